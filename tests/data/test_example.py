"""The id is a function of the task's content, and of nothing else."""

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from data.example import Example, content_id, make

ROOT = Path(__file__).parents[2]
TURNS = [{"role": "user", "content": "Wie warm ist es in Zürich?"}]
TOOLS = [{"name": "weather", "description": "", "parameters": {"city": {"type": "string"}}}]
ANSWER = [{"name": "weather", "arguments": {"city": "Zürich", "days": 1}}]


def test_id_is_sha256_of_canonical_json():
    text = (
        '{"answer":[{"arguments":{"city":"Zürich","days":1},"name":"weather"}],'
        '"messages":[{"content":"Wie warm ist es in Zürich?","role":"user"}],'
        '"tools":[{"description":"","name":"weather","parameters":{"city":{"type":"string"}}}]}'
    )
    expected = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert make(TURNS, TOOLS, ANSWER, "here").id == expected == content_id(TURNS, TOOLS, ANSWER)


def test_id_ignores_source_extra_and_order_of_keys():
    other = [{"arguments": {"days": 1, "city": "Zürich"}, "name": "weather"}]
    a, b = make(TURNS, TOOLS, ANSWER, "here"), make(TURNS, TOOLS, other, "there", {"reasoning": "why"})
    assert a.id == b.id


@pytest.mark.parametrize("days", [1.0, True, "1", None, [1]])
def test_id_tells_types_of_values_apart(days):
    changed = [{"name": "weather", "arguments": {"city": "Zürich", "days": days}}]
    assert make(TURNS, TOOLS, changed, "here").id != make(TURNS, TOOLS, ANSWER, "here").id


def test_id_sees_messages_tools_and_the_order_of_turns():
    more = [*TURNS, {"role": "assistant", "content": "Where?"}, {"role": "user", "content": "There."}]
    swapped = [more[2], more[1], more[0]]
    ids = [content_id(TURNS, TOOLS, ANSWER), content_id(TURNS, [], ANSWER), content_id(TURNS, TOOLS, [])]
    ids += [content_id(more, TOOLS, ANSWER), content_id(swapped, TOOLS, ANSWER)]
    assert len(set(ids)) == 5


def test_an_example_without_an_id_computes_it_and_is_frozen():
    made = make(TURNS, TOOLS, ANSWER, "here")
    assert Example(tuple(TURNS), tuple(TOOLS), tuple(ANSWER), "here") == made
    assert dataclasses.replace(made, answer=(), id="").id == content_id(TURNS, TOOLS, [])
    assert Example((), (), (), "here", "chosen").id == "chosen"
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.source = "there"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "half \ud800 pair", {1, 2}])
def test_content_that_is_no_plain_json_is_refused(value):
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        make(TURNS, TOOLS, [{"name": "weather", "arguments": {"city": value}}], "here")


def test_data_does_not_import_jax():
    code = "import sys, data.example, data.jsonl, data.prompt, data.build; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
