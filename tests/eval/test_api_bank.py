"""API-Bank: the loader on made-up rows in both forms, the verdict's rules, and the whole file where it is at hand.

The benchmark is read from the folder that GRPO_JAX_BENCHMARKS names: level-1-api.json, or apibank_level1_call.jsonl.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from data import prompt
from eval import api_bank

BENCHMARKS = os.environ.get("GRPO_JAX_BENCHMARKS")
FILES = ("level-1-api.json", "apibank_level1_call.jsonl")

HOTEL = {"name": "BookHotel", "description": "Books a room.", "parameters": {"city": {"type": "str", "description": "Where."}}}
MEET = {
    "name": "AddMeeting",
    "description": "Adds a meeting.",
    "parameters": {
        "topic": {"type": "str", "description": "What about."},
        "rooms": {"type": "int", "description": "How many."},
        "attendees": {"type": "list(str)", "description": "Who."},
    },
}


def authors_row(number: int, tool: dict, dialogue: str, output: str) -> dict:
    described = json.dumps({**tool, "input_parameters": tool["parameters"], "output_parameters": {}})
    return {
        "file": "Meet-1.jsonl",
        "id": number,
        "instruction": f"Generate an API request.\n\nAPI descriptions:\n{described}",
        "input": f"{dialogue}\nGenerate API Request:\n",
        "expected_output": f"API-Request: {output}",
    }


ROWS = [
    authors_row(
        0,
        MEET,
        "User: Plan a meeting.\nAI: One moment.\nAPI-Request: [GetUser(name='Ann's', pass='x, y=1')]->{'id': 7}\n"
        "AI: Done: who comes?\nUser: Bo and Cy.\nAI: I'll add it.",
        "[AddMeeting(topic='Ann's plan', rooms='2', attendees='['Bo', 'Cy']')]",
    ),
    authors_row(2, HOTEL, "User: A room in Oslo?\nAPI-Request: [Now()]->12:00", "[BookHotel(city='Oslo')]"),
    authors_row(3, MEET, "User: Add it.", "[AddMeeting(theme='A')]"),
]
MEETING = {"topic": "Ann's plan", "rooms": "2", "attendees": "['Bo', 'Cy']"}


@pytest.fixture
def made_up(tmp_path) -> list:
    (tmp_path / "level-1-api.json").write_text(json.dumps(ROWS), encoding="utf-8")
    return api_bank.items(tmp_path)


def reply(*calls) -> str:
    return prompt.reply([{"name": name, "arguments": arguments} for name, arguments in calls], "A thought.")


def test_rows_of_the_authors_become_items(made_up):
    assert [item.id for item in made_up] == ["Meet-1:0", "Meet-1:2", "Meet-1:3"]
    assert [item.category for item in made_up] == list(api_bank.CATEGORIES)
    first = made_up[0]
    assert first.given["answer"] == {"name": "AddMeeting", "arguments": MEETING}
    assert first.example.answer == (first.given["answer"],) and first.example.tools == (MEET,)
    assert first.example.messages[0] == {"role": "system", "content": "This year is 2023."}
    assert first.example.messages[1]["content"] == (
        "**Dialogue Records History**\n"
        "<user>Plan a meeting.</user>\n"
        "<response>One moment.</response>\n"
        "<tool_call>\n"
        '[{"name": "GetUser", "arguments": {"name": "Ann\'s", "pass": "x, y=1"}}]\n'
        "</tool_call>\n"
        "<obs> {'id': 7} </obs>\n"
        "<response>Done: who comes?</response>\n"
        "\n"
        "<user>Bo and Cy.</user>\n"
        "<response>I'll add it.</response>\n"
        "\n"
        f"<user> {api_bank.REQUEST}</user>"
    )
    chat = prompt.messages(first.example)
    assert [turn["role"] for turn in chat] == ["system", "user"] and chat[0]["content"].endswith("This year is 2023.")


def test_the_dialogue_as_turns(tmp_path):
    (tmp_path / "level-1-api.json").write_text(json.dumps(ROWS), encoding="utf-8")
    first, second, _ = api_bank.items(tmp_path / "level-1-api.json", layout="turns")
    assert first.example.messages[1:] == (
        {"role": "user", "content": "Plan a meeting."},
        {
            "role": "assistant",
            "content": "One moment.",
            "calls": [{"name": "GetUser", "arguments": {"name": "Ann's", "pass": "x, y=1"}}],
        },
        {"role": "tool", "name": "GetUser", "content": "{'id': 7}"},
        {"role": "assistant", "content": "Done: who comes?"},
        {"role": "user", "content": "Bo and Cy."},
        {"role": "assistant", "content": "I'll add it."},
        {"role": "user", "content": api_bank.REQUEST},
    )
    calls = [{"name": "Now", "arguments": {}}]
    assert second.example.messages[2] == {"role": "assistant", "content": "", "calls": calls}
    roles = [turn["role"] for turn in prompt.messages(second.example)]
    assert roles == ["system", "user", "assistant", "user"]  # by turns: the result and the request are one


def test_json_lines_are_the_same_items(tmp_path, made_up):
    history = [
        {"role": "user", "content": "Plan a meeting."},
        {"role": "assistant", "content": "One moment."},
        {"role": "tool", "name": "GetUser", "arguments": {"name": "Ann's", "pass": "x, y=1"}, "content": {"id": 7}},
        {"role": "assistant", "content": "Done: who comes?"},
        {"role": "user", "content": "Bo and Cy."},
        {"role": "assistant", "content": "I'll add it."},
    ]
    row = {"id": "a0", "tools": [MEET], "history": history, "answer": {"name": "AddMeeting", "arguments": MEETING}}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    [item] = api_bank.items(file)
    assert item.id == "a0" and replace(item.example, extra={}) == replace(made_up[0].example, extra={})
    assert api_bank.items(file, ["call_book_hotel"]) == []


RIGHT = [
    MEETING,
    {"topic": " Ann's plan ", "rooms": 2, "attendees": ["Bo", "Cy"]},
    {"topic": "Ann's plan", "rooms": " 2", "attendees": '["Bo","Cy"]'},
]
WRONG = [
    ("wrong_argument", {**MEETING, "topic": "ann's plan"}),
    ("wrong_argument", {**MEETING, "rooms": 2.0}),
    ("wrong_argument", {**MEETING, "rooms": True}),
    ("wrong_argument", {**MEETING, "rooms": [2]}),
    ("wrong_argument", {**MEETING, "rooms": None}),
    ("wrong_argument", {**MEETING, "attendees": ["Cy", "Bo"]}),
    ("wrong_argument", {**MEETING, "attendees": "Bo, Cy"}),
    ("wrong_argument", {**MEETING, "attendees": "[" * 1900}),
    ("wrong_argument", {**MEETING, "attendees": "[" + "-" * 1900 + "1]"}),
    ("wrong_argument", {**MEETING, "attendees": "[" * 90000 + "]" * 90000}),
    ("missing_argument", {"topic": "Ann's plan", "rooms": "2", "who": "Bo"}),
    ("extra_argument", {**MEETING, "place": "here"}),
]


def test_values_that_are_the_same(made_up):
    for arguments in RIGHT:
        scored = api_bank.verdict(reply(("AddMeeting", arguments)), made_up[0])
        assert (scored.value, scored.reason, scored.parts["accuracy"]) == (1.0, "correct", 1.0)
        assert scored.parts["toolrl"] == float(arguments == MEETING)  # values as they stand


@pytest.mark.parametrize(("reason", "arguments"), WRONG)
def test_values_that_are_not(made_up, reason, arguments):
    scored = api_bank.verdict(reply(("AddMeeting", arguments)), made_up[0])
    assert (scored.value, scored.reason, scored.parts) == (0.0, reason, {"accuracy": 0.0, "toolrl": 0.0})


def test_replies_that_are_no_single_call(made_up):
    right = ("AddMeeting", MEETING)
    twice = reply(right, ("BookHotel", {}))
    for text, reason, toolrl in [
        (twice, "wrong_count", 1.0),  # ToolRL takes any
        (reply(), "wrong_count", 0.0),
        ("", "no_call", 0.0),
        ("<tool_call>[{]</tool_call>", "bad_json", 0.0),
        (reply(("addmeeting", MEETING)), "wrong_function", 0.0),
        ("<tool_call>" + "[" * 100000 + "</tool_call>", "bad_json", 0.0),
        (reply(("BookHotel", {})) + reply(right), "correct", 1.0),  # the last block counts
    ]:
        scored = api_bank.verdict(text, made_up[0])
        assert (scored.reason, scored.parts["toolrl"]) == (reason, toolrl), text[:80]


def test_null_and_booleans_are_their_python_text(made_up):
    item = replace(made_up[1], given={"answer": {"name": "BookHotel", "arguments": {"a": "True", "b": "None"}}})
    assert api_bank.verdict(reply(("BookHotel", {"a": True, "b": None})), item).value == 1.0
    assert api_bank.verdict(reply(("BookHotel", {"a": 1, "b": ""})), item).value == 0.0


def test_aggregates():
    counts = {"call": (300, 386), "call_book_hotel": (4, 5), "call_undescribed_argument": (0, 8)}
    shares = api_bank.aggregates(counts)
    assert shares == {"accuracy": 304 / 399, "accuracy_394": 300 / 394, "accuracy_reachable": 304 / 391}
    assert api_bank.aggregates({"call_book_hotel": (4, 5)}) == {"accuracy": 0.8, "accuracy_reachable": 0.8}
    assert api_bank.aggregates({}) == {} == api_bank.aggregates({"call": (0, 0)})
    # Part of a category stands for the whole of it.
    some = {"call": (5, 10), "call_book_hotel": (5, 5), "call_undescribed_argument": (0, 1)}
    assert api_bank.aggregates(some) == {"accuracy": 198 / 399, "accuracy_394": 193 / 394, "accuracy_reachable": 198 / 391}
    for name, count in {"LLaMA-3.1-Base-8B": 238, "GPT-4o-mini": 288, "GPT-4o": 304}.items():
        assert round(100 * count / 394, 2) == api_bank.PAPER[name]


def test_what_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"level-1-api.json is not there: download https://huggingface"):
        api_bank.items(tmp_path)
    file = tmp_path / "level-1-api.json"
    for text, problem in [
        ("[{", "cannot be read as JSON"),
        ("[]", "it holds no tasks"),
        ('{"id": 1, "query": "x"}', "row 1 is none of API-Bank's level 1 .*KeyError: 'answer'"),
        (json.dumps([{**ROWS[0], "input": "Nobody: hi"}]), "row 1 .*a line of the dialogue is of nobody: Nobody: hi"),
        (json.dumps([{**ROWS[0], "expected_output": "hello"}]), "row 1 .*not a call: hello"),
    ]:
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=problem):
            api_bank.items(tmp_path)
    with pytest.raises(ValueError, match="no category 'calls': use call, call_book_hotel"):
        api_bank.items(tmp_path, ["calls"])
    with pytest.raises(ValueError, match="layout 'chat': use one_message or turns"):
        api_bank.items(tmp_path, layout="chat")


@pytest.mark.skipif(BENCHMARKS is None, reason="GRPO_JAX_BENCHMARKS names no folder with the benchmarks' files")
def test_the_answers_of_the_benchmark_are_right():
    files = [Path(BENCHMARKS) / name for name in FILES if (Path(BENCHMARKS) / name).is_file()]
    if not files:
        pytest.skip(f"none of {', '.join(FILES)} in GRPO_JAX_BENCHMARKS")
    for file in files:
        found = api_bank.items(file)
        scored = [api_bank.verdict(prompt.reply([item.given["answer"]], ""), item) for item in found]
        assert len(found) == 399 and sum(one.value for one in scored) == sum(one.parts["toolrl"] for one in scored) == 399
        sizes = {name: sum(item.category == name for item in found) for name in api_bank.CATEGORIES}
        assert list(sizes.values()) == [386, 5, 8]
        # Lists as lists and numbers as numbers are right, too, and are what ToolRL's comparison loses.
        typed = [api_bank.verdict(reply((name, _typed(arguments))), item) for item, name, arguments in _answers(found)]
        assert sum(one.value for one in typed) == 399 > sum(one.parts["toolrl"] for one in typed)
        # A changed value, a dropped argument and one too many never pass.
        for item, name, arguments in _answers(found):
            for key, value in arguments.items():
                changed = {**arguments, key: value + " zzz"}
                dropped = {other: arguments[other] for other in arguments if other != key}
                for wrong in (changed, dropped, {**arguments, "zzz": "1"}):
                    assert api_bank.verdict(reply((name, wrong)), item).value == 0.0, (item.id, wrong)


def _answers(found):
    return [(item, item.given["answer"]["name"], item.given["answer"]["arguments"]) for item in found]


def _typed(arguments: dict) -> dict:
    def value(text):
        held = api_bank._container(text)
        return int(text) if text.isdecimal() and str(int(text)) == text else held

    return {name: value(text) for name, text in arguments.items()}
