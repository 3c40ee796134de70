"""`python -m data.build`: public sets of tool calls, or files like theirs, to one folder of rows to train on.

    row of ToolACE --toolace.examples_of--> Examples or reasons --`_kept`--> Examples --jsonl.row_of--> part-00000.jsonl, ...
    row of xLAM    --jsonl.example_of-----> Example or reason                                          test/, manifest.json

Rows stream from input to output; only the ids of what was kept are held. What is drawn for a row (its masking, ...) is a
function of the seed and of the row's content, not of its place, so that adding rows changes no other row. The folder is
written beside its place and moved there whole; an earlier one stays until then. The same inputs, options and seed give the
same bytes.

Counting is by *answer*: a turn of the assistant in ToolACE, a row in xLAM. A row that cannot be read at all counts as one.
Each answer is kept or dropped for one reason, so that kept and dropped add up to what was read.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from data import augment, command_line, jsonl, overlap, toolace
from data.command_line import plural
from data.example import Example

TEST = "test"  # the folder in `out`
IN_BENCHMARK = "in_benchmark"  # a user says the same in a file of --benchmarks
SINGLE_TURN, MULTI_TURN = "single-turn", "multi-turn"  # whether the assistant speaks once in a row, or more often
ROWS_PER_FILE = 10_000
MADE_BY = "python -m data.build of grpo_jax"
SETS = {
    # what the word `hub` means, and whose work it is
    "toolace": {
        "hub_id": "Team-ACE/ToolACE",
        "licence": "Apache-2.0",
        "attribution": "ToolACE by Team-ACE, arXiv 2409.00920",
    },
    "xlam": {
        "hub_id": "Salesforce/xlam-function-calling-60k",
        "licence": "CC-BY-4.0",
        "attribution": "xlam-function-calling-60k by Salesforce AI Research (APIGen, arXiv 2406.18518)",
    },
}


@dataclass(frozen=True)
class Build:
    """Makes a folder of rows to train on from public sets of tool calls, or from files like theirs."""

    #: The folder to make; `--data.path` of training takes it. An earlier build there is replaced, anything else is not.
    out: str
    #: Conversations of ToolACE: `hub` for Team-ACE/ToolACE, another hub id, or a JSON, JSONL or Parquet file or a folder of
    #: them. Your own conversations in its shape go here, too.
    toolace: str | None = None
    #: Rows of xLAM: `hub` for Salesforce/xlam-function-calling-60k (gated: accept its conditions there first), or as above.
    #: Your own rows of query or messages, tools and answers go here, too.
    xlam: str | None = None
    #: Keep answers that call nothing (ToolACE's prose, empty answers of xLAM). Take it for a model that should also know when
    #: not to call; the paper's data has none.
    no_call: bool = False
    #: Share of the rows that lose the tools they call, so that the right answer is to call nothing. Take it, with a tenth or
    #: less, where --no_call gives too few such rows. Rows that would have no tool left stay as they are.
    irrelevance: float = 0.0
    #: Share of xLAM's rows whose names of tools and parameters become random letters, so that a model reads descriptions
    #: instead of guessing by names (Hammer). 0.67 in the released code of Tool-N1.
    masking: float = 0.0
    #: Files and folders of benchmarks (the data/ of bfcl-eval, API-Bank, ACEBench): a row that asks what one of them asks is
    #: dropped, and counted. Name all that you will evaluate on.
    benchmarks: tuple[str, ...] = ()
    #: Share of the rows that go to OUT/test instead, which training on OUT does not read: for eval.run --data.path OUT/test, or
    #: eval.study --test OUT/test. 0.02 of 50 000 is plenty. They stay as they are, whatever --irrelevance and --masking are;
    #: rows that begin with the same question, like the turns of a conversation, are on one side.
    test: float = 0.0
    #: Stop after so many rows kept of each source, for a quick look.
    limit: int | None = None
    #: Of what is drawn for --irrelevance, --masking and --test.
    seed: int = 0


@dataclass
class Source:
    """One set, and what became of it. By kind (single-turn, multi-turn): rows, answers, kept; by reason: dropped; by what
    was done to kept ones: made; by file of --benchmarks: in_files (a row may be in several)."""

    name: str  # toolace, xlam
    path: str  # or hub id
    sha256: dict[str, str] = field(default_factory=dict)  # of each file; of the rows as JSON lines, where they are the hub's
    rows: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    made: Counter[str] = field(default_factory=Counter)
    in_files: Counter[str] = field(default_factory=Counter)


class Shards:
    """JSON lines in files of ROWS_PER_FILE, with their hashes."""

    def __init__(self, folder: Path):
        self.folder, self.file, self.written = folder, None, []

    def write(self, row: dict[str, Any]) -> None:
        if not self.written or self.written[-1]["rows"] == ROWS_PER_FILE:
            self.close()
            self.folder.mkdir(exist_ok=True)
            name = f"part-{len(self.written):05d}.jsonl"
            self.file, self.digest = (self.folder / name).open("wb"), hashlib.sha256()
            self.written.append({"file": name, "rows": 0, "sha256": ""})
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        self.file.write(line)
        self.digest.update(line)
        self.written[-1]["rows"] += 1

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.written[-1]["sha256"] = self.digest.hexdigest()


def build(settings: Build, console: Console | None = None) -> dict[str, Any]:
    """Makes the folder `settings.out`, shows what became of the rows, and returns the folder's manifest.

    Raises ValueError for options that do not fit, a file that cannot be read and where no row is kept, FileNotFoundError
    where an input does not exist, PermissionError where a data set is gated, FileExistsError where `out` holds something
    other than an earlier build.
    """
    console = console or Console(highlight=False)
    sources = _sources(settings)
    out = Path(settings.out).resolve()
    replaces = _is_build(out, sources)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (out.with_name(f".{out.name}.{what}") for what in ("partial", "partial-old"))
    with _alone(partial.with_name(partial.name + ".lock"), out):
        if _clean_up(out, partial, old):
            replaces = _is_build(out, sources)
            console.print(f"{out}: the earlier build was cut off as it was replaced, and is back", soft_wrap=True)
        benchmarks = overlap.read(settings.benchmarks)
        partial.mkdir()
        try:
            shards, test = _write(partial, sources, settings, benchmarks, console)
            manifest = _manifest(settings, sources, benchmarks, shards, test)
            text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
            (partial / jsonl.MANIFEST).write_text(text, encoding="utf-8")
            _move(partial, out, old)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    _show(console, sources, benchmarks)
    where = f"--data.path {settings.out}" + " (in place of the earlier build)" * replaces
    rows, files = plural(manifest["examples"], "row"), plural(len(shards), "file")
    console.print(f"{rows} in {files}: {where}", soft_wrap=True)
    if test:
        console.print(f"{plural(_rows(test), 'row')} to test on: {settings.out}/{TEST}", soft_wrap=True)
    return manifest


def _sources(settings: Build) -> list[Source]:
    """The sources that are given. Raises ValueError for options that do not fit."""
    for option in ("irrelevance", "masking"):
        if not 0 <= getattr(settings, option) <= 1:
            raise ValueError(f"--{option} {getattr(settings, option)}: give a share from 0 to 1")
    if not 0 <= settings.test < 1:
        raise ValueError(f"--test {settings.test}: give a share from 0 to below 1")
    if settings.masking and not settings.xlam:
        raise ValueError("--masking is for rows of xLAM: give --xlam, or leave it out")
    if settings.limit is not None and settings.limit < 1:
        raise ValueError(f"--limit {settings.limit}: give a number of rows from 1 on")
    given = {"toolace": settings.toolace, "xlam": settings.xlam}
    sources = [Source(name, SETS[name]["hub_id"] if path == "hub" else path) for name, path in given.items() if path]
    if not sources:
        raise ValueError("no rows are named: give --toolace or --xlam, a file, a folder or `hub`")
    return sources


# ---------------------------------------------------------------- rows


def _write(
    folder: Path, sources: list[Source], settings: Build, benchmarks: overlap.Benchmarks, console: Console
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Writes the rows that are kept, counts in `sources`, and returns what was written, file by file: to train, to test."""
    shards, test, seen = Shards(folder), Shards(folder / TEST), set()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeElapsedColumn())
    with (
        contextlib.closing(shards),
        contextlib.closing(test),
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        for source in sources:
            rows = bar.track(_outcomes(source, settings.no_call), description=source.name)
            for example, to_test in _kept(rows, source, settings, benchmarks, seen):
                (test if to_test else shards).write(jsonl.row_of(example))
            other = None if source.kept else _other_door(source)
            if other:
                raise ValueError(f"--{source.name}: no row is kept ({_counts(source.dropped)}): {other}")
    if not seen:
        dropped = sum((source.dropped for source in sources), Counter())
        raise ValueError(f"no row is kept ({_counts(dropped)}): give other data")
    if not shards.written or (settings.test and not test.written):
        left = "train" if test.written else "test"
        raise ValueError(f"--test {settings.test} of {plural(len(seen), 'row')} leaves none to {left} on: give another share")
    return shards.written, test.written


def _counts(dropped: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in dropped.most_common()) or "there are none"


def _other_door(source: Source) -> str | None:
    """What to do where the rows look like those of the other set."""
    row, _ = next(jsonl.rows(source.path), (None, ""))
    keys = row.keys() if isinstance(row, dict) else set()
    if source.name == "toolace" and "answers" in keys and "conversations" not in keys:
        return "these look like xLAM's rows: give --xlam"
    if source.name == "xlam" and "conversations" in keys and "answers" not in keys:
        return "these look like ToolACE's conversations: give --toolace"
    return None


def _is_test(example: Example, settings: Build) -> bool:
    """Drawn from the first question, so that no turn of a conversation is the context of one on the other side."""
    question = next((turn["content"] for turn in example.messages if turn["role"] == "user"), "")
    return random.Random(f"{settings.seed} test {overlap.normalized(question)}").random() < settings.test


def _outcomes(source: Source, no_call: bool) -> Iterator[list[Example | str]]:
    """An Example or a reason for each answer of a row, row by row; notes in `source` what was read."""
    local, digest = Path(source.path).exists(), hashlib.sha256()
    if local:
        source.sha256 |= {str(file): _sha256(file) for file in jsonl.files(Path(source.path))}
    for number, (row, _) in enumerate(jsonl.rows(source.path)):
        if not local:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
            source.sha256[source.path] = digest.hexdigest()
        if source.name == "toolace":
            yield toolace.examples_of(row, str(number), keep_no_call=no_call)
        else:
            yield [jsonl.example_of(row, source.name, keep_no_call=no_call)]


def _kept(
    rows: Iterable[list[Example | str]], source: Source, settings: Build, benchmarks: overlap.Benchmarks, seen: set[str]
) -> Iterator[tuple[Example, bool]]:
    """The examples to write, changed where that is drawn, each with whether it is one to test on.

    Counts everything in `source`, and their ids in `seen`.
    """
    for outcomes in rows:
        kind = _kind(outcomes)
        source.rows[kind] += 1
        for outcome in outcomes:
            source.answers[kind] += 1
            files = () if isinstance(outcome, str) else benchmarks.files_with(outcome.messages)
            if isinstance(outcome, str) or files:
                source.in_files.update(files)
                source.dropped[IN_BENCHMARK if files else outcome] += 1
                continue
            to_test = _is_test(outcome, settings)
            example, made = (outcome, [TEST]) if to_test else _changed(outcome, source, settings)
            if example.id in seen:
                source.dropped[jsonl.DUPLICATE] += 1
                continue
            seen.add(example.id)
            source.made.update(made)
            source.kept[kind] += 1
            yield example, to_test
            if source.kept.total() == settings.limit:
                return


def _kind(outcomes: list[Example | str]) -> str:
    contexts = [outcome.messages for outcome in outcomes if isinstance(outcome, Example)]
    earlier = any(turn["role"] == "assistant" for messages in contexts for turn in messages)
    return MULTI_TURN if earlier or len(outcomes) > 1 else SINGLE_TURN


def _changed(example: Example, source: Source, settings: Build) -> tuple[Example, list[str]]:
    """The example after what is drawn for it, and the names of that. Each row has draws of its own, from its content."""
    made, draws = [], random.Random(f"{settings.seed} {example.id}")
    if draws.random() < settings.irrelevance and (other := augment.irrelevant(example)):
        example = other
        made.append("irrelevance")
    if draws.random() < settings.masking and source.name == "xlam":
        example = augment.masked(example, draws)
        made.append("masking")
    return example, made


# ---------------------------------------------------------------- files


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _is_build(out: Path, sources: list[Source]) -> bool:
    """Whether there is an earlier build in `out`; FileExistsError where there is something else, or one of the inputs."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if any(out in (place, *place.parents) for place in (Path(source.path).resolve() for source in sources)):
        raise FileExistsError(f"--out {out} is where rows are read from: give another folder")
    try:
        manifest = json.loads((out / jsonl.MANIFEST).read_text(encoding="utf-8"))
        parts = [*manifest["shards"], *manifest.get(TEST, ())]
        ours = {jsonl.MANIFEST, *(shard["file"] for shard in parts)} if manifest["made_by"] == MADE_BY else set()
    except (OSError, ValueError, LookupError, TypeError):
        ours = set()
    found = [file for file in out.rglob("*") if file.is_symlink() or not file.is_dir()] if out.is_dir() else [out]
    inside = {file.relative_to(out).as_posix() for file in found}
    if not inside <= ours:
        raise FileExistsError(f"--out {out} holds other files than those of an earlier build: give a new or empty folder")
    return True


@contextlib.contextmanager
def _alone(lock: Path, out: Path) -> Iterator[None]:
    """Holds a lock that ends with the process, however that ends. ValueError where another process holds it."""
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat())  # else its holder has just ended
        except BlockingIOError:
            held = False
        except OSError:
            held = True  # as far as can be known: a file system without locks
        if not held:
            raise ValueError(f"--out {out}: another process is building it: wait for its end, or give another folder")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _clean_up(out: Path, partial: Path, old: Path) -> bool:
    """Removes what a killed build left; whether it left `_move` half done, so that the earlier build is now put back."""
    shutil.rmtree(partial, ignore_errors=True)
    if not old.exists():
        return False
    if not out.exists() or not any(out.iterdir()):
        old.rename(out)
        return True
    shutil.rmtree(old)
    return False


def _move(folder: Path, out: Path, old: Path) -> None:
    """Puts a folder in the place of another one, which may exist and is `old` for a moment."""
    if out.exists():
        out.rename(old)
        folder.rename(out)
        shutil.rmtree(old)
    else:
        folder.rename(out)


def _manifest(
    settings: Build,
    sources: list[Source],
    benchmarks: overlap.Benchmarks,
    shards: list[dict[str, Any]],
    test: list[dict[str, Any]],
) -> dict[str, Any]:
    """What was built from what, as plain JSON. Nothing of it depends on when or where."""
    in_files = sum((source.in_files for source in sources), Counter())
    return {
        "made_by": MADE_BY,
        "options": {key: value for key, value in dataclasses.asdict(settings).items() if key != "out"},
        "sources": [{**vars(source), "public_set": SETS[source.name]} for source in sources],
        "benchmarks": {file: {"queries": count, "dropped": in_files[file]} for file, count in benchmarks.counts.items()},
        "examples": _rows(shards),
        "shards": shards,
        TEST: [{**shard, "file": f"{TEST}/{shard['file']}"} for shard in test],
    }


def _rows(shards: list[dict[str, Any]]) -> int:
    return sum(shard["rows"] for shard in shards)


# ---------------------------------------------------------------- what a person sees


def _show(console: Console, sources: list[Source], benchmarks: overlap.Benchmarks) -> None:
    table = Table("source", "kind", *(Column(name, justify="right") for name in ("rows", "answers", "kept")))
    for source in sources:
        for kind in (kind for kind in (SINGLE_TURN, MULTI_TURN) if source.rows[kind]):
            table.add_row(source.name, kind, *(f"{count[kind]:,}" for count in (source.rows, source.answers, source.kept)))
    console.print(table)
    _show_counts(console, "dropped", sources, [source.dropped for source in sources])
    if benchmarks.counts:
        columns = ("queries", *(f"{source.name} dropped" for source in sources))
        table = Table("benchmark", *(Column(name, justify="right") for name in columns))
        for file, queries in benchmarks.counts.items():
            table.add_row(file, f"{queries:,}", *(f"{source.in_files[file]:,}" for source in sources))
        console.print(table)
    _show_counts(console, "made", sources, [source.made for source in sources])


def _show_counts(console: Console, title: str, sources: list[Source], counts: list[Counter[str]]) -> None:
    total = sum(counts, Counter())
    if total:
        table = Table(title, *(Column(source.name, justify="right") for source in sources))
        for reason, _ in total.most_common():
            table.add_row(reason, *(f"{count[reason]:,}" for count in counts))
        console.print(table)


def main() -> None:
    """The command line. An error that a user can mend is one line on stderr and exit code 2."""
    try:
        build(command_line.read(Build, "python -m data.build", sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError) as error:
        if not isinstance(error, OSError) and not _is_ours(error):
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def _is_ours(error: BaseException) -> bool:
    """Whether code of this package raised it; a ValueError from elsewhere is a bug, and shows where."""
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    return Path(frame.tb_frame.f_code.co_filename).resolve().parent == Path(__file__).resolve().parent


if __name__ == "__main__":
    main()
