"""The leaderboard's own program on replies of ours: `python -m eval.bfcl_handler --help`

    read          a file of replies -> {id: text}
    write         replies -> result files in the layout of the official runner
    Handler       what that runner asks for the calls of a reply: `bfcl.calls_of`
    evaluate      runs it over those files -> which replies it finds right; its score files and tables stay

Nothing of the official runner is changed, but that an exception of its checker makes one reply wrong instead of ending the run
(`bfcl.check`). Besides the package itself it imports a few small ones: INSTALL.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data import command_line
from eval import bfcl
from eval import replies as replies_of
from grpo_jax import config

INSTALL = "pip install -e '.[eval]'"


@dataclass(frozen=True)
class Args:
    """Scores replies to BFCL by the official runner, and says whether eval.bfcl agrees on each."""

    #: A JSONL file whose lines have "id", the benchmark's own, and "output" or "text", the reply, as in bfcl.jsonl of eval.run.
    #: Other benchmarks' ids are passed over.
    responses: Path
    #: A new folder, for result/ and score/ of the official program.
    out: Path
    #: Which <tool_call> block of a reply counts.
    block: Literal["first", "last"] = "first"


@dataclass(frozen=True)
class Handler:
    """One model, as the official runner sees it."""

    block: str

    def decode_ast(self, result: str, language: Any, has_tool_call_tag: bool) -> list[dict[str, Any]]:
        """The calls of a reply. Raises ValueError where it has none, which makes it wrong."""
        calls = bfcl.calls_of(result, self.block)
        if calls is None:
            raise ValueError("no list of calls")
        return json.loads(_writable(json.dumps(calls, ensure_ascii=False)))


def read(path: Path) -> dict[str, str]:
    """The replies of a file, by id, without those whose line names another benchmark. Errors as in eval.replies."""
    return {reply.id: reply.output for reply in replies_of.read(path) if reply.benchmark in (None, "bfcl")}


def write(replies: Mapping[str, str], categories: Mapping[str, str], folder: Path) -> None:
    """Result files of the official layout under `folder`; `categories` by id."""
    lines: dict[str, list[str]] = {}
    for name, text in replies.items():
        lines.setdefault(categories[name], []).append(json.dumps({"id": name, "result": _writable(text)}) + "\n")
    for category, some in lines.items():
        group = folder / bfcl.MODEL / ("live" if category.startswith("live_") else "non_live")
        group.mkdir(parents=True, exist_ok=True)
        (group / f"BFCL_v4_{category}_result.json").write_text("".join(some), encoding="utf-8")


def evaluate(replies: Mapping[str, str], out: Path, block: str = "first") -> dict[str, bool]:
    """Whether each reply is right, by the official runner, which leaves its files in `out`: result/ and score/.

    Raises ValueError where `out` holds such files, where no reply has an id of the benchmark, and where a package is missing.
    """
    if (out / "result").exists() or (out / "score").exists():
        raise ValueError(f"{out} holds results already, which would be counted too: name another folder")
    categories = {item.id: item.category for item in bfcl.items() if item.id in replies}
    if not categories:
        raise ValueError("none of the replies has an id of BFCL, such as simple_python_0")
    table = bfcl.package().models
    try:
        runner = importlib.import_module("bfcl_eval.eval_checker.eval_runner")
    except ModuleNotFoundError as error:
        raise ValueError(f"the official runner of BFCL needs more ({error}): {INSTALL}") from error
    runner.ast_checker = bfcl.check
    table[bfcl.MODEL] = types.SimpleNamespace(
        **dict.fromkeys(("model_name", "display_name", "org"), bfcl.MODEL),
        **dict.fromkeys(("url", "license"), ""),
        **dict.fromkeys(("input_price", "output_price")),
        model_handler=lambda **_: Handler(block),
        is_fc_model=False,
        underscore_to_dot=False,
    )
    result, score = out.resolve() / "result", out.resolve() / "score"
    write({name: replies[name] for name in categories}, categories, result)
    score.mkdir()
    sizes = Counter(categories.values())
    partial = any(bfcl.SIZES[category] != size for category, size in sizes.items())
    runner.main([bfcl.MODEL], list(sizes), result, score, partial_eval=partial)
    wrong = set()
    for path in score.rglob("BFCL_v4_*_score.json"):
        _, *rows = path.read_text(encoding="utf-8").strip("\n").split("\n")  # the first line is the category's accuracy
        wrong |= {json.loads(row)["id"] for row in rows}
    return {name: name not in wrong for name in categories}


def main() -> None:
    args = command_line.read(Args, "python -m eval.bfcl_handler", sys.argv[1:])
    replies = read(args.responses)
    official = evaluate(replies, args.out, args.block)
    ours = {item.id: bfcl.verdict(replies[item.id], item) for item in bfcl.items(block=args.block) if item.id in replies}
    other = [name for name, right in official.items() if right != (ours[name].value == 1)]
    print(
        f"{sum(official.values()):,} of {len(official):,} replies are right; eval.bfcl says otherwise of {len(other)}",
        *other[:10],
    )


def _writable(text: str) -> str:
    """Without half surrogate pairs, which the official program could not write; no right value has what stands for them."""
    return text.encode("utf-8", "xmlcharrefreplace").decode()


if __name__ == "__main__":
    config.run_main(main)
