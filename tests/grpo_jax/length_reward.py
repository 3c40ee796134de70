"""A user's own reward, for the tests: how many different letters a response has, in twentieths."""


def score(responses, example):
    return [min(20, len(set(response.text))) / 20 for response in responses]


def of_some(responses, example):
    """The same for all responses to every other example."""
    return score(responses, example) if int(example.id, 16) % 2 else [0.5] * len(responses)
