"""The rules of the reward, case by case; its equality with the released code's readings; and that no text is too odd,
too deep or too long for it."""

import itertools
import json
import math
import re
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax import reward
from grpo_jax.reward import KINDS, REASONS, Response, Scored, judge, parse_calls, resolve, score

F1 = {"name": "f", "arguments": {"a": 1}}
F2 = {"name": "f", "arguments": {"a": 2}}
G = {"name": "g", "arguments": {}}
THINK = "<think>so</think>"

PROPERTY = settings(derandomize=True, deadline=None, max_examples=200)


def block(content):
    return f"<tool_call>{content if isinstance(content, str) else json.dumps(content)}</tool_call>"


def arguments(text):
    """A block with one call of f whose argument `a` is the JSON `text`."""
    return block('[{"name": "f", "arguments": {"a": %s}}]' % text)  # noqa: UP031 (braces)


# ---------------------------------------------------------------- which block, which think


FRAGMENTS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<tool_call", "call>", "</", "<", "[]", "x", "\n"]


@PROPERTY
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join))
def test_tags_are_read_as_by_the_regular_expressions(text):
    blocks = [match.span() for match in re.finditer(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL)]
    assert reward.block_span(text) == (blocks[-1] if blocks else None)
    think = re.search(r"<think>(.*?)</think>", text, re.DOTALL)
    assert reward.think_span(text) == (think.span() if think else None)


def test_all_short_sequences_of_tags_are_read_as_by_the_regular_expression():
    for parts in itertools.chain.from_iterable(itertools.product(FRAGMENTS[:2] + ["x"], repeat=n) for n in range(7)):
        text = "".join(parts)
        blocks = [match.span() for match in re.finditer(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL)]
        assert reward.block_span(text) == (blocks[-1] if blocks else None), text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("[]", None),
        ("<tool_call>[]", None),
        ("[]</tool_call>", None),
        ("</tool_call>[]<tool_call>", None),
        ("<TOOL_CALL>[]</TOOL_CALL>", None),
        (block([]), []),
        (block([F1]) + "and" + block([G]), [G]),
        (block([F1]) + block("oops"), None),
        (block([F1]) + "<tool_call>[]", [F1]),  # an opening tag never closed is no block
        (block([F1]) + "</tool_call>", [F1]),
        ("I will write <tool_call> now: " + block([F1]), None),  # the block starts at the first opening tag
        (f"<think>{block([F1])}</think>", [F1]),
        (block([{"name": "f", "arguments": {"a": "</tool_call>"}}]), None),
    ],
)
def test_the_last_block_counts(text, expected):
    assert parse_calls(text) == expected


@pytest.mark.parametrize(
    ("think", "expected"),
    [("<think></think>", 1), ("<think>\n<think></think>", 1), ("</think><think>", 0), ("<think>", 0), ("</think>", 0)],
)
def test_a_think_block_opens_before_it_closes(think, expected):
    assert score(think + block([F1]), [F1]) == expected
    assert score(block([F1]) + think, [F1]) == expected


# ---------------------------------------------------------------- what is a list of calls


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[]", []),
        (json.dumps(F1), [F1]),
        (json.dumps([F1, F1]), [F1, F1]),
        (" \n[]\t", []),
        ("\u00a0\u3000[]\u2003", []),
        (json.dumps(json.dumps([F1])), [F1]),
        (json.dumps(json.dumps(F1)), [F1]),
        (json.dumps(json.dumps(json.dumps([F1]))), None),
        (json.dumps({**F1, "id": 3}), [F1]),
        ("", None),
        ("null", None),
        ("true", None),
        ("3", None),
        ("{}", None),
        ('"text"', None),
        ("[null]", None),
        ("[[]]", None),
        (json.dumps([[F1]]), None),
        (json.dumps([F1, 1]), None),
        ("[{}]", None),
        ('[{"name": "f"}]', None),
        ('[{"arguments": {}}]', None),
        ('[{"name": "f", "parameters": {}}]', None),
        ('[{"name": ["f"], "arguments": {}}]', None),
        ('[{"name": null, "arguments": {}}]', None),
        ('[{"name": 1, "arguments": {}}]', None),
        ('[{"name": "f", "arguments": null}]', None),
        ('[{"name": "f", "arguments": []}]', None),
        ('[{"name": "f", "arguments": "{}"}]', None),
        ("[{'name': 'f', 'arguments': {}}]", None),
        (json.dumps([F1]) + "x", None),
        (json.dumps([F1]) + json.dumps([F1]), None),
        ("```json\n[]\n```", None),
        ("\ufeff[]", None),
    ],
)
def test_what_is_a_list_of_calls(content, expected):
    assert parse_calls(block(content)) == expected


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "01", "+1", "1_000", '"\n"'])
def test_what_python_reads_but_json_is_not(text):
    assert parse_calls(arguments(text)) is None


def test_integers_up_to_4300_digits():
    for sign in ("", "-"):
        fits = sign + "1" * 4300
        assert parse_calls(arguments(fits))[0]["arguments"]["a"] == int(fits)
        assert score(arguments(fits), [{"name": "f", "arguments": {"a": int(fits)}}], "binary_no_reasoning") == 1
        assert parse_calls(arguments(fits + "1")) is None


def test_the_limit_of_digits_is_ours_and_not_the_interpreters():
    limit = sys.get_int_max_str_digits()
    try:
        sys.set_int_max_str_digits(0)
        assert parse_calls(arguments("1" * 1_000_000)) is None
    finally:
        sys.set_int_max_str_digits(limit)


def test_an_answer_may_hold_an_integer_that_str_refuses():
    assert score(THINK + arguments("1"), [{"name": "f", "arguments": {"a": 10**5000}}]) == 0


def test_a_repeated_key_takes_its_last_value():
    assert parse_calls(block('{"name": "x", "name": "f", "arguments": {"a": 0, "a": 1}}')) == [F1]


@pytest.mark.parametrize("text", ['"\\ud83d"', '"\ud83d"', '"\\udc00\\ud83d"'])
def test_lone_surrogates_are_characters(text):
    assert score(arguments(text), [{"name": "f", "arguments": {"a": json.loads(text)}}], "binary_no_reasoning") == 1
    assert score(arguments('"x"') + text, [F1]) == 0


def nested(depth, opening, closing):
    """`depth` levels of nesting in all: the list of calls, the call and its arguments are three of them."""
    return arguments(opening * (depth - 3) + "1" + closing * (depth - 3))


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_nesting_up_to_500_levels(opening, closing):
    deep = parse_calls(nested(500, opening, closing))
    assert deep is not None
    assert score(nested(500, opening, closing), deep, "binary_no_reasoning") == 1
    assert parse_calls(nested(501, opening, closing)) is None


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("closed", [True, False])
def test_nesting_of_100_000_levels_is_bad_json(opening, closing, closed):
    text = nested(100_000, opening, closing if closed else "")
    for response in (text, block(opening * 100_000), block(json.dumps(opening * 100_000 + closing * 100_000))):
        assert parse_calls(response) is None
        assert judge(THINK + response, [F1]).reason == "bad_json"


def test_the_comparison_does_not_recurse():
    value = 1
    for _ in range(100_000):
        value = {"a": [value]}
    assert len(reward.canonical(value)) > 800_000
    assert score(THINK + block([F1]), [{"name": "f", "arguments": value}]) == 0


# ---------------------------------------------------------------- which calls match


def matches(calls, answer):
    return score(block(calls), answer, "binary_no_reasoning") == 1


@pytest.mark.parametrize(
    ("calls", "answer", "expected"),
    [
        ([F1], [F1], True),
        ([F1], (F1,), True),
        ([F1, G], [G, F1], True),
        ([F1, F2, F1], [F1, F1, F2], True),
        ([F1, F1], [F1], False),
        ([F1], [F1, F1], False),
        ([F1, F1, F2], [F1, F2, F2], False),
        ([], [], True),
        ([], [F1], False),
        ([F1], [], False),
        ([F2], [F1], False),
        ([{"name": "F", "arguments": {"a": 1}}], [F1], False),
    ],
)
def test_calls_match_as_a_multiset(calls, answer, expected):
    assert matches(calls, answer) == expected


VALUES = ["1", "1.0", "true", "null", '"1"', "0", "0.0", "-0.0", "false", '""', "[]", "{}", "[[]]", "[1]", '{"1": 1}']
VALUES += [
    "[1, 2]",
    "[2, 1]",
    "[1.5, 12.5]",
    "[1.51, 2.5]",
    "[1, 12.5]",
    "[17, 2.5]",
]  # canonical texts must not run together


@pytest.mark.parametrize(("left", "right"), list(itertools.combinations_with_replacement(VALUES, 2)))
def test_values_are_equal_only_to_themselves(left, right):
    answer = [{"name": "f", "arguments": {"a": json.loads(right)}}]
    assert score(arguments(left), answer, "binary_no_reasoning") == (left == right)


@pytest.mark.parametrize(("left", "right"), [("1e2", "100.0"), ("1.50", "1.5"), ("-0", "0"), ('"\\u00e9"', '"é"')])
def test_the_writing_of_a_value_is_free(left, right):
    answer = [{"name": "f", "arguments": {"a": json.loads(right)}}]
    assert score(arguments(left), answer, "binary_no_reasoning") == 1


def test_an_answer_may_hold_tuples():
    assert matches([{"name": "f", "arguments": {"a": [1, [2]]}}], ({"name": "f", "arguments": {"a": (1, (2,))}},))


TEXTS = st.text(st.characters(codec=None), max_size=5)  # all code points, surrogates too
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
JSON = st.recursive(LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS, v, max_size=3), max_leaves=8)
CALL = st.fixed_dictionaries({"name": TEXTS, "arguments": st.dictionaries(TEXTS, JSON, max_size=3)})
CALLS = st.lists(CALL, max_size=4)


def shuffled(value, random):
    """The same JSON value with the keys of every object in another order."""
    if isinstance(value, dict):
        return {key: shuffled(value[key], random) for key in random.sample(list(value), len(value))}
    return [shuffled(item, random) for item in value] if isinstance(value, list) else value


@PROPERTY
@given(CALLS, st.booleans())
def test_what_is_rendered_is_parsed(calls, ensure_ascii):
    # json writes a pair of surrogate characters as it writes the one character they encode
    expected = json.loads(json.dumps(calls)) if ensure_ascii else calls
    assert parse_calls(block(json.dumps(calls, ensure_ascii=ensure_ascii))) == expected


@PROPERTY
@given(CALLS, st.randoms())
def test_the_order_of_calls_and_of_keys_is_free_and_repeats_count(calls, random):
    calls = json.loads(json.dumps(calls))
    answer = shuffled(random.sample(calls, len(calls)), random)
    assert judge(THINK + block(calls), answer) == judge(THINK + block(answer), calls)
    assert judge(THINK + block(calls), answer).reason == "correct"
    if calls:
        assert judge(THINK + block([*calls, calls[0]]), answer).reason == "wrong_count"
        assert judge(THINK + block([*calls, calls[0]]), [*answer, calls[0]]).reason == "correct"


@PROPERTY
@given(JSON, JSON, st.randoms())
def test_values_match_where_json_with_sorted_keys_is_the_same_text(left, right, random):
    for other in (shuffled(left, random), right):
        expected = json.dumps(left, sort_keys=True) == json.dumps(other, sort_keys=True)
        assert (reward.canonical(left) == reward.canonical(other)) == expected


# ---------------------------------------------------------------- kinds, reasons, parts

SWAPPED = [{"name": "f", "arguments": {"a": 9}}, G]
OTHER = [{"name": "h", "arguments": {"a": 1}}, G]
CASES = {  # response: (reason, then a value for each of KINDS); the right answer is [F1, G]
    "": ("no_format", 0, 0, 0, 0, 0),
    THINK: ("no_format", 0, 0, 0.2, 0.2, 0),
    block([G, F1]): ("no_format", 0, 1, 0.8, 0.8, 1.0),
    block(SWAPPED): ("no_format", 0, 0, 0, 0.2, 0),
    block("oops"): ("no_format", 0, 0, 0, 0, 0),
    THINK + "<tool_call>[]": ("no_format", 0, 0, 0.2, 0.2, 0),
    THINK + block("oops"): ("bad_json", 0, 0, 0.2, 0.2, 0),
    THINK + block("[1]"): ("bad_json", 0, 0, 0.2, 0.2, 0),
    THINK + block([G, F1]): ("correct", 1, 1, 1.0, 1.0, 1.2),
    THINK + block([]): ("wrong_count", 0, 0, 0.2, 0.2, -0.2),
    THINK + block([F1]): ("wrong_count", 0, 0, 0.2, 0.2, -0.2),
    THINK + block([F1, G, G]): ("wrong_count", 0, 0, 0.2, 0.2, -0.2),
    THINK + block(OTHER): ("wrong_name", 0, 0, 0.2, 0.2, -0.2),
    THINK + block([F1, F1]): ("wrong_name", 0, 0, 0.2, 0.2, -0.2),
    THINK + block(SWAPPED): ("wrong_arguments", 0, 0, 0.2, 0.4, -0.2),
}


@pytest.mark.parametrize("response", CASES)
def test_kinds_and_reasons(response):
    reason, *values = CASES[response]
    for kind, value in zip(KINDS, values, strict=True):
        scored = judge(response, [F1, G], kind)
        assert scored.value == value and isinstance(scored.value, float)
        assert score(response, [F1, G], kind) == value
        if kind != "binary_no_reasoning":
            assert scored.reason == reason


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("", "no_format"),
        (THINK, "no_format"),
        (block("oops"), "bad_json"),
        (block([F1, G]), "correct"),
        (block([F1]), "wrong_count"),
        (block(OTHER), "wrong_name"),
        (block(SWAPPED), "wrong_arguments"),
    ],
)
def test_without_reasoning_a_missing_think_block_is_no_failure(response, reason):
    assert judge(response, [F1, G], "binary_no_reasoning").reason == reason


def test_every_reason_is_a_case_above():
    assert {reason for reason, *_ in CASES.values()} == set(REASONS)


def test_parts_are_the_findings():
    found = dict(think=1.0, tool_call=1.0, parsed=1.0, names=1.0, match=0.0)
    assert judge(THINK + block(SWAPPED), [F1, G]).parts == found
    assert judge("", [F1, G]).parts == dict.fromkeys(found, 0.0)


def test_binary_is_the_default():
    assert judge(block([F1]), [F1]) == judge(block([F1]), [F1], "binary")
    assert score(block([F1]), [F1]) == 0 and score(THINK + block([F1]), [F1]) == 1


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(ValueError, match="'format_and_name'.*'format_and_names'"):
        judge("", [], "format_and_name")


# ---------------------------------------------------------------- any text, linear time


@PROPERTY
@given(
    st.text(st.characters(codec=None))
    | st.lists(st.sampled_from([*FRAGMENTS, "{", "}", '"name":', '"arguments":', '"f"', ",", "1", "\\", "null"])).map("".join),
    st.sampled_from([[], [F1], [F1, G]]),
    st.booleans(),
)
def test_no_text_raises(text, answer, inside):
    text = THINK + block(text) if inside else text
    for kind in KINDS:
        scored = judge(text, answer, kind)
        assert math.isfinite(scored.value) and scored.reason in REASONS


def test_a_subclass_of_str_is_read_as_its_text():
    class Odd(str):
        def find(self, *_):
            raise RuntimeError

        __str__ = strip = __getitem__ = __len__ = __eq__ = find
        __hash__ = str.__hash__

    assert score(Odd(THINK + block([F1])), [F1]) == 1
    assert parse_calls(Odd(block([F1]))) == [F1]


class Counted(str):
    """A text that counts the characters which `find` passes over."""

    passed = 0

    def find(self, part, start=0):
        at = super().find(part, start)
        self.passed += (len(self) if at < 0 else at + len(part)) - start
        return at


@pytest.mark.parametrize(
    "piece",
    ["<tool_call>", "</tool_call>", "<tool_call></tool_call>", "<tool_call><tool_call></tool_call>", "<think>", "<"],
)
def test_the_search_for_tags_passes_over_a_text_at_most_twice(piece):
    for search in (reward.block_span, reward.think_span):
        text = Counted(piece * 10_000)
        search(text)
        assert text.passed <= 2 * len(text)


MERSENNE = 2**61 - 1  # Python hashes an int modulo this number: its multiples all collide


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>" * 100_000,
        "<think>" * 150_000,
        "<tool_call></tool_call>" * 50_000,
        THINK + block("[" + "{}," * 300_000 + "{}]"),
        THINK + arguments("9" * 1_000_000),
        THINK + arguments("0." + "1" * 1_000_000),
        THINK + arguments("1e" + "9" * 1_000_000),
        THINK + arguments('"' + "\\ud83d" * 160_000 + '"'),
        THINK + arguments("[" + ",".join(["9" * 4300] * 230) + "]"),
        THINK + arguments("{" + ",".join('"%s%d": 1' % ("a" * 900, i) for i in range(1_000)) + "}"),  # noqa: UP031
        THINK + block([{"name": "f", "arguments": {"a": i * MERSENNE}} for i in range(16_000)]),
        THINK + block([{"name": str(i), "arguments": {}} for i in range(25_000)]),
    ],
    ids=lambda text: text[:60],
)
def test_a_megabyte_is_judged_soon(text):
    answer = parse_calls(text) or [F1]
    start = time.perf_counter()
    assert judge(text, answer).reason in REASONS
    assert time.perf_counter() - start < 5  # a quadratic reading takes minutes


# ---------------------------------------------------------------- resolve

GROUP = [Response(THINK + block([F1]), 20, False), Response("", 1, False), Response(THINK + block([G]), 20, True)]
EXAMPLE = SimpleNamespace(answer=(F1,))


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A function that writes a user's module, whose `reward` returns the expression given, and gives its path."""
    monkeypatch.syspath_prepend(tmp_path)
    names = (f"user_reward_{tmp_path.name.translate(str.maketrans('-[].', '____'))}_{n}" for n in itertools.count())

    def write(expression):
        name = next(names)
        (tmp_path / f"{name}.py").write_text(
            "import numpy as np\nfrom grpo_jax.reward import Scored\nconstant = 3\n"
            f"def reward(responses, example):\n    return {expression}\n"
        )
        return f"{name}:reward"

    return write


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_scores_each_response_of_a_group(kind):
    assert resolve(kind)(GROUP, EXAMPLE) == [judge(response.text, [F1], kind) for response in GROUP]


def test_a_reward_of_the_users_own_sees_the_group_once(own):
    scored = resolve(own("[len(responses), responses[2].truncated, example.answer[0]['arguments']['a'] / 2]"))(GROUP, EXAMPLE)
    assert scored == [Scored(3.0, "custom", {}), Scored(1.0, "custom", {}), Scored(0.5, "custom", {})]
    assert all(type(one.value) is float for one in scored)


def test_a_reward_of_the_users_own_may_give_reasons(own):
    scored = resolve(own("[Scored(2, 'short', {'length': 1.0}), np.float32(0.5), np.int64(1)]"))(GROUP, EXAMPLE)
    assert scored == [Scored(2.0, "short", {"length": 1.0}), Scored(0.5, "custom", {}), Scored(1.0, "custom", {})]


def test_a_reward_of_the_users_own_may_return_an_array(own):
    assert [one.value for one in resolve(own("np.arange(3)"))(GROUP, EXAMPLE)] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("[1.0, 2.0]", "2 values for 3 responses"),
        ("1.0", "returned 1.0"),
        ("None", "returned None"),
        ("[1.0, float('nan'), 0.0]", "nan for response 1"),
        ("[1.0, 0.0, float('-inf')]", "-inf for response 2"),
        ("[1.0, None, 0.0]", "None for response 1"),
        ("['1', 0.0, 0.0]", "'1' for response 0"),
        ("'123'", "'1' for response 0"),
        ("[10 ** 400, 0.0, 0.0]", "for response 0"),
        ("[[1.0], 0.0, 0.0]", "for response 0"),
        ("[Scored(float('nan'), 'mine', {}), 0.0, 0.0]", "for response 0"),
    ],
)
def test_a_wrong_return_is_refused_by_name(own, expression, message):
    path = own(expression)
    with pytest.raises(ValueError) as caught:
        resolve(path)(GROUP, EXAMPLE)
    assert path in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_the_users_code_raises_passes_through(own):
    with pytest.raises(ZeroDivisionError):
        resolve(own("1 / 0"))(GROUP, EXAMPLE)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("binery", "did you mean 'binary'"),
        ("lexico", "did you mean 'lexicographic'"),
        ("binary\nformat", "unknown reward"),
        ("", "unknown reward"),
        (":", "unknown reward"),
        ("json:", "unknown reward"),
        (":loads", "unknown reward"),
        (".json:loads", "unknown reward"),
        ("json.loads", "package.module:function"),
        ("no_such_package.rewards:mine", "cannot import the module 'no_such_package.rewards'"),
        ("json:no_such_function", "the module 'json' has no function 'no_such_function'"),
        ("json:lods", "has no function 'lods': did you mean 'loads'?"),
        ("string:digits", "has no function 'digits'"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_line(kind, message):
    with pytest.raises(ValueError) as caught:
        resolve(kind)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_results_are_frozen():
    with pytest.raises(FrozenInstanceError):
        judge("", []).value = 1.0
    with pytest.raises(FrozenInstanceError):
        GROUP[0].text = ""


def test_the_module_does_not_import_jax():
    code = "import sys, grpo_jax.reward; assert not {'jax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
