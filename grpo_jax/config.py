"""What a run is: one frozen dataclass a concern, presets that replace fields, and the command line over them.

The defaults are the paper's (Tool-N1: section 4 and the released code). A preset is the first word of the command line if
it names one; then come options, `--section.field value`. Fields are *identity* (they decide the result: resuming a run
with another value is refused) or *operational* (`OPERATIONAL` below: where, how long and how it is cut and shown).
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from data import command_line

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / "models" / "demo"
DEMO_TEMPLATE = ROOT / "data" / "demo_template.txt"


@dataclass(frozen=True)
class Run:
    #: The run's folder. Starting again with the same folder resumes the run from its newest checkpoint.
    dir: str = "runs/grpo"
    #: Steps to train. One step samples, scores and learns from one batch of prompts. Left out: as many as `epochs` takes.
    steps: int | None = None
    #: Passes over the training rows, where `steps` is left out.
    epochs: float = 7.0
    #: Of all that is drawn: which rows are held out, the order of the others, and the random key of every sampled token. From 0
    #: to 2147483647.
    seed: int = 0
    #: Minutes from the start after which the machine is taken away: the run saves and ends before, with exit code 75, and the
    #: same command goes on. For machines that send no SIGTERM; a last minute (of short limits, a tenth) is kept for saving, and
    #: no step is begun that would take longer than is left. Left out: no limit.
    time_limit: float | None = None
    #: Minutes in which nothing moves after which the stacks of all threads are written to `stalls.txt` in the run's folder, and
    #: again as often as they pass; the run is left alone. More where one optimizer step takes as long. 0: off.
    watchdog: float = 30.0
    #: Also write the metrics as TensorBoard events, under `tensorboard/` in the run's folder.
    tensorboard: bool = True


@dataclass(frozen=True)
class Model:
    #: A Hugging Face folder or hub id of a Qwen2.5 or Llama 3 model with its tokenizer and chat template; or the folder of a
    #: finished run, whose trained model is taken. `org/name@revision` stays with that commit, or tag, of the hub.
    path: str = ""


@dataclass(frozen=True)
class Data:
    #: Rows of tool calls: a JSONL, JSON or Parquet file, a folder of them, a hub id (`org/name@revision` for one commit of it);
    #: or `demo`, tasks the program makes.
    path: str = ""
    #: A text file that replaces the built-in thinking template; `{tools}` in it stands for the tools, one a line.
    template: str | None = None
    #: Rows to validate on. Left out: `validation_fraction` of the rows of `path`, by a seeded shuffle.
    validation_path: str | None = None
    #: Share of the rows held out for validation.
    validation_fraction: float = 0.1
    #: Train on the rows of these sources only, named with commas between: `toolace`, `xlam` of a folder of data.build, or what
    #: stands under "source" in rows of your own. To see what each is worth; validation stays on rows of all. Left out: all.
    sources: str | None = None
    #: Where the share of the training rows begins that this run uses, in their seeded order, held-out rows left aside:
    #: with 0.5, and the same data and seed, a run has none of the rows of one that ended at 0.5.
    begin: float = 0.0
    #: Where that share ends. 0.5 for a first run that is to leave half of the rows to a second one, for a quick look 0.1.
    end: float = 1.0
    #: What supervised training imitates: a thought and the right calls, or the calls alone, without a think block. GRPO gives
    #: no replies and does not read it.
    replies: Literal["reasoning", "calls"] = "reasoning"


@dataclass(frozen=True)
class Rollout:
    #: Responses sampled to each prompt, G. More makes advantages less noisy; the prompt is computed once whatever G is.
    group_size: int = 5
    #: Prompts sampled a step, N.
    prompts_per_step: int = 1024
    #: Longer prompts are dropped before training, and counted; never cut.
    max_prompt_tokens: int = 4096
    #: A response that reaches this length is stopped, and marked truncated.
    max_response_tokens: int = 8192
    #: Of sampling, and of the log-probs in the loss.
    temperature: float = 0.7
    #: Must be 1 in training: the log-probs of a cut distribution are not those of the policy.
    top_p: float = 1.0
    #: Must be 0 (off) in training, for the same reason.
    top_k: int = 0
    #: Tokens decoded between two looks at which responses have ended. Lower wastes fewer tokens, higher calls less often.
    decode_steps_per_call: int = 32
    #: Responses decoded at once. Left out: what the device's memory holds (128 where it does not tell, as on a CPU), taken once
    #: a run. No sample depends on it; lower it if memory runs out while sampling.
    rows: int | None = None
    #: Devices of a host that share one copy of the weights while sampling. Left out: as few as hold it.
    tensor: int | None = None
    #: Above 0: groups of equal rewards, which teach nothing, are replaced by those of the next prompts, for which up to so many
    #: more batches are sampled a step (DAPO's dynamic sampling). Worth it where `groups/zero_variance` is high.
    #: Give --run.steps with it, since `epochs` counts one batch a step.
    refills: int = 0


@dataclass(frozen=True)
class Reward:
    #: binary, binary_no_reasoning, format, format_and_names, lexicographic; or your own, as `package.module:function`.
    kind: str = "binary"
    #: Above 0: in training, responses that come within so many tokens of --rollout.max_response_tokens lose up
    #: to `overlong_penalty`, evenly growing (DAPO), so that length is learned before it is cut. 0: off.
    overlong_margin: int = 0
    #: What a response of full length loses. 1, as much as a right response earns, makes none worth being cut.
    overlong_penalty: float = 1.0
    #: Processes that call a reward of your own, so that one that hangs or crashes does not end the run. More of them score
    #: several groups at once; then it should keep no state from call to call. 0 calls it in this process, for a debugger, say,
    #: or where it needs the accelerator. Built-in rewards need none.
    workers: int = 1
    #: Seconds that a call of your own reward, which is one group, may take before its process is killed and the group scores 0.
    #: Raise it for a reward that asks a server; 0 for no limit. Without `workers` nothing can end a call, and it is not read.
    timeout: float = 60.0


@dataclass(frozen=True)
class Loss:
    #: std divides a group's centred rewards by their standard deviation; mean_only leaves them (Dr. GRPO); rloo compares each
    #: with the mean of the others.
    normalize: Literal["std", "mean_only", "rloo"] = "std"
    #: ppo clips each token's ratio to the sampling policy; gspo that of the whole response (steadier for long ones; wants edges
    #: of 3e-4 and 4e-4 and the mean by sequence: see the preset); cispo weighs every token by its clipped ratio and drops none.
    objective: Literal["ppo", "gspo", "cispo"] = "ppo"
    #: token_mean: every token of a mini-batch counts alike, so long responses count more. sequence_mean: every response does.
    #: constant: as token_mean, but divided by the responses and --rollout.max_response_tokens, not by the tokens (Dr. GRPO).
    mean: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    #: The ratio to the sampling policy is clipped at 1 - clip_low, which bounds how far a bad token falls in a step ...
    clip_low: float = 0.2
    #: ... and at 1 + clip_high, how far a good one rises. Larger than clip_low keeps entropy up (DAPO).
    clip_high: float = 0.2
    #: Above 0, with --update.recompute_old_logp: tokens are weighed by how much likelier they are to the learner than to the
    #: sampler, up to this (2, say). For when `rollout/logp_mismatch` is not small. 0: off.
    importance_cap: float = 0.0
    #: Weight of the KL term against the initial policy. 0 needs no reference model: less memory, a faster step.
    kl_coefficient: float = 1e-3
    #: The estimator of the KL: k3, the paper's, varies least and is never negative; k1 is unbiased and varies most; k2 (half
    #: the square) pulls evenly in both directions.
    kl_kind: Literal["k3", "k1", "k2"] = "k3"
    #: Weight of an entropy bonus. Take 1e-3 or so where `entropy/mean` falls to nothing while the reward still could rise.
    entropy_coefficient: float = 0.0
    #: Leave out groups whose rewards are all equal. They teach nothing but the KL term; leaving them out saves their time.
    skip_zero_variance: bool = False


@dataclass(frozen=True)
class Optimizer:
    #: The peak learning rate of AdamW.
    learning_rate: float = 1e-6
    #: constant, or cosine down to 0 over the run.
    schedule: Literal["constant", "cosine"] = "constant"
    #: Share of the optimizer steps in which the learning rate rises from 0.
    warmup: float = 0.0
    #: Decoupled, on every parameter.
    weight_decay: float = 0.01
    #: The gradient is scaled down to this global norm.
    clip_norm: float = 1.0
    #: Decay of Adam's first moment.
    b1: float = 0.9
    #: Decay of Adam's second moment.
    b2: float = 0.999
    #: Optimizer steps in a row that may be left out because their loss, gradient or log-probs were not finite; at one more the
    #: run stops. They are counted (`learner/skipped`), and what they would have learned from is kept in the run's folder.
    skips: int = 5
    #: How Adam's moments are kept. bfloat16 takes 4 bytes a parameter instead of 8, where memory is short; the second moment,
    #: rounded at random in every step, then scatters by a few per cent.
    moments: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class Update:
    #: Prompts an optimizer step learns from. Fewer than prompts_per_step gives several optimizer steps a batch.
    prompts_per_minibatch: int = 256
    #: Times each batch is learned from.
    passes: int = 1
    #: Take the old log-probs from the learner's forward pass instead of the sampler's (one more forward pass a step).
    recompute_old_logp: bool = False


@dataclass(frozen=True)
class Learner:
    #: Tokens a device computes at once, prompts counted once a group. Lower it if memory runs out in learning: the result stays
    #: the same. (The rows that attention by cudnn or splash gathers inside hold copies of the prompts beside that.)
    tokens_per_microbatch: int = 30720
    #: What the backward pass computes again: nothing (most memory); the elementwise parts of a layer (somewhat less); all of a
    #: layer but its attention (much less); or all of it (least memory). auto: attention where that is by tiles, full where it
    #: is by a fused kernel, whose output holds each prompt once a response.
    remat: Literal["auto", "none", "elementwise", "attention", "full"] = "auto"
    #: Of the computation; master weights are float32. auto: float32 on CPU, bfloat16 on accelerators.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    #: The kernel of attention in learning, and of the prompts in sampling. auto: cudnn on NVIDIA in bfloat16, splash on TPU,
    #: tiles (plain XLA) elsewhere. cudnn and splash have been compiled for such devices and not run yet: if a step fails, or
    #: the alarm on log-probs sounds, take tiles.
    attention: Literal["auto", "tiles", "cudnn", "splash"] = "auto"
    #: What rests in the host's memory, and is on the device for its phase only, where memory is short: the reference weights (2
    #: bytes a parameter), Adam's moments (8), or both. The result is the same; each costs transfers, the reference one a step,
    #: the moments two an optimizer step.
    offload: Literal["none", "reference", "optimizer", "both"] = "none"


@dataclass(frozen=True)
class Lora:
    #: 0: the whole model is learned. Above: adapters of this rank beside a frozen model (LoRA), where memory is short: a frozen
    #: weight takes 2 bytes in bfloat16, a learned one about 20. 8 to 64 is usual, with ten times the learning rate or more.
    rank: int = 0
    #: The adapters' product counts alpha / rank times. Higher acts like a higher learning rate.
    alpha: float = 16.0
    #: The matrices of each layer that have adapters, by PEFT's names. Fewer save little memory; all of them learn best.
    targets: str = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@dataclass(frozen=True)
class Mesh:
    #: Devices that hold whole copies of the weights. Left out: what the other two leave.
    data: int | None = None
    #: Devices that share the weights and optimizer state and gather them layer by layer. Left out: what `data` and `tensor`
    #: leave; 1 where `data` is left out, too; where all three are, as few as keep the state in a quarter of a device's memory.
    fsdp: int | None = None
    #: Devices that split heads and feed-forward width.
    tensor: int = 1


@dataclass(frozen=True)
class Hosts:
    #: Who says which hosts belong together. auto: Slurm's srun, Open MPI's mpirun, the workers that the environment of a TPU
    #: pod names, or the flags below; tpu: a pod whose workers are named elsewhere (TPU VMs); none: this host alone, whatever
    #: the environment says. Every host runs the same command, one process each.
    launcher: Literal["auto", "tpu", "none"] = "auto"
    #: Address and port of the first host, as in 10.0.0.1:1234, where no launcher says it.
    coordinator: str | None = None
    #: Hosts in all, where no launcher says it.
    count: int | None = None
    #: This host, from 0, where no launcher says it.
    index: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    #: Steps between checkpoints; one is always written at the end.
    every: int = 10
    #: Newest checkpoints kept.
    keep: int = 2


@dataclass(frozen=True)
class Validation:
    #: Steps between validations; there is always one before the first step and one after the last. 0: only those two.
    every: int = 10
    #: Validation rows used, at most, and tasks of each benchmark. 0: no validation.
    limit: int = 512
    #: Benchmarks to answer at each validation beside the rows, to see whether what is learned carries over: names with commas
    #: between, `eval.bfcl:simple_python` (or another category of BFCL), or your own
    #: as `package.module:function` (docs/training.md, section 6). Tasks of theirs take the time of as many rows. Supervised
    #: training samples no responses, and refuses it.
    benchmarks: str | None = None


@dataclass(frozen=True)
class Export:
    #: Of the Hugging Face folder `hf/` written at the end. With --lora.rank it holds the merged weights; `adapter/` beside it,
    #: for PEFT, is always float32.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


@dataclass(frozen=True)
class TrainConfig:
    """GRPO on tool calls, by the Tool-N1 recipe."""

    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    rollout: Rollout = field(default_factory=Rollout)
    reward: Reward = field(default_factory=Reward)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    update: Update = field(default_factory=Update)
    learner: Learner = field(default_factory=Learner)
    lora: Lora = field(default_factory=Lora)
    mesh: Mesh = field(default_factory=Mesh)
    hosts: Hosts = field(default_factory=Hosts)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    validation: Validation = field(default_factory=Validation)
    export: Export = field(default_factory=Export)


@dataclass(frozen=True)
class Batch:
    #: Rows an optimizer step learns from.
    rows_per_step: int = 32
    #: Rows whose prompt and reply are longer together are dropped, and counted.
    max_tokens: int = 2048


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning: the same way of the data, with one given response to each prompt."""

    run: Run = field(default_factory=lambda: Run(dir="runs/sft", epochs=3.0))
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    batch: Batch = field(default_factory=Batch)
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=1e-5, schedule="cosine", warmup=0.1))
    learner: Learner = field(default_factory=Learner)
    lora: Lora = field(default_factory=Lora)
    mesh: Mesh = field(default_factory=Mesh)
    hosts: Hosts = field(default_factory=Hosts)
    checkpoint: Checkpoint = field(default_factory=lambda: Checkpoint(every=100))
    validation: Validation = field(default_factory=lambda: Validation(every=100))
    export: Export = field(default_factory=Export)


Config = TypeVar("Config", TrainConfig, SftConfig)

OPERATIONAL = (
    "run.dir", "run.steps", "run.epochs", "run.time_limit", "run.watchdog", "run.tensorboard",
    "rollout.decode_steps_per_call", "rollout.rows", "rollout.tensor", "optimizer.skips",
    "reward.workers", "reward.timeout",
    "learner.tokens_per_microbatch", "learner.remat", "learner.attention", "learner.offload",
    "mesh.", "hosts.", "checkpoint.", "validation.", "export.",
)  # fmt: skip


_FROM_0 = (
    "run.seed",
    "rollout.top_k",
    "rollout.refills",
    "reward.overlong_margin",
    "reward.workers",
    "hosts.index",
    "lora.rank",
    "optimizer.skips",
    "validation.every",
    "validation.limit",
)  # whole numbers; the others start at 1


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON."""
    return dataclasses.asdict(config)


_RENAMED = {f"learner.{name}": f"update.{name}" for name in ("prompts_per_minibatch", "passes", "recompute_old_logp")}


def differences(before: dict[str, Any], config: Any) -> tuple[list[str], list[str]]:
    """("field: old -> new" of identity fields, the same of operational ones) between a config as plain JSON and one.

    A field that `before` lacks is newer than it, and had then what is its default; one of `_RENAMED` goes by its new name.
    """
    old, new = flat(to_dict(type(config)())), flat(to_dict(config))
    for name, value in flat(before).items():
        if name not in _RENAMED or _RENAMED[name] in new:  # supervised training had those three too, and never read them
            old[_RENAMED.get(name, name)] = value
    identity, operational = [], []
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            (operational if name.startswith(OPERATIONAL) else identity).append(f"{name}: {old.get(name)} -> {new.get(name)}")
    return identity, operational


def check_numbers(config: Any) -> None:
    """Raises ValueError for a number below the least that its field can take, or one that is not finite."""
    for section in dataclasses.fields(config):
        for number in dataclasses.fields(getattr(config, section.name)):
            name, value = f"{section.name}.{number.name}", getattr(getattr(config, section.name), number.name)
            least = 1 if "int" in number.type and name not in _FROM_0 else 0
            if isinstance(value, (int, float)) and not least <= value < math.inf:
                raise ValueError(f"--{name} {value}: give a number from {least} on")


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config as plain JSON, field by field: "section.field" -> value."""
    found: dict[str, Any] = {}
    for name, value in nested.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


# ---------------------------------------------------------------- presets


def demo() -> TrainConfig:
    """Minutes on a laptop: the tiny model that comes with the program, on tasks that the program makes itself."""
    return TrainConfig(
        run=Run(dir="runs/demo", steps=40),
        model=Model(path=str(DEMO_MODEL)),
        data=Data(path="demo", template=str(DEMO_TEMPLATE)),
        rollout=Rollout(
            group_size=8,
            prompts_per_step=16,
            max_prompt_tokens=192,
            max_response_tokens=96,
            temperature=0.7,
            decode_steps_per_call=16,
        ),
        optimizer=Optimizer(learning_rate=3e-4),
        update=Update(prompts_per_minibatch=16),
        learner=Learner(tokens_per_microbatch=16384, remat="none"),
        validation=Validation(every=5, limit=256),
        export=Export(dtype="float32"),
    )


def tool_n1(model: str, max_response_tokens: int = 8192) -> Callable[[], TrainConfig]:
    """The paper's run on a model of the hub; the data is yours to name, with --data.path."""
    return lambda: TrainConfig(
        run=Run(dir=f"runs/tool-n1-{model.split('/')[-1].lower()}"),
        model=Model(path=model),
        rollout=Rollout(max_response_tokens=max_response_tokens),
    )


def variant(base: Callable[[], TrainConfig], name: str, **sections: dict[str, Any]) -> Callable[[], TrainConfig]:
    """Another algorithm on a preset's model: some fields of its sections replaced."""

    def made() -> TrainConfig:
        config = base()
        changed = {section: replace(getattr(config, section), **fields) for section, fields in sections.items()}
        return replace(config, run=replace(config.run, dir=f"runs/{name}"), **changed)

    return made


def demo_sft() -> SftConfig:
    """A few minutes of supervised training of the demo model on its own tasks, right replies only."""
    return SftConfig(
        run=Run(dir="runs/demo-sft", steps=100),
        model=Model(path=str(DEMO_MODEL)),
        data=Data(path="demo", template=str(DEMO_TEMPLATE)),
        optimizer=Optimizer(learning_rate=1e-3, schedule="cosine", warmup=0.1),
        learner=Learner(tokens_per_microbatch=16384, remat="none"),
        validation=Validation(every=50, limit=256),
        export=Export(dtype="float32"),
    )


def tool_n1_sft(replies: str) -> Callable[[], SftConfig]:
    """The paper's supervised recipe (Table 3): LoRA of rank 8 on all linear layers.

    Its sources give two settings. These are the rate, the epochs and the cut-off of the basic one (1e-4, 5, 2048 tokens) with
    the 4 x 8 rows a step of the released script, which for its part takes 2e-5 and 20 epochs.
    """
    return lambda: SftConfig(
        run=Run(dir=f"runs/tool-n1-{'reason' if replies == 'reasoning' else 'no-reason'}", epochs=5.0),
        model=Model(path="Qwen/Qwen2.5-7B-Instruct"),
        data=Data(replies=replies),
        batch=Batch(rows_per_step=32, max_tokens=2048),
        optimizer=Optimizer(learning_rate=1e-4, schedule="cosine", warmup=0.1),
        lora=Lora(rank=8),
    )


_7B = tool_n1("Qwen/Qwen2.5-7B-Instruct")

PRESETS: dict[type, dict[str, Callable[[], Any]]] = {
    TrainConfig: {
        "demo": demo,
        **{f"tool-n1-{size}": tool_n1(f"Qwen/Qwen2.5-{size.upper()}-Instruct") for size in ("0.5b", "1.5b", "3b", "7b", "14b")},
        "tool-n1-llama-8b": tool_n1("meta-llama/Llama-3.1-8B-Instruct"),
        # It is made for 8192 positions; prompts may take half of them.
        "tool-n1-llama3-8b": tool_n1("meta-llama/Meta-Llama-3-8B-Instruct", max_response_tokens=4096),
        # Tables 4 and 5 of the paper, but for `binary` on both sources, which is tool-n1-7b.
        **{
            f"tool-n1-7b-{kind.replace('_', '-')}": variant(_7B, f"tool-n1-7b-{kind.replace('_', '-')}", reward={"kind": kind})
            for kind in ("binary_no_reasoning", "format", "format_and_names")
        },
        **{
            f"tool-n1-7b-{source}": variant(_7B, f"tool-n1-7b-{source}", data={"sources": source})
            for source in ("toolace", "xlam")
        },
        # arXiv 2503.14476, section 4.1: no KL term, a higher upper edge, no group without a difference, a soft limit of length.
        "dapo": variant(
            _7B,
            "dapo",
            loss={"clip_high": 0.28, "kl_coefficient": 0.0},
            rollout={"refills": 4},
            reward={"overlong_margin": 2048},
        ),
        # arXiv 2503.20783, section 3: neither the spread of rewards nor the length of responses is divided by.
        "dr-grpo": variant(_7B, "dr-grpo", loss={"normalize": "mean_only", "mean": "constant", "kl_coefficient": 0.0}),
        # arXiv 2507.18071, section 5.1.
        "gspo": variant(
            _7B,
            "gspo",
            loss={"objective": "gspo", "mean": "sequence_mean", "clip_low": 3e-4, "clip_high": 4e-4, "kl_coefficient": 0.0},
        ),
    },
    SftConfig: {
        "demo": demo_sft,
        "reason": SftConfig,
        "tool-n1-reason": tool_n1_sft("reasoning"),
        "tool-n1-no-reason": tool_n1_sft("calls"),
    },
}


# ---------------------------------------------------------------- the command line


def parse(kind: type[Config], program: str, argv: Sequence[str]) -> Config:
    """The config that a command line asks for: a preset, if the first word names one (else `demo`), then options.

    Raises ValueError, in one line that names the nearest right word, for a command line that is wrong. `--help` prints
    and exits.
    """
    words, presets = list(argv), PRESETS[kind]
    name = words.pop(0) if words and not words[0].startswith("-") else "demo"
    if name not in presets:
        raise ValueError(
            f"unknown preset {name!r}: did you mean {command_line.nearest(name, presets)!r}? Known: {', '.join(presets)}"
        )
    description = f"{kind.__doc__} The first word may be a preset: {', '.join(presets)} (default: demo)."
    try:
        return command_line.read(kind, f"python -m {program} [PRESET]", words, description=description, default=presets[name]())
    except ValueError as error:
        late = next((word for word in words if word in presets), None)
        hint = f"; a preset like {late!r} comes first" if late and "Unrecognized" in str(error) else ""
        raise ValueError(f"{error}{hint}") from None


_OUT_OF_MEMORY = (
    "the device is out of memory: take --learner.remat full, then halve --learner.tokens_per_microbatch, if it was learning; "
    "halve --rollout.rows if it was sampling; the run resumes from its last checkpoint"
)


def run_main(main: Callable[[], None]) -> None:
    """Runs a program: an error that a user can mend becomes one line on stderr and exit code 2.

    Such are the errors of files, and the ValueErrors that this program raises itself. One from elsewhere, a library or a
    user's own reward, is a bug, and shows where.
    """
    try:
        main()
    except KeyboardInterrupt:
        _leave("interrupted", 130)
    except Exception as error:
        text = " ".join(str(error).split())
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in text:
            _leave(f"error: {_OUT_OF_MEMORY} ({text[:200]})", 2)
        elif isinstance(error, OSError) or (isinstance(error, ValueError) and _is_ours(error)):
            _leave(f"error: {text}", 2)
        elif _among_hosts():
            _leave(traceback.format_exc(), 1)
        raise


def _leave(text: str, code: int) -> NoReturn:
    """Ends the process with a text on stderr."""
    from grpo_jax.console import visible  # not above: it is long to import, and programs say wrong options before

    print(visible(text, sys.stderr.encoding or "utf-8"), file=sys.stderr, flush=True)  # it may say what a file says
    if _among_hosts():
        os._exit(code)  # an orderly end would wait for the other hosts, and these for this one
    raise SystemExit(code) from None


def _among_hosts() -> bool:
    import jax  # not above: this module is read before a program says which devices it wants

    return jax.distributed.is_initialized()


def _is_ours(error: BaseException) -> bool:
    """Whether code of this program raised it."""
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    file = Path(frame.tb_frame.f_code.co_filename)
    return any(file.is_relative_to(ROOT / package) for package in ("grpo_jax", "models", "data", "eval", "scripts"))
