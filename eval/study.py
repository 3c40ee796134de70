"""A question of the paper as one command: a grid of runs, their evaluation, a table beside the paper's. See docs/study.md.

    python -m eval.study recipes --scale demo --out studies/recipes

    GRIDS     the studies as plain data: (args) -> Study, its rows in the paper's order
    command   a row and a seed -> the command line of its training
    inputs    what a command reads, file by file, as hashes
    once      runs a command unless it has run with these inputs, and keeps that it has
    report    (its own module) scores -> study.md, accuracy.png, curves.png

Each run is a process of its own in OUT/ROW/seed-S. The same command again goes on where it stopped: training resumes
itself, what has finished is not repeated. A run that fails is reported, and the others go on.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data import command_line, demo, jsonl
from data.example import Example
from eval import report
from eval.lines import lock
from eval.report import Outcome
from grpo_jax import config, console
from grpo_jax.config import DEMO_MODEL, SftConfig, TrainConfig

RAW = "base"  # the row of the model that nobody trained
SFT, GRPO = "grpo_jax.sft", "grpo_jax.train"
CONFIGS = {SFT: SftConfig, GRPO: TrainConfig}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # that stop a study
PAPER = "Qwen/Qwen2.5-7B-Instruct"


@dataclass(frozen=True)
class Args:
    """A study of Tool-N1: its runs, their evaluation, and the table."""

    #: recipes: supervised, reinforced or both (Table 3); rewards (Table 4); data: which source (Table 5); sizes: models of
    #: several sizes and families (Figures 4 and 5).
    study: Annotated[Literal["recipes", "rewards", "data", "sizes"], tyro.conf.Positional]
    #: The study's folder. The same command again goes on with what is in it.
    out: Path
    #: demo: the tiny model and the tasks that come with the program, in under an hour on two CPU cores.
    scale: Literal["demo", "paper"] = "paper"
    #: Runs of each row, with the seeds 0, 1, ... The table has their mean and spread. 1 for a first look; 3 or more before you
    #: believe a difference between rows. Raise it later with the same --out: what has run is kept.
    seeds: int = 3
    #: Rows to train on by reinforcement, as `data.build` writes them: for `data`, both sources together.
    data: str = ""
    #: For `data`: the rows of ToolACE alone.
    toolace: str = ""
    #: For `data`: the rows of xLAM alone.
    xlam: str = ""
    #: For `recipes`: rows with the reasoning of a stronger model; supervised and reinforced runs both take these.
    reasoning: str = ""
    #: Rows that no run trains on: what the finished models are scored on.
    test: str = ""
    #: Of these (or of the demo's 256), at most so many, the same ones for all models: for a first look, or where scoring takes
    #: long. A share of n rows is known to about ± 1 / sqrt(n).
    limit: int | None = None
    #: The model to begin from, where it is not the paper's (or, at demo scale, the demo's).
    model: str = ""
    #: Further options for every supervised run, in one pair of quotes and after an equals sign: those of your machine, say.
    sft: str = ""
    #: Further options for every run of reinforcement learning, likewise: --train="--run.steps 50".
    train: str = ""
    #: Print the commands, and run and write nothing. Take it to look at them, or to give them to a launcher of your own.
    dry_run: bool = False


@dataclass(frozen=True)
class Row:
    """One row of the table: how its model comes about."""

    name: str  # its folder
    label: str
    program: str = ""  # that trains it; empty: `start` as it is
    preset: str = ""
    options: tuple[str, ...] = ()
    start: str = ""  # the model it begins from, or `row:NAME`, the one of that row with the same seed; empty: the preset's
    paper: tuple[float, float, float] | None = None  # BFCL non-live, live and their mean, in the paper


@dataclass(frozen=True)
class Study:
    """A grid, and how its models are scored."""

    title: str
    paper: str  # where its numbers come from
    rows: tuple[Row, ...]
    evaluation: tuple[str, ...]  # options of eval.run
    files: Callable[[Path], None] = lambda out: None  # writes, into the study's folder, rows that the runs read


# ---------------------------------------------------------------- the grids

_ROWS = 384  # the demo's "100 %": 24 steps of 16 prompts; the program makes 4096 tasks
_SHARE = _ROWS / 4096
_DEMO_GRPO = (
    "--run.no_tensorboard", "--rollout.prompts_per_step", "16", "--validation.every", "6", "--validation.limit", "128",
)  # fmt: skip
_DEMO_SFT = ("--run.no_tensorboard", "--validation.limit", "0")
_DEMO_SFT_RATE = "1e-3"
_DEMO_EVALUATION = ("--data.path", "demo", "--max_response_tokens", "96", "--samples", "4")


def recipes(args: Args) -> Study:
    """Table 3. Supervised and reinforced runs see the same rows."""
    demo_scale = args.scale == "demo"

    def share(begin: float, end: float) -> tuple[str, ...]:
        scale = _SHARE if demo_scale else 1
        return ("--data.begin", f"{begin * scale:g}", "--data.end", f"{end * scale:g}")

    def supervised(name: str, label: str, replies: str, end: float, paper: tuple[float, float, float]) -> Row:
        options = share(0, end)
        if demo_scale:  # five passes, as in the paper
            steps = str(round(5 * end * _ROWS / 32))
            more = ("--run.steps", steps, "--data.replies", replies, "--optimizer.learning_rate", _DEMO_SFT_RATE)
            return Row(name, label, SFT, "demo", (*_DEMO_SFT, *more, *options), args.model, paper)
        preset = "tool-n1-reason" if replies == "reasoning" else "tool-n1-no-reason"
        return Row(name, label, SFT, preset, ("--data.path", args.reasoning, *options), args.model, paper)

    def reinforced(name: str, label: str, begin: float, end: float, start: str, paper: tuple[float, float, float]) -> Row:
        if demo_scale:  # one pass
            steps = ("--run.steps", str(round((end - begin) * _ROWS / 16)))
            return Row(name, label, GRPO, "demo", (*_DEMO_GRPO, *steps, *share(begin, end)), start, paper)
        return Row(name, label, GRPO, "tool-n1-7b", ("--data.path", args.reasoning, *share(begin, end)), start, paper)

    rows = (
        _raw(args, None),
        supervised("no-reason-sft-50", "No-Reason SFT, 50 %", "calls", 0.5, (85.94, 76.09, 81.02)),
        supervised("no-reason-sft-100", "No-Reason SFT, 100 %", "calls", 1, (86.40, 76.54, 81.47)),
        supervised("reason-sft-50", "Reason-SFT, 50 %", "reasoning", 0.5, (86.40, 76.61, 81.50)),
        supervised("reason-sft-100", "Reason-SFT, 100 %", "reasoning", 1, (87.54, 77.87, 82.71)),
        reinforced("reason-sft-rl", "Reason-SFT, 50 %, then RL, 50 %", 0.5, 1, "row:reason-sft-50", (88.19, 78.16, 83.17)),
        reinforced("rl-50", "RL, 50 %", 0.5, 1, args.model, (87.12, 78.90, 83.01)),
        reinforced("rl-100", "RL, 100 %", 0, 1, args.model, (88.23, 78.24, 83.24)),
    )
    return Study("Supervised learning, reinforcement learning, or both", "Table 3", rows, _evaluation(args))


def rewards(args: Args) -> Study:
    """Table 4. At demo scale from a model that skips some thoughts, or no reward would have to teach the format."""
    kinds = (
        ("format", "Fine-grained: format", (87.83, 79.64, 83.74)),
        ("format_and_names", "Fine-grained: format and names", (88.54, 76.61, 82.58)),
        ("binary_no_reasoning", "Binary, without the reasoning format", (87.63, 76.24, 81.94)),
        ("binary", "Binary, with the reasoning format", (89.25, 80.38, 84.82)),
    )
    if args.scale == "paper":
        preset, options, start = "tool-n1-7b", ("--data.path", args.data), args.model
        before, files = (_raw(args, None),), Study.files
    else:
        files = _half_thinking
        preset, start = "demo", "row:half-thinking"
        options = (*_DEMO_GRPO, "--run.steps", "24", "--data.end", f"{_SHARE:g}")
        warm = ("--run.steps", "20", "--data.path", str(args.out / "half_thinking.jsonl"), "--optimizer.learning_rate", "1e-3")
        before = (
            Row(
                "half-thinking", "Before: the demo's model, made to skip some thoughts", SFT, "demo",
                (*_DEMO_SFT, *warm), args.model,
            ),
        )  # fmt: skip
    rows = [Row(kind, label, GRPO, preset, (*options, "--reward.kind", kind), start, paper) for kind, label, paper in kinds]
    return Study("What the reward pays for", "Table 4", (*before, *rows), _evaluation(args), files)


def _half_thinking(out: Path) -> None:
    """Careless replies to imitate, every other one without its think block."""
    rows = demo.sft_rows(640, seed=7, careless=1.0)
    replies = [row.extra["response"] for row in rows]
    replies = [reply.partition("</think>\n")[2] if i % 2 else reply for i, reply in enumerate(replies)]
    _write_rows(out / "half_thinking.jsonl", rows, replies)


def data(args: Args) -> Study:
    """Table 5. At demo scale the two sources are tasks of one call and tasks of two, as many rows of each."""
    paper = {"xlam": (87.77, 76.24, 82.01), "toolace": (87.67, 79.58, 83.63), "both": (89.25, 80.38, 84.82)}
    if args.scale == "paper":
        labels = {"xlam": "xLAM alone", "toolace": "ToolACE alone", "both": "ToolACE and xLAM"}
        paths = {"xlam": args.xlam, "toolace": args.toolace, "both": args.data}
        rows = [
            Row(name, labels[name], GRPO, "tool-n1-7b", ("--data.path", paths[name]), args.model, paper[name]) for name in paper
        ]
        files = Study.files
    else:
        files = _two_sources
        labels = {"single": "Tasks of one call alone", "parallel": "Tasks of two calls alone", "both": "Half of each"}
        held_out = ("--data.validation_path", str(args.out / "validation.jsonl"))
        rows = [
            Row(
                name, labels[name], GRPO, "demo",
                (*_DEMO_GRPO, "--run.steps", "24", "--data.path", str(args.out / f"{name}.jsonl"), *held_out), args.model,
            )
            for name in labels
        ]  # fmt: skip
    raw = _raw(args, (73.94, 61.14, 67.54))
    return Study("What the data is made of", "Table 5", (raw, *rows), _evaluation(args), files)


def _two_sources(out: Path) -> None:
    tasks = demo.tasks(6 * _ROWS, seed=8, held_out=False)  # about one in five has two calls
    single = [task for task in tasks if len(task.answer) == 1][:_ROWS]
    parallel = [task for task in tasks if len(task.answer) == 2][:_ROWS]
    half = _ROWS // 2
    held_out = demo.tasks(128, seed=0, held_out=True)
    files = {"single": single, "parallel": parallel, "both": single[:half] + parallel[:half], "validation": held_out}
    for name, rows in files.items():
        _write_rows(out / f"{name}.jsonl", rows)


def sizes(args: Args) -> Study:
    """Figures 4 and 5: each model before and after; of the figures the paper states these numbers only."""
    if args.scale == "demo":
        raise ValueError("study sizes --scale demo: the program comes with one demo model, so there are no sizes to compare")
    known = {"7b": ((86.46, 67.44, 76.95), (89.25, 80.38, 84.82)), "14b": (None, (90.52, 81.42, 85.97))}
    rows = []
    for size in ("0.5b", "1.5b", "3b", "7b", "14b", "llama3-8b", "llama-8b"):
        make = config.PRESETS[config.TrainConfig][f"tool-n1-{size}"]
        path, (before, after) = make().model.path, known.get(size, (None, None))
        rows.append(Row(f"{size}-{RAW}", path.split("/")[1], start=path, paper=before))
        rows.append(
            Row(size, f"Tool-N1 from {path.split('/')[1]}", GRPO, f"tool-n1-{size}", ("--data.path", args.data), paper=after)
        )
    return Study("Sizes and families of models", "Table 2, for Figures 4 and 5", tuple(rows), _evaluation(args))


GRIDS: dict[str, Callable[[Args], Study]] = {"recipes": recipes, "rewards": rewards, "data": data, "sizes": sizes}
NEEDS = {"recipes": ("reasoning",), "rewards": ("data",), "data": ("toolace", "xlam", "data"), "sizes": ("data",)}


def _raw(args: Args, paper: tuple[float, float, float] | None) -> Row:
    """The untrained model. Its accuracy in the paper is not that of Table 3's and 4's setting, so most have none."""
    model = args.model or (str(DEMO_MODEL) if args.scale == "demo" else PAPER)
    return Row(RAW, "The model itself", start=model, paper=paper)


def _evaluation(args: Args) -> tuple[str, ...]:
    limit = () if args.limit is None else ("--limit", str(args.limit))
    if args.scale == "demo":
        return (*_DEMO_EVALUATION, *limit)
    # The same limit for all: left out, it would be another one for models that were trained than for those that were not.
    return ("--data.path", args.test, "--max_response_tokens", "4096", "--samples", "4", *limit)


def _write_rows(path: Path, rows: Sequence[Example], replies: Sequence[str] | None = None) -> None:
    """The tasks as rows of a data file, with replies to imitate; not again where they are there, as resumed runs read them."""
    if path.exists():
        return
    texts = []
    for i, row in enumerate(rows):
        plain = {"messages": row.messages, "tools": row.tools, "answers": row.answer, "source": row.source}
        texts.append(json.dumps(plain | ({} if replies is None else {"response": replies[i]}), ensure_ascii=False) + "\n")
    report.write(path, "".join(texts))


# ---------------------------------------------------------------- commands


@dataclass(frozen=True)
class Job:
    """One run of the grid: what to call, after which other, and where things lie."""

    row: Row
    seed: int
    train: tuple[str, ...] | None  # None: nothing is trained
    evaluate: tuple[str, ...]
    folder: Path
    after: str  # the name of the row whose run of the same seed it needs; empty: none


def command(args: Args, row: Row, seed: int) -> tuple[str, ...] | None:
    """The training of a row, as arguments of Python; None where there is none."""
    if not row.program:
        return None
    start = str(args.out / row.start.removeprefix("row:") / f"seed-{seed}") if row.start.startswith("row:") else row.start
    place = ("--run.dir", str(args.out / row.name / f"seed-{seed}"), "--run.seed", str(seed))
    model = ("--model.path", start) if start else ()
    further = shlex.split(args.sft if row.program == SFT else args.train)
    return ("-m", row.program, row.preset, *place, *row.options, *model, *further)


@functools.cache
def parsed(train: tuple[str, ...]) -> SftConfig | TrainConfig:
    """The config that a training command asks for. Raises ValueError, in one line, for options that its program lacks."""
    return config.parse(CONFIGS[train[1]], train[1], train[2:])


def jobs(args: Args, study: Study) -> list[Job]:
    """Every run, seed by seed, so that a study that is stopped early has whole tables; a row after the one it begins from."""
    found = []
    for seed in range(args.seeds):
        for row in study.rows:
            if row.program or seed == 0:
                train, folder = command(args, row, seed), args.out / row.name / f"seed-{seed}"
                model = str(folder) if train else row.start
                evaluate = ("-m", "eval.run", "--model", model, "--out", str(folder / "eval"), *study.evaluation)
                after = row.start.removeprefix("row:") if row.start.startswith("row:") else ""
                found.append(Job(row, seed, train, evaluate, folder, after))
    return found


def check(args: Args) -> None:
    """Refuses, before anything runs, what a study lacks or does not read."""
    if args.seeds < 1 or (args.limit is not None and args.limit < 1):
        raise ValueError("--seeds and --limit: give numbers from 1 on")
    for name in ("sft", "train"):
        try:
            shlex.split(getattr(args, name))
        except ValueError as error:  # a quote or an escape that does not end
            raise ValueError(f"--{name}: {str(error).lower()} in {getattr(args, name)!r}: mend the quotes") from None
    reads = () if args.scale == "demo" else (*NEEDS[args.study], "test")
    rows = ("data", "toolace", "xlam", "reasoning", "test")
    unread = [f"--{name}" for name in rows if getattr(args, name) and name not in reads]
    if unread:
        raise ValueError(f"study {args.study} at {args.scale} scale does not read {', '.join(unread)}: leave that out")
    if args.scale == "demo":
        return
    what = {
        "reasoning": "rows with a stronger model's reasoning (python -m scripts.distill makes them)",
        "test": "rows to score the models on, that no run trains on",
        "data": "rows to train on (python -m data.build makes them)",
        "toolace": "ToolACE's rows (python -m data.build --toolace)",
        "xlam": "xLAM's rows (python -m data.build --xlam)",
    }
    if missing := [name for name in reads if not getattr(args, name)]:
        lacks = "; ".join(f"--{name}: {what[name]}" for name in missing)
        without = "" if args.study == "sizes" else ". --scale demo, which is not the default, needs none of it"
        raise ValueError(f"study {args.study} at paper scale lacks {lacks}{without}")
    paths = [getattr(args, name) for name in reads]
    if gone := [path for path in paths if not Path(path).exists() and not jsonl.is_hub_id(path)]:
        raise FileNotFoundError(f"{', '.join(gone)}: no such file or folder, nor a hub id")
    if args.model and args.study == "sizes":
        raise ValueError("--model: study sizes takes its models from the presets")


def check_commands(args: Args, grid: Sequence[Job]) -> None:
    """Refuses what is wrong in --sft and --train, as the programs would."""
    if args.sft and all(job.row.program != SFT for job in grid):
        raise ValueError(f"--sft: study {args.study} at {args.scale} scale has no supervised run: leave it out")
    for job in grid:
        if job.train:
            option, words = ("--sft", args.sft) if job.row.program == SFT else ("--train", args.train)
            if {"-h", "--help"} & set(shlex.split(words)):
                raise ValueError(f"{option}: for help, ask the program itself: python -m {job.row.program} --help")
            try:
                cfg = parsed(job.train)
                config.check_numbers(cfg)
            except ValueError as error:
                raise ValueError(f"{option}: {error}" if words else str(error)) from None
            if (cfg.run.dir, cfg.run.seed) != (str(job.folder), job.seed):
                raise ValueError(f"{option}: --run.dir and --run.seed are the study's own: leave them out")


# ---------------------------------------------------------------- running them


def inputs(job: Job, start: str | None) -> dict[str, str]:
    """What the job's training reads: file or folder -> hash of its content; `start`, of the weights of the row it begins from.

    Nothing of what is not here, a hub id, say, or made by the program. Content, not the time of a file: a build of the same
    rows, or a copy of the study on another machine, makes no run another one.
    """
    cfg = parsed(job.train)
    paths = [path for path in (cfg.data.path, cfg.data.validation_path) if path]
    files = {path: jsonl.files(Path(path)) for path in paths if path != "demo" and Path(path).exists()}
    if cfg.data.template:
        files[cfg.data.template] = [Path(cfg.data.template)]
    found = {path: _content(some) for path, some in files.items()}
    if start is not None:
        return found | {cfg.model.path: start}
    return found | _model(cfg.model.path)


def scored_inputs(job: Job, test: str, trained: int | None) -> dict[str, str]:
    """What the job's evaluation reads, likewise; for a trained model the time that `once` returned for it."""
    found = {test: _content(jsonl.files(Path(test)))} if test != "demo" and Path(test).exists() else {}
    return found | (_model(job.row.start) if trained is None else {"the model": str(trained)})


def _model(path: str) -> dict[str, str]:
    """The model in a Hugging Face folder, or in that of a run; nothing of a hub id."""
    folder = Path(path) / "hf" if (Path(path) / "hf").is_dir() else Path(path)
    return {path: _content(sorted(file for file in folder.iterdir() if file.is_file()))} if folder.is_dir() else {}


def _content(files: Sequence[Path]) -> str:
    lines = [f"{file.name} {_sha256(file, file.stat().st_size, file.stat().st_mtime_ns)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@functools.cache
def _sha256(file: Path, size: int, modified: int) -> str:
    """Size and time are for the cache: every row reads the same gigabytes."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def differences(job: Job) -> list[str]:
    """The options for which the run in the job's folder is another one than its command asks for: "field: old -> new".

    For most of them training would refuse to go on. Not for its length, but a schedule made for another length, or steps
    beyond the last one, are not in the command that the table shows.
    """
    try:
        before = json.loads((job.folder / "config.json").read_text())
        owner = before.pop("program")
        if owner != job.row.program:
            return [f"program: {owner} -> {job.row.program}"]
        identity, operational = config.differences(before, parsed(job.train))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []  # no run, or one that only training can tell what is wrong with
    return identity + [change for change in operational if change.startswith(("run.steps:", "run.epochs:"))]


def once(
    label: str,
    folder: Path,
    step: str,
    command: Sequence[str],
    made: Path,
    reads: Mapping[str, str],
    differs: Sequence[str] = (),
) -> int:
    """Runs a command that leaves `made`, unless it did, from the same inputs; returns the time when it had, in ns.

    Where other inputs were read before, or `differs` is not empty, training cannot go on in its folder: that is moved aside.
    Raises ChildProcessError, with the last lines of its log, for a command that fails, ValueError where another process is
    at work in the folder to be moved.
    """
    marker, log = folder.with_name(f"{folder.name}.{step}.json"), folder.with_name(f"{folder.name}.{step}.log")
    known = json.loads(marker.read_text()) if marker.exists() else None
    record, changes = {"command": ["python", *command], "inputs": dict(reads)}, list(differs)
    if isinstance(known, dict):
        before = known["inputs"]
        changes += [name for name in {**before, **reads} if before.get(name) != reads.get(name)]
        if known["finished"] and known["command"] == record["command"] and not changes and made.exists():
            return known["finished"]
    log.parent.mkdir(parents=True, exist_ok=True)
    if changes and step == "train" and folder.exists():
        aside = _move_aside(folder)
        console.note(f"{label}: begins anew, since this changed: {', '.join(changes)}; the run until now is in {aside}")
    report.write(marker, json.dumps(record | {"finished": 0}, indent=1) + "\n")
    console.note(f"{label}: {shlex.join(['python', *command])}")
    with log.open("ab") as file:
        at = file.tell()
        # In a session of its own, a Ctrl-C does not reach it: one signal lets training save its last step, a second would not.
        child = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = _wait(child, log, label)
        except BaseException:
            _stop(child, label)
            raise
    if code:
        with log.open("rb") as file:
            file.seek(at)
            last = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()][-3:]
        raise ChildProcessError(f"exit code {code}: {' | '.join(last) or 'it said nothing'} ({log})")
    finished = time.time_ns()
    report.write(marker, json.dumps(record | {"finished": finished}, indent=1) + "\n")
    return finished


def _move_aside(folder: Path) -> Path:
    """Renames a run's folder to the first free name; not one that a process is at work on."""
    with (folder / "lock").open("a") as file:
        lock(file, f"{folder}: another process is at work on this run, with other inputs; wait for it")
        number = 1
        while (aside := folder.with_name(f"{folder.name}-stale-{number}")).exists():
            number += 1
        return folder.rename(aside)


def _stop(child: subprocess.Popen, label: str) -> None:
    """Asks the child to end and waits until it has. Further signals are ignored: the child would go on without its study."""
    before = {one: signal.signal(one, signal.SIG_IGN) for one in SIGNALS}
    try:
        child.terminate()
        with contextlib.suppress(OSError):  # the terminal may be gone
            console.note(f"{label}: stopping; waiting for process {child.pid} (training saves its last whole step)")
        child.wait()
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _wait(child: subprocess.Popen, log: Path, label: str) -> int:
    """The exit code; on a terminal, the last line of the log is shown meanwhile."""
    if not console.CONSOLE.is_terminal:
        return child.wait()
    with console.CONSOLE.status(label) as status:
        while True:
            try:
                return child.wait(timeout=1)
            except subprocess.TimeoutExpired:
                with log.open("rb") as file:
                    file.seek(max(0, log.stat().st_size - 400))
                    said = file.read().decode(errors="replace").strip().splitlines()
                status.update(f"{label}  {said[-1][:100] if said else ''}")


def run(args: Args) -> int:
    """Runs what is left of the study and writes it up; returns the exit code: 1 where a run failed."""
    check(args)
    study = GRIDS[args.study](args)
    grid = jobs(args, study)
    check_commands(args, grid)
    if args.dry_run:
        for job in grid:
            for one in (job.train, job.evaluate):
                if one:
                    console.CONSOLE.print(shlex.join(["python", *one]), soft_wrap=True)
        made = [word for job in grid for word in job.train or () if word.startswith(f"{args.out}/") and word.endswith(".jsonl")]
        if missing := [path for path in dict.fromkeys(made) if not Path(path).exists()]:
            # Not among the commands, which a shell may read.
            print(f"not written in a dry run; the study does at its start: {', '.join(missing)}", file=sys.stderr)
        return 0
    written = args.out / "study.md"
    if written.exists() and (title := written.read_text().partition("\n")[0]) != f"# {study.title}":
        raise ValueError(f"--out {args.out}: holds another study ({title.strip('# ')}); give this one a folder of its own")
    args.out.mkdir(parents=True, exist_ok=True)
    study.files(args.out)
    asked = f"{args.study} --scale {args.scale} --seeds {args.seeds}"
    commands = [shlex.join(["python", *job.train]) for job in grid if job.train and job.seed == 0]
    outcomes: dict[tuple[str, int], Outcome] = {}
    test = "demo" if args.scale == "demo" else args.test
    for number, job in enumerate(grid, 1):
        place, label = (job.row.name, job.seed), f"{number}/{len(grid)} {job.row.name}, seed {job.seed}"
        outcome = outcomes[place] = Outcome()
        before, trained = outcomes.get((job.after, job.seed)), None
        try:
            if before is not None and before.problem:
                raise ChildProcessError(f"not run, since {job.after} failed")
            if job.train:
                reads = inputs(job, before.scores["model_fingerprint"] if before else None)
                trained = once(label, job.folder, "train", job.train, job.folder / "hf", reads, differences(job))
            made = job.folder / "eval" / "scores.json"
            once(f"{label}, scores", job.folder, "eval", job.evaluate, made, scored_inputs(job, test, trained))
            outcome.scores = json.loads(made.read_text())
            console.note(f"{label}: {outcome.scores['accuracy']:.1%} right")
        except (OSError, ValueError) as error:
            outcome.problem = str(error)
            console.warn(f"{label} failed: {error}")
        report.write(written, report.table(study, asked, outcomes, commands))
    labels, names = {row.name: row.label for row in study.rows}, [row.name for row in study.rows if row.program == GRPO]
    report.accuracy(args.out / "accuracy.png", labels, outcomes)
    report.curves(args.out / "curves.png", labels, {name: [j.folder for j in grid if j.row.name == name] for name in names})
    console.CONSOLE.print(written.read_text(), soft_wrap=True)
    console.note(f"written: {written}, accuracy.png, curves.png")
    return int(any(outcome.problem for outcome in outcomes.values()))


def main() -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for one in SIGNALS:
        signal.signal(one, interrupt)
    sys.exit(run(command_line.read(Args, "python -m eval.study", sys.argv[1:])))


if __name__ == "__main__":
    config.run_main(main)
