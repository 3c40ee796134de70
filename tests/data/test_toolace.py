"""ToolACE's calls against what was written, Python's own reader and rubbish; its conversations against what each turn is."""

import ast
import contextlib
import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import jsonl, toolace
from data.toolace import AFTER_A_BAD_CALL, CALLS_DO_NOT_PARSE, NO_ANSWER, calls_of, examples_of, parse_calls, system_of

HEAD = "Compose functions. \nPoint it out if none fits.\nHere is a list of functions in JSON format that you can invoke:\n"
TAIL = ". \nShould you decide to return the function call(s). \nPut it in the format of [func1(name=value), func2(params)]\n"
WEATHER = {"name": "Weather (Beta)", "description": "d", "parameters": {"type": "dict", "properties": {}}, "required": None}
NEWS = {"name": "get/news.v2-x", "description": "", "parameters": {}}
SYSTEM = HEAD + json.dumps([WEATHER, NEWS]) + TAIL


def row(*turns, system=SYSTEM):
    roles = {"u": "user", "a": "assistant", "t": "tool"}
    return {"system": system, "conversations": [{"from": roles[who], "value": text} for who, text in turns]}


# ---------------------------------------------------------------- the parser of calls


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("[]", []),
        (" [ f( ) ]\n", [("f", {})]),
        ("[f(),]", [("f", {})]),
        ('[Market Trends API(kind="M_I", country="us")]', [("Market Trends API", dict(kind="M_I", country="us"))]),
        ("[a.b/c-d (x = 1 , y= 2,), e_f(x=3)]", [("a.b/c-d", {"x": 1, "y": 2}), ("e_f", {"x": 3})]),
        ("[f(a-b=1, $top=2, by[name]=3, größe=4, a b=5)]", [("f", {"a-b": 1, "$top": 2, "by[name]": 3, "größe": 4, "a b": 5})]),
        (
            "[f(a=True, b=true, c=False, d=false, e=None, f=null)]",
            [("f", dict(a=True, b=True, c=False, d=False, e=None, f=None))],
        ),
        (
            "[f(a=-1, b=+2, c=0, d=123456789012345678901234567890)]",
            [("f", dict(a=-1, b=2, c=0, d=123456789012345678901234567890))],
        ),
        ("[f(a=1.5, b=.5, c=5., d=-1e3, e=2E-2, f=0.0)]", [("f", dict(a=1.5, b=0.5, c=5.0, d=-1000.0, e=0.02, f=0.0))]),
        ("[f(a=[], b=[1, [2, 'x'],], c=(1, 2), d=())]", [("f", dict(a=[], b=[1, [2, "x"]], c=[1, 2], d=[]))]),
        ("[f(a={}, b={'k': [None], \"l\": {'m': 1,}})]", [("f", dict(a={}, b={"k": [None], "l": {"m": 1}}))]),
        ("""[f(a="it's, [x](y=1) {z}", b='"hi", f(x=1)]')]""", [("f", dict(a="it's, [x](y=1) {z}", b='"hi", f(x=1)]'))]),
        (r"""[f(a="\"q\" \\ \n\t\/ \x41\u00e9\U0001F600 \101", b='\'')]""", [("f", dict(a='"q" \\ \n\t/ Aé😀 A', b="'"))]),
        ('[f(a="\\ud83d\\ude00", b="line one\nline two", c="\\d")]', [("f", dict(a="😀", b="line one\nline two", c="\\d"))]),
        ("[f(a=\"\", b='')]", [("f", dict(a="", b=""))]),
    ],
)
def test_calls(text, calls):
    assert parse_calls(text) == [{"name": name, "arguments": arguments} for name, arguments in calls]
    assert json.dumps(parse_calls(text)) == json.dumps([{"name": n, "arguments": a} for n, a in calls])  # 1 is not 1.0 or true


@pytest.mark.parametrize(
    "text",
    [
        "", "f()", "[", "[f]", "[f(]", "[f()", "[f())]", "[f()] and more", "[f()][g()]", "[,]", "[f(),,g()]", "[(x=1)]",
        "[ (x=1)]", "[f() g()]", "[f(x)]", "[f('x')]", "[f(=1)]", "[f( =1)]", "[f(x=)]", "[f(x==1)]", "[f(x=1 y=2)]",
        "[f(x=1, x=2)]", "[f(,)]", "[f(x=abc)]", "[f(x=g(y=1))]", "[f(x=2022-01-01)]", "[f(x=10.0.0.1)]", "[f(x=5km)]",
        "[f(x=007)]", "[f(x=1_000)]", "[f(x=0x1f)]", "[f(x=--1)]", "[f(x=1 + 2)]", "[f(x=.)]", "[f(x=-)]", "[f(x=nan)]",
        "[f(x=inf)]", "[f(x=1e999)]", "[f(x=" + "9" * 5000 + ")]", "[f(x=٣)]", "[f(x=TRUE)]", "[f(x=True1)]",
        "[f(x='a)]", '[f(x="a\')]', "[f(x='a' 'b')]", "[f(x=b'a')]", "[f(x='\\')]", r"[f(x='\U00110000')]", "[f(x=”a”)]",
        "[f(x=[1, 2)]", "[f(x=[1 2])]", "[f(x=(1))]", "[f(x=(1,))]", "[f(x={1, 2})]", "[f(x={a: 1})]", "[f(x={1: 1})]",
        "[f(x={'a' 1})]", "[f(x={'a': })]", "[f(x=" + "[" * 100_000, "[f(x=" + "[" * 66 + "]" * 66 + ")]",
        "[f(x=" + "{'a':" * 66 + "1" + "}" * 66 + ")]", '[{"name": "f", "arguments": {}}]', "[f(**{'x': 1})]",
        "[w(a: 1 b=2)]", "[w(a : 1 b=2)]", "[w(a:1 b=2)]", "[w(# one\nb=2)]", "[w(# one b=2)]", "[w(/* one */ b=2)]",
        "[w(a\nb=2)]",
        "[f(x={'a': 1, 'a': 2})]", "[f(x=[{'a': {'b': 1, \"b\": 1}}])]", r"[f(x='\x4')]",
        r"[f(x='\x')]", r"[f(x='\u12')]",
        r"[f(x='\U0001F60')]", r"[f(x='C:\Users')]",
        r"[f(x='\N{BULLET}')]", "[__import__('os').system('true')]", "[f(x=__import__('os').system('true'))]",
    ],
)  # fmt: skip
def test_what_is_no_list_of_calls_is_refused(text):
    with pytest.raises(ValueError, match=r"is due at character|is given twice|is no character"):
        parse_calls(text)


def test_nesting_is_allowed_to_its_bound():
    deep = "[" * toolace.DEEPEST + "1" + "]" * toolace.DEEPEST
    assert json.dumps(parse_calls(f"[f(x={deep})]")[0]["arguments"]["x"]) == deep


def test_names_on_offer_may_hold_anything():
    names = ["Weather (Beta)", "M1.0+ Quakes, Past Day", "Today's Quiz", "a = b [c]", "Weather", "x("]
    text = "[" + ", ".join(f"{name}(n={i})" for i, name in enumerate(names)) + "]"
    assert parse_calls(text, names) == [{"name": name, "arguments": {"n": i}} for i, name in enumerate(names)]
    assert calls_of(" [a = b [c](n=1)]", names) == [{"name": "a = b [c]", "arguments": {"n": 1}}]
    with pytest.raises(ValueError, match="is due"):
        parse_calls(text)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
words = st.text("abcXYZ019 _./-+$:;é中'\"(), ", min_size=1).map(str.strip).filter(bool)
plain_words = words.map(lambda word: "".join(c for c in word if c not in "'\"(),").strip()).filter(bool)
writers = st.sampled_from([repr, json.dumps, lambda value: json.dumps(value, ensure_ascii=False, indent=2)])


EXAMPLES = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
gaps = st.sampled_from(["", " ", "\n \t"])
keys = plain_words.filter(lambda word: not (":" in word and " " in word))  # `a: 1 b` is no key
some_calls = st.lists(st.tuples(plain_words, st.dictionaries(keys, values, max_size=3)), max_size=3)


@EXAMPLES
@given(some_calls, writers, gaps)
def test_what_was_written_is_read_back(calls, write, gap):
    def arguments(given):
        return ",".join(f"{gap}{key}{gap}={gap}{write(value)}{gap}" for key, value in given.items())

    text = f"[{','.join(f'{gap}{name}{gap}({arguments(given)}){gap}' for name, given in calls)}]"
    expected = [{"name": name, "arguments": given} for name, given in calls]
    assert parse_calls(text) == expected
    assert json.dumps(parse_calls(text)) == json.dumps(expected)  # which tells 1 from 1.0 and true


@EXAMPLES
@given(st.text("""[](){}"'=,:\\ \nafx019.-+eTrue""", max_size=60) | st.text(max_size=60))
def test_any_text_is_read_as_python_reads_it_or_refused(text):
    try:
        value = parse_calls(f"[f(x={text})]")[0]["arguments"]["x"]
    except ValueError:
        return
    json.dumps(value, allow_nan=False)
    ours_alone = (
        "true",
        "false",
        "null",
        "\\",
        "\n",
        "\r",
        "),",
        ",x",
    )  # JSON's words, escapes and raw line ends; more arguments
    if not any(part in text for part in ours_alone):
        assert value == json.loads(json.dumps(ast.literal_eval(text.strip())))  # tuples as lists


@EXAMPLES
@given(st.text("""[](){}"'=,:\\ \nfg1""", max_size=80) | st.text(max_size=80), st.lists(st.text(max_size=5), max_size=3))
def test_nothing_but_value_error_is_raised(text, names):
    for read in (parse_calls, calls_of):
        with contextlib.suppress(ValueError):
            assert isinstance(read(text, names), list)


@pytest.mark.parametrize(
    "text",
    [
        "[" + "f(x=1)," * 50_000 + "]",
        "[f(x=[" + "1," * 200_000 + "])]",
        "[f(x='" + "\\" * 400_001,
        "[f(x='" + "\\'" * 200_000,
        "[f(x='" + "ab\\n" * 100_000 + "')]",
        "[" + " " * 400_000 + "f",
        "[" + "a" * 400_000,
        "[f(" + "a" * 400_000,
        "[f(x=" + "1" * 400_000,
        "[f(x=1e" + "1" * 400_000 + ")]",
        "The current time " * 25_000,
        "[f(x={" + "'a':1," * 70_000 + "})]",
        "[f(" + "a " * 200_000 + "=1)]",
        "Sure: " + "[f " * 130_000,
        "Sure: [f" + " " * 400_000,
        "Sure: f" + " " * 400_000 + "'name'" + " " * 400_000,
    ],
    ids=range(16),
)
def test_time_is_linear_in_the_text(text):
    start = time.process_time()
    jsonl.parsed(lambda text: calls_of(text, ["f", "g"]), text)
    examples_of(row(("u", text), ("a", text), system=text), "0")
    assert time.process_time() - start < 10  # of 0.4 MB; a tenth of that where time is linear, hours where it is quadratic


# ---------------------------------------------------------------- conversations


def test_a_single_turn():
    [example] = examples_of(row(("u", "How warm?"), ("a", '[Weather (Beta)(city="Oslo", days=2)]')), "7")
    assert example.messages == ({"role": "user", "content": "How warm?"},)
    assert example.tools == (WEATHER, NEWS)
    assert example.answer == ({"name": "Weather (Beta)", "arguments": {"city": "Oslo", "days": 2}},)
    assert (example.source, example.extra) == ("toolace", {"row_id": "7#1"})


def test_each_call_turn_is_an_example_with_the_turns_before_it():
    conversation = row(
        ("u", "How warm?"), ("a", "[Weather (Beta)()]"), ("t", '[{"name": "Weather (Beta)", "results": 4}]'),
        ("a", "Four degrees."), ("u", "And the news?"), ("a", "[get/news.v2-x(), Weather (Beta)(day=1)]"),
    )  # fmt: skip
    first, prose, last = examples_of(conversation, "0")
    assert prose == jsonl.NO_CALL
    assert last.messages == (
        {"role": "user", "content": "How warm?"},
        {"role": "assistant", "content": "", "calls": [{"name": "Weather (Beta)", "arguments": {}}]},
        {"role": "tool", "content": '[{"name": "Weather (Beta)", "results": 4}]'},
        {"role": "assistant", "content": "Four degrees."},
        {"role": "user", "content": "And the news?"},
    )
    assert [call["name"] for call in last.answer] == ["get/news.v2-x", "Weather (Beta)"]
    assert first.messages == last.messages[:1] and last.extra == {"row_id": "0#3"}

    kept = examples_of(conversation, "0", keep_no_call=True)
    assert kept[0] == first and kept[2] == last
    assert kept[1].answer == () and kept[1].messages == last.messages[:3]


@pytest.mark.parametrize(
    ("turns", "outcomes"),
    [
        ([], [NO_ANSWER]),
        ([("u", "Hi")], [NO_ANSWER]),
        ([("u", "Hi"), ("a", "[Weather (Beta)(city=Oslo)]")], [CALLS_DO_NOT_PARSE]),
        ([("u", "Hi"), ("a", "[Nonsense()]")], [jsonl.CALLS_UNOFFERED_TOOL]),
        (
            [("u", "Hi"), ("a", "[Nonsense()]"), ("t", "x"), ("a", "[Weather (Beta)()]")],
            [jsonl.CALLS_UNOFFERED_TOOL, AFTER_A_BAD_CALL],
        ),
        (
            [("u", "Hi"), ("a", "[f(x=y)]"), ("u", "x"), ("a", "Sure."), ("u", "x"), ("a", "[f(]")],
            [CALLS_DO_NOT_PARSE, AFTER_A_BAD_CALL, AFTER_A_BAD_CALL],
        ),
        ([("u", "Hi"), ("a", "Sure: [Weather (Beta)(x=1)]")], [CALLS_DO_NOT_PARSE]),  # it is no answer of no call
        ([("u", "Hi"), ("a", "[Weather (Beta)()] is what I call")], [CALLS_DO_NOT_PARSE]),
        ([("u", "Hi"), ("a", "[]")], [jsonl.NO_CALL]),
        ([("u", "Hi"), ("a", "The [news] (of today) is due, weather (or not): {'name': 'x'}.")], [jsonl.NO_CALL]),
        ([("u", "Hi"), ("a", "[This](https://x.org) is prose")], [jsonl.NO_CALL]),
        ([("u", "Hi"), ("a", "I need your city (or your post code).")], [jsonl.NO_CALL]),
        ([("a", "[Weather (Beta)()]")], [jsonl.NO_QUERY]),
        ([("u", "Hi"), ("a", "Let me see."), ("a", "[Weather (Beta)()]")], [jsonl.NO_CALL, jsonl.MESSAGES_DO_NOT_PARSE]),
        ([("u", "half \ud800"), ("a", "[Weather (Beta)()]")], [jsonl.NOT_PLAIN_JSON]),
        ([("u", "Hi"), ("a", r"[Weather (Beta)(x='\ud800')]")], [jsonl.NOT_PLAIN_JSON]),
    ],
)  # fmt: skip
def test_turns_without_an_example_give_their_reason(turns, outcomes):
    assert examples_of(row(*turns), "0") == outcomes


@pytest.mark.parametrize(
    "text",
    [
        '[{"name":"w","arguments":{"city":"Oslo"}}]', '{"name": "w", "arguments": {}}',
        "{'arguments': {}, 'name': 'other'}",
        '[{"type": "function", "function": {"name": "w", "parameters": {}}}]',
        '```json\n{"name" : "w", "arguments" : "{}"}\n```',
        '<tool_call>[{"name": "w"}]</tool_call>', "<tool_call>\nw\n</tool_call>", "w and </TOOL_CALL>",
        'Sure: [w (city="Oslo")]', 'Sure: [W(city="Oslo")]', 'I call W\n(city="Oslo").', "[w]", "Sure: [ W ]", "[w, Big Api]",
        "Sure: [big api]", 'Sure: [forecast(city="Oslo")]', "Sure: [my.forecast()]", 'Sure: [w(city="Oslo")]',
    ],
)  # fmt: skip
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_what_may_be_a_call_is_never_prose(text, keep, wrapped):
    """As an answer it would teach to call nothing, and in a context that prose is how to call."""
    tools = [{"name": name, "description": "", "parameters": {}} for name in ("w", "Big Api")]
    tools = [{"type": "function", "function": tool} for tool in tools] if wrapped else tools
    turns = [("u", "Hi"), ("a", text), ("u", "And now?"), ("a", "[w()]")]
    outcomes = examples_of(row(*turns, system=HEAD + json.dumps(tools) + TAIL), "0", keep_no_call=keep)
    assert outcomes == [CALLS_DO_NOT_PARSE, AFTER_A_BAD_CALL]


def test_a_key_with_a_space_is_one_where_the_schema_has_it():
    def outcome(text, parameters):
        tools = [{"name": "w", "description": "", "parameters": parameters}]
        [found] = examples_of(row(("u", "Hi"), ("a", text), system=HEAD + json.dumps(tools) + TAIL), "0")
        return found if isinstance(found, str) else found.answer[0]["arguments"]

    schema = {"type": "dict", "properties": {"user id": {"type": "int"}, "b": {"type": "int"}}}
    assert outcome("[w(user id=1, other=2)]", schema) == {"user id": 1, "other": 2}
    assert outcome("[w(1 b=2)]", schema) == outcome("[w(True b=2)]", schema) == CALLS_DO_NOT_PARSE
    assert outcome("[w(user id=1)]", {}) == {"user id": 1}  # nothing known of the tool


@pytest.mark.parametrize(
    ("bad", "outcomes"),
    [
        (None, [jsonl.NOT_AN_OBJECT]),
        ({}, [jsonl.MESSAGES_DO_NOT_PARSE]),
        ({"system": SYSTEM, "conversations": "[{"}, [jsonl.MESSAGES_DO_NOT_PARSE]),
        ({"system": SYSTEM, "conversations": ["Hi"]}, [jsonl.MESSAGES_DO_NOT_PARSE]),
        ({"system": SYSTEM, "conversations": [{"from": ["user"], "value": "Hi"}]}, [jsonl.MESSAGES_DO_NOT_PARSE]),
        ({"system": SYSTEM, "conversations": [{"from": "judge", "value": "Hi"}]}, [jsonl.MESSAGES_DO_NOT_PARSE]),
        ({"system": SYSTEM, "conversations": [{"from": "user", "value": None}]}, [jsonl.MESSAGES_DO_NOT_PARSE]),
    ],
)
def test_rows_that_are_no_conversation(bad, outcomes):
    assert examples_of(bad, "0") == outcomes


@pytest.mark.parametrize(
    "system",
    [
        None, 3, "", "Be brief.", HEAD, HEAD + "none" + TAIL, HEAD + "[{" + TAIL, HEAD + '["' + TAIL, HEAD + "[" * 100_000,
        HEAD + "[{'name': 'f'}]" + TAIL, HEAD + '[{"description": "no name"}]' + TAIL, HEAD + "[3]" + TAIL,
    ],
)  # fmt: skip
def test_tools_that_do_not_parse_drop_every_answer_of_the_conversation(system):
    turns = [("u", "Hi"), ("a", "[f()]"), ("u", "Hi"), ("a", "[f()]")]
    reasons = {jsonl.TOOLS_DO_NOT_PARSE, CALLS_DO_NOT_PARSE, AFTER_A_BAD_CALL}
    outcomes = examples_of(row(*turns, system=system), "0")
    assert len(outcomes) == 2 and outcomes[0] == jsonl.TOOLS_DO_NOT_PARSE and set(outcomes) <= reasons


@pytest.mark.parametrize("tail", [TAIL, "", "\r\n\r\nShould you decide [to] return", "]. [f(x=1)]"])
@pytest.mark.parametrize("line", [":\n", ":", ".\r\n\n", ": \n "])
def test_tools_amid_any_text(line, tail):
    text = (
        HEAD.removesuffix(":\n").replace("functions in", "functions\n in") + line + json.dumps([WEATHER, NEWS], indent=1) + tail
    )
    assert system_of(text) == ([WEATHER, NEWS], [])


def test_the_time_stays_where_it_is_told_and_only_there():
    told = {"role": "system", "content": "The current time is 2024-12-03 22:01:56."}
    sentence = "The current time is 2024-12-03 22:01:56."
    for system in (SYSTEM.replace("Here is", sentence + "Here is"), f"Be brief. {sentence}\n{SYSTEM}", f"{sentence}\n{SYSTEM}"):
        [example] = examples_of(row(("u", "Tomorrow?"), ("a", "[Weather (Beta)()]"), system=system), "0")
        assert example.messages == (told, {"role": "user", "content": "Tomorrow?"})
    tool = {**NEWS, "description": "The current time is always told."}
    assert system_of(HEAD + json.dumps([tool]) + TAIL) == ([tool], [])


def test_conversations_may_be_json_in_a_string_and_roles_have_two_names():
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "[Weather (Beta)()]"},
        {"from": "observation", "value": "4"},
    ]
    turns.append({"from": "gpt", "value": "[get/news.v2-x()]"})
    as_list, as_text = (examples_of({"system": SYSTEM, "conversations": c}, "0") for c in (turns, json.dumps(turns)))
    assert as_list == as_text and [turn["role"] for turn in as_list[1].messages] == ["user", "assistant", "tool"]
