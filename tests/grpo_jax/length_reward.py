"""A user's own rewards and benchmark, for the tests: how many different letters a response has, in twentieths."""

from data import demo


def score(responses, example):
    return [min(20, len(set(response.text))) / 20 for response in responses]


def of_some(responses, example):
    """The same for all responses to every other example."""
    return score(responses, example) if int(example.id, 16) % 2 else [0.5] * len(responses)


def benchmark():
    """Three tasks, of which the second and third are one; right is a reply with more than eight different letters."""
    tasks = demo.tasks(2, seed=7, held_out=True)
    return [tasks[0], tasks[1], tasks[1]], lambda responses, example: [len(set(r.text)) > 8 for r in responses]
