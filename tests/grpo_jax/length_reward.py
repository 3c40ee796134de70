"""A user's own reward, for the tests: how many different letters a response has, in twentieths."""


def score(responses, example):
    return [min(20, len(set(response.text))) / 20 for response in responses]
