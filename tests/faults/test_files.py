"""metrics.jsonl and rollouts.jsonl: cut at every byte, on a full disk, on one that cannot be written."""

import json

import pytest

from grpo_jax import checkpoint, metrics
from tests.faults.small_disk import fill, read_only, small_disk

ROWS = [{"step": step, "reward/mean": step / 8, "text": "é\n\udfff" * step} for step in range(4)]


def written(folder, rows=ROWS, resume=0, tensorboard=False) -> metrics.Log:
    log = metrics.Log.open(folder, resume, tensorboard)
    for row in rows:
        log.rollouts([row, row])
        log.step({name: value for name, value in row.items() if name != "text"})
    return log


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl"])
def test_killed_at_any_byte_both_files_are_read_and_a_resumed_run_writes_them_as_they_were(name, tmp_path):
    written(tmp_path).close()
    whole = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    step_1 = whole[name].index(b'{"step": 2')  # of the checkpoint: its rows are on the disk before it is saved
    for length in range(len(whole[name]) + 1):
        (tmp_path / name).write_bytes(whole[name][:length])
        ends = [json.loads(line) for line in whole[name][:length].splitlines(keepends=True) if line.endswith((b"}\n", b"}"))]
        assert metrics.read(tmp_path / name) == ends
        if length >= step_1 - 1:  # without the last row's end, even
            written(tmp_path, ROWS[2:], resume=1).close()
            assert (tmp_path / name).read_bytes() == whole[name]


def test_rows_that_a_full_disk_does_not_take_wait_and_are_written_when_there_is_room(tmp_path):
    with small_disk(tmp_path / "disk", 1) as disk:
        log = written(disk, ROWS[:2], tensorboard=True)
        assert log.sync() and not log.problem
        filler = fill(disk)
        late = [dict(row, text="x" * 20_000) for row in ROWS[2:]]  # more than what the files' last pages may still take
        for row in late * 20:  # as many as would fill a queue of TensorBoard's
            log.rollouts([row])
            log.step({"step": row["step"], "reward/mean": 0.5})
            assert [r["step"] for r in metrics.read(disk / "rollouts.jsonl")] == [0, 0, 1, 1]  # and no half of one
        assert not log.sync() and "No space left on device" in log.problem
        filler.unlink()
        assert log.sync() and not log.problem
        log.close()
        assert [row["step"] for row in metrics.read(disk / "rollouts.jsonl")] == [0, 0, 1, 1] + 20 * [2, 3]
        assert [row["step"] for row in metrics.read(disk / "metrics.jsonl")] == [0, 1] + 20 * [2, 3]


def test_a_read_only_folder_is_named_before_anything_is_begun(tmp_path):
    with small_disk(tmp_path / "disk", 1) as disk:
        read_only(disk, True)
        with pytest.raises(OSError, match=f"Read-only file system: '{disk / 'run'}'"):
            checkpoint.claim(disk / "run")
