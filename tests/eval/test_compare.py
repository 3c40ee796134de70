"""Comparisons: only what is common is compared, what differs is said, counts are those made by hand, no text of a model's gets
out of its quotation, and what cannot be compared is one line.
"""

import json
import re
from collections import Counter
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt

from data import command_line
from eval import acebench, api_bank, bfcl, compare, comparison, markdown, results
from eval.chance import ALL, Pairs
from eval.compare import Args
from grpo_jax import config

OUTPUT = "<think>\nHm.\n</think>\n<tool_call>\n[]\n</tool_call>"


def row(item, category, reason="correct", *, output=OUTPUT, truncated=False, parts=None):
    value = float(reason == "correct")
    return {
        "id": item, "category": category, "prompt": "What?", "output": output, "token_count": 9, "truncated": truncated,
        "calls": None, "value": value, "reason": reason, "parts": {} if parts is None else parts,
    }  # fmt: skip


def wrote(folder, name="bfcl", rows=(), options=None, **scores):
    """A folder of eval.run --benchmarks; called again, another benchmark of the same."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "scores.json"
    known = json.loads(file.read_text()) if file.exists() else {"benchmarks": {}}
    fixed = {"model": "org/m", "model_fingerprint": "f00", "replies": None, "endpoint": None, "max_response_tokens": 64}
    known = {**fixed, "temperature": 0.0, "template_fingerprint": "t1", **known, **scores}
    known["benchmarks"][name] = {"items": len(rows), "options": options or {"block": "first"}}
    file.write_text(json.dumps(known))
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


def some(reasons, category="simple_python", **more):
    return [row(f"{category}_{i}", category, reason, **more) for i, reason in enumerate(reasons)]


def ran(tmp_path, *words, pictures=False, **more):
    """The page of a comparison; pictures take longer than all the rest, and are drawn where a test wants them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in () if pictures else ("scores", "errors"):
            patch.setattr(comparison, name, lambda path, folders: None)
        compare.run(Args(tuple(map(str, words)), tmp_path / "out", **more))
    return (tmp_path / "out" / "comparison.md").read_text()


def cells(page, first):
    """The further cells of the first row of a table whose first cell is that."""
    line = next(line for line in page.splitlines() if line.startswith(f"| {first} |"))
    return line.removeprefix("| ").removesuffix(" |").split(" | ")[1:]


def every(module, right):
    """An item in each category, right where its place is in `right`."""
    return [row(f"{c}_0", c, "correct" if place in right else "no_call") for place, c in enumerate(module.CATEGORIES)]


# What is compared


def test_scores_means_and_the_paper_stand_side_by_side(tmp_path):
    base, after = wrote(tmp_path / "a", rows=every(bfcl, {0, 3})), wrote(tmp_path / "b", rows=every(bfcl, {0, 3, 6, 7, 8}))
    page = ran(tmp_path, f"base={base}", f"after={after}", pictures=True)
    assert cells(page, "simple python") == ["**100.0** [100.0, 100.0] 1/1"] * 2
    assert cells(page, "all items") == ["**20.0** [20.0, 20.0] 2/10", "**50.0** [50.0, 50.0] 5/10"]
    # simple is a third, non-live (1/3 + 1) / 4; live 1327 of 1351 by the weight of the categories
    assert cells(page, "non-live") == ["**33.3** [33.3, 33.3]", "**33.3** [33.3, 33.3]"]
    assert cells(page, "overall") == ["**16.7** [16.7, 16.7]", "**65.8** [65.8, 65.8]"]
    assert cells(page, "Tool-N1-7B")[-5:] == ["89.25", "80.38", "84.82", "80.38", "84.82"]
    assert cells(page, "Qwen2.5-7B-Inst")[-5:] == ["86.46", "67.44", "76.95", "75.06", "80.76"]
    paper = page[page.index("Beside the paper") :]
    assert "Ours are of 10 of its 2,501 tasks" in paper and "like for like" in paper
    assert cells(paper, "**after**")[-5:] == ["33.33", "", "", "98.22", "65.78"]
    for name in ("scores.png", "errors.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") and f"]({name})" in page


def test_other_protocols_are_counted_from_the_parts(tmp_path):
    parts = [{"official": 1.0, "official_nostrip": 1.0, "strict": float(i == 0)} for i in range(2)]
    rows = [row(f"atom_bool_{i}", "atom_bool", parts=parts[i]) for i in range(2)]
    rows += [row("atom_bool_2", "atom_bool", "prompt_too_long")]  # it has no parts
    page = ran(tmp_path, wrote(tmp_path / "a", "acebench", rows))
    assert cells(page, "atom bool")[0].endswith(" 2/3")
    assert cells(page, "`official_nostrip`, all items")[0].startswith("**66.7**")
    assert cells(page, "`strict`, all items")[0].startswith("**33.3**")
    rows = [row(f"{c}_0", c, parts={"accuracy": 1.0, "toolrl": float(c == "call")}) for c in api_bank.CATEGORIES]
    page = ran(tmp_path, wrote(tmp_path / "a", "api_bank", rows))
    right = api_bank.aggregates({c: (int(c == "call"), 1) for c in api_bank.CATEGORIES})
    assert right["accuracy"] < right["accuracy_394"] and len(right) == 3
    for mean, share in right.items():
        assert cells(page, f"`toolrl`, {results.words(mean)}")[0].startswith(f"**{100 * share:.1f}**")


def test_the_table_of_benchmarks_is_that_of_their_modules():
    for name, module in {"bfcl": bfcl, "api_bank": api_bank, "acebench": acebench}.items():
        benchmark = results.BENCHMARKS[name]
        means = module.aggregates({category: (1, 1) for category in module.CATEGORIES})
        assert set(benchmark.headlines) <= means.keys() and set(benchmark.marks) <= set(benchmark.headlines)
        assert all(set(benchmark.marks.values()) <= row.keys() for row in benchmark.paper.values())
        assert benchmark.paper.keys() == module.PAPER.keys()
        assert set(benchmark.columns) == means.keys() | {c for row in benchmark.paper.values() for c in row}
    assert results.BENCHMARKS["bfcl"].size == 2501


def test_only_common_items_are_compared_and_what_differs_is_said(tmp_path, capsys):
    rows = some(["correct", "no_call", "correct", "correct"])
    base = wrote(tmp_path / "base", rows=rows)
    wrote(base, "api_bank", [row("x", "call", parts={"accuracy": 1.0, "toolrl": 1.0})], {"layout": "turns"})
    after = wrote(
        tmp_path / "after", rows=[*some(["correct", "correct"]), row("simple_python_2", "simple_java")],
        options={"block": "last", "limit": 3, "categories": ["multiple"]}, temperature=0.7, template_fingerprint="t2",
    )  # fmt: skip
    page = ran(tmp_path, base, after)
    notes = [
        "BFCL: base has 4 items, after has 3 items; 2 items in common, and only there is anything compared.",
        "BFCL: block: first in base, last in after.",
        "API-Bank: not in after.",
        "temperature: 0.0 in base, 0.7 in after.",
        "template: t1 in base, t2 in after.",
    ]
    said = capsys.readouterr().out
    for note in notes:
        assert f"- {note}\n" in page and f"warning: {note}\n" in said
    assert "limit: " not in page and page.count("may come from there, too") == 1
    assert cells(page, "simple python") == ["**50.0** [0.0, 100.0] 1/2", "**100.0** [100.0, 100.0] 2/2"]
    assert "after - base" in said and "1 won, 0 lost, p: 1.0000" in said
    same = ran(tmp_path, base, f"again={base}")
    assert "Nothing differs but the models" not in same  # of 2,501 items four were asked
    assert "BFCL: 4 items of 2,501 were asked" in same and "No item changed sides" in same


def test_nothing_differs_where_nothing_does(tmp_path, monkeypatch):
    monkeypatch.setitem(results.BENCHMARKS, "bfcl", replace(results.BENCHMARKS["bfcl"], size=1))
    a, b = (wrote(tmp_path / name, rows=some(["correct"])) for name in "ab")
    assert "Nothing differs but the models: the same items, options, template and settings." in ran(tmp_path, a, b)


def test_how_replies_came_is_told_and_of_a_file_nothing_more_is_known(tmp_path):
    rows = some(["correct", "no_reply"])
    folders = [
        wrote(tmp_path / "ours", rows=rows[:1]), wrote(tmp_path / "file", rows=rows, replies="r.jsonl"),
        wrote(tmp_path / "served", rows=rows, endpoint="http://host/v1"),
    ]  # fmt: skip
    read = [results.read(folder.name, folder) for folder in folders]
    assert [list(results.settings_of(one).values()) for one in read] == [
        ["by our sampler", 0.0, 64, "t1"], ["from a file", *["not known"] * 3], ["by an endpoint", 0.0, 64, "t1"],
    ]  # fmt: skip
    notes = results.remarks(read)
    assert not [note for note in notes if note.startswith(("temperature", "template"))]  # ours and the served one have the same
    assert "replies: by our sampler in ours, from a file in file, by an endpoint in served." in notes
    assert notes[-1] == "Of file the template and the decoding are not known: the replies were read from a file."
    assert "BFCL: 1 item of file is without a reply; wrong in scores, in no pair." in notes
    assert results.answered(read[1], read[2], "bfcl") == ["simple_python_0"]
    rows = (folders[0] / "bfcl.jsonl").read_text() + json.dumps(row("simple_python_7", "simple_python")) + "\n"
    (folders[0] / "bfcl.jsonl").write_text(rows)
    assert "BFCL: scores.json of ours is of 1 items, its file has 2." in results.remarks([results.read("ours", folders[0])])


def test_items_stand_as_a_person_counts(tmp_path):
    rows = [row(f"simple_python_{i}", "simple_python") for i in (10, 9, 100)] + [row("a_2", "multiple"), row("a_1", "multiple")]
    read = results.read("a", wrote(tmp_path / "a", rows=rows))
    assert results.common([read], "bfcl") == ["simple_python_9", "simple_python_10", "simple_python_100", "a_1", "a_2"]


# Pairs


def test_pairs_are_counted_and_changed_items_listed(tmp_path):
    before = some(["correct"] * 5 + ["wrong_argument"] * 4 + ["no_call", "no_call"])
    after = some(["correct"] * 3 + ["bad_json", "wrong_count"] + ["correct"] * 3 + ["wrong_argument", "correct", "no_call"])
    page = ran(tmp_path, wrote(tmp_path / "before", rows=before), wrote(tmp_path / "after", rows=after))
    base, other = (results.read(name, tmp_path / name) for name in ("before", "after"))
    ids = results.answered(base, other, "bfcl")
    found = results.pairs(base, other, "bfcl", ids, "official")
    assert found == {"simple_python": Pairs(3, 4, 2, 2), ALL: Pairs(3, 4, 2, 2)}
    table = page[page.index("## after against before") :]
    old, new, points, *counted = cells(table, "simple python")
    assert (old, new) == ("45.5", "63.6") and points.startswith("+18.2 [")
    assert counted == ["4", "2", "3", "2", "0.6875"]  # 2 (1 + 6 + 15) / 64
    assert cells(table, "correct") == ["3", "", "1", "1", ""]
    assert cells(table, "wrong argument") == ["3", "", "", "", "1"]
    assert cells(table, "`simple_python_9`") == ["simple python", "no call → correct"]
    assert table.count(" → ") == 6 + 3 + 2  # changed ones, and of these three won and two lost quoted
    assert "| `simple_python_8` |" not in table and "`simple_python_9`, no call → correct\n" in table


def test_a_pair_has_all_items_that_its_two_folders_share(tmp_path, capsys):
    a, b = (wrote(tmp_path / name, rows=some(["correct", name, name])) for name in ("no_call", "correct"))
    page = ran(tmp_path, a, b, wrote(tmp_path / "c", rows=some(["correct"])))
    assert cells(page, "simple python")[0].endswith(" 1/1")
    assert cells(page[page.index("## correct against no_call") :], "simple python")[3:5] == ["2", "0"]
    said = capsys.readouterr().out
    assert "BFCL, 1 item: all items" in said and "2 won, 0 lost of 3, p: 0.5000" in said and "0 won, 0 lost, p: 1.0000" in said


def test_the_base_is_the_first_or_the_one_that_is_named(tmp_path):
    a, b, c = (wrote(tmp_path / name, rows=some(["correct"] * n + ["no_call"] * (3 - n))) for n, name in enumerate("abc", 1))
    heads = lambda page: re.findall("## (. against .)", page)  # noqa: E731
    assert heads(ran(tmp_path, a, b, c)) == ["b against a", "c against a"]
    assert heads(ran(tmp_path, a, b, c, base="b")) == ["a against b", "c against b"]
    assert heads(ran(tmp_path, a, pictures=True)) == []


def test_a_reply_that_was_cut_off_is_no_other_mistake():
    cut = [
        results.kind(row("a", "multiple", reason, truncated=True))
        for reason in ("no_call", "bad_json", "wrong_count", "correct")
    ]
    assert cut == ["cut off", "cut off", "wrong count", "correct"]
    assert results.kind(row("a", "multiple", "bad_json")) == "bad JSON"
    for module in (bfcl,):
        kinds = {results.kind(row("a", "multiple", reason)) for reason in module.REASONS}
        assert kinds - comparison.KINDS.keys() == {"correct", "checker failed"}


def test_where_nothing_is_wrong_there_is_still_a_page(tmp_path):
    page = ran(tmp_path, wrote(tmp_path / "a", rows=every(bfcl, range(10))), pictures=True)
    assert "|  | all wrong ones | reached the limit |" in page and (tmp_path / "out" / "errors.png").exists()


def test_kinds_add_up_and_unknown_ones_stand_last(tmp_path):
    rows = [*some(["wrong_argument", "from_elsewhere", "no_call", "correct"]), row("x", "multiple", "no_call", truncated=True)]
    page = ran(tmp_path, wrote(tmp_path / "a", rows=rows))
    head = [line for line in page.splitlines() if "all wrong ones" in line]
    assert head == ["|  | cut off | no call | wrong argument | from elsewhere | all wrong ones | reached the limit |"]
    table = page[page.index(head[0]) :]
    assert cells(table, "**a**") == ["1 (20.0)"] * 4 + ["4 (80.0)", "1 (20.0)"]
    read = results.read("a", tmp_path / "a")
    assert comparison.kinds([read], "bfcl", results.common([read], "bfcl")) == [
        Counter({"cut off": 1, "no call": 1, "wrong argument": 1, "from elsewhere": 1})
    ]


# Texts of others

HOSTILE = [
    "```\n# Owned\n````````````\n<script>alert(1)</script>\n</details>\n| a | b |\n~~~",
    "`" * 50 + "\n</pre><img src=x onerror=alert(1)>\n\n[click](http://evil)\n<!-- ",
    "\x1b[31mred\x00\r\n\u202etxt\ud800 \u2028 end",
    "",
    "a" * 499 + "`" * 30 + "b" * 5000 + "\n```",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_output_gets_out_of_its_quotation(tmp_path, text):
    before, after = some(["correct", "no_call"], output=text), some(["no_call", "correct"], output=text)
    a, b = wrote(tmp_path / "a", rows=before), wrote(tmp_path / "b", rows=after)
    page = ran(tmp_path, a, b)
    tokens = MarkdownIt("commonmark").enable("table").parse(page)
    quoted = [token.content for token in tokens if token.type == "fence"]
    assert quoted == [markdown.fenced(text).split("\n", 1)[1].rpartition("\n")[0] + "\n"] * 4
    plain = some(["correct", "no_call"]), some(["no_call", "correct"])
    wrote(tmp_path / "a", rows=plain[0]), wrote(tmp_path / "b", rows=plain[1])
    others = MarkdownIt("commonmark").enable("table").parse(ran(tmp_path, a, b))
    assert [token.type for token in tokens] == [token.type for token in others]  # the page is built as with plain outputs
    tags = set(re.findall(r"<[/!\w]+", page))
    assert tags <= {"<details", "<summary", "</summary", "</details", "<think", "</think", "<tool_call", "</tool_call"}
    assert all(c.isprintable() or c in "\n\t" for c in page)


def test_long_outputs_lose_their_middle_and_say_so():
    quoted = markdown.fenced("x" * 500 + "y" * 3000 + "z" * 700)
    assert quoted == f"```text\n{'x' * 500}\n[... 3,000 characters left out ...]\n{'z' * 700}\n```"
    assert "left out" not in markdown.fenced("x" * 1200)


def test_names_and_ids_are_shown_as_they_are(tmp_path):
    name = "a|b <b>*c*</b> `d` _e_ f_g $h$\x1b[0m"
    shown = MarkdownIt("commonmark").enable("table").render(f"| x |\n|---|\n| {markdown.cell(name)} |\n")
    assert "<td>a|b &lt;b&gt;*c*&lt;/b&gt; `d` _e_ f_g $h$\\x1b[0m</td>" in shown
    item = "we`ird|``id"
    shown = MarkdownIt("commonmark").enable("table").render(f"| x |\n|---|\n| {markdown.code(item)} |\n")
    assert "<td><code>we`ird|``id</code></td>" in shown
    rows = [row(item, "multiple", reason) for reason in ("correct", "no_call")]
    a, b = wrote(tmp_path / "a", rows=rows[:1], model=name), wrote(tmp_path / "b", rows=rows[1:])
    page = ran(tmp_path, f"{name}={a}", f"{'long ' * 30}$={b}", pictures=True)  # in the pictures, too
    assert page.startswith(f"# Comparison of {markdown.cell(name)}, long long")
    assert "\x1b" not in page and "<b>" not in page


# Names and bad input


def test_folders_are_called_by_as_much_of_their_path_as_tells_them_apart(tmp_path):
    labels = lambda *words: [label for label, _ in compare.named([str(word) for word in words])]  # noqa: E731
    assert labels(tmp_path / "x" / "eval", tmp_path / "y") == ["eval", "y"]
    assert labels(tmp_path / "x" / "eval", tmp_path / "y" / "eval", "n=z") == ["x/eval", "y/eval", "n"]
    assert labels(tmp_path / "x", tmp_path / "x", "x=y", tmp_path / "x") == ["x 2", "x 3", "x", "x 4"]
    (tmp_path / "lr=3").mkdir()
    assert labels(tmp_path / "lr=3", f"mine={tmp_path / 'lr=3'}") == ["lr=3", "mine"]
    for word in ("=d", "n="):
        with pytest.raises(ValueError, match=f"{word}: no name before the equals sign, or no folder behind it"):
            labels(word)
    with pytest.raises(ValueError, match="n=...: two folders have this name"):
        labels("n=a", "n=b")


GOOD = json.dumps(row("simple_python_0", "simple_python"))


@pytest.mark.parametrize(
    "line, message",
    [
        (GOOD[:40], r"bfcl.jsonl:1: not JSON \(.*\): mend or delete the line"),
        ("[]", "row 1: no object: mend or delete it"),
        ('{"id": "x"}', "row 1: it has no 'category'"),
        (GOOD.replace('"truncated": false', '"truncated": 0'), "row 1: 'truncated' is 0:"),
        (GOOD.replace('"category": "simple_python"', '"category": "simple"'), "row 1: BFCL has no category 'simple'"),
        (GOOD.replace('"value": 1.0', '"value": 0.5'), r"row 1: its value and parts are \[0.5\], and not 0 or 1"),
        (GOOD.replace('"value": 1.0', '"value": 0.0'), "row 1: value 0.0 and reason 'correct' do not go together"),
        (f"{GOOD}\n{GOOD}", "row 2: a second reply to 'simple_python_0': delete one"),
        ("", "bfcl.jsonl: it has no replies"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path, line, message):
    folder = wrote(tmp_path / "a", rows=some(["correct"]))
    (folder / "bfcl.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        ran(tmp_path, folder)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_compared_is_one_clear_line(tmp_path):
    good = wrote(tmp_path / "good", rows=some(["correct"]))
    with pytest.raises(ValueError, match="no folders: give some that python -m eval.run"):
        ran(tmp_path)
    with pytest.raises(NotADirectoryError, match="nowhere: no such folder: give one that"):
        ran(tmp_path, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: no scores.json: give a folder that eval.run wrote, after its end"):
        ran(tmp_path, good, tmp_path / "empty")
    bad = wrote(tmp_path / "bad", rows=some(["correct"]))
    for text, message in {
        "{": r"scores.json: not JSON \(",
        '{"rows": 3, "accuracy": 0.5}': "it has no scores of benchmarks: give a folder that",
        '{"benchmarks": {"bfcl": {}, "mmlu": {}}}': "unknown benchmark 'mmlu': known are bfcl, api_bank, acebench",
    }.items():
        (bad / "scores.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            ran(tmp_path, bad)
    (bad / "scores.json").write_text('{"benchmarks": {"bfcl": {}, "acebench": {}}}')
    with pytest.raises(FileNotFoundError, match="acebench.jsonl: not there, but scores.json beside it has this benchmark"):
        ran(tmp_path, bad)
    with pytest.raises(ValueError, match="--base good: there is one folder, and nothing to set against it"):
        ran(tmp_path, good, base="good")
    with pytest.raises(ValueError, match="--base god: no folder has this name: did you mean 'good'"):
        ran(tmp_path, good, f"b={good}", base="god")
    with pytest.raises(ValueError, match="nothing can be compared"):
        ran(tmp_path, good, wrote(tmp_path / "other", rows=[row("y", "multiple")]))
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="out: this is a file: give a folder"):
        ran(tmp_path, good)


def test_the_command_line(tmp_path, monkeypatch, capsys):
    args = command_line.read(Args, "python -m eval.compare", ["a", "n=b", "--out", "o", "--base", "n"])
    assert args == Args(("a", "n=b"), args.out, "n") and str(args.out) == "o"
    monkeypatch.setattr("sys.argv", ["compare", str(tmp_path / "no")])
    with pytest.raises(SystemExit) as stop:
        config.run_main(compare.main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
