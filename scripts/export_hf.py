"""Writes a checkpoint of a run as a Hugging Face folder.

python scripts/export_hf.py runs/mine OUT_DIR                      the newest checkpoint
python scripts/export_hf.py runs/mine/checkpoints/40 OUT_DIR       that of step 40
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from grpo_jax import checkpoint, console, inputs
from grpo_jax.config import run_main
from models import decoder, hf


@dataclass(frozen=True)
class Args:
    """A checkpoint of a run, as a folder that transformers and vLLM load."""

    source: Annotated[Path, tyro.conf.Positional]
    """A run's folder, or one checkpoint in it."""
    out: Annotated[Path, tyro.conf.Positional]
    """The folder to write."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the weights; float32 keeps them as they were trained."""


def export(args: Args) -> None:
    """Raises ValueError or FileNotFoundError where there is no such run, or no whole checkpoint in it."""
    source = args.source.resolve()
    single = source.parent.name == "checkpoints" and source.name.isdigit()
    run = source.parent.parent if single else source
    config = run / "config.json"
    try:
        model_path = json.loads(config.read_text())["model"]["path"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{args.source}: neither a run's folder nor runs/.../checkpoints/STEP (no config of a run in {run})"
        ) from None
    policy = inputs.load_policy(model_path)
    params = checkpoint.read_params(run, decoder.shapes(policy.model), int(source.name) if single else None)
    hf.save(args.out, policy.model, params, policy.tokenizer, dtype=args.dtype)
    console.CONSOLE.print(str(args.out))


if __name__ == "__main__":
    run_main(lambda: export(tyro.cli(Args, args=sys.argv[1:], description=__doc__)))
