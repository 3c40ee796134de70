"""Rewards with faults, for the tests: each scores a response by its letters where it does not fail."""

import os
import re
import signal
import sys
import time

from grpo_jax.reward import Scored


def good(responses, example):
    return [Scored(min(20, len(set(response.text))) / 20, "letters", {}) for response in responses]


def is_bad(example) -> bool:
    """Of about every other example."""
    return int(example.id, 16) % 2 == 1


def raises(responses, example):
    return 1 / 0 if is_bad(example) else good(responses, example)


def sleeps(responses, example):
    if is_bad(example):
        time.sleep(3600)
    return good(responses, example)


def hangs(responses, example):
    """In a regular expression, which holds the interpreter's lock and hears no signal of Python's."""
    if is_bad(example):
        re.match(r"(a+)+$", "a" * 64 + "b")
    return good(responses, example)


def dies(responses, example):
    if is_bad(example):
        os.kill(os.getpid(), signal.SIGSEGV)
    return good(responses, example)


def exits(responses, example):
    if is_bad(example):
        os._exit(3)
    return good(responses, example)


def leaves(responses, example):
    if is_bad(example):
        sys.exit("no more")
    return good(responses, example)


def nan(responses, example):
    return [float("nan"), *good(responses, example)[1:]] if is_bad(example) else good(responses, example)


def infinite(responses, example):
    return [1e999] * len(responses) if is_bad(example) else good(responses, example)


def text(responses, example):
    return ["1.0"] * len(responses) if is_bad(example) else good(responses, example)


def nothing(responses, example):
    return None if is_bad(example) else good(responses, example)


def too_few(responses, example):
    return good(responses, example)[1:] if is_bad(example) else good(responses, example)


def endless(responses, example):
    return iter(float, 1.0) if is_bad(example) else good(responses, example)


def odd_reason(responses, example):
    return [Scored(1.0, None, {})] * len(responses) if is_bad(example) else good(responses, example)


def speaks(responses, example):
    """Prints, reads from the terminal, and says in its error what the model wrote."""
    print("from the reward", sys.stdin.read())
    if is_bad(example):
        raise RuntimeError(f"\x1b[2J {responses[0].text} \ud800")
    return good(responses, example)


def process(responses, example):
    """Which process has scored it."""
    return [os.getpid()] * len(responses)


def modules(responses, example):
    """Whether the process has JAX."""
    return [float("jax" in sys.modules)] * len(responses)
