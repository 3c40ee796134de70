"""Writes a checkpoint of a run as a Hugging Face folder.

python scripts/export_hf.py runs/mine OUT_DIR                      the newest checkpoint
python scripts/export_hf.py runs/mine/checkpoints/40 OUT_DIR       that of step 40
python scripts/export_hf.py runs/mine OUT_DIR --adapter            of a run with --lora.rank: the adapter, for PEFT
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from data import command_line
from grpo_jax import checkpoint, config, console, inputs, learner
from grpo_jax.config import run_main
from models import decoder, hf, lora


@dataclass(frozen=True)
class Args:
    """A checkpoint of a run, as a folder that transformers and vLLM load."""

    #: A run's folder, or one checkpoint in it.
    source: Annotated[Path, tyro.conf.Positional]
    #: The folder to write.
    out: Annotated[Path, tyro.conf.Positional]
    #: Of the weights; float32 keeps them as they were trained.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    #: Write the adapter of a run with --lora.rank as a folder for PEFT (always float32), and not the merged model.
    adapter: bool = False


def export(args: Args) -> None:
    """Raises ValueError or FileNotFoundError where there is no such run, or no whole checkpoint in it."""
    source = args.source.resolve()
    single = source.parent.name == "checkpoints" and source.name.isdigit()
    run = source.parent.parent if single else source
    file = run / "config.json"
    try:
        options = json.loads(file.read_text())
        model_path = options["model"]["path"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{args.source}: neither a run's folder nor runs/.../checkpoints/STEP (no config of a run in {run})"
        ) from None
    policy = inputs.load_policy(model_path)
    step = int(source.name) if single else None
    settings = inputs.adapters(config.Lora(**options.get("lora", {})))
    if settings is None:
        if args.adapter:
            raise ValueError(f"{args.source}: a run with --lora.rank 0 has no adapter; leave out --adapter")
        params = checkpoint.read_params(run, decoder.shapes(policy.model), step)
        hf.save(args.out, policy.model, params, policy.tokenizer, dtype=args.dtype)
    else:
        shapes = jax.eval_shape(lambda: lora.init(policy.model, settings, jax.random.key(0)))
        adapters = checkpoint.read_params(run, shapes, step)
        if args.adapter:
            hf.save_adapter(args.out, policy.model, settings, adapters, policy.path)
        else:
            # Beside the model rounded as it was in the run.
            base = learner.cast(hf.load(policy.path)[1], checkpoint.read_meta(run, step)["resolved"]["dtype"])
            params = lora.merge(base, adapters, settings, args.dtype)
            hf.save(args.out, policy.model, params, policy.tokenizer, dtype=args.dtype)
    console.CONSOLE.print(str(args.out))


if __name__ == "__main__":
    run_main(lambda: export(command_line.read(Args, "python scripts/export_hf.py", sys.argv[1:])))
