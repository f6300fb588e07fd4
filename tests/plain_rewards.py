"""Reward functions in a module that imports nothing: the process that runs them starts at once."""


def halves(completions, **columns):
    return [len(text) / 2 for text in completions]


def known_below_four(completions, **columns):
    return [1.0 if len(text) < 4 else None for text in completions]
