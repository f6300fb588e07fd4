"""Answers in text: finding the final one, and telling whether two are the same number or expression."""

from __future__ import annotations

import re
from fractions import Fraction

# what a number looks like in prose: 1,234.50  -3  .5; a minus after a word, digit or bracket is a subtraction
NUMBER = re.compile(r"(?:(?<![\w)\]])[-−])?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)")
_EXACT = re.compile(r"([-+]?)((?:\d+(?:,\d{3})*)?(?:\.\d*)?)(?:[eE]([-+]?\d{1,3}))?")
_FRACTION = re.compile(r"([-+]?)\\?frac\{([^{}]+)\}\{([^{}]+)\}|([-+]?[\d.,]+)/([-+]?[\d.,]+)")
_SAYS = re.compile(r"(?:final answer|answer)\s*(?:is|:|=)[\s:=]*", re.IGNORECASE)
_LONGEST_GOLD = 200  # characters; a longer reference is a worked solution
_LONGEST_NUMBER = 100  # characters; longer digit strings are text, so that exact arithmetic stays bounded


def after_thinking(text: str) -> str:
    """What follows the last </think>; the whole text when nothing is thought aloud."""
    return text.rpartition("</think>")[2]


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{…} whose braces balance, or None."""
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    while start >= 0:
        begin = text.index("{", start) + 1
        depth = 1
        for end in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[begin:end].strip()
        start = max(text.rfind(r"\boxed{", 0, start), text.rfind(r"\fbox{", 0, start))
    return None


def after_hashes(text: str) -> str | None:
    """What stands behind the last #### on its line, or None."""
    _, mark, tail = text.rpartition("####")
    return tail.strip().split("\n", 1)[0].strip() or None if mark else None


def last_number(text: str) -> str | None:
    """The last number of the text as written, or None."""
    found = NUMBER.findall(text)
    return found[-1] if found else None


def stated_answer(text: str) -> str | None:
    r"""The answer that the text commits to: \boxed{…}, else `#### …`, else after "the answer is"; None when there is none."""
    found = last_boxed(text) or after_hashes(text)
    if found:
        return found
    says = list(_SAYS.finditer(text))
    if not says:
        return None
    rest = text[says[-1].end() :].split("\n", 1)[0]
    sentence = re.split(r"\.(?:\s|$)", rest, maxsplit=1)[0].strip()
    math = re.match(r"\$+([^$]+)\$+|\\\((.+?)\\\)", sentence)
    return ((math.group(1) or math.group(2)).strip() if math else sentence.strip("*")) or None


def final_answer(text: str) -> str | None:
    """`stated_answer`, else the last number of the text."""
    return stated_answer(text) or last_number(text)


def gold_answer(text: str) -> str | None:
    r"""The answer inside a reference: \boxed{…}, else `#### …`, else the whole text.

    A reference too long to be an answer must say "the answer is …"; None when it does not.
    """
    text = text.strip()
    return last_boxed(text) or after_hashes(text) or (text if len(text) <= _LONGEST_GOLD else stated_answer(text)) or None


def normalize(text: str) -> str:
    """The answer without what does not change its meaning: spaces, $, units in \\text{}, \\left, thousands commas, a final dot."""
    text = text.strip().strip("$").replace("−", "-").replace("–", "-")
    text = re.sub(r"\\(?:left|right|displaystyle|limits|,|;|!|:| )", "", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    # a unit behind a number says nothing; a word alone is the answer itself
    text = re.sub(r"(?<=[\d}])\s*\\(?:text|mathrm|mbox)\{[^{}]*\}(?:\^\d)?", "", text)
    text = re.sub(r"\\(?:text|mathrm|mathbf|mbox|textbf)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\^?\{?\\circ\}?|°", "", text)
    text = text.replace(r"\$", "").replace("$", "").replace("£", "").replace("€", "").replace(r"\%", "%")
    text = re.sub(r"(?<=\d)%", "", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"^[a-zA-Z]\s*=\s*(?=[^=]+$)", "", text)  # x = 5 answers 5
    return re.sub(r"\s+", "", text).rstrip(".")


def as_number(text: str) -> Fraction | None:
    r"""The exact value of a decimal, a fraction (a/b, \frac{a}{b}) or scientific notation; None when it is no number."""
    text = re.sub(r"\s+", "", text).replace("−", "-")
    if not text or len(text) > _LONGEST_NUMBER:
        return None
    match = _FRACTION.fullmatch(text)
    if match:
        sign, top, bottom = (match.group(1), match.group(2), match.group(3)) if match.group(2) else ("", match.group(4), match.group(5))
        numerator, denominator = as_number(top), as_number(bottom)
        if numerator is None or not denominator:
            return None
        return (-1 if sign == "-" else 1) * numerator / denominator
    match = _EXACT.fullmatch(text)
    if not match or not any(c.isdigit() for c in match.group(2)):
        return None
    digits = match.group(2).replace(",", "").rstrip(".") or "0"
    value = Fraction(digits) * Fraction(10) ** int(match.group(3) or 0)
    return -value if match.group(1) == "-" else value


def _parts(text: str) -> list[str]:
    """The comma-separated parts of a tuple, set or interval with its brackets kept as parts of their own; [text] otherwise."""
    if len(text) < 2 or text[0] not in "([{" or text[-1] not in ")]}":
        return [text]
    parts, depth, begin = [text[0]], 0, 1
    for i in range(1, len(text) - 1):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(text[i], 0)
        if text[i] == "," and depth == 0:
            parts.append(text[begin:i])
            begin = i + 1
    parts += [text[begin:-1], text[-1]]
    return parts if len(parts) > 3 else [text]


def equivalent(gold: str, answer: str) -> bool:
    """Whether two answers are the same: as exact numbers, part by part for tuples, else as normalized text.

    Decimals compare exactly (0.5 is 1/2, 0.33 is not 1/3), letter case does not matter.
    """
    gold, answer = normalize(gold), normalize(answer)
    left, right = as_number(gold), as_number(answer)
    if left is not None and right is not None:
        return left == right
    if gold.lower() == answer.lower():
        return bool(gold)
    golds, answers = _parts(gold), _parts(answer)
    if len(golds) == 1 or len(golds) != len(answers):
        return False
    return all(equivalent(g, a) if len(g) > 1 or g not in "()[]{}" else g == a for g, a in zip(golds, answers, strict=True))
