"""Small runs on the tiny model, for tests: their options, their rows, and a run in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from grpo_jax import config, metrics, train
from grpo_jax.config import TrainConfig
from models import hf

STEPS = 6
SMALL = {
    "run.steps": STEPS,
    "checkpoint.every": 2,
    "validation.limit": 4,
    "validation.every": 3,
    "rollout.prompts_per_step": 3,
    "rollout.group_size": 3,
    "rollout.max_prompt_tokens": 400,
    "rollout.max_response_tokens": 12,
    "rollout.decode_steps_per_call": 4,
    "update.prompts_per_minibatch": 2,
    "learner.tokens_per_microbatch": 2048,
    "loss.kl_coefficient": 0.1,
    "optimizer.learning_rate": 1e-3,
    "reward.kind": "tests.grpo_jax.length_reward:score",
}


def words(options: dict) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def rows(folder: Path) -> list[dict]:
    """metrics.jsonl without what a clock or the machine's memory decides."""
    timed = ("time/", "memory/", "rollout/tokens_per_second", "learner/tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in metrics.read(folder / "metrics.jsonl")]


def small(model: str, folder: Path, **options) -> TrainConfig:
    options = {**SMALL, "run.steps": 2, "validation.limit": 0, "model.path": model, "run.dir": str(folder), **options}
    flags = [word for name, on in options.items() if isinstance(on, bool) for word in ([f"--{name}"] if on else [])]
    valued = {name: value for name, value in options.items() if not isinstance(value, bool)}
    return config.parse(TrainConfig, "grpo_jax.train", [*words(valued), *flags])


def end_of(cfg: TrainConfig) -> tuple[list[dict], np.ndarray]:
    train.train(cfg)
    _, params = hf.load(Path(cfg.run.dir) / "hf")
    return rows(Path(cfg.run.dir)), np.asarray(params["layers"]["attention"]["q"], np.float64)
