"""Tests as a data set writes them, taken apart into steps: what the program is asked, and what only this side knows."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

COLUMNS = ("tests", "test_list", "test", "inputs", "input_output")
"""Where the tests of a record are, in this order."""

_BUILDERS: dict[str, Callable[..., Any]] = {
    "set": set,
    "frozenset": frozenset,
    "tuple": tuple,
    "list": list,
    "sorted": sorted,
    "dict": dict,
}


@dataclass(frozen=True)
class Run:
    """Statements that must end without an exception."""

    source: str


@dataclass(frozen=True)
class Value:
    """An expression and what it must equal; the expectation stays on this side."""

    source: str
    expected: Any


@dataclass(frozen=True)
class Whole:
    """One run of the program as a whole: its stdin, and the stdout that it must have."""

    stdin: str
    stdout: str


Test = list[Run | Value] | Whole


def read_tests(record: dict[str, Any]) -> list[Test]:
    """The tests of a record; empty where it has none.

    `tests`, `test_list` or `test`: Python with asserts, a list of texts one test each. `inputs` and `outputs`, or the two in a JSON
    text `input_output`: texts of stdin and stdout; with `entry_point` or `fn_name`, arguments and results of that function.
    `test_setup_code` goes before every test, `test_imports` too.

    Raises:
        ValueError: for tests of another form.
    """
    entry = str(record.get("entry_point") or record.get("fn_name") or "")
    for name in ("tests", "test_list", "test"):
        value = record.get(name)
        if value:
            texts = [value] if isinstance(value, str) else list(value)
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"expected {name} to be a text or a list of texts, got {type(texts[0]).__name__} {str(texts[0])[:80]!r}")
            return [steps_of(text, entry, _setup_of(record)) for text in texts]
    pairs = record
    if record.get("input_output"):
        pairs = record["input_output"] if isinstance(record["input_output"], dict) else json.loads(record["input_output"])
        entry = str(pairs.get("fn_name") or entry)
    inputs, outputs = pairs.get("inputs"), pairs.get("outputs")
    if not inputs or outputs is None:
        return []
    if len(inputs) != len(outputs):
        raise ValueError(f"expected one of outputs for each of {len(inputs)} inputs, got {len(outputs)}")
    return [_pair(given, wanted, entry) for given, wanted in zip(inputs, outputs, strict=True)]


def _setup_of(record: dict[str, Any]) -> str:
    imports = record.get("test_imports") or []
    return "\n".join([*([imports] if isinstance(imports, str) else imports), record.get("test_setup_code") or ""]).strip()


def _pair(given: Any, wanted: Any, entry: str) -> Test:
    if not entry:
        return Whole(_text(given), _text(wanted))
    if not isinstance(given, list):
        raise ValueError(f"expected the inputs of {entry} as lists of arguments, got {type(given).__name__} {str(given)[:80]!r}")
    function = f"({entry} if {entry!r} in globals() else Solution().{entry})"
    return [Value(f"{function}(*{given!r})", wanted[0] if isinstance(wanted, list) and len(wanted) == 1 else wanted)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def steps_of(source: str, entry: str = "", setup: str = "") -> list[Run | Value]:
    """The steps of one test.

    `assert f(x) == literal` becomes a value to ask for; other statements run as they are. A function `check(candidate)` is taken
    with `entry` as its argument, functions `test_…()` without arguments and unittest classes are run.

    Raises:
        ValueError: for what is not Python.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"expected Python, got {source[:80]!r}: {error}") from error
    return list(_joined([*ast.parse(setup).body, *_inlined(tree.body, entry)]))


def _inlined(body: Sequence[ast.stmt], entry: str) -> Iterator[ast.stmt]:
    """The statements, and the bodies or calls of what is only defined in them."""
    yield from (statement for statement in body if not _is_main_guard(statement))
    for statement in body:
        if isinstance(statement, ast.FunctionDef):
            arguments = [a.arg for a in statement.args.args]
            if statement.name == "check" and len(arguments) == 1 and entry and not _calls(body, "check"):
                yield from ast.parse(f"{arguments[0]} = {entry}").body
                yield from statement.body if _is_flat(statement) else ast.parse(f"check({entry})").body
            elif statement.name.startswith("test") and not arguments and not _calls(body, statement.name):
                yield from statement.body if _is_flat(statement) else ast.parse(f"{statement.name}()").body
        elif isinstance(statement, ast.ClassDef) and any("TestCase" in ast.unparse(b) for b in statement.bases):
            yield from ast.parse(
                f"import unittest\n_result = unittest.TestResult()\n"
                f"unittest.defaultTestLoader.loadTestsFromTestCase({statement.name}).run(_result)\n"
                f"assert _result.testsRun and _result.wasSuccessful()"
            ).body


def _is_main_guard(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)


def _calls(body: Sequence[ast.stmt], name: str) -> bool:
    calls = (s.value for s in body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Call))
    return any(isinstance(call.func, ast.Name) and call.func.id == name for call in calls)


def _is_flat(function: ast.FunctionDef) -> bool:
    """Whether the body means the same outside its function."""
    if function.decorator_list:
        return False
    left: list[ast.AST] = list(function.body)
    while left:
        node = left.pop()
        if isinstance(node, ast.Return | ast.Global | ast.Nonlocal | ast.Yield | ast.YieldFrom):
            return False
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            left += ast.iter_child_nodes(node)
    return True


def _joined(body: Sequence[ast.stmt]) -> Iterator[Run | Value]:
    waiting: list[ast.stmt] = []
    for statement in body:
        value = _value(statement)
        if value is None:
            waiting.append(statement)
            continue
        if waiting:
            yield _run(waiting)
            waiting = []
        yield value
    if waiting:
        yield _run(waiting)


def _run(statements: list[ast.stmt]) -> Run:
    return Run(ast.unparse(ast.Module(statements, [])))


def _value(statement: ast.stmt) -> Value | None:
    """The comparison of an assert with one side that can be known beforehand."""
    if not isinstance(statement, ast.Assert) or not isinstance(statement.test, ast.Compare):
        return None
    compare = statement.test
    if len(compare.ops) != 1 or not isinstance(compare.ops[0], ast.Eq | ast.Is):
        return None
    for asked, wanted in ((compare.left, compare.comparators[0]), (compare.comparators[0], compare.left)):
        try:
            expected = _constant(wanted)
        except (ValueError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(compare.ops[0], ast.Is) and expected is not None:
            return None
        return Value(ast.unparse(asked), expected)
    return None


def _constant(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _BUILDERS and not node.keywords:
        return _BUILDERS[node.func.id](*map(_constant, node.args))
    return ast.literal_eval(node)
