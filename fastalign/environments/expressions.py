"""Exact arithmetic on what a model writes: a parser of its own, which runs nothing and bounds time and memory."""

from __future__ import annotations

import decimal
import re
from collections.abc import Callable
from fractions import Fraction

MAX_CHARACTERS = 400
MAX_DEPTH = 40
MAX_BITS = 4096  # of numerator and denominator

_TOKEN = re.compile(r"\s*(?:(\d+(?:,\d{3})*(?:\.\d*)?|\.\d+)|(\*\*|//|[-+*/%^()×÷−]))")
_SAME = {"×": "*", "÷": "/", "−": "-", "^": "**"}
_BINDS = {"+": 1, "-": 1, "*": 2, "/": 2, "//": 2, "%": 2, "**": 4}
_SIGN = 3  # binds tighter than *, looser than **: -2**2 is -4
_OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "//": lambda a, b: Fraction(a // b),
    "%": lambda a, b: a % b,
    "**": lambda a, b: _power(a, b),
}


def calculate(text: str) -> str:
    """The value of an expression of numbers, + - * / // % ** (or ^) and parentheses: exact where it is whole, else 12 digits.

    Raises:
        ValueError: it is no such expression, or its value is too large.
        ZeroDivisionError: it divides by 0.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the expression has {len(text)} characters, at most {MAX_CHARACTERS}")
    return shown(_Parser(tokens(text)).whole())


def tokens(text: str) -> list[str]:
    """Numbers and operators.

    Raises:
        ValueError: anything else is in the text.
    """
    found, at, text = [], 0, text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"unexpected {text[at:].lstrip()[0]!r}")
        word = match.group(1) or match.group(2)
        found.append(_SAME.get(word, word))
        at = match.end()
    return found


def shown(value: Fraction) -> str:
    """A number as the model reads it."""
    if value.denominator == 1:
        return str(value.numerator)
    context = decimal.Context(prec=12)
    return str(context.divide(decimal.Decimal(value.numerator), decimal.Decimal(value.denominator)).normalize(context))


class _Parser:
    """Precedence climbing over tokens."""

    def __init__(self, found: list[str]) -> None:
        self.tokens, self.at, self.depth = found, 0, 0

    def whole(self) -> Fraction:
        value = self.expression(0)
        if self.at < len(self.tokens):
            raise ValueError(f"unexpected {self.tokens[self.at]!r}")
        return value

    def expression(self, least: int) -> Fraction:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        value = self.operand()
        while self.at < len(self.tokens) and _BINDS.get(self.tokens[self.at], -1) > least - (self.tokens[self.at] == "**"):
            operator = self.tokens[self.at]
            self.at += 1
            value = bounded(_OPERATIONS[operator](value, self.expression(_BINDS[operator])))
        self.depth -= 1
        return value

    def operand(self) -> Fraction:
        if self.at == len(self.tokens):
            raise ValueError("the expression ends too early")
        word = self.tokens[self.at]
        self.at += 1
        if word in "+-":
            value = self.expression(_SIGN)
            return value if word == "+" else -value
        if word == "(":
            value = self.expression(0)
            if self.at == len(self.tokens) or self.tokens[self.at] != ")":
                raise ValueError("a parenthesis is not closed")
            self.at += 1
            return value
        if word in _BINDS or word == ")":
            raise ValueError(f"unexpected {word!r}")
        return bounded(Fraction(word.replace(",", "")))


def bounded(value: Fraction) -> Fraction:
    """The value itself. Raises ValueError when it is too large."""
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ValueError("the number is too large")
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("the exponent must be whole")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * bits > MAX_BITS and abs(base) not in (0, 1):
        raise ValueError("the number is too large")
    return base**exponent.numerator
