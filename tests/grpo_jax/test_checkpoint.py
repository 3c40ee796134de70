"""Whose a run's folder is, and what can be read of a checkpoint where the devices that wrote it are not."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import checkpoint
from grpo_jax.checkpoint import Checkpoints
from grpo_jax.config import Run, TrainConfig

ROOT = Path(__file__).resolve().parents[2]


def state(scale=1.0):
    return {"params": {"a": {"b": scale * jnp.arange(8.0)}}, "optimizer": ({"m": jnp.ones(8)}, jnp.zeros((), jnp.int32))}


def shapes(size=8):
    return {"a": {"b": jax.ShapeDtypeStruct((size,), jnp.float32)}}


def saved(folder, *steps):
    checkpoints = Checkpoints(folder, 9, print)
    for step in steps:
        checkpoints.save(step, state(step), {"resolved": {}})
    checkpoints.close()


def damage(folder):
    for file in (folder / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_parameters_are_read_of_the_step_that_is_asked_for(tmp_path):
    saved(tmp_path, 2, 10)
    for step, scale in ((None, 10), (10, 10), (2, 2)):
        found = checkpoint.read_params(tmp_path, shapes(), step)
        assert isinstance(found["a"]["b"], np.ndarray)
        np.testing.assert_array_equal(found["a"]["b"], scale * np.arange(8))
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3; there are: 2, 10"):
        checkpoint.read_params(tmp_path, shapes(), 3)
    with pytest.raises(FileNotFoundError, match="no checkpoint; there are: none"):
        checkpoint.read_params(tmp_path / "nothing", shapes())
    damage(tmp_path / "checkpoints" / "10")
    with pytest.raises(ValueError, match="10: cannot be read .*; take another step"):
        checkpoint.read_params(tmp_path, shapes())


def test_parameters_are_read_where_the_devices_that_wrote_them_are_not(tmp_path):
    code = (
        "import sys, jax, jax.numpy as jnp; from jax.sharding import NamedSharding, PartitionSpec as P;"
        "from grpo_jax.checkpoint import Checkpoints; mesh = jax.make_mesh((4,), ('x',));"
        "x = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P('x')));"
        "c = Checkpoints(sys.argv[1], 1, print); c.save(1, {'params': {'a': {'b': x}}, 'optimizer': x}, {}); c.close()"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, cwd=ROOT, check=True, capture_output=True)
    np.testing.assert_array_equal(checkpoint.read_params(tmp_path, shapes())["a"]["b"], np.arange(8))


def test_a_step_that_is_damaged_twice_is_set_aside_twice(tmp_path):
    saved(tmp_path, 1, 2)
    warnings = []
    for _ in range(2):
        damage(tmp_path / "checkpoints" / "2")
        assert Checkpoints(tmp_path, 9, warnings.append).restore(state()).step == 1
        saved(tmp_path, 2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["1", "2", "damaged-2", "damaged-2-2"] and len(warnings) == 2


def test_a_kill_while_a_folder_is_claimed_leaves_it_free(tmp_path):
    config = TrainConfig(run=Run(dir=str(tmp_path)))
    for name in ("lock", "config.tmp"):
        (tmp_path / name).write_text("{")
    assert checkpoint.compare(config, "p") == []
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        checkpoint.compare(config, "p")
