"""Comparing what a program answered, as `jail/examine.py` encodes it, with what a test expects."""

from __future__ import annotations

from typing import Any


def matches(expected: Any, answer: Any) -> bool:
    """Whether an encoded answer equals the expected value, as Python's == has it.

    The expectation leads: an answer of another size is refused before it is looked into, so that no answer makes this slow.
    """
    try:
        return _matches(expected, answer)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError, AttributeError):
        return False  # not what `encode` writes


def _matches(expected: Any, answer: Any) -> bool:
    if isinstance(expected, list | tuple):
        items = answer["list" if isinstance(expected, list) else "tuple"]
        return len(items) == len(expected) and all(_matches(e, a) for e, a in zip(expected, items, strict=True))
    if isinstance(expected, set | frozenset):
        items = answer["set"]
        return len(items) == len(expected) and {_hashable(item) for item in items} == expected
    if isinstance(expected, dict):
        pairs = answer["dict"]
        if len(pairs) != len(expected):
            return False
        values = {_hashable(key): value for key, value in pairs}
        return values.keys() == expected.keys() and all(_matches(expected[key], value) for key, value in values.items())
    return _scalar(answer) == expected


def _scalar(answer: Any) -> Any:
    if answer is None or isinstance(answer, bool):
        return answer
    ((kind, text),) = answer.items()
    if kind == "int":
        return int(text, 16)
    if kind == "float":
        return float.fromhex(text)
    if kind == "complex":
        return complex(*map(float.fromhex, text))
    if kind == "str":
        return bytes.fromhex(text).decode("utf-8", "surrogatepass")
    if kind == "bytes":
        return bytes.fromhex(text)
    raise ValueError(f"expected a scalar, got {kind}")


def _hashable(answer: Any) -> Any:
    if isinstance(answer, dict) and ("tuple" in answer or "set" in answer):
        ((kind, items),) = answer.items()
        parts = [_hashable(item) for item in items]
        return tuple(parts) if kind == "tuple" else frozenset(parts)
    return _scalar(answer)
