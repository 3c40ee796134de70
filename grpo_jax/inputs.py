"""What a run reads: the model with its tokenizer, and rows of data as prompts in token ids.

load_policy   a Hugging Face folder or hub id -> Policy, its parameters on the mesh
load_tasks    a file, a folder, a hub id or `demo` -> Tasks: examples with their prompt ids, split and counted
batch         the tasks from a place on: a fixed shuffled order of each epoch, a function of the seed and the place alone
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.progress import track

from data import demo, jsonl, prompt
from data.example import Example
from grpo_jax import checkpoint, config, console, mesh
from models import decoder, hf, lora
from models.decoder import DecoderConfig, Params
from models.lora import Lora

_DEMO_ROWS = 4096


@dataclass(frozen=True)
class Policy:
    """A model as a run names it, without its weights."""

    path: str
    model: DecoderConfig
    tokenizer: Any
    end_tokens: tuple[int, ...]  # ids that end a response


@dataclass(frozen=True)
class Task:
    """One example with its prompt."""

    example: Example
    prompt: np.ndarray  # int32 [P]
    target: np.ndarray | None = None  # int32 [R], the response to imitate with its end-of-turn token, where SFT wants it


@dataclass(frozen=True)
class Tasks:
    """The rows of a run."""

    train: list[Task]
    validation: list[Task]
    dropped: dict[str, int]  # rows left out, by reason

    def summary(self) -> str:
        """How many rows there are, and why others are not."""
        counts = f"{len(self.train):,} training rows, {len(self.validation):,} for validation"
        return counts + "".join(f"; dropped as {reason}: {count:,}" for reason, count in self.dropped.items())

    def fingerprint(self) -> str:
        """Changes when any training row does, or the way it is written as a prompt and, in SFT, as a target."""
        ids = lambda tokens: None if tokens is None else tokens.tolist()  # noqa: E731
        return checkpoint.fingerprint([[task.example.id, ids(task.prompt), ids(task.target)] for task in self.train])


def require(settings: Any) -> None:
    """Raises ValueError where a config names no model or no data, or holds a number that is out of its range."""
    if not 0 <= settings.run.seed < 2**31:  # jax folds it into keys as 32 bits
        raise ValueError(f"--run.seed {settings.run.seed} must lie in 0 ... {2**31 - 1}")
    if not settings.model.path:
        raise ValueError("--model.path is missing: give the folder or the hub id of a Qwen2.5 or Llama 3 model")
    if not settings.data.path:
        raise ValueError("--data.path is missing: give a JSONL file, a folder, a hub id, or `demo`")
    if not 0 <= settings.data.begin < settings.data.end <= 1:
        raise ValueError(
            f"--data.begin {settings.data.begin} --data.end {settings.data.end}: give 0 <= begin < end <= 1, shares of the rows"
        )
    check_options(settings)


def check_options(settings: Any) -> None:
    """Raises ValueError for a number out of its range, and for LoRA with what it cannot do."""
    config.check_numbers(settings)
    if adapters(settings.lora) and settings.learner.offload in ("reference", "both"):
        raise ValueError(
            f"--learner.offload {settings.learner.offload}: with --lora.rank the reference is the frozen model itself, which "
            "every phase needs; take none or optimizer"
        )


def model_folder(path: str) -> str:
    """The model that a path names: that of a finished run for the run's folder, else the path itself.

    Raises ValueError for the folder of a run that has written no model yet.
    """
    folder = Path(path)
    if (folder / "hf").is_dir():
        return str(folder / "hf")
    if (folder / "checkpoints").is_dir():
        raise ValueError(f"{path}: this run has not finished, so it has no model yet; start its own command again first")
    return path


def load_policy(path: str) -> Policy:
    """Reads config and tokenizer; raises ValueError or FileNotFoundError, in one line, for what does not fit.

    `path` as in `model_folder`; the policy's is that of the model.
    """
    path = model_folder(path)
    model, tokenizer = hf.load_config(path), hf.load_tokenizer(path)
    ends = hf.end_tokens(path, model, tokenizer)
    if not ends:
        raise ValueError(f"{path}: no end-of-turn token is named; set eos_token_id in generation_config.json")
    if len(tokenizer) > model.vocab:  # a gather beyond the end of an array is no error in JAX
        raise ValueError(f"{path}: {len(tokenizer)} tokens in the tokenizer, {model.vocab} in the model; they do not fit")
    return Policy(path, model, tokenizer, ends)


def load_params(policy: Policy, device_mesh: Mesh, dtype: Any = jnp.float32) -> Params:
    """The weights, sharded over the mesh; `dtype` None keeps that of the file. Errors as in models.hf.load."""
    shardings = mesh.shardings(device_mesh, policy.model)
    return hf.load(policy.path, shardings=shardings, dtype=dtype)[1]


def first_adapters(policy: Policy, device_mesh: Mesh, settings: Lora, seed: int) -> Params:
    """New adapters, sharded over the mesh like the matrices beside which they stand."""
    made = jax.jit(lora.init, static_argnums=(0, 1), out_shardings=mesh.shardings(device_mesh, policy.model, settings))
    return made(policy.model, settings, jax.random.key(seed))


def adapters(settings: config.Lora) -> Lora | None:
    """The adapters that a run learns; None where it learns the whole model. ValueError for a target that there is not."""
    targets = tuple(dict.fromkeys(name.strip() for name in settings.targets.split(",")))
    if unknown := [name for name in targets if name not in lora.TARGETS]:
        raise ValueError(f"--lora.targets {settings.targets}: {unknown[0]!r} is none of {', '.join(lora.TARGETS)}")
    return Lora(settings.rank, settings.alpha, targets) if settings.rank else None


def load_tasks(
    settings: config.Data, policy: Policy, max_tokens: int, seed: int, limit: int, with_target: bool = False
) -> Tasks:
    """Reads, splits and encodes the rows; `limit` bounds those for validation.

    Prompts of more than `max_tokens` tokens (with their target, if it is wanted) are dropped, and counted as `too_long`;
    never cut. Of the training rows of `settings.sources`, in their seeded order, those from `settings.begin` to `settings.end`
    are taken: cut before any is dropped for its length, so that runs with other limits share no row either. Raises ValueError
    where no row is left to train on, or to validate on where a file names such rows.
    """
    train, validation, dropped = _examples(settings, seed, limit)
    drops = Counter(dropped)
    if settings.sources is not None:
        wanted = [name.strip() for name in settings.sources.split(",")]
        # What data.build changed keeps its source, and says so behind a hyphen: xlam-masked.
        kept = [example for example in train if any(f"{example.source}-".startswith(f"{name}-") for name in wanted)]
        if not kept:
            found = ", ".join(sorted({example.source for example in train}))
            raise ValueError(f"--data.sources {settings.sources}: {settings.path} has no such rows, but of {found}")
        drops["other_source"] += len(train) - len(kept)
        train = kept
    train = train[round(settings.begin * len(train)) : round(settings.end * len(train))]
    template = prompt.load_template(settings.template)

    def encoded(examples: Sequence[Example], what: str, most: int) -> list[Task]:
        tasks = []
        shown = track(examples, f"reading {what}", console=console.CONSOLE, transient=True, disable=len(examples) < 1000)
        for example in shown:
            if len(tasks) == most:
                break
            ids = np.array(prompt.encode(example, policy.tokenizer, template), np.int32)
            task = Task(example, ids, target_ids(example, policy, settings.replies) if with_target else None)
            if len(ids) + (0 if task.target is None else len(task.target)) > max_tokens:
                drops["too_long"] += 1
            else:
                tasks.append(task)
        return tasks

    tasks = Tasks(encoded(train, "training rows", len(train)), encoded(validation, "validation rows", limit), drops)
    if not tasks.train:
        raise ValueError(
            f"{settings.path}: no row to train on is left ({tasks.summary()}); raise the length limits, or give other data"
        )
    if (long := drops["too_long"]) > (kept := len(tasks.train) + len(tasks.validation)):
        console.warn(f"{long:,} of {long + kept:,} rows take more than {max_tokens:,} tokens and are left out")
    if not tasks.validation and limit and settings.validation_path:
        raise ValueError(
            f"{settings.validation_path}: no row to validate on is left ({tasks.summary()}); raise the length limits"
        )
    return tasks


def target_ids(example: Example, policy: Policy, replies: str = "reasoning") -> np.ndarray:
    """int32 [R]: the text that SFT imitates, as `data.prompt.target` has it, and the end-of-turn token."""
    text = policy.tokenizer(prompt.target(example, replies), add_special_tokens=False)["input_ids"]
    end = policy.tokenizer.eos_token_id
    return np.array([*text, policy.end_tokens[0] if end is None else end], np.int32)


def _examples(settings: config.Data, seed: int, limit: int) -> tuple[list[Example], list[Example], dict[str, int]]:
    if settings.path == "demo":
        # Never the rows that the demo model was made from, whatever the seed: those have another seed.
        return demo.tasks(_DEMO_ROWS, seed=seed + 1, held_out=False), demo.tasks(limit, seed=0, held_out=True), {}
    loaded = jsonl.load(settings.path)
    if settings.validation_path:
        held_out = jsonl.load(settings.validation_path)
        # Both shuffled: `limit` takes the first rows, and files are often sorted.
        train, validation = (jsonl.split(rows.examples, 0.0, seed)[0] for rows in (loaded, held_out))
        return train, validation, Counter(loaded.dropped) + Counter(held_out.dropped)
    return *jsonl.split(loaded.examples, settings.validation_fraction, seed), loaded.dropped


def batch(tasks: Sequence[Task], size: int, seed: int, place: int) -> list[Task]:
    """The next `size` tasks from a place on, from 0, of an endless order, in which each epoch is a shuffle of its own."""
    places = range(place, place + size)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(len(tasks)) for epoch in {p // len(tasks) for p in places}
    }
    return [tasks[orders[p // len(tasks)][p % len(tasks)]] for p in places]


def steps_of(run: config.Run, rows: int, batch_size: int) -> int:
    """Steps of a run: given, or what its epochs take."""
    return run.steps if run.steps is not None else max(1, round(run.epochs * rows / batch_size))


def check_context(path: str, model: DecoderConfig, longest: int, options: str) -> None:
    """Raises ValueError where a sequence may be longer than any that the model was made for: nothing fails there by itself."""
    if longest > model.max_positions:
        raise ValueError(f"{options} allow {longest:,} tokens; {path} is made for {model.max_positions:,}; lower them")


def devices(device_mesh: Mesh, learner: config.Learner, model: DecoderConfig) -> str:
    """What a run computes on, for its header."""
    sizes = " x ".join(f"{axis} {size}" for axis, size in device_mesh.shape.items())
    how = f"{compute_dtype(learner)}, attention by {attention_kernel(learner, model)}"
    on = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}{on}, mesh {sizes}, {how}"


def learned(model: DecoderConfig, settings: Lora | None) -> str:
    """How many parameters a run learns, for its header."""
    whole = decoder.parameters(model)
    if settings is None:
        return f"all {whole:,} parameters"
    few = sum(x.size for x in jax.tree.leaves(lora.shapes(model, settings)))
    return f"{few:,} parameters of adapters of rank {settings.rank}, beside {whole:,} frozen ones"


def compute_dtype(learner: config.Learner) -> str:
    if learner.dtype != "auto":
        return learner.dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def attention_kernel(learner: config.Learner, model: DecoderConfig, platform: str | None = None) -> str:
    """The kernel for packs that `learner.attention` names; raises ValueError where it cannot run.

    `platform` is "cpu", "gpu" or "tpu"; by default that of this process.
    """
    platform, dtype = platform or jax.default_backend(), compute_dtype(learner)
    reasons = {
        "cudnn": "needs an NVIDIA GPU" if platform != "gpu" else "computes in bfloat16 only" if dtype != "bfloat16" else
        f"takes heads of up to 128 in steps of 8, not {model.head_dim}" if model.head_dim > 128 or model.head_dim % 8 else "",
        "splash": "" if platform == "tpu" else "needs a TPU",
        "tiles": "",
    }  # fmt: skip
    if learner.attention == "auto":
        return next(kernel for kernel, reason in reasons.items() if not reason)
    if reasons[learner.attention]:
        raise ValueError(f"--learner.attention {learner.attention} {reasons[learner.attention]}; take auto or tiles")
    return learner.attention


def remat(learner: config.Learner, kernel: str) -> str:
    """What of a layer is kept for the backward pass (models.decoder.hidden), by `learner.remat` and the kernel of attention."""
    if learner.remat != "auto":
        return learner.remat
    # A fused kernel's output has a place for every copy of a prompt: at drawn lengths, 2.5 times the memory of all else
    # together, for 4 % of the work (7B on eight H100s, by the planner).
    return "attention" if kernel == "tiles" else "full"


def identity(settings: Any, policy: Policy, tasks: Tasks) -> dict[str, str]:
    """What all hosts of a run must have alike, by the name of the option that sets it."""
    plain = config.to_dict(settings)
    plain.pop("hosts")
    ids = [[task.example.id, task.prompt.tolist()] for task in tasks.validation]
    return {
        "their options": checkpoint.fingerprint(plain),
        "--model.path (the tokenizer)": tokenizer_fingerprint(policy),
        "--data.path": tasks.fingerprint(),
        "--data.validation_path": checkpoint.fingerprint(ids),
    }


def tokenizer_fingerprint(policy: Policy) -> str:
    """Of its words and its chat template."""
    return checkpoint.fingerprint([policy.tokenizer.get_vocab(), policy.tokenizer.chat_template])


def fingerprints(policy: Policy, params: Params, tasks: Tasks) -> dict[str, str]:
    """What a resumed run must find unchanged besides its config; kept in every checkpoint."""
    return {
        "data": tasks.fingerprint(),
        "tokenizer": tokenizer_fingerprint(policy),
        "initial_weights": checkpoint.fingerprint(checkpoint.checksums(params)),
    }
