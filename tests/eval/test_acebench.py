"""ACEBench: the loader and each rule of its checker on made-up tasks, and the published facts where the data is at hand.

The benchmark is read from the folder that GRPO_JAX_BENCHMARKS names: acebench_en/ (a copy of data_all/data_en).
"""

import ast
import copy
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from data import prompt
from eval import acebench

BENCHMARKS = os.environ.get("GRPO_JAX_BENCHMARKS")

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "nights": {"type": "integer"},
        "price": {"type": "number"},
        "quiet": {"type": "boolean"},
        "wishes": {"type": "array", "items": {"type": "string"}},
        "guests": {"type": "array", "items": {"type": "object"}},
        "room": {"type": "object", "properties": {"beds": {"type": "integer"}, "view": {"type": "object"}}},
        "grid": {"type": "array", "items": {"type": "array"}},
    },
    "required": ["city"],
}
TOOLS = [
    {"name": "Other", "description": "Not it.", "arguments": SCHEMA, "results": {}, "tags": ["x"]},
    {"name": "Book.room", "description": "Books a room.", "parameters": SCHEMA},
    {"name": "Now", "description": "The time.", "parameters": {}},
]
RIGHT = {
    "city": "San José, CA",
    "nights": 3,
    "price": 80.5,
    "quiet": True,
    "wishes": ["Sea view", "late check-out"],
    "guests": [{"name": "Ann", "age": 7}],
    "room": {"beds": 2, "view": {"side": "sea front"}},
    "grid": [[1, 0], [0, 1]],
}
QUESTION = "user: A room?\nsystem: In which city?\nsystem: And when?\nuser: San José, CA.\nNote: user: quiet\n"


def write(folder: Path, category: str, rows: list[tuple[dict, object]]) -> Path:
    (folder / "possible_answer").mkdir(parents=True, exist_ok=True)
    tasks = [
        {"id": f"{category}_{i}", "question": QUESTION, "function": TOOLS, "time": "It is May.", **task}
        for i, (task, _) in enumerate(rows)
    ]
    answers = [{"id": f"{category}_{i}", "ground_truth": answer} for i, (_, answer) in enumerate(rows)]
    name = f"data_normal_{category}.json"
    (folder / name).write_text("\n".join(json.dumps(task) for task in tasks), encoding="utf-8")
    (folder / "possible_answer" / name).write_text("\n".join(json.dumps(answer) for answer in answers), encoding="utf-8")
    return folder


def item_for(tmp_path, answer, **task):
    [item] = acebench.items(write(tmp_path / "made", "atom_bool", [(task, answer)]), ["atom_bool"])
    return item


@pytest.fixture
def item(tmp_path):
    return item_for(tmp_path, {"Book.room": RIGHT})


def reply(*calls) -> str:
    return prompt.reply([{"name": name, "arguments": arguments} for name, arguments in calls], "A thought.")


def parts(item, *calls) -> tuple[float, float, float]:
    found = acebench.verdict(reply(*calls), item).parts
    return found["official"], found["official_nostrip"], found["strict"]


def test_a_task_becomes_an_item(item):
    assert item.id == "atom_bool_0" and item.category == "atom_bool"
    # Keys that only tools other than the answer have are not shown.
    assert [tool["parameters"] for tool in item.example.tools] == [SCHEMA, SCHEMA, {}]
    assert {frozenset(tool) for tool in item.example.tools} == {frozenset({"name", "description", "parameters"})}
    assert item.example.answer == ({"name": "Book.room", "arguments": RIGHT},)
    assert item.example.messages == (
        {"role": "system", "content": "It is May."},
        {"role": "user", "content": "Conversation history 1..t:\n" + QUESTION},
    )


def test_the_dialogue_as_turns(tmp_path):
    folder = write(tmp_path / "ACEBench" / "data_all" / "data_en", "atom_enum", [({"time": ""}, {"Now": {}})])
    assert folder.is_dir()
    [item] = acebench.items(tmp_path / "ACEBench", ["atom_enum"], layout="turns")
    assert item.example.messages == (
        {"role": "user", "content": "A room?"},
        {"role": "assistant", "content": "In which city?"},
        {"role": "assistant", "content": "And when?"},
        {"role": "user", "content": "San José, CA.\nNote: user: quiet"},
    )
    assert [turn["role"] for turn in prompt.messages(item.example)] == ["system", "user", "assistant", "user"]


def test_the_answer_is_right_but_for_spaces_in_lists_inside_objects(tmp_path, item):
    assert parts(item, ("Book.room", RIGHT)) == (1.0, 1.0, 1.0)
    spaced = item_for(tmp_path, {"Book.room": {"city": "A", "room": {"wishes": ["a b"]}}})
    answer = ("Book.room", {"city": "A", "room": {"wishes": ["a b"]}})
    assert parts(spaced, answer) == (0.0, 1.0, 1.0)
    scored = acebench.verdict(reply(answer), spaced)
    assert (scored.value, scored.reason) == (0.0, "wrong_argument")


# What the authors' checker makes of a right call with some arguments changed. Expectations by hand, from its rules.
CHANGES = [
    # Numbers and truth values are compared by type alone.
    ({"quiet": False}, (1, 1, 0)),
    ({"nights": 10}, (1, 1, 0)),
    ({"nights": 3.0}, (1, 1, 1)),  # no integer, but equal to the answer
    ({"nights": 3.5}, (0, 0, 0)),
    ({"nights": True}, (0, 0, 0)),
    ({"nights": "3"}, (0, 0, 0)),
    ({"price": 1.5}, (1, 1, 0)),  # "number" is an int to the checker: so it looks at the type of the answer
    ({"price": 1}, (1, 1, 0)),
    ({"price": None}, (0, 0, 0)),
    ({"quiet": "true"}, (1, 1, 0)),
    ({"quiet": "True"}, (0, 0, 0)),
    # A text contains the answer's, without case and some punctuation.
    ({"city": "in SAN_JOSÉ ca, please"}, (1, 1, 0)),
    ({"city": "San Jose, CA"}, (0, 0, 0)),
    ({"city": ["San José, CA"]}, (0, 0, 0)),
    # A list has the same elements in the same order; one of objects as many that pass.
    ({"wishes": ["sea-view", "Late checkout"]}, (1, 1, 0)),
    ({"wishes": ["late check-out", "Sea view"]}, (0, 0, 0)),
    ({"wishes": ["Sea view", "late check-out", "x"]}, (0, 0, 0)),
    ({"guests": [{"name": "Anne", "age": 17}]}, (1, 1, 0)),  # inside objects, numbers too are compared as texts
    ({"guests": [{"name": "Ann", "age": 8}]}, (0, 0, 0)),
    ({"guests": [{"name": "Ann", "age": 7}] * 2}, (0, 0, 0)),
    ({"guests": ["Ann"]}, (0, 0, 0)),
    ({"grid": [[1, 0], [0, 1.0]]}, (1, 1, 1)),
    ({"grid": [[1, 0], [1, 0]]}, (0, 0, 0)),
    ({"grid": [1, 0]}, (0, 0, 0)),
    # An object has the same keys at every depth.
    ({"room": {"view": {"side": "The Sea-Front"}, "beds": 12}}, (1, 1, 0)),
    ({"room": {"beds": 2, "view": {"side": "front"}}}, (0, 0, 0)),
    ({"room": {"beds": 2}}, (0, 0, 0)),
    ({"room": {"beds": 2, "view": {"side": "sea front", "floor": 1}}}, (0, 0, 0)),
    ({"room": {"beds": 2, "view": "sea front"}}, (0, 0, 0)),
    ({"extra": 1}, (0, 0, 0)),
    ({"nights ": 3}, (1, 1, 0)),  # as code, a name may have spaces round it
    ({"night s": 3}, (1, 0, 0)),
    ({"from": 3}, (0, 0, 0)),
]


@pytest.mark.parametrize(("change", "expected"), CHANGES)
def test_what_the_verdicts_compare(item, change, expected):
    arguments = {**RIGHT, **change}
    for name in change:
        if name.replace(" ", "") == "nights" and name != "nights":
            del arguments["nights"]
    assert parts(item, ("Book.room", arguments)) == expected


def test_optional_arguments_may_be_left_out_officially(item):
    for name in RIGHT:
        dropped = {other: value for other, value in RIGHT.items() if other != name}
        scored = acebench.verdict(reply(("Book.room", dropped)), item)
        assert scored.value == float(name != "city") and scored.parts["strict"] == 0
        assert scored.reason == ("missing_argument" if name == "city" else "correct")


def test_several_calls(tmp_path):
    one, two = {"city": "A", "nights": 1}, {"city": "B", "nights": 2}
    item = item_for(tmp_path, {"Book.room_1": one, "Book.room_2": two})
    assert [call["name"] for call in item.example.answer] == ["Book.room"] * 2

    def call(arguments):
        return "Book.room", arguments

    assert parts(item, call(two), call(one)) == (1, 1, 1)  # any order
    assert parts(item, call({"city": "A B"}), call({"city": "zzz"})) == (1, 1, 0)  # one call may serve twice
    assert parts(item, call(one), call(one)) == (0, 0, 0)
    for calls, reason in [
        ([call(one)], "wrong_count"),
        ([], "wrong_count"),
        ([call(one), ("Now", {})], "wrong_function"),
        ([call(one), ("Book.room_2", two)], "wrong_function"),
        ([call({"nights": 1}), call({"nights": 2})], "missing_argument"),
        ([call({**one, "x": 1}), call({**two, "x": 1})], "extra_argument"),
        ([call(one), call(one)], "wrong_argument"),
    ]:
        assert acebench.verdict(reply(*calls), item).reason == reason


def test_alternatives_and_calls_without_arguments(tmp_path):
    item = item_for(tmp_path, [{"Book.room": {"city": "A"}}, {"Now": {}}])
    assert item.example.answer == ({"name": "Book.room", "arguments": {"city": "A"}},)
    assert parts(item, ("Now", {})) == (1, 1, 1)
    assert parts(item, ("Now", {"a": 1})) == parts(item, ("Book.room", {})) == (0, 0, 0)
    empty = item_for(tmp_path, {"Book.room": {"city": "A", "wishes": []}})
    assert parts(empty, ("Book.room", {"city": "A", "wishes": []})) == (0, 0, 1)  # an empty list in the answer never passes


def test_replies_that_are_no_calls(item):
    for text, reason in [
        ("", "no_call"),
        ("Book.room(city='A')", "no_call"),
        ("<tool_call>[{]</tool_call>", "bad_json"),
        ("<tool_call>" + "[" * 100000 + "</tool_call>", "bad_json"),
        (reply(("Now", {})) + reply(("Book.room", RIGHT)), "correct"),  # the last block counts
    ]:
        scored = acebench.verdict(text, item)
        assert (scored.reason, scored.value) == (reason, float(reason == "correct")), text[:60]


NESTED = [0]
for _ in range(196):
    NESTED = [NESTED]
DECODED = [
    [("a.b", {"x": 'it\'s "so"\n\t\u3000\xa0 \\ n', "y": [1, -2, 1.5e-7, -0.0, True, None, {"k k": "v v"}]})],
    [(" a . b ", {" x\n": 1}), ("f", {})],
    [("a b", {"x": 1})],
    [("f", {"x y": 1, "xy": 2})],
    [("f", {"class": 1})],
    [("if", {"x": 1})],
    [("", {})],
    [("a..b", {})],
    [("f(x=1), g", {})],
    [("ﬁle", {"ﬁ": "ﬁ"})],
    [("f", {"x": "\ud800 \x00 \u2028"})],
    [("f", {"x": {"b c": 1, "bc": 2}})],
    [("f", {"x": NESTED})],
    [("f", {"x": [NESTED]})],
    [("f", {"x": [[NESTED]]})],
    [("f", {"x": 10**4299})],
]


@pytest.mark.parametrize("strip", [True, False])
@pytest.mark.parametrize("number", range(len(DECODED)))
def test_decoding_without_text_equals_decoding_the_text(strip, number):
    """The slow path: the calls written as Python, parsed by Python."""
    calls = [{"name": name, "arguments": arguments} for name, arguments in DECODED[number]]
    written = ", ".join(
        f"{call['name']}({', '.join(f'{key}={value!r}' for key, value in call['arguments'].items())})" for call in calls
    )
    text = f"[{written}]"
    expected = None
    try:
        nodes = ast.parse("".join(text.split()) if strip else text, mode="eval").body.elts
        named = all(isinstance(node, ast.Call) and not node.args for node in nodes) and len(nodes) == len(calls)
        if named:
            values = [{given.arg: ast.literal_eval(given.value) for given in node.keywords} for node in nodes]
            expected = [(ast.unparse(node.func), given) for node, given in zip(nodes, values, strict=True)]
    except SyntaxError:
        pass
    assert acebench._decoded(calls, strip=strip) == expected
    assert number != 0 or expected is not None  # not all are refused


def test_aggregates():
    sizes = {name: 50 if name in acebench.ATOM else 100 for name in acebench.CATEGORIES}
    right = dict(zip(sizes, (50, 50, 50, 50, 50, 33, 92, 86), strict=True))
    means = acebench.aggregates({name: (right[name], sizes[name]) for name in sizes})
    assert means == pytest.approx({"acebench": 0.93, "atom": 283 / 300, "single_turn": 0.89}, abs=1e-12)
    assert acebench.aggregates({name: (1, 4) for name in acebench.SINGLE_TURN}) == {"single_turn": 0.25}
    assert acebench.aggregates({}) == acebench.aggregates({"atom_bool": (1, 2), "atom_enum": (0, 0)}) == {}
    for name, eighths in {"LLaMA-3.1-Base-8B": 405, "GPT-4o-mini": 653, "Tool-N1-14B": 688, "GPT-4o": 696}.items():
        assert abs(eighths / 8 - acebench.PAPER[name]) < 0.006  # means of eight categories


def test_what_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data_normal_atom_bool.json: no such file of ACEBench: git clone https"):
        acebench.items(tmp_path, ["atom_bool"])
    with pytest.raises(ValueError, match="no category 'atom_boolean' here: did you mean 'atom_bool'"):
        acebench.items(tmp_path, ["atom_boolean"])
    with pytest.raises(ValueError, match="layout 'chat': use one_message or turns"):
        acebench.items(tmp_path, layout="chat")
    folder = write(tmp_path, "atom_bool", [({}, {"Now": {}})])
    for name, text, problem in [
        ("possible_answer/data_normal_atom_bool.json", '{"id": "x"}', "its ids are not those of"),
        ("possible_answer/data_normal_atom_bool.json", '{"id": "atom_bool_0", "ground_truth": []}', "atom_bool_0 is no task"),
        ("possible_answer/data_normal_atom_bool.json", '{"id": "atom_bool_0", "ground_truth": {}}', "its answer is not calls"),
        ("data_normal_atom_bool.json", '{"id": "atom_bool_0"}\n{', "cannot be read as JSON lines"),
        ("data_normal_atom_bool.json", "", "it holds no tasks"),
    ]:
        write(tmp_path, "atom_bool", [({}, {"Now": {}})])
        (folder / name).write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=problem):
            acebench.items(folder, ["atom_bool"])


# The real data.


@pytest.fixture(scope="module")
def english() -> list:
    folder = Path(BENCHMARKS or "") / "acebench_en"
    if BENCHMARKS is None or not folder.is_dir():
        pytest.skip("GRPO_JAX_BENCHMARKS names no folder with acebench_en/")
    return acebench.items(folder)


def test_the_answers_of_the_benchmark(english):
    right, sizes = {}, Counter(item.category for item in english)
    for item in english:
        for protocol, value in acebench.verdict(prompt.reply(item.example.answer, ""), item).parts.items():
            right.setdefault(protocol, Counter())[item.category] += value
    table = {protocol: [count[name] for name in acebench.CATEGORIES] for protocol, count in right.items()}
    assert table == {
        "official": [50, 50, 50, 50, 50, 33, 92, 86],
        "official_nostrip": [50, 50, 50, 50, 50, 50, 100, 99],
        "strict": [50, 50, 50, 50, 50, 50, 100, 100],
    }
    means = [acebench.aggregates({n: (count[n], sizes[n]) for n in sizes})["acebench"] for count in right.values()]
    assert [round(100 * mean, 1) for mean in means] == [93.0, 99.9, 100.0]


PERTURBED = {  # tasks that it concerns, and how many still pass: official, official_nostrip, strict
    "flipped": (34, 33, 34, 0),
    "plus 7": (56, 55, 56, 0),
    "zzz": (337, 316, 336, 0),
    "optional dropped": (251, 223, 233, 0),
}


@pytest.mark.parametrize("change", PERTURBED)
def test_perturbed_answers_pass_as_often_as_by_the_authors_checker(english, change):
    """All top-level values of a type, in all calls of a task, changed: that most still pass is why `strict` is there."""
    found = Counter()
    for item in english:
        calls = copy.deepcopy(item.example.answer)
        schemas = {tool["name"]: tool["parameters"] for tool in item.example.tools}
        for call in calls:
            for name, value in list(call["arguments"].items()):
                if change == "optional dropped":
                    if name not in schemas[call["name"]]["required"]:
                        del call["arguments"][name]
                elif change == "flipped" and isinstance(value, bool):
                    call["arguments"][name] = not value
                elif change == "plus 7" and type(value) in (int, float):
                    call["arguments"][name] = value + 7
                elif change == "zzz" and isinstance(value, str):
                    call["arguments"][name] = value + " zzz"
        if calls != item.example.answer:
            found["tasks"] += 1
            found.update(acebench.verdict(prompt.reply(calls, ""), item).parts)
    assert (found["tasks"], found["official"], found["official_nostrip"], found["strict"]) == PERTURBED[change]
