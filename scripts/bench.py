"""How fast the parts of a training step are, and the whole, against what the machine can do and against others.

python scripts/bench.py update logprob --model qwen2.5-0.5b --layers 4 --drawn
python scripts/bench.py rollout step --model DIR --against copied transformers trl --out speed.json

    rollout      sampling the responses                  logprob   a forward pass for their log-probs (the reference's)
    update       gradient and optimizer step             attention the attention of one layer, forward and backward
    step         all of a training step: rollout, log-probs of the reference, update

Prompts are random tokens, and responses have exactly the wanted length: the end of turn is off. In every round each
contender does the work once, in turn, and the ceilings (a matrix product, a copy) are measured too, so that a noisy machine
hits all alike. The first round warms up; what it took longer is reported as compilation, of what no section before it has
compiled. Speeds are medians over the other rounds.

MFU is useful FLOPs (grpo_jax.flops.useful: no padding, copies or recomputation) per second over the matrix product's, so
it compares contenders that launch different amounts of work. `--against copied` is this program itself with groups of one
response, that is with every prompt computed once a response; the others are in scripts/peers.py.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh
from rich.progress import Progress
from rich.table import Table

from data import command_line, lengths
from grpo_jax import config, console, flops, inputs, learner, mesh, packing, rollout
from grpo_jax.config import run_main
from grpo_jax.group import Group
from grpo_jax.learner import Objective
from grpo_jax.packing import Pack
from grpo_jax.rollout import Sampling
from grpo_jax.run import Clock, free_memory
from models import attention, decoder, hf
from models.decoder import DecoderConfig, Params
from scripts import peers
from scripts.timing import Ceilings, Contender, launched, time_round

Section = Literal["rollout", "update", "logprob", "attention", "step"]
PEER_SECTIONS: dict[str, Section] = {"transformers": "rollout", "trl": "step"}


@dataclass(frozen=True)
class Args:
    """Times the parts of a training step, and the whole, beside what the machine can do and other programs.

    Take it to see whether a machine is used well, or what an option costs, before a long run.

    python scripts/bench.py update logprob --model qwen2.5-0.5b --layers 4 --drawn
    """

    #: What to time, in this order.
    sections: Annotated[tuple[Section, ...], tyro.conf.Positional]
    #: A size that the program knows, with random weights, or a Hugging Face folder. Other programs need a folder.
    model: str = "qwen2.5-0.5b"
    #: Only the first so many layers, where the whole model does not fit.
    layers: int | None = None
    #: Prompts a step, N.
    prompts: int = 4
    #: Responses to each, G.
    group_size: int = 5
    #: Length of every prompt.
    prompt_tokens: int = 384
    #: Length of every response.
    response_tokens: int = 64
    #: Draw the lengths as tool calling has them (data/lengths.py) instead of the two above.
    drawn: bool = False
    #: Rounds that count. One more, before them, warms up.
    repeats: int = 5
    #: Of the computation; auto: float32 on CPU, bfloat16 on accelerators.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    #: Of sampling, and of the log-probs.
    temperature: float = 0.7
    #: Tokens a device computes at once in update and log-probs.
    tokens_per_microbatch: int = 8192
    #: What the backward pass computes again, as --learner.remat.
    remat: Literal["none", "elementwise", "attention", "full"] = "attention"
    #: The kernel of attention in learning, as --learner.attention.
    attention: Literal["auto", "tiles", "cudnn", "splash"] = "auto"
    #: Responses decoded at once, as --rollout.rows; left out, the memory of the device decides.
    rows: int | None = None
    #: Tokens decoded between two looks of the host.
    decode_steps_per_call: int = 32
    #: Others to time beside: copied in every section but attention, transformers in rollout, trl in step (these two on a CPU,
    #: in float32, with a Hugging Face folder as --model).
    against: tuple[Literal["copied", "transformers", "trl"], ...] = ()
    #: Rows that transformers and trl compute at once: each is tried, the fastest kept. Left out: one group, and all; trl keeps
    #: the activations of all of them, so give it fewer where memory is short.
    peer_rows: tuple[int, ...] = ()
    #: Print the results as one JSON object, the last line.
    json: bool = False
    #: Write the results into this file too.
    out: Path | None = None


@dataclass(frozen=True)
class Bench:
    """What all sections share."""

    args: Args
    model: DecoderConfig
    mesh: Mesh
    objective: Objective
    kernel: str  # of attention in learning
    groups: list[Group]  # with random responses and advantages
    free: int | None  # bytes for caches, as at first: later, what else is held would change the size of the pool
    state: dict[str, Any]  # "params" and, once an update wants it, "optimizer"; updates replace them


# ---------------------------------------------------------------- the work


def prepare(args: Args) -> Bench:
    """The model and the groups. Raises ValueError or FileNotFoundError for what a user can mend."""
    if not args.sections:
        raise ValueError("name at least one section: rollout, update, logprob, attention or step")
    counts = ("layers", "prompts", "group_size", "prompt_tokens", "response_tokens", "repeats")
    for name in (*counts, "tokens_per_microbatch", "rows", "decode_steps_per_call"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")
    for name, section in PEER_SECTIONS.items():
        if name in args.against:
            require_peer(args, name, section)
    device_mesh = mesh.make(config.Mesh())
    model, params = load(args, device_mesh)
    settings = config.Learner(dtype=args.dtype, attention=args.attention)
    objective = Objective(
        temperature=args.temperature, kl_coefficient=1e-3, dtype=inputs.compute_dtype(settings), remat=args.remat,
        mesh=device_mesh,
    )  # fmt: skip
    kernel = inputs.attention_kernel(settings, model)
    free = free_memory(model, objective.dtype, device_mesh)
    return Bench(args, model, device_mesh, objective, kernel, make_groups(args, model), free, {"params": params})


def require_peer(args: Args, name: str, section: Section) -> None:
    """Raises ValueError where another program cannot be timed beside ours."""
    peers.require(name)
    responses = args.prompts * args.group_size
    if section not in args.sections:
        raise ValueError(f"--against {name}: is timed in the section {section}; name it")
    if args.model in decoder.SIZES or args.layers is not None or jax.default_backend() != "cpu":
        raise ValueError(f"--against {name}: needs a Hugging Face folder as --model, with all its layers, and a CPU")
    if args.drawn or args.dtype == "bfloat16":
        raise ValueError(f"--against {name}: takes one length of prompts and responses, and float32")
    for rows in args.peer_rows:
        if rows < 1 or responses % rows:
            raise ValueError(f"--peer_rows {rows}: does not divide the {responses} responses")


def load(args: Args, device_mesh: Mesh) -> tuple[DecoderConfig, Params]:
    cut = lambda model: replace(model, layers=min(args.layers or math.inf, model.layers))  # noqa: E731
    if args.model in decoder.SIZES:
        model = cut(decoder.SIZES[args.model])
        init = jax.jit(lambda key: decoder.init(model, key), out_shardings=mesh.shardings(device_mesh, model))
        return model, init(jax.random.key(0))
    if not Path(args.model).is_dir():
        raise FileNotFoundError(f"--model {args.model}: no such folder, and not one of {', '.join(decoder.SIZES)}")
    shardings = mesh.shardings(device_mesh, hf.load_config(args.model))
    model, params = hf.load(args.model, shardings=shardings, dtype=jnp.float32)
    if args.layers:
        model = cut(model)
        params["layers"] = jax.tree.map(lambda x: x[: model.layers], params["layers"])
        params = jax.device_put(params, mesh.shardings(device_mesh, model))
    return model, params


def make_groups(args: Args, model: DecoderConfig) -> list[Group]:
    """Random tokens, advantages that are not zero, and the log-probs of a policy that knows nothing."""
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(0, model.vocab, n, np.int32)  # noqa: E731
    if args.drawn:
        prompts, responses = lengths.draw(args.prompts, args.group_size)
    else:
        prompts = np.full(args.prompts, args.prompt_tokens)
        responses = np.full((args.prompts, args.group_size), args.response_tokens)
    logp = lambda r: np.full(r, -math.log(model.vocab), np.float32)  # noqa: E731
    return [
        Group(
            ids(p),
            tuple(map(ids, rs)),
            tuple(map(logp, rs)),
            (True,) * len(rs),
            rng.standard_normal(len(rs)).astype(np.float32),
        )
        for p, rs in zip(prompts, responses, strict=True)
    ]


def copies(groups: Sequence[Group]) -> list[Group]:
    """The groups as groups of one response: the prompt stands before each."""
    return [
        Group(g.prompt, (r,), (logp,), (cut,), g.advantages[i : i + 1])
        for g in groups
        for i, (r, logp, cut) in enumerate(zip(g.responses, g.sampler_logp, g.truncated, strict=True))
    ]


def sample(bench: Bench, groups: Sequence[Group], seed: int, most: int | None = None) -> tuple[list[Group], dict[str, float]]:
    """Samples responses as long as those of the groups, or at most `most` tokens; with the advantages of the groups."""
    args, model = bench.args, bench.model
    wanted = [[min(len(r), most or len(r)) for r in g.responses] for g in groups]
    sampling = Sampling(
        (), len(wanted[0]), max(map(max, wanted)), args.temperature, decode_steps_per_call=args.decode_steps_per_call
    )  # fmt: skip
    longest = max(len(g.prompt) for g in groups)
    rows, cache = rollout.pool_size(model, bench.objective.dtype, sampling, longest, bench.free, mesh.shards(bench.mesh))
    sampling = replace(sampling, rows=args.rows or rows, cache_bytes=cache)
    made, usage = rollout.sample(
        model, learner.cast(bench.state["params"], bench.objective.dtype), [g.prompt for g in groups], sampling,
        seed=seed, mesh=bench.mesh, lengths=wanted,
        kernel=bench.kernel,
    )  # fmt: skip
    advised = [replace(g, advantages=given.advantages) for g, given in zip(made, groups, strict=True)]
    return advised, {"slot_utilization": usage.tokens / usage.row_steps, "response_tokens": usage.tokens}


def pack(bench: Bench, groups: Sequence[Group]) -> tuple[list[Pack], dict[str, float]]:
    """Packs on the devices, and their padding: the share of places (of dense layers) that hold no token."""
    packed = packing.pack(groups, bench.args.tokens_per_microbatch, mesh.shards(bench.mesh), kernel=bench.kernel)
    facts = {
        "packs": len(packed.packs),
        "tokens_computed": packed.tokens,
        "response_tokens": packed.response_tokens,
        "padding_dense": 1 - packed.tokens / packed.launched_tokens,
        "padding_attention": 1 - packed.cells / packed.launched_cells,
    }
    return [packing.place(p, mesh.rows(bench.mesh)) for p in packed.packs], facts


# ---------------------------------------------------------------- sections: the ways of doing their work


def rollout_contenders(bench: Bench, name: str, groups: Sequence[Group]) -> list[Contender]:
    seeds = itertools.count()
    whole = Contender(name, lambda: sample(bench, groups, next(seeds))[1])
    if max(len(r) for g in groups for r in g.responses) == 1:
        return [whole]
    whole.facts["bytes"] = decode_bytes(bench.model, groups, jnp.dtype(bench.objective.dtype).itemsize)
    return [whole, Contender(name, lambda: sample(bench, groups, next(seeds), most=1)[1], part="first_token")]


def decode_bytes(model: DecoderConfig, groups: Sequence[Group], size: int) -> int:
    """Bytes that decoding all but the first token of all responses at once has to read, at `size` a number.

    In each step all weights, the cache of each prompt that has a response at work, and the caches of these responses.
    """
    weights = model.layers * flops.layer_weights(model) + model.d_model * model.vocab
    of = [[len(r) for r in g.responses] for g in groups]
    cached = sum(len(g.prompt) * (max(rs) - 1) + sum(r * (r - 1) // 2 for r in rs) for g, rs in zip(groups, of, strict=True))
    return size * (weights * (max(map(max, of)) - 1) + 2 * model.layers * model.kv_heads * model.head_dim * cached)


def update_contenders(bench: Bench, name: str, groups: Sequence[Group]) -> list[Contender]:
    packs, facts = pack(bench, groups)
    packs = [replace(p, ref_logp=p.sampler_logp) for p in packs]
    optimizer = make_optimizer(bench)

    def run() -> dict[str, float]:
        update(bench, optimizer, packs)
        return {}

    return [Contender(name, run, facts=facts)]


def make_optimizer(bench: Bench) -> Any:
    optimizer, _ = learner.make_optimizer(config.Optimizer(), 1)
    if "optimizer" not in bench.state:
        bench.state["optimizer"] = learner.init_state(optimizer, bench.state["params"])
    return optimizer


def update(bench: Bench, optimizer: Any, packs: Sequence[Pack]) -> None:
    params, state, _ = learner.update(
        bench.model, bench.objective, optimizer, bench.state["params"], bench.state["optimizer"], packs
    )
    bench.state.update(jax.block_until_ready({"params": params, "optimizer": state}))


def logprob_contenders(bench: Bench, name: str, groups: Sequence[Group]) -> list[Contender]:
    packs, facts = pack(bench, groups)

    def run() -> dict[str, float]:
        jax.block_until_ready([learner.logprobs(bench.model, bench.objective, bench.state["params"], p) for p in packs])
        return {}

    return [Contender(name, run, facts=facts)]


def attention_contenders(bench: Bench, name: str, groups: Sequence[Group]) -> list[Contender]:
    packs, facts = pack(bench, groups)
    model, keys = bench.model, iter(jax.random.split(jax.random.key(0), 4))
    shape = packs[0].tokens.shape
    draw = lambda heads: jax.random.normal(next(keys), (*shape, heads, model.head_dim), bench.objective.dtype)  # noqa: E731
    qkv, cotangent = (draw(model.heads), draw(model.kv_heads), draw(model.kv_heads)), draw(model.heads)

    def both(q, k, v, cotangent, layout):
        o, pullback = jax.vjp(lambda *qkv: attend(*qkv, layout), q, k, v)
        return o, pullback(cotangent)

    attend = mesh.by_rows(attention.packed, bench.mesh, (model.heads, model.kv_heads))
    one, two = jax.jit(attend), jax.jit(both)

    def forward() -> dict[str, float]:
        jax.block_until_ready([one(*qkv, p.layout) for p in packs])
        return {}

    def run() -> dict[str, float]:
        jax.block_until_ready([two(*qkv, cotangent, p.layout) for p in packs])
        return {}

    facts["flops_launched"] = sum(flops.count(two.trace(*qkv, cotangent, p.layout).jaxpr) for p in packs)
    return [Contender(name, run, facts=facts), Contender(name, forward, part="forward")]


def step_contenders(bench: Bench, name: str, groups: Sequence[Group]) -> list[Contender]:
    optimizer, seeds = make_optimizer(bench), itertools.count()
    if "reference" not in bench.state:
        bench.state["reference"] = jax.tree.map(jnp.copy, learner.cast(bench.state["params"], bench.objective.dtype))

    def run() -> dict[str, float]:
        clock = Clock()
        with clock.time("rollout"):
            made, used = sample(bench, groups, next(seeds))
        with clock.time("pack"):
            packs, _ = pack(bench, made)
        with clock.time("reference"):
            logp = lambda p: learner.logprobs(bench.model, bench.objective, bench.state["reference"], p)  # noqa: E731
            packs = jax.block_until_ready([replace(p, ref_logp=logp(p)) for p in packs])
        with clock.time("update"):
            update(bench, optimizer, packs)
        return {**used, **{f"time/{k}": s for k, s in clock.seconds.items()}}

    return [Contender(name, run)]


CONTENDERS = {
    "rollout": rollout_contenders,
    "update": update_contenders,
    "logprob": logprob_contenders,
    "attention": attention_contenders,
    "step": step_contenders,
}


def useful(bench: Bench, section: Section) -> int:
    """FLOPs that the section's work needs, whoever does it."""
    forward = flops.useful(bench.model, bench.groups)
    backward = flops.useful(bench.model, bench.groups, backward=True)
    cells = sum(g.cells for g in bench.groups)
    attended = 3 * 2 * 2 * cells * bench.model.heads * bench.model.head_dim
    return {
        "rollout": forward, "logprob": forward, "update": backward, "step": 2 * forward + backward, "attention": attended,
    }[section]  # fmt: skip


def time_section(bench: Bench, section: Section, ceilings: Ceilings, progress: Progress) -> list[Contender]:
    args = bench.args
    contenders = CONTENDERS[section](bench, "ours", bench.groups)
    if "copied" in args.against and section != "attention":
        contenders += CONTENDERS[section](bench, "copied", copies(bench.groups))
    rows = args.peer_rows or tuple(sorted({args.group_size, args.prompts * args.group_size}))
    trl = None
    if "transformers" in args.against and section == "rollout":
        peer = peers.generate(peer_work(bench), rows)
        run = lambda: {"response_tokens": peer.run()}  # noqa: E731
        contenders.append(Contender("transformers", run, facts={"setting": peer.setting}))
    if "trl" in args.against and section == "step":
        trl = peers.trl_steps(peer_work(bench), rows)
    rounds = args.repeats + 1
    task = progress.add_task(section, total=rounds * len(contenders))
    one_round = lambda: time_round(contenders, ceilings, (rollout, learner), lambda: progress.advance(task))  # noqa: E731
    if trl is None:
        for _ in range(rounds):
            one_round()
        return contenders
    seconds, facts = trl.run(rounds, one_round)
    return [*contenders, Contender("trl", dict, facts={"setting": trl.setting, **facts}, seconds=seconds)]


def peer_work(bench: Bench) -> peers.Work:
    args, tokenizer = bench.args, hf.load_tokenizer(bench.args.model)
    prompts = [g.prompt for g in bench.groups]
    return peers.Work(args.model, tokenizer, prompts, args.group_size, args.response_tokens, args.temperature)


# ---------------------------------------------------------------- results


def spread(seconds: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def results(bench: Bench, section: Section, contenders: Sequence[Contender], ceilings: dict[str, float]) -> dict[str, Any]:
    """The section as plain JSON, contender by contender."""
    needed = useful(bench, section)
    counted = sum(g.response_tokens if section in ("rollout", "step") else g.tokens for g in bench.groups)
    rows: dict[str, Any] = {}
    for one in contenders:
        seconds = spread(one.seconds[1:])
        if one.part:
            rows[one.name]["parts"][one.part] = seconds
            continue
        parts = {k.removeprefix("time/"): spread([t[k] for t in one.times[1:]]) for k in (one.times or [{}])[0]}
        rows[one.name] = {
            "seconds": seconds,
            "rounds": one.seconds[1:],
            "parts": parts,
            "compile_seconds": max(0.0, one.seconds[0] - seconds["median"]),
            "tokens": counted,
            "tokens_per_second": counted / seconds["median"],
            "flops_useful": needed,
            "mfu": needed / seconds["median"] / ceilings["flops_per_second"],
            **({"flops_launched": launched(one.calls)} if one.calls else {}),
            **one.facts,
            **one.memory,
        }
    for row in rows.values():
        row["seconds_over_ours"] = row["seconds"]["median"] / rows["ours"]["seconds"]["median"]
        if "bytes" in row:
            row["decode_seconds"] = row["seconds"]["median"] - row["parts"]["first_token"]["median"]
            row["bandwidth_share"] = row["bytes"] / row["decode_seconds"] / ceilings["bytes_per_second"]
    return rows


def machine(against: Sequence[str]) -> dict[str, Any]:
    packages = ["jax", "jaxlib", "numpy", *dict.fromkeys(p for name in against for p in peers.PACKAGES.get(name, ()))]
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    )
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


SHOWN = (
    # label, how to write a contender's row; KeyError: it has none
    ("seconds", lambda r: "{median:.4g} ({min:.4g}-{max:.4g})".format(**r["seconds"])),
    ("seconds / ours", lambda r: f"{r['seconds_over_ours']:.2f}"),
    ("tokens/s", lambda r: f"{r['tokens_per_second']:,.1f}"),
    ("response tokens made", lambda r: f"{r['response_tokens']:,}"),
    ("MFU", lambda r: f"{r['mfu']:.1%}"),
    ("TFLOPs useful", lambda r: f"{r['flops_useful'] / 1e12:.4g}"),
    ("TFLOPs launched", lambda r: f"{r['flops_launched'] / 1e12:.4g}"),
    ("padding, dense", lambda r: f"{r['padding_dense']:.1%}"),
    ("padding, attention", lambda r: f"{r['padding_attention']:.1%}"),
    ("slot utilization", lambda r: f"{r['slot_utilization']:.1%}"),
    ("decode bandwidth", lambda r: f"{r['bandwidth_share']:.1%} of a copy"),
    ("parts, seconds", lambda r: "\n".join(f"{k} {s['median']:.4g}" for k, s in r["parts"].items())),
    ("compilation, seconds", lambda r: f"{r['compile_seconds']:.3g}"),
    ("peak host GB", lambda r: f"{r['host_gb']:.2f}"),
    ("peak device GB", lambda r: f"{r['device_gb']:.2f}"),
    ("setting", lambda r: r["setting"]),
)


def show(section: str, rows: dict[str, Any]) -> None:
    table = Table("", *rows, title=section, title_justify="left")
    for label, write in SHOWN:
        cells = []
        for row in rows.values():
            try:
                cells.append(write(row))
            except KeyError:
                cells.append("")
        if any(cells):
            table.add_row(label, *cells)
    console.CONSOLE.print(table)


def bench(args: Args) -> dict[str, Any]:
    """Runs the sections, shows them, and returns everything as plain JSON."""
    it = prepare(args)
    ceilings = Ceilings(it.objective.dtype)
    ceilings.measure()
    timed = {}
    with Progress(console=console.CONSOLE, transient=True) as progress:
        for section in args.sections:
            timed[section] = time_section(it, section, ceilings, progress)
    top = ceilings.read()
    work = {name: sum(getattr(g, name) for g in it.groups) for name in ("tokens", "response_tokens")}
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    result = {
        "machine": machine(args.against),
        "options": options | {"dtype": it.objective.dtype, "layers": it.model.layers},
        "work": work,
        "ceilings": top,
        "sections": {section: results(it, section, contenders, top) for section, contenders in timed.items()},
    }
    console.header(
        f"bench: {args.model}, {it.model.layers} layers, {it.objective.dtype}",
        [
            ("machine", f"{result['machine']['devices']} x {result['machine']['device']}, {result['machine']['cpu']}"),
            ("work", f"{args.prompts} x {args.group_size}: {work['tokens']:,} tokens, {work['response_tokens']:,} sampled"),
            ("ceilings", f"{top['flops_per_second'] / 1e12:.3g} TFLOP/s, {top['bytes_per_second'] / 1e9:.3g} GB/s"),
        ],
    )  # fmt: skip
    for section, rows in result["sections"].items():
        show(section, rows)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    if args.json:
        print(json.dumps(result), flush=True)
    return result


if __name__ == "__main__":
    run_main(lambda: bench(command_line.read(Args, "python scripts/bench.py", sys.argv[1:])))
