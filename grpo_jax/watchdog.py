"""Where a run stands when nothing moves any more: a hung device, a lost file system, a reward that does not come back.

    watching    around the loop: a thread that looks, now and then, whether something has moved

The thread writes what it sees and the stacks of all threads to a file, and leaves the run alone. Where it cannot run itself,
because a reward's regular expression holds the interpreter's lock, say, `faulthandler`'s own timer, which needs no lock,
writes the stacks half as long later.
"""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def watching(path: Path, minutes: float, where: Callable[[], str], warn: Callable[[str], None]) -> Iterator[None]:
    """Appends to `path` whenever `where`() has not changed for so many minutes (0: never), and warns. Costs a look a quarter
    of that time."""
    if not minutes:
        yield
        return
    ended = threading.Event()
    with path.open("a") as file:
        thread = threading.Thread(target=_watch, args=(file, 60 * minutes, where, warn, ended), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            faulthandler.cancel_dump_traceback_later()
    if not path.stat().st_size:
        path.unlink()


def _watch(file: TextIO, seconds: float, where: Callable[[], str], warn: Callable[[str], None], ended: threading.Event) -> None:
    look, seen, since = seconds / 4, "", 0.0
    before = time.monotonic()
    while True:
        now, at = time.monotonic(), where()
        if at != seen or now - before > 2 * look:  # or this process itself was held, and is not to blame
            seen, since = at, now
            faulthandler.dump_traceback_later(1.5 * seconds, repeat=True, file=file)
        elif now - since >= seconds:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: nothing has moved for {(now - since) / 60:.3g} minutes; {at}\n")
            file.flush()
            faulthandler.dump_traceback(file)
            file.write("\n")
            file.flush()
            warn(f"nothing has moved for {(now - since) / 60:.3g} minutes ({at}); the stacks of all threads are in {file.name}")
            seen = ""  # counts anew
        before = now
        if ended.wait(look):
            return
