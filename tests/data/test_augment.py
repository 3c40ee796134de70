"""Rows without their tools, rows with random names: what changes, and that nothing else does."""

import json
import random

from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import augment
from data.example import Example, make

XLAM = {"name": "weather", "description": "weather of a city", "parameters": {"city": {"type": "str"}, "days": {"type": "int"}}}
SCHEMA = {
    "name": "news",
    "description": "",
    "parameters": {"type": "object", "properties": {"topic": {"type": "string"}, "city": {}}, "required": ["topic"]},
}
BARE = {"name": "ping", "description": "", "parameters": {}, "strict": True}
TURNS = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": "", "calls": [{"name": "news", "arguments": {"topic": "weather", "city": "Oslo"}}]},
    {"role": "tool", "content": "rain", "name": "news"},
]
ANSWER = [{"name": "weather", "arguments": {"city": "Oslo", "unlisted": 1}}, {"name": "ping", "arguments": {}}]
EXTRA = {"row_id": "7", "reasoning": "weather knows", "response": "[weather]"}
TASK = make(TURNS, [XLAM, SCHEMA, BARE], ANSWER, "xlam", EXTRA)


def test_irrelevant_takes_the_called_tools_and_the_answer_away():
    other = augment.irrelevant(TASK)
    assert other == make(TURNS, [SCHEMA], [], "xlam-irrelevance", {"row_id": "7"})
    assert other.id != TASK.id


def test_a_task_that_would_have_no_tool_left_or_called_it_before_or_calls_nothing_stays():
    assert augment.irrelevant(make(TURNS, [XLAM, SCHEMA], [{"name": "news", "arguments": {}}], "xlam")) is None
    assert augment.irrelevant(make(TURNS, [XLAM, BARE], ANSWER, "xlam")) is None
    assert augment.irrelevant(make(TURNS, [XLAM, BARE], [], "xlam")) is None


def test_masked_renames_tools_and_parameters_everywhere_but_in_texts():
    other = augment.masked(TASK, random.Random(0))
    weather, news, ping = (tool["name"] for tool in other.tools)
    city, days = other.tools[0]["parameters"]
    topic, where = other.tools[1]["parameters"]["properties"]
    names = {weather, news, ping, city, days, topic, where}
    assert len(names) == 7 and all(len(name) == augment.MASK_LETTERS and name.isalpha() and name.islower() for name in names)
    assert other == Example(
        messages=(
            TURNS[0],
            {"role": "assistant", "content": "", "calls": [{"name": news, "arguments": {topic: "weather", where: "Oslo"}}]},
            {"role": "tool", "content": "rain", "name": news},
        ),
        tools=(
            {"name": weather, "description": "weather of a city", "parameters": {city: {"type": "str"}, days: {"type": "int"}}},
            {
                "name": news,
                "description": "",
                "parameters": {"type": "object", "properties": {topic: {"type": "string"}, where: {}}, "required": [topic]},
            },
            {"name": ping, "description": "", "parameters": {}, "strict": True},
        ),
        answer=({"name": weather, "arguments": {city: "Oslo", "unlisted": 1}}, {"name": ping, "arguments": {}}),
        source="xlam-masked",
        id=other.id,
        extra={"row_id": "7"},
    )
    assert other == augment.masked(TASK, random.Random(0)) != augment.masked(TASK, random.Random(1))


def test_a_parameter_called_properties_is_one():
    tool = {"name": "house", "description": "", "parameters": {"properties": {"type": "dict"}, "type": {"type": "str"}}}
    other = augment.masked(make(TURNS[:1], [tool], [{"name": "house", "arguments": {"type": 1}}], "xlam"), random.Random(0))
    assert len(other.tools[0]["parameters"]) == 2 and "properties" not in other.tools[0]["parameters"]
    assert set(other.answer[0]["arguments"]) < set(other.tools[0]["parameters"])


json_values = st.recursive(
    st.none() | st.integers() | st.text(max_size=3), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
)


@settings(max_examples=50, deadline=None)
@example({"type": "object", "properties": {"a": {}}, "required": "a"}, 0)
@given(st.dictionaries(st.sampled_from(["type", "properties", "required", "a"]), json_values), st.integers(0, 9))
def test_any_parameters_can_be_masked(parameters, seed):
    tools = [{"name": "f", "description": "", "parameters": parameters}] * 2
    task = make(TURNS[:1], tools, [{"name": "f", "arguments": {"a": 1}}], "xlam")
    other = augment.masked(task, random.Random(seed))
    assert len(json.dumps(other.tools[0])) >= 3 and other.tools[0] == other.tools[1]
    assert other.answer[0]["name"] == other.tools[0]["name"] != "f"
