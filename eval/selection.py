"""The benchmarks that a command asks for: which of them, which of their items, and how they are asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from data import command_line
from eval import acebench, api_bank, bfcl
from eval.benchmark import Item
from grpo_jax import checkpoint
from grpo_jax.benchmarks import spread
from grpo_jax.reward import Scored, parse_calls

MODULES = {"bfcl": bfcl, "api_bank": api_bank, "acebench": acebench}


@dataclass(frozen=True)
class Bfcl:
    #: Which <tool_call> block of a reply counts. first: as in the paper's own evaluation; last: as in the reward of training,
    #: for models that write more than one.
    block: Literal["first", "last"] = "first"
    #: 49 live items have a system message, which is shown at the end of our own. With no_ it is left out, as in the paper's own
    #: evaluation, which overwrote it; say which, where you report.
    system_messages: bool = True


@dataclass(frozen=True)
class ApiBank:
    #: Its file level-1-api.json, or the folder with it. Its authors have it at
    #: https://huggingface.co/datasets/liminghao1630/API-Bank, in test-data/ (0.9 MB).
    path: str = ""
    #: The dialogue so far as one user message, as others ask it, or as turns of a chat, to see what difference that makes.
    layout: Literal["one_message", "turns"] = "one_message"


@dataclass(frozen=True)
class AceBench:
    #: The folder of `git clone https://github.com/ACEBench/ACEBench`; or its data_all/data_zh, for the Chinese tasks.
    path: str = ""
    #: The question as its authors ask it, the dialogue so far in one user message, or as turns of a chat.
    layout: Literal["one_message", "turns"] = "one_message"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark, as it is asked."""

    name: str
    categories: Sequence[str]  # those asked
    items: Sequence[Item]  # those asked, by category
    ids: frozenset[str]  # of all its items
    options: Mapping[str, Any]  # how it is asked, as plain JSON
    verdict: Callable[[str, Item], Scored]
    calls: Callable[[str, Item], list[dict[str, Any]] | None]  # of a reply, as the verdict reads them
    aggregates: Callable[[Mapping[str, tuple[float, int]]], dict[str, float]]

    def settings(self) -> dict[str, Any]:
        """What results must share to count together: the options, and what the items say in place of where they lie."""
        items = checkpoint.fingerprint([[item.id, item.example.id] for item in self.items])
        return {name: value for name, value in self.options.items() if name != "path"} | {"items_fingerprint": items}


def choose(
    names: str, categories: str | None, limit: int | None, options: Mapping[str, Bfcl | ApiBank | AceBench]
) -> list[Benchmark]:
    """The benchmarks with these names, of each the categories that it has of `categories` (None: all), of each category at
    most `limit` items, spread evenly over it. names, categories: words between commas; options: by name.

    Raises ValueError or FileNotFoundError for an unknown name and for a package or file that is missing.
    """
    asked = _words("--benchmarks", names, MODULES)
    known = {category: name for name in asked for category in MODULES[name].CATEGORIES}
    wanted = list(known) if categories is None else _words("--categories", categories, known)
    if idle := [name for name in asked if name not in {known[category] for category in wanted}]:
        raise ValueError(f"--categories {categories}: {idle[0]} has none of them: leave it out of --benchmarks")
    found = []
    for name in asked:
        module, own = MODULES[name], options[name]
        if not isinstance(own, Bfcl) and not own.path:
            raise ValueError(f"--{name}.path is missing: {module.SOURCE}")
        given = {key: value for key, value in asdict(own).items() if key != "path"}
        every = module.items(**given) if isinstance(own, Bfcl) else module.items(own.path, **given)
        there = {item.category for item in every}
        of = [category for category in module.CATEGORIES if category in wanted and category in there]
        if not of:
            raise ValueError(f"--{name}.path {own.path}: it has no items of --categories {categories}")
        items = [item for category in of for item in spread([one for one in every if one.category == category], limit)]
        calls = module.calls if isinstance(own, Bfcl) else lambda text, item: parse_calls(text)
        told = asdict(own) | {"categories": of, "limit": limit}
        ids = frozenset(item.id for item in every)
        found.append(Benchmark(name, of, items, ids, told, module.verdict, calls, module.aggregates))
    return found


def _words(option: str, text: str, known: Mapping[str, Any]) -> list[str]:
    """The words between commas, in the order in which they are known. Raises ValueError for one that is not."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words or [""]:
        if word not in known:
            near = command_line.nearest(word, known)
            raise ValueError(f"{option} {text}: no {word!r}: did you mean {near!r}? There are {', '.join(known)}")
    return [word for word in known if word in words]
