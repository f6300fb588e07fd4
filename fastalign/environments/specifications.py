"""How a name, given as --environment, becomes a kind of environment."""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..rewards import worker
from .calculator import Calculator
from .protocol import Kind
from .python_tool import PythonTool

BUILTIN: dict[str, Callable[..., Any]] = {"calculator": Calculator, "python": PythonTool}
_BOOLEANS = {"true": True, "false": False}
_READ: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "bool": lambda text: _BOOLEANS[text.lower()], "str": str}
_GIVEN = ("prompt", "seed")  # to every environment that asks for them


def load_environment(specification: str) -> Kind:
    """The environment of a run.

    Args:
        specification: a built-in (`calculator`, `python`), `module:Class` or `path.py:Class`, options behind another colon:
            `calculator:call=[{}],result=({})`, `games.py:Maze:size=4`. The class may be any callable that makes environments.

    Raises:
        ValueError: an unknown name (with the nearest), a class that does not load or is no environment, a wrong option.
    """
    name, make, options = _named(specification)
    make = partial(make, **_parsed(specification, make, options)) if options else make
    try:
        example = make()
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else worker.describe(error)
        raise ValueError(f"environment {specification!r}: {reason}") from error
    missing = [method for method in ("reset", "step") if not callable(getattr(example, method, None))]
    if missing:
        raise ValueError(f"environment {specification!r}: expected an object with reset and step, got no {missing[0]}")
    accepted = worker.signature(example.reset)
    stop = getattr(example, "stop", ())
    return Kind(
        name,
        make,
        None if accepted["any"] else frozenset(accepted["names"]),
        tuple(accepted["required"]),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        role=getattr(example, "role", "tool"),
        immediate=getattr(example, "immediate", False),
        gives_reward=getattr(example, "gives_reward", True),
    )


def check_columns(kind: Kind, columns: list[str]) -> None:
    """Raises ValueError, naming the nearest column, when the environment needs one that the data has not."""
    for name in kind.required:
        if name not in _GIVEN and name not in columns:
            near = difflib.get_close_matches(name, columns, n=1) or columns[:1]
            remedy = f"; rename with --dataset_map {near[0]}={name}" if near else ""
            raise ValueError(f"environment {kind.name!r}: expected a column {name!r}, got columns {columns}{remedy}")


def _named(specification: str) -> tuple[str, Callable[..., Any], str]:
    """(name, what makes it, its options as text)."""
    head, _, rest = specification.partition(":")
    if head in BUILTIN:
        return head, BUILTIN[head], rest
    attribute, _, options = rest.partition(":")
    if not head or not attribute:
        near = difflib.get_close_matches(specification, BUILTIN, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        known = "one of yours is module:Class or path.py:Class"
        raise ValueError(f"unknown environment {specification!r}; {hint}built-in are {', '.join(BUILTIN)}; {known}")
    is_file = head.endswith(".py")
    if is_file and not Path(head).is_file():
        raise ValueError(f"environment {specification!r}: no such file {head!r}")
    target = ("file", os.path.abspath(head), attribute) if is_file else ("module", head, attribute)
    try:
        return attribute, worker.load(target), options
    except Exception as error:
        names = error.args[1] if isinstance(error, AttributeError) and len(error.args) > 1 else []
        near = difflib.get_close_matches(attribute, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it has {names}" if names else ""
        reason = error.args[0] if names else worker.describe(error)
        raise ValueError(f"environment {specification!r}: {reason}{hint}") from error


def _parsed(specification: str, make: Callable[..., Any], text: str) -> dict[str, Any]:
    """`option=value,option=value`; a comma splits only before another option, so that texts may hold commas."""
    parameters = inspect.signature(make).parameters.values()
    known = {p.name: p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    given: dict[str, Any] = {}
    for part in re.split(r",(?=[A-Za-z_]\w*=)", text):
        key, equals, value = part.partition("=")
        if not equals or key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"environment {specification!r}: expected options {list(known)} as name=value, got {part!r}{hint}")
        kind = _type_of(known[key])
        try:
            given[key] = _READ[kind](value)
        except (ValueError, KeyError):
            raise ValueError(f"environment {specification!r}: expected {key} as {kind}, got {value!r}") from None
    return given


def _type_of(parameter: inspect.Parameter) -> str:
    """int, float, bool or str: by its annotation, or else by its default."""
    annotation = parameter.annotation if isinstance(parameter.annotation, str) else getattr(parameter.annotation, "__name__", "")
    if annotation in _READ:
        return annotation
    default = type(parameter.default).__name__
    return default if default in _READ else "str"
