"""The conversation: what is kept of a reply, what is said of one, and what lines do to it."""

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from data import demo, prompt
from eval import chat
from eval.chat import Args, Chat
from grpo_jax import console
from grpo_jax.reward import Response, judge

TOOLS = [
    {"name": "weather", "description": "Of a city.", "parameters": {"city": {"type": "string"}}},
    {"name": "clock", "description": "", "parameters": {}},
]
OSLO = {"name": "weather", "arguments": {"city": "Oslo"}}
TIME = {"name": "clock", "arguments": {}}
TEMPLATE = prompt.load_template(demo.TEMPLATE)


def block(text):
    return f"<tool_call>{text}</tool_call>"


# Tools


def read(path, text):
    path.write_text(text)
    return chat.read_tools(path)


def test_tools_are_a_list_openais_or_those_of_the_first_row(tmp_path):
    openais = [{"type": "function", "function": tool} for tool in TOOLS]
    row = {"query": "What?", "tools": json.dumps(TOOLS), "answers": "[]"}
    other = {"query": "Else?", "tools": [], "answers": []}
    for name, text in (
        ("tools.json", json.dumps(TOOLS, indent=2)),
        ("openai.json", json.dumps(openais)),
        ("lines.jsonl", "".join(json.dumps(tool) + "\n" for tool in TOOLS)),
        ("rows.jsonl", json.dumps(row) + "\n" + json.dumps(other) + "\n"),
        ("rows.json", json.dumps([row, other])),
    ):
        assert read(tmp_path / name, text) == TOOLS, name


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "it holds no tools"),
        ("[]", "it holds no tools"),
        ('{"query": "q", "tools": []}', "it holds no tools"),
        ('[{"name": "f"}, 5]', "not all of it are tools"),
        ('[{"description": "no name"}]', "not all of it are tools"),
        ("[{", "not JSON"),
    ],
)
def test_what_holds_no_tools_is_one_line_that_names_the_file(text, says, tmp_path):
    with pytest.raises(ValueError) as error:
        read(tmp_path / "tools.json", text)
    assert says in str(error.value) and "tools.json" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="--tools no/such.json: no such file: give a JSON list of tools"):
        chat.read_tools(chat.Path("no/such.json"))


# A reply


@pytest.mark.parametrize(
    ("text", "thought", "calls", "rest"),
    [
        (prompt.reply([OSLO], "Oslo, then."), "Oslo, then.", [OSLO], ""),
        ("Well. <think>Hm.</think> So: " + block("[]") + " Done.", "Hm.", [], "Well.  So:  Done."),
        (block("{") + " and " + block(json.dumps(OSLO)), "", [OSLO], block("{") + " and"),
        (block("[]") + "</tool_call> more", "", [], "</tool_call> more"),
        ("<think>a</think>" + block("{"), "a", None, block("{")),
        ("<think>never closed " + block(json.dumps([TIME])), "", [TIME], "<think>never closed"),
        ("nothing [bold]of[/bold] it", "", None, "nothing [bold]of[/bold] it"),
    ],
)
def test_a_reply_in_its_parts(text, thought, calls, rest):
    assert chat.parts(text) == (thought, calls, rest)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (prompt.reply([OSLO], "So."), ""),
        (prompt.reply([], "None fits."), ""),
        (prompt.reply([OSLO], None), "a reward of 0 (no_format): no <think> block"),
        ("Oslo!", "no readable call (no_format): no <think> block, no <tool_call> block"),
        ("<think></think>", "no readable call (no_format): no <tool_call> block"),
        ("<think></think>" + block("[1]"), "no readable call (bad_json): no JSON list of calls in its <tool_call> block"),
        (
            block("[1]"),
            "no readable call (no_format): no <think> block, no JSON list of calls in its <tool_call> block",
        ),
    ],
)
def test_why_a_reply_cannot_be_read_is_what_the_reward_says(text, says):
    assert chat.problem(text) == says
    assert not says or f"({judge(text, [OSLO]).reason})" in says or judge(text, [OSLO]).value == 0


def test_what_the_model_writes_is_text(monkeypatch, capsys):
    thought = "[red]alarm[/red] \x1b[2J\x9b2J\r\u202e over"
    call = {"name": "\x1b]0;title\x07", "arguments": {"[bold]": ["\x1b[31m", "é\n", {"deep": True}], "half": "\ud800"}}
    text = f"<think>{thought}</think>" + block(json.dumps([call, OSLO])) + "\x08rest"
    chat.show(Response(text, 7, True), TOOLS, 1.26, 7)
    out = capsys.readouterr().out
    assert not {c for c in out if not c.isprintable()} - {"\n"}
    assert out.splitlines() == [
        r"[red]alarm[/red] \x1b[2J\x9b2J\r\u202e over",
        r"\x08rest",
        r"\x1b]0;title\x07  which is none of the tools",
        r'  [bold] = ["\u001b[31m", "é\n", {"deep": true}]',
        r'  half = "\ud800"',
        "weather",
        '  city = "Oslo"',
        "warning: cut at 7 tokens (--max_response_tokens)",
        r"7 tokens in 1.3 s; /result TEXT says what \x1b]0;title\x07 returned",
    ]


# The conversation


class Replies:
    """A model that says what it is told to, and keeps what it was asked."""

    def __init__(self, monkeypatch, *texts):
        self.texts, self.asked = list(texts), []
        monkeypatch.setattr(chat, "respond", self.respond)

    def respond(self, model, examples, template, most, **options):
        self.asked.append([dict(turn) for turn in examples[0].messages])
        text = self.texts.pop(0)
        if isinstance(text, BaseException):
            raise text
        return [[Response(text, 5, False)] if text else []]


def conversation(monkeypatch, lines, *texts):
    replies = Replies(monkeypatch, *texts)
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    policy = SimpleNamespace(model=SimpleNamespace(max_positions=64), tokenizer=None)
    talked = Chat(SimpleNamespace(policy=policy), TOOLS, TEMPLATE, 32)
    chat.talk(talked)
    return replies.asked, talked


def user(text):
    return {"role": "user", "content": text}


def test_the_conversation_goes_on_with_calls_and_results_as_rows_have_them(monkeypatch, capsys):
    lines = ["Weather in Oslo, and the time?", "/result 3 degrees", '/result {"time": "12:00"}', "", "Thanks", "/new", "Hello"]
    texts = [prompt.reply([OSLO, TIME], "Two."), "It is cold.", prompt.reply([], "Nothing."), "Hi"]
    asked, talked = conversation(monkeypatch, lines, *texts)
    first = [user(lines[0])]
    second = [
        *first,
        {"role": "assistant", "content": "Two.", "calls": [OSLO, TIME]},
        {"role": "tool", "name": "weather", "content": "3 degrees"},
        {"role": "tool", "name": "clock", "content": '{"time": "12:00"}'},
    ]
    third = [*second, {"role": "assistant", "content": "It is cold."}, user("Thanks")]
    assert asked == [first, second, third, [user("Hello")]]
    assert talked.turns == [user("Hello"), {"role": "assistant", "content": "Hi"}] and talked.waiting == []
    shown = capsys.readouterr().out
    assert "and what clock returned? /result TEXT" in shown and "> /result 3 degrees" in shown and "no call: []" in shown


def test_a_result_of_some_calls_may_be_all_and_none_is_taken_without_a_call(monkeypatch, capsys):
    lines = ["/result 5", "Both?", "/result", "/result 5", "Go on", "/result 6"]
    asked, _ = conversation(monkeypatch, lines, prompt.reply([OSLO, TIME], ""), "Good.")
    assert [turn["role"] for turn in asked[1]] == ["user", "assistant", "tool", "user"] and len(asked) == 2
    assert asked[1][1]["calls"] == [OSLO, TIME]
    shown = capsys.readouterr().out
    assert shown.count("warning: no call waits for a result") == 2
    assert shown.count("warning: what did it return? /result TEXT") == 1


def test_what_goes_wrong_leaves_the_conversation_as_it_was(monkeypatch, capsys):
    monkeypatch.setattr(prompt, "encode", lambda *_: [0] * 1234)
    lines = ["one", "two \udcff", "three", "/nwe", "/tools", "/help", "four"]
    asked, talked = conversation(monkeypatch, lines, "1", None, "4")
    assert asked[2] == [user("one"), {"role": "assistant", "content": "1"}, user("four")]
    assert [turn["content"] for turn in talked.turns] == ["one", "1", "four", "4"]
    shown = capsys.readouterr().out
    assert (
        "the context is full: tools and conversation take 1,234 tokens, a reply up to 32, and the model is made for 64" in shown
    )
    assert "warning: the task cannot be written as JSON" in shown and "no command /nwe: see /help" in shown
    assert 'weather  Of a city.\n  {"city": {"type": "string"}}\n' in shown and chat.HELP in shown


def test_an_argument_that_no_prompt_takes_is_kept_as_the_text_it_was(monkeypatch):
    text = "<think>t</think>" + block('[{"name": "clock", "arguments": {"zone": "\\ud800"}}]')
    asked, talked = conversation(monkeypatch, ["Time?", "Go on"], text, "Well.")
    assert asked[1][1] == {"role": "assistant", "content": text}


def test_ctrl_c_stops_a_reply_on_a_terminal_and_a_second_one_ends_it(monkeypatch, capsys):
    with pytest.raises(KeyboardInterrupt):
        conversation(monkeypatch, ["one"], KeyboardInterrupt())
    replies = Replies(monkeypatch, KeyboardInterrupt(), "fine")
    typed = iter(["one", "two", KeyboardInterrupt()])

    def line(shown):
        assert shown == "> "
        said = next(typed)
        if isinstance(said, BaseException):
            raise said
        return said

    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", line)
    talked = Chat(None, TOOLS, TEMPLATE, 32)
    chat.talk(talked)
    assert replies.asked == [[user("one")], [user("two")]] and len(talked.turns) == 2
    assert "stopped; the conversation is as before" in capsys.readouterr().out


def test_the_real_sampler_answers_the_prompt_of_training(tiny_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    args = Args(tiny_model, tmp_path / "tools.json", max_response_tokens=4, template=demo.TEMPLATE)
    talked = chat.begin(args)
    monkeypatch.setattr("sys.stdin", io.StringIO("Weather in Oslo?\nAnd now?\n"))
    chat.talk(talked)
    assert [turn["role"] for turn in talked.turns] == ["user", "assistant"] * 2
    found = chat.respond(talked.model, [talked.example(talked.turns[:3])], TEMPLATE, 4)
    assert found[0][0].text == talked.turns[3]["content"]
    out = capsys.readouterr().out
    assert out.count("tokens in ") == 2 and "> And now?" in out and "\x1b" not in out
    assert chat.begin(replace(args, max_response_tokens=None)).max_response_tokens == 512  # half of the context
    with pytest.raises(ValueError, match=r"tools.json: they take \d+ tokens, a reply up to 1,000, and .* 1,024: give fewer"):
        chat.begin(replace(args, max_response_tokens=1000))
    for bad in ({"max_response_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}):
        with pytest.raises(ValueError, match="give a number from"):
            chat.begin(replace(args, **bad))


def test_visible_leaves_lines_and_what_the_encoding_has():
    shown = r"\u2028|\u200b|\x7f|\x00|\ud800"
    for encoding, words in (("latin-1", "\\u4e2d\\u3000\\u6587"), ("utf-8", "中\u3000文")):  # among them a wide space
        found = console.visible("a\tb\nç\xa0中\u3000文 \u2028|\u200b|\x7f|\0|\ud800", encoding)
        assert found == f"a\tb\nç\xa0{words} {shown}"
