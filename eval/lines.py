"""A file of JSON lines that is only ever appended to, so that a program that is killed goes on where it stopped."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

TAKEN = "another process is writing it: wait for its end, or give another --out"


class Lines:
    """The file at `path`, for this process alone until `close`.

    Half a line at the end, which a kill can leave, is taken away when it is opened.
    """

    def __init__(self, path: Path):
        """Raises ValueError where another process writes it."""
        self._file = path.open("a+b")
        lock(self._file, f"{path}: {TAKEN}")
        self._file.seek(0)
        whole = self._file.read()
        end = whole.rfind(b"\n") + 1
        self._file.truncate(end)
        self.found: list[bytes] = whole[:end].split(b"\n")[:-1]  # the lines that were there, as they stand

    def append(self, row: dict[str, Any], *, sync: bool) -> None:
        """Returns when no kill of this process can lose the row; sync: nor the end of the machine."""
        self._file.write(encoded(row))
        self._file.flush()
        if sync:
            os.fsync(self._file.fileno())

    def clear(self) -> None:
        self._file.truncate(0)

    def close(self) -> None:
        self._file.close()


def lock(file: IO[Any], taken: str) -> None:
    """Locks a file until it is closed. Closes it and raises ValueError(taken) where another process has it locked."""
    with contextlib.suppress(OSError):  # some network file systems know no locks
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(taken) from None


def encoded(row: dict[str, Any]) -> bytes:
    """A row as a line. Half a surrogate pair, which UTF-8 lacks, becomes the escape that JSON has for it."""
    return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
