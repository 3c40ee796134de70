"""The script that makes the demo's model: a step of its training runs, and changes the weights that it saves."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from models import hf
from scripts import make_demo_model


def test_a_stage_trains_and_saves(tiny_model, tmp_path):
    policy, params = make_demo_model.load(Path(tiny_model))
    before = jax.device_get(params)
    make_demo_model.stage(policy, params, 1, 1e-2, 0.5, 0, "a stage", tmp_path / "made", whole=True)
    _, after = hf.load(str(tmp_path / "made"))
    assert float(np.abs(after["embed"] - before["embed"]).max()) > 1e-4
