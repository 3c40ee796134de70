"""The command: `python -m grpo_jax.report --help`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data import command_line
from data.command_line import plural
from grpo_jax import config, console
from grpo_jax.report import page, server


@dataclass(frozen=True)
class Args:
    """One page of a run, or of several on top of each other: curves, every response with its reward and why, and a summary. It
    is a file that opens in any browser and asks nothing of any other place. A run makes its own at its end; this makes it anew,
    also while the run goes on."""

    #: Folders of runs (their --run.dir).
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")] = ()
    #: The file to write. Left out: report.html in the run's folder, or, of several runs, in the present one.
    out: Path | None = None
    #: At most about so many groups of each run: of a longer one the first ones of each step, which are drawn at random. Each
    #: thousand takes some 2 MB of the file, more with long responses.
    groups: int = page.MOST_GROUPS
    #: Show the page on this machine's own address instead, and renew it by itself while the run goes on. Ctrl-C ends it. Where
    #: the run is on another machine: ssh -L PORT:127.0.0.1:PORT THERE.
    serve: bool = False
    #: Of --serve. 0: one that is free.
    port: int = 8008


def run(args: Args) -> None:
    """Writes the page, or shows it. Raises ValueError or OSError, before anything is written."""
    if not args.runs:
        raise ValueError("no run: give the folder of one (its --run.dir), or of several")
    if args.groups < 1:
        raise ValueError(f"--groups {args.groups}: give at least 1")
    if args.serve:
        return serve(args)
    out = args.out or (args.runs[0] if len(args.runs) == 1 else Path()) / "report.html"
    if out.is_dir():
        raise IsADirectoryError(f"--out {out}: this is a folder: give a file")
    made = page.write(args.runs, out, args.groups)
    for reading in made.readings:
        for name in reading.torn:
            console.warn(f"{reading.folder / name}: the last line has no end, and is left out")
        if reading.groups.left_out:
            console.warn(
                f"{reading.folder}: {reading.count:,} of {reading.count + reading.groups.left_out:,} groups (--groups)"
            )
    rows, groups = (sum(count) for count in zip(*((len(r.rows), r.count) for r in made.readings), strict=True))
    size = out.stat().st_size / 1e6
    console.note(f"{out}: {size:.1f} MB, {plural(rows, 'row')} of metrics, {plural(groups, 'group')}")


def serve(args: Args) -> None:
    try:
        shown = server.make(page.Page(args.runs, args.groups), args.port)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise OSError(f"--port {args.port}: {error.strerror or error}: give another one, or 0 for one that is free") from None
    console.note(f"http://{server.HOST}:{shown.server_port}/ on this machine; Ctrl-C ends it")
    with shown:
        shown.serve_forever()


def main() -> None:
    run(command_line.read(Args, "python -m grpo_jax.report", sys.argv[1:]))


if __name__ == "__main__":
    config.run_main(main)
