"""The options of a program from its command line; what is wrong with them is told in one line. And counts, as words."""

import contextlib
import dataclasses
import difflib
import inspect
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, get_type_hints

import tyro

Options = TypeVar("Options")


def read(
    kind: type[Options], program: str, argv: Sequence[str], *, description: str | None = None, default: Options | None = None
) -> Options:
    """The dataclass `kind` as the words after the program's name ask for; its docstring says what the program does.

    Raises ValueError, in one line that names the nearest right word, for a command line that is wrong. `--help` prints and
    exits. `default` stands for options that are not given.
    """
    _refuse_unknown(argv, [f"--{name}" for name in _names(kind)])
    wants_help, shown = "--help" in argv or "-h" in argv, io.StringIO()
    try:
        with contextlib.nullcontext() if wants_help else contextlib.redirect_stderr(shown):
            return tyro.cli(
                kind,
                prog=program,
                description=description or inspect.cleandoc(kind.__doc__),
                args=argv,
                use_underscores=True,
                # What is off by itself needs no --no-...; a preset may have it on.
                config=(tyro.conf.FlagCreatePairsOff,) if default is None else (),
                **({} if default is None else {"default": default}),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(_one_line(shown.getvalue())) from None


def plural(count: int, what: str) -> str:
    """ "1 row", "2,000 rows"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def nearest(word: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)[0]


def _names(kind: Any, prefix: str = "") -> list[str]:
    """Of the fields, those of nested dataclasses as section.field."""
    hints, names = get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        inner = hints[field.name]
        names += _names(inner, f"{prefix}{field.name}.") if dataclasses.is_dataclass(inner) else [prefix + field.name]
    return names


def _refuse_unknown(argv: Sequence[str], known: list[str]) -> None:
    spelled = [name.replace("_", "-") for name in known]
    for word in argv:
        option = word.split("=")[0].replace("_", "-")
        off = re.sub(r"(^--|\.)no-", r"\1", option)  # of a flag that is on
        if word.startswith("--") and word not in ("--help", "--") and not {option, off} & {*spelled}:
            near = known[spelled.index(nearest(option, spelled))]
            raise ValueError(f"unknown option {word.split('=')[0]!r}: did you mean {near!r}?")


def _one_line(box: str) -> str:
    """The text of an error box of tyro, without its frame, its title and the help texts below."""
    if "Missing from " in box:  # names are indented by four, and help, which may begin with an option's name, by eight
        names = re.findall(r"(?m)^. {5}([^ ]+)", box.split("For full helptext")[0])
        return f"missing: {', '.join(names)}; --help says what to give"
    lines = [re.sub(r"[^\x20-\x7e]", "", line).strip(" -") for line in box.splitlines()]
    text = re.sub(r"\s+", " ", " ".join(line for line in lines[1:] if line))
    text = re.split(r" (?:Argument helptext|For full helptext)", text)[0]
    wrong = re.match(r"Error parsing (\S+): no type matching (?:\{None\}\|)?(\S+) could be instantiated from (\[.*?\])\.", text)
    if wrong:  # an option that may be left out; tyro tells why it is not None, too
        text = f"Error parsing {wrong[1]}: {wrong[3]} is no {wrong[2]}"
    return text or "the command line is wrong; see --help"
