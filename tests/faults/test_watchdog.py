"""The watchdog: what it writes when nothing moves, that it writes nothing when something does, and that it needs no lock."""

import ctypes
import itertools
import time
from types import SimpleNamespace

from grpo_jax import config, console, run, watchdog

QUICK = 0.2 / 60  # minutes


def wait_for(path) -> str:
    """What stands in the file once something does."""
    until = time.monotonic() + 60
    while not path.stat().st_size and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)  # for the rest of it
    return path.read_text()


def test_where_each_thread_stands_is_written_when_nothing_moves(tmp_path):
    path, said = tmp_path / "stalls.txt", []
    with watchdog.watching(path, QUICK, lambda: "step 7, rollout 300/1024", said.append):
        text = wait_for(path)
    assert "minutes; step 7, rollout 300/1024" in text and "in wait_for" in text and "Current thread" in text
    assert said and "nothing has moved for" in said[0] and str(path) in said[0]


class Looks:
    """In place of the event that ends the thread: a wait lets the clock go on by what was asked for, and what `late` adds."""

    def __init__(self, count: int, late: dict[int, float], monkeypatch):
        self.now, self._left, self._late = 0.0, iter(range(count)), late
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: None)

    def wait(self, seconds: float) -> bool:
        number = next(self._left, None)
        self.now += seconds + self._late.get(number, 0.0)
        return number is None


def reports(tmp_path, monkeypatch, where, count=20, late=None) -> list[str]:
    """What is warned of in so many looks, four to the 100 seconds after which it is time."""
    said = []
    with (tmp_path / "stalls.txt").open("a") as file:
        watchdog._watch(file, 100.0, where, said.append, Looks(count, late or {}, monkeypatch))
    return said


def test_only_what_does_not_move_is_reported_and_again_as_often_as_the_time_passes(tmp_path, monkeypatch):
    count = itertools.count()
    assert reports(tmp_path, monkeypatch, lambda: f"update {next(count)}") == []
    assert reports(tmp_path, monkeypatch, lambda: f"update {next(count) // 4}") == []  # moves every 100 seconds, just
    assert (tmp_path / "stalls.txt").read_text() == ""
    assert len(reports(tmp_path, monkeypatch, lambda: "update 3")) == 4  # in 500 seconds, a look apart from one to the next
    assert (tmp_path / "stalls.txt").read_text().count("nothing has moved for 1.67 minutes; update 3\n") == 4


def test_a_process_that_was_itself_held_is_not_reported(tmp_path, monkeypatch):
    assert reports(tmp_path, monkeypatch, lambda: "update 3", 4, {1: 1000.0}) == []


def test_stacks_are_written_even_while_the_interpreters_lock_is_held(tmp_path):
    """As by a regular expression that does not end. It moves whenever it is looked at, so none but that timer can write."""
    path, count = tmp_path / "stalls.txt", itertools.count()
    with watchdog.watching(path, QUICK, lambda: f"update {next(count)}", print):
        until = time.monotonic() + 60
        while not path.stat().st_size and time.monotonic() < until:
            ctypes.PyDLL(None).usleep(900_000)  # which, of a PyDLL, keeps the lock
        text = path.read_text()
    assert "Timeout" in text and "in test_stacks_are_written" in text and "nothing has moved" not in text


def test_that_of_a_run_writes_to_its_folder(tmp_path):
    settings = config.TrainConfig(run=config.Run(dir=str(tmp_path), watchdog=QUICK))
    with console.Progress(9, 0, console.make_console(quiet=True)) as show:
        show.phase("update", 1, 4)
        with run.watching(SimpleNamespace(config=settings), show):
            assert "; step 1, update 1/4" in wait_for(tmp_path / "stalls.txt")


def test_it_can_be_turned_off(tmp_path):
    with watchdog.watching(tmp_path / "stalls.txt", 0, lambda: "", print):
        assert not (tmp_path / "stalls.txt").exists()


def test_the_display_says_where_a_run_is():
    with console.Progress(9, 3, console.make_console(quiet=True)) as show:
        assert show.where() == "step 4, between two phases"
        show.phase("reward", 17)
        assert show.where() == "step 4, reward 17"
        show.phase("rollout", 300, 1024)
        assert show.where() == "step 4, rollout 300/1024"
        show.step({"step": 4})
        assert show.where() == "step 5, between two phases"
