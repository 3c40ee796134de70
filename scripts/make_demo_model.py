"""Makes the demo's base model, `models/demo`, from nothing: able, but careless. About an hour on two cores.

    python scripts/make_demo_model.py --out models/demo

The tokenizer comes from the demo's texts. The weights come from this program's own supervised training in three stages, on
training tools and values only: whole texts, prompts included, since copying is learned sooner where there is more to copy;
then right replies; then the replies of an annotator who knows what to do and slips in writing it (`data.demo.SLIPS`). What
is left for reinforcement learning is what reinforcement learning is good at: to prefer, among what the model can already
do, that which is right.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.progress import track

from data import demo, prompt
from data.example import Example
from grpo_jax import config, inputs, learner, mesh, packing, rollout, sft
from grpo_jax.config import DEMO_MODEL
from grpo_jax.console import CONSOLE
from grpo_jax.inputs import Policy, Task
from grpo_jax.reward import judge
from models import decoder, hf
from models.decoder import DecoderConfig, Params

VOCABULARY = 640
ROWS = 16  # of an optimizer step


@dataclass(frozen=True)
class Args:
    """The demo's base model, by supervised training on tasks that the program makes."""

    #: The Hugging Face folder to write.
    out: Path = DEMO_MODEL
    #: Optimizer steps on whole texts.
    reading: int = 2000
    #: Optimizer steps on right replies, after those.
    able: int = 3000
    #: Optimizer steps on careless replies, after those.
    careless: int = 2500
    #: Peak learning rate of each stage; a cosine takes it to 0.
    rate: float = 2.5e-3
    #: Width of the model.
    d_model: int = 128
    #: Its depth.
    layers: int = 4
    #: A folder to go on from, with some stages done; give those 0 steps.
    start: Path | None = None


def new_policy(args: Args) -> tuple[Policy, Params]:
    """A tokenizer from the demo's texts and random weights in Qwen2.5's shape."""
    tokenizer = demo.build_tokenizer(demo.tokenizer_texts(demo.sft_rows(5000, 0, 0.0)), VOCABULARY)
    d, c = args.d_model, 32
    heads = d // c
    model = DecoderConfig(
        "qwen2", len(tokenizer), d, 5 * d // 2, args.layers, heads, heads // 2, c,
        rope_theta=1e4, max_positions=2048, eos_token_ids=(tokenizer.eos_token_id,),
    )  # fmt: skip
    params = jax.device_put(decoder.init(model, jax.random.key(0)), mesh.shardings(mesh.make(config.Mesh()), model))
    return Policy("", model, tokenizer, (tokenizer.eos_token_id,)), params


def load(folder: Path) -> tuple[Policy, Params]:
    policy = inputs.load_policy(str(folder))
    return policy, inputs.load_params(policy, mesh.make(config.Mesh()))


def task(policy: Policy, example: Example, template: str, whole: bool) -> Task:
    """A row to imitate: its reply, or (`whole`) its prompt too, all of it but the first token."""
    ids = np.array(prompt.encode(example, policy.tokenizer, template), np.int32)
    target = inputs.target_ids(example, policy)
    return Task(example, ids[:1], np.concatenate([ids[1:], target])) if whole else Task(example, ids, target)


def stage(
    policy: Policy,
    params: Params,
    steps: int,
    rate: float,
    careless: float,
    seed: int,
    label: str,
    folder: Path,
    whole: bool = False,
) -> Params:
    """`steps` optimizer steps on fresh rows, of which the share `careless` is by the careless annotator."""
    if not steps:
        return params
    template = prompt.load_template(demo.TEMPLATE)
    optimizer, _ = learner.make_optimizer(config.Optimizer(rate, "cosine", warmup=0.03, b2=0.98), steps)
    objective = learner.Objective("cross_entropy", head_chunk=4096)
    state = learner.init_state(optimizer, params)
    rows = demo.sft_rows(steps * ROWS, seed, careless)
    device_mesh, began = mesh.make(config.Mesh()), time.perf_counter()
    for step in track(range(steps), label, console=CONSOLE):
        batch = [task(policy, e, template, whole) for e in rows[step * ROWS : (step + 1) * ROWS]]
        packed = packing.pack([sft.group_of(one) for one in batch], 1 << 14, mesh.shards(device_mesh))
        packs = [packing.place(one, mesh.rows(device_mesh)) for one in packed.packs]
        params, state, sums = learner.update(policy.model, objective, optimizer, params, state, packs)
        if step % 100 == 99 or step == steps - 1:
            loss, seconds = float(sums["loss"] / sums["count"]), time.perf_counter() - began
            CONSOLE.print(f"{label}, step {step + 1}: loss {loss:.4f}, {seconds:.0f} s")
        if step % 500 == 499:
            measure(policy, params, f"{label}, step {step + 1}", 128)
            save(folder, policy, params)
    save(folder, policy, params)
    return params


def measure(policy: Policy, params: Params, label: str, count: int = 256) -> dict[str, float]:
    """Held-out accuracy, greedy and sampled at temperature 0.7, and the share with the right format."""
    template = prompt.load_template(demo.TEMPLATE)
    examples = demo.tasks(count, seed=0, held_out=True)
    prompts = [np.array(prompt.encode(e, policy.tokenizer, template), np.int32) for e in examples]
    found = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 0.7)):
        sampling = rollout.Sampling(policy.end_tokens, 1, 112, temperature, rows=256)
        groups, _ = rollout.sample(policy.model, params, prompts, sampling)
        scored = [judge(policy.tokenizer.decode(g.responses[0]), e.answer) for g, e in zip(groups, examples, strict=True)]
        found[name] = float(np.mean([s.value for s in scored]))
        found[f"{name}_format"] = float(np.mean([s.reason != "no_format" for s in scored]))
    CONSOLE.print(f"{label}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    return found


def save(folder: Path, policy: Policy, params: Params) -> None:
    hf.save(folder, policy.model, jax.device_get(params), policy.tokenizer, dtype="float32")


def main(args: Args) -> None:
    policy, params = new_policy(args) if args.start is None else load(args.start)
    able = args.out.with_name(f"{args.out.name}-able")
    params = stage(policy, params, args.reading, args.rate, 0.0, 0, "reading", able, whole=True)
    params = stage(policy, params, args.able, args.rate, 0.0, 1, "able", able)
    params = stage(policy, params, args.careless, args.rate, 1.0, 2, "careless", args.out)
    measure(policy, params, f"{args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
