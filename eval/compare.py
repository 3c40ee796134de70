"""Several models on the same benchmarks, on one page: `python -m eval.compare --help`

python -m eval.compare base=scores/qwen after=scores/tool-n1 --out comparison

results       folders of eval.run -> verdicts, what can be compared, where they differ in more than the model
chance        intervals, McNemar's test
comparison    the page and its pictures
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated

import tyro

from data import command_line
from data.command_line import plural
from eval import comparison, report, results
from eval.chance import ALL
from eval.results import BENCHMARKS, Folder
from grpo_jax import config, console


@dataclass(frozen=True)
class Args:
    """One page on several models or checkpoints that answered the same benchmarks: scores with intervals, the paper's rows
    beside them, why replies are wrong, and what changed from one model to another."""

    #: Folders that python -m eval.run --benchmarks wrote (its --out), each with the name that it should have on the page, if
    #: that is not its own. One alone is fine: then there is a page of its scores, and nothing is set against it.
    folders: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME=]DIR ...")] = ()
    #: The folder to write: comparison.md, scores.png and errors.png. What it has of an earlier comparison is replaced.
    out: Path = Path("comparison")
    #: The name of the folder that all others are set against, item by item. Left out: the first. Give it where tables and
    #: pictures should begin with another one.
    base: str = ""


def named(words: Sequence[str]) -> list[tuple[str, Path]]:
    """(label, folder) of each DIR or NAME=DIR. Raises ValueError for a name that is empty or stands twice.

    Without a name it is the last part of the path, or as many more as tell it from the others (so a/eval and b/eval keep
    their whole names); one folder given twice has a number behind its second name.
    """
    found = []
    for word in words:
        name, equals, path = word.partition("=")
        name, path = (name, Path(path)) if equals and not Path(word).exists() else (None, Path(word))
        if name is not None and not (name.strip() and word.partition("=")[2]):
            raise ValueError(f"{word}: no name before the equals sign, or no folder behind it: give NAME=DIR, or DIR alone")
        found.append((name, path))
    given = Counter(name for name, _ in found if name is not None)
    if twice := [name for name, count in given.items() if count > 1]:
        raise ValueError(f"{twice[0]}=...: two folders have this name: give each its own")
    paths = {path.resolve().parts for name, path in found if name is None}
    depth = next((d for d in range(1, 99) if len({parts[-d:] for parts in paths}) == len(paths)), 1)
    labels: list[str] = []
    for name, path in found:
        plain = name or "/".join(path.resolve().parts[-depth:])
        label, number = plain, 2
        while label in labels or (name is None and label in given):
            label, number = f"{plain} {number}", number + 1
        labels.append(label)
    return [(label, path) for label, (_, path) in zip(labels, found, strict=True)]


def run(args: Args) -> None:
    """Reads the folders, then writes the page and shows the means. Raises ValueError or OSError, before anything is written."""
    if not args.folders:
        raise ValueError("no folders: give some that python -m eval.run --benchmarks ... --out wrote")
    if args.out.exists() and not args.out.is_dir():
        raise FileExistsError(f"--out {args.out}: this is a file: give a folder")
    pairs = named(args.folders)
    labels = [label for label, _ in pairs]
    if args.base and len(labels) < 2:
        raise ValueError(f"--base {args.base}: there is one folder, and nothing to set against it: give another, or no --base")
    if args.base and args.base not in labels:
        near = command_line.nearest(args.base, labels)
        raise ValueError(f"--base {args.base}: no folder has this name: did you mean {near!r}? Names are {', '.join(labels)}")
    folders = [results.read(label, path) for label, path in pairs]
    if not results.asked(folders):
        raise ValueError("nothing can be compared: of no benchmark do the folders have an item in common: give fewer at once")
    base = folders[labels.index(args.base) if args.base else 0]
    notes = results.remarks(folders)
    args.out.mkdir(parents=True, exist_ok=True)
    report.write(args.out / comparison.PAGE, comparison.page(folders, base, notes))
    comparison.scores(args.out / comparison.SCORES, folders)
    comparison.errors(args.out / comparison.ERRORS, folders)
    for note in notes:
        console.warn(console.visible(note))
    show(folders, base)
    console.note(f"written: {args.out / comparison.PAGE}, {comparison.SCORES}, {comparison.ERRORS}")


def show(folders: Sequence[Folder], base: Folder) -> None:
    """Prints of each benchmark the means of every folder, and below them the differences to the base."""
    for name, some in results.asked(folders).items():
        benchmark, ids = BENCHMARKS[name], results.common(some, name)
        main, rows = benchmark.protocols[0], []
        for folder in some:
            found = results.scored(results.counts(folder, name, ids, main), name)
            means = {row: "{:.1f} [{:.1f}, {:.1f}]".format(*found[row]) for row in results.headlines(found, name)}
            rows.append((folder.label, means))
        for other in some:
            both = results.answered(base, other, name) if base in some and other is not base else []
            if both:
                cells = results.pairs(base, other, name, both, main)
                changes = results.changes(cells, name)
                shown = {row: comparison.points(changes[row]) for row in rows[0][1] if row in changes}
                of = "" if len(both) == len(ids) else f" of {len(both):,}"
                sides = f"{cells[ALL].won:,} won, {cells[ALL].lost:,} lost{of}, p: {comparison.p_value(cells[ALL])}"
                rows.append((f"{other.label} - {base.label}", shown | {"": sides}))
        widths = [max(map(len, column)) for column in zip_longest(*(shown.values() for _, shown in rows), fillvalue="")]
        lines = [(console.visible(label), _columns(shown.values(), widths)) for label, shown in rows]
        console.header(f"{benchmark.title}, {plural(len(ids), 'item')}: {', '.join(map(results.words, rows[0][1]))}", lines)


def _columns(cells: Iterable[str], widths: Sequence[int]) -> str:
    return "   ".join(f"{text:{width}}" for text, width in zip(cells, widths, strict=False)).rstrip()


def main() -> None:
    run(command_line.read(Args, "python -m eval.compare", sys.argv[1:]))


if __name__ == "__main__":
    config.run_main(main)
