"""What a run reads: the model with its tokenizer, and rows of data as prompts in token ids.

load_policy   a Hugging Face folder or hub id -> Policy, its parameters on the mesh
load_tasks    a file, a folder, a hub id or `demo` -> Tasks: examples with their prompt ids, split and counted
batch         which tasks a step takes: a fixed shuffled order of each epoch, a function of (seed, step) alone
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.progress import track

from data import demo, jsonl, prompt
from data.example import Example
from grpo_jax import checkpoint, config, console, mesh
from models import hf
from models.decoder import DecoderConfig, Params

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

    def fingerprint(self) -> str:
        """Changes when any training row, or the way it is written as a prompt, does."""
        return checkpoint.fingerprint([[task.example.id, task.prompt.tolist()] for task in self.train])


def require(settings: Any) -> None:
    """Raises ValueError where a config names no model or no data, or where its seed is none."""
    if not 0 <= settings.run.seed < 2**31:  # jax folds it into keys as 32 bits
        raise ValueError(f"--run.seed {settings.run.seed} must lie in 0 ... {2**31 - 1}")
    if not settings.model.path:
        raise ValueError("--model.path is missing: give the folder or the hub id of a Qwen2.5 or Llama 3 model")
    if not settings.data.path:
        raise ValueError("--data.path is missing: give a JSONL file, a folder, a hub id, or `demo`")


def load_policy(path: str) -> Policy:
    """Reads config and tokenizer; raises ValueError or FileNotFoundError, in one line, for what does not fit."""
    model, tokenizer = hf.load_config(path), hf.load_tokenizer(path)
    ends = hf.end_tokens(path, model, tokenizer)
    if not ends:
        raise ValueError(f"{path}: no end-of-turn token is named; set eos_token_id in generation_config.json")
    return Policy(path, model, tokenizer, ends)


def load_params(policy: Policy, device_mesh: Mesh) -> Params:
    """The weights in float32, sharded over the mesh; errors as in models.hf.load."""
    shardings = mesh.shardings(device_mesh, policy.model)
    return hf.load(policy.path, shardings=shardings, dtype=jnp.float32)[1]


def load_tasks(
    settings: config.Data, policy: Policy, max_tokens: int, seed: int, limit: int, with_target: bool = False
) -> Tasks:
    """Reads, splits and encodes the rows; `limit` bounds those for validation.

    Prompts of more than `max_tokens` tokens (with their target, if it is wanted) are dropped, and counted as `too_long`;
    never cut. Raises ValueError where no row is left to train on.
    """
    train, validation, dropped = _examples(settings, seed, limit)
    template = prompt.load_template(settings.template)
    drops = Counter(dropped)

    def encoded(examples: Sequence[Example], what: str, most: int) -> list[Task]:
        tasks = []
        shown = track(examples, f"reading {what}", console=console.CONSOLE, transient=True, disable=len(examples) < 1000)
        for example in shown:
            if len(tasks) == most:
                break
            ids = np.array(prompt.encode(example, policy.tokenizer, template), np.int32)
            task = Task(example, ids, target_ids(example, policy.tokenizer) if with_target else None)
            if len(ids) + (0 if task.target is None else len(task.target)) > max_tokens:
                drops["too_long"] += 1
            else:
                tasks.append(task)
        return tasks

    tasks = Tasks(encoded(train, "training rows", len(train)), encoded(validation, "validation rows", limit), drops)
    if not tasks.train:
        raise ValueError(
            f"{settings.path}: no row to train on is left ({dict(drops)}); raise the length limits, or give other data"
        )
    return tasks


def target_ids(example: Example, tokenizer: Any) -> np.ndarray:
    """int32 [R]: the text that SFT imitates, and the end-of-turn token."""
    text = tokenizer(prompt.target(example), add_special_tokens=False)["input_ids"]
    return np.array([*text, tokenizer.eos_token_id], np.int32)


def _examples(settings: config.Data, seed: int, limit: int) -> tuple[list[Example], list[Example], dict[str, int]]:
    if settings.path == "demo":
        # Never the rows that the demo model was made from, whatever the seed: those have another seed.
        return demo.tasks(_DEMO_ROWS, seed=seed + 1, held_out=False), demo.tasks(limit, seed=0, held_out=True), {}
    loaded = jsonl.load(settings.path)
    if settings.validation_path:
        held_out = jsonl.load(settings.validation_path).examples
        train = jsonl.split(loaded.examples, 0.0, seed)[0]
        return train, held_out, loaded.dropped
    return *jsonl.split(loaded.examples, settings.validation_fraction, seed), loaded.dropped


def batch(tasks: Sequence[Task], size: int, seed: int, step: int) -> list[Task]:
    """The tasks of step 1, 2, ...: consecutive places of an endless order, each epoch a shuffle of its own."""
    places = range((step - 1) * size, step * size)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(len(tasks)) for epoch in {p // len(tasks) for p in places}
    }
    return [tasks[orders[p // len(tasks)][p % len(tasks)]] for p in places]


def steps_of(run: config.Run, rows: int, batch_size: int) -> int:
    """Steps of a run: given, or what its epochs take."""
    return run.steps if run.steps is not None else max(1, round(run.epochs * rows / batch_size))


def compute_dtype(learner: config.Learner) -> str:
    if learner.dtype != "auto":
        return learner.dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def fingerprints(policy: Policy, params: Params, tasks: Tasks) -> dict[str, str]:
    """What a resumed run must find unchanged besides its config; kept in every checkpoint."""
    return {
        "data": tasks.fingerprint(),
        "tokenizer": checkpoint.fingerprint([policy.tokenizer.get_vocab(), policy.tokenizer.chat_template]),
        "initial_weights": checkpoint.fingerprint(checkpoint.checksums(params)),
    }
