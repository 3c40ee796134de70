"""A conversation with a model that calls tools: what it thinks, what it calls, and why a call cannot be read.

    read_tools    a file -> the tools on offer
    Chat          the conversation so far, and the model's reply to it, by the prompt and the sampler of training
    show          a reply, as a person reads it
    talk          requests and commands, line by line

`python -m eval.chat --help`
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import progress
from rich.text import Text

from data import command_line, jsonl, prompt
from data.command_line import plural
from data.example import Example, make
from eval.answer import Model, open_model, respond, response_tokens, template_of
from grpo_jax import config, inputs
from grpo_jax.console import CONSOLE, header, note, visible, warn
from grpo_jax.inputs import Policy
from grpo_jax.reward import Response, block_span, judge, parse_calls
from grpo_jax.run import cache_compilations

Turn = dict[str, Any]

HELP = """\
Type a request; the model answers with its thoughts and its calls.
/result TEXT  what the tool that was called returned; of several calls, one after the other
/new          begins again
/tools        the tools on offer
/help         this
Ctrl-C stops a reply; without one, it ends the program, as Ctrl-D does."""


@dataclass(frozen=True)
class Args:
    """A conversation with a model that calls tools. No tool is called: /result says what it returned."""

    #: A Hugging Face folder, a hub id, or the folder of a finished run.
    model: str
    #: The tools on offer: a JSON list of {"name", "description", "parameters"}, OpenAI's {"type": "function", ...} too; or rows
    #: of data (JSON, JSONL, Parquet), of which the first one's tools are taken.
    tools: Path
    #: 0: the likeliest reply. Above: one drawn at that temperature; the same conversation draws the same again.
    temperature: float = 0.0
    #: A reply that reaches this length is stopped. Left out: what the run trained with, where --model is one of reinforcement
    #: learning, else 4096; at most half of the model's context. The rest is for the conversation.
    max_response_tokens: int | None = None
    #: A text file that replaces the built-in thinking template. Left out: that of the run, where --model is one. The model that
    #: comes with the program, models/demo, wants data/demo_template.txt.
    template: Path | None = None


def read_tools(path: Path) -> list[dict[str, Any]]:
    """The tools of a file, as `Args.tools` says. Raises FileNotFoundError or ValueError, in one line, where there are none."""
    if not path.is_file():
        raise FileNotFoundError(f"--tools {path}: no such file: give a JSON list of tools")
    rows = (row for row, _ in jsonl.rows(path))
    first = next(rows, None)
    is_row = isinstance(first, dict) and "tools" in first and "name" not in first
    tools = jsonl.parsed(jsonl.tools_of, first["tools"] if is_row else [] if first is None else [first, *rows])
    if tools is None:
        raise ValueError(
            f'--tools {path}: not all of it are tools: give a JSON list of {{"name", "description", "parameters"}}'
        )
    if not tools:
        raise ValueError(f"--tools {path}: it holds no tools")
    return tools


@dataclass
class Chat:
    """A conversation. A turn of the user's, or of a tool, stays in it only if the model has answered."""

    model: Model
    tools: Sequence[dict[str, Any]]
    template: str
    max_response_tokens: int
    temperature: float = 0.0
    turns: list[Turn] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)  # names of the tools called last whose results are not given yet

    def reply(self, turns: Sequence[Turn]) -> Response:
        """Answers the conversation with these turns at its end. Raises ValueError where it cannot be asked."""
        example = self.example([*self.turns, *turns])
        [responses] = respond(
            self.model, [example], self.template, self.max_response_tokens, temperature=self.temperature, rows=1
        )
        if not responses:
            length = len(prompt.encode(example, self.model.policy.tokenizer, self.template))
            sizes = _sizes(length, self.max_response_tokens, self.model.policy)
            raise ValueError(f"the context is full: tools and conversation take {sizes}: begin again with /new")
        self.turns += [*turns, self.turn_of(responses[0].text)]
        self.waiting = [call["name"] for call in self.turns[-1].get("calls", ())]
        return responses[0]

    def example(self, turns: Sequence[Turn]) -> Example:
        return make(turns, self.tools, (), "chat")

    def turn_of(self, text: str) -> Turn:
        """A reply as an earlier turn: its calls with its thought, as rows of data have them, else what it says."""
        thought, calls, rest = parts(text)
        turn = {"role": "assistant", "content": thought or rest, "calls": calls}
        try:
            self.example([turn])
        except ValueError:  # half of a surrogate pair in an argument
            calls = None
        return turn if calls else {"role": "assistant", "content": text}


def parts(text: str) -> tuple[str, list[dict[str, Any]] | None, str]:
    """(thought, calls as the reward reads them, what is neither) of a reply; calls that cannot be read are in the last."""
    calls, rest = parse_calls(text), text
    if calls is not None:
        begin, end = block_span(text)
        rest = text[:begin] + text[end:]
    before, opened, behind = rest.partition("<think>")
    thought, closed, after = behind.partition("</think>")
    if opened and closed:
        return thought.strip(), calls, (before + after).strip()
    return "", calls, rest.strip()


def problem(text: str) -> str:
    """Why the reward of training would not read a reply, whatever the right calls were; "" where it would."""
    calls = parse_calls(text)
    found = judge(text, calls or ())
    if found.reason == "correct":
        return ""
    lacks = [f"no <{tag}> block" for tag in ("think", "tool_call") if not found.parts[tag]]
    if found.parts["tool_call"] and calls is None:
        lacks.append("no JSON list of calls in its <tool_call> block")
    return f"{'no readable call' if calls is None else 'a reward of 0'} ({found.reason}): {', '.join(lacks)}"


# ---------------------------------------------------------------- what a person sees


def show(response: Response, tools: Sequence[dict[str, Any]], seconds: float, max_response_tokens: int) -> None:
    """Prints a reply. All of it is text: neither markup nor control characters of the model's have an effect."""
    thought, calls, rest = parts(response.text)
    if thought:
        _print(Text(visible(thought), style="dim italic"))
    if rest:
        _print(Text(visible(rest)))
    known = {tool["name"] for tool in tools}
    for call in calls or ():
        strange = "" if call["name"] in known else "  which is none of the tools"
        _print(Text.assemble((visible(call["name"]), "bold cyan"), (strange, "yellow")))
        for name, value in call["arguments"].items():
            _print(Text.assemble("  ", (visible(name), "cyan"), " = ", visible(_json(value))))
    if calls == []:
        _print(Text("no call: []", style="bold cyan"))
    if response.truncated:
        warn(f"cut at {max_response_tokens:,} tokens (--max_response_tokens)")
    if why := problem(response.text):
        warn(why)
    speed = f"{plural(response.token_count, 'token')} in {seconds:.1f} s"
    note(f"{speed}; /result TEXT says what {visible(calls[0]['name'])} returned" if calls else speed)


def _print(text: Text) -> None:
    CONSOLE.print(text, soft_wrap=not CONSOLE.is_terminal)


def _json(value: Any) -> str:
    line = json.dumps(value, ensure_ascii=False)
    return line if len(line) <= 100 else json.dumps(value, ensure_ascii=False, indent=2)


def show_tools(tools: Sequence[dict[str, Any]]) -> None:
    for tool in tools:
        _print(Text.assemble((visible(tool["name"]), "bold cyan"), f"  {visible(tool['description'])}"))
        _print(Text(f"  {visible(json.dumps(tool['parameters'], ensure_ascii=False))}", style="dim"))


# ---------------------------------------------------------------- line by line


def lines() -> Iterator[str]:
    """What is typed, or piped in, until it ends."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            _print(Text(f"> {visible(line.strip())}", style="bold"))
            yield line.strip()
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and earlier lines, for `input`)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("> ").strip()
    print()


def talk(chat: Chat) -> None:
    """Answers line by line; what one of them has wrong is said, and changes nothing."""
    results: list[Turn] = []  # of some of the calls; the model goes on when it has all
    for line in lines():
        command, _, rest = line.partition(" ")
        if not line:
            continue
        if command == "/result":
            if not chat.waiting[len(results) :] or not rest.strip():
                why = "no call waits for a result" if rest.strip() else "what did it return? /result TEXT"
                warn(why)
                continue
            results.append({"role": "tool", "name": chat.waiting[len(results)], "content": rest.strip()})
            if left := chat.waiting[len(results) :]:
                note(f"and what {visible(left[0])} returned? /result TEXT, or go on without it")
                continue
            _answer(chat, results)
        elif command == "/new":
            chat.turns.clear()
            chat.waiting.clear()
            note("a new conversation")
        elif command == "/tools":
            show_tools(chat.tools)
            continue
        elif command.startswith("/"):
            note(HELP) if command == "/help" else warn(f"no command {visible(command)}: see /help")
            continue
        else:
            _answer(chat, [*results, {"role": "user", "content": line}])
        results = []


def _answer(chat: Chat, turns: Sequence[Turn]) -> None:
    """Asks the model, and shows its reply. On a terminal, Ctrl-C stops it."""
    began, silent = time.perf_counter(), not CONSOLE.is_terminal
    columns = (progress.SpinnerColumn(), progress.TextColumn("{task.description}"), progress.TimeElapsedColumn())
    try:
        with progress.Progress(*columns, console=CONSOLE, transient=True, disable=silent) as spinner:
            spinner.add_task("answering", total=None)
            response = chat.reply(turns)
    except ValueError as error:
        warn(visible(str(error)))
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        note("stopped; the conversation is as before")
    else:
        show(response, chat.tools, time.perf_counter() - began, chat.max_response_tokens)


def begin(args: Args) -> Chat:
    """Loads the model. Raises ValueError or FileNotFoundError for what a user can mend, mostly before the weights load."""
    if args.max_response_tokens is not None and args.max_response_tokens < 1:
        raise ValueError(f"--max_response_tokens {args.max_response_tokens}: give a number from 1 on")
    if not args.temperature >= 0:
        raise ValueError(f"--temperature {args.temperature}: give a number from 0 on")
    tools = read_tools(args.tools)
    template = template_of(args.model, args.template)
    policy = inputs.load_policy(args.model)
    request = make([{"role": "user", "content": "?"}], tools, (), "chat")
    longest, context = args.max_response_tokens, policy.model.max_positions
    if longest is None:
        longest = min(response_tokens(args.model, policy, [request], template), context // 2)
    if (length := len(prompt.encode(request, policy.tokenizer, template))) > context - longest:
        sizes = _sizes(length, longest, policy)
        raise ValueError(f"--tools {args.tools}: they take {sizes}: give fewer, or lower --max_response_tokens")
    with CONSOLE.status("loading"):
        model = open_model(policy)
    return Chat(model, tools, template, longest, args.temperature)


def _sizes(prompt_tokens: int, reply_tokens: int, policy: Policy) -> str:
    most = policy.model.max_positions
    return f"{prompt_tokens:,} tokens, a reply up to {reply_tokens:,}, and the model is made for {most:,}"


def main() -> None:
    args = command_line.read(Args, "python -m eval.chat", sys.argv[1:])
    cache_compilations()
    chat = begin(args)
    names = ", ".join(visible(tool["name"]) for tool in itertools.islice(chat.tools, 8))
    more = f" and {len(chat.tools) - 8:,} more" if len(chat.tools) > 8 else ""
    header(args.model, [("tools", names + more), ("replies", f"up to {chat.max_response_tokens:,} tokens"), ("help", "/help")])
    talk(chat)


if __name__ == "__main__":
    config.run_main(main)
