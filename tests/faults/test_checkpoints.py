"""Checkpoints: any file of one damaged in any way, a save that finds no room or no right, one that was killed."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.checkpoint import Checkpoints
from tests.faults.small_disk import fill, read_only, small_disk


def state(step: int, size: int = 2000) -> dict:
    values = np.random.default_rng(step).normal(size=size).astype(np.float32)  # random: so that it does not shrink
    return {"params": {"w": jnp.asarray(values)}, "optimizer": {"count": jnp.int32(step)}}


def meta(step: int) -> dict:
    return {"place": 100 + step, "resolved": {"rows": 32}, "pending": {"reward/mean": 0.125}}


def same(found, step: int) -> bool:
    expected = {**meta(step), "step": step}
    return (
        {name: found.meta[name] for name in expected} == expected
        and np.array_equal(found.state["params"]["w"], state(step)["params"]["w"])
        and int(found.state["optimizer"]["count"]) == step
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder, 9, print)
    for step in (1, 2):
        checkpoints.save(step, state(step), meta(step))
    checkpoints.close()
    assert checkpoints.latest == 2
    return folder


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = {"flipped": flip, "cut": lambda content: content[: len(content) // 2], "empty": lambda _: b"", "missing": None}


@pytest.mark.parametrize("how", DAMAGES)
def test_whatever_file_is_damaged_the_state_is_one_that_was_saved(how, saved, tmp_path):
    """Where the damage changes nothing that is read, that of the newest; else the one before, and the damaged one is named."""
    set_aside = 0
    files = sorted(path.relative_to(saved) for path in (saved / "checkpoints" / "2").rglob("*") if path.is_file())
    for number, file in enumerate(files):
        folder = shutil.copytree(saved, tmp_path / str(number))
        if DAMAGES[how] is None:
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(DAMAGES[how]((folder / file).read_bytes()))
        said = []
        found = Checkpoints(folder, 9, said.append).restore(state(0))
        assert same(found, found.step), file
        assert (found.step == 1) == bool(said) == (folder / "checkpoints" / "damaged-2").exists(), file
        assert all(f"checkpoint {folder / 'checkpoints' / '2'} is damaged (" in text for text in said)
        set_aside += found.step == 1
    assert set_aside >= 4


def test_a_digit_of_the_metadata_that_changed_is_noticed(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "run")
    (file,) = [
        f for f in (folder / "checkpoints" / "2" / "meta").rglob("*") if f.is_file() and b'"place": 102' in f.read_bytes()
    ]
    file.write_bytes(file.read_bytes().replace(b'"place": 102', b'"place": 103'))
    said = []
    assert Checkpoints(folder, 9, said.append).restore(state(0)).step == 1
    assert "its metadata are not those that were saved" in said[0]


def test_a_checkpoint_from_before_its_metadata_had_a_digest_is_read(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "run")
    (file,) = [f for f in (folder / "checkpoints" / "2" / "meta").rglob("*") if f.is_file() and b'"digest"' in f.read_bytes()]
    older = json.loads(file.read_text())
    del older["digest"]
    file.write_text(json.dumps(older))
    assert same(Checkpoints(folder, 9, pytest.fail).restore(state(0)), 2)


def names(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_full_disk_costs_the_save_and_nothing_else(tmp_path):
    with small_disk(tmp_path / "disk", 4) as disk:
        said, size = [], 200_000
        checkpoints = Checkpoints(disk, 9, said.append)
        checkpoints.save(1, state(1, size), meta(1))
        checkpoints.wait()
        filler = fill(disk)
        filler.write_bytes(bytes(filler.stat().st_size - 300_000))  # it begins to be written, and then there is no room
        for step in (2, 3):
            checkpoints.save(step, state(step, size), meta(step))
            checkpoints.wait()
            assert len(said) == step - 1 and f"checkpoint {step} could not be saved" in said[-1]
            assert "the newest is that of step 1, and the run goes on" in said[-1]
            assert names(disk) == ["1"] and checkpoints.latest == 1  # no part of it is left to take room, or to be mistaken
        filler.unlink()
        checkpoints.save(4, state(4, size), meta(4))
        checkpoints.close()
        assert len(said) == 2 and names(disk) == ["1", "4"] and checkpoints.latest == 4
        found = Checkpoints(disk, 9, pytest.fail).restore(state(0, size))
        assert found.step == 4 and np.array_equal(found.state["params"]["w"], state(4, size)["params"]["w"])


def test_a_folder_that_became_read_only_costs_the_save_and_nothing_else(tmp_path):
    with small_disk(tmp_path / "disk", 4) as disk:
        said = []
        checkpoints = Checkpoints(disk, 9, said.append)
        checkpoints.save(1, state(1), meta(1))
        checkpoints.wait()
        read_only(disk, True)
        checkpoints.save(2, state(2), meta(2))
        checkpoints.wait()
        read_only(disk, False)
        assert len(said) == 1 and "Read-only file system" in said[0] and "the newest is that of step 1" in said[0]
        checkpoints.save(3, state(3), meta(3))
        checkpoints.close()
        assert len(said) == 1 and names(disk) == ["1", "3"]


def test_what_a_killed_save_left_is_no_checkpoint_and_is_cleared_away(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "run")
    shutil.copytree(folder / "checkpoints" / "2", folder / "checkpoints" / "3.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(folder, 9, pytest.fail)
    assert same(checkpoints.restore(state(0)), 2)
    checkpoints.save(3, state(3), meta(3))
    checkpoints.close()
    assert names(folder) == ["1", "2", "3"]
