"""`code` and `command`: what they score, and what a program that wants the score without the work gets."""

from __future__ import annotations

import json
import math
import os
import stat
import time

import pytest
from open_folders import opened

from fastalign.rewards import load_rewards
from fastalign.rewards.code import last_block, verdicts
from fastalign.rewards.confinement import ConfinementUnavailable, Limits, confinement
from fastalign.rewards.program_values import matches
from fastalign.rewards.unit_tests import Run, Value, Whole, read_tests, steps_of

ADD = "def add(a, b):\n    return a + b\n"
SUBTRACT = "def add(a, b):\n    return a - b\n"


@pytest.fixture
def confined():
    try:
        confinement()
    except ConfinementUnavailable as error:
        pytest.skip(str(error))


def fenced(program: str, language: str = "python") -> str:
    return f"Here it is:\n```{language}\n{program}```\nDone."


def score(specification: str, completions: list[str], **columns) -> list[float]:
    """Each completion against the same record."""
    with load_rewards([specification]) as rewards:
        repeated = {name: [value] * len(completions) for name, value in columns.items()}
        (values,) = rewards.score(["p"] * len(completions), completions, columns=repeated).values()
    return values


# ---- reading completions and tests: nothing runs


def test_code_takes_the_last_python_block():
    text = "```python\na = 1\n```\n```bash\nls\n```\n```py\na = 2\n```\n```\nplain\n```\n"
    assert last_block(text, ("python", "py")) == "a = 2\n"
    assert last_block(text) == "plain\n"
    assert last_block("```\nb = 1\n```\n```bash\nls\n```", ("python",)) == "b = 1\n"
    assert last_block("```bash\nls\n```", ("python",)) is None
    assert last_block("no fence at all") is None
    assert last_block("```python\ncut = 1", ("python",)) == "cut = 1"
    assert last_block("```python\nx = '''```'''\n```", ("python",)) == "x = '''```'''\n"


def test_code_keeps_expectations_on_this_side():
    source = """
x = 2
assert f(x) == [1, (2, 'a')], 'message'
assert {3: None} == g()
assert set(f(1)) == set([1, 2])
assert h(x) < 3
"""
    assert steps_of(source) == [
        Run("x = 2"),
        Value("f(x)", [1, (2, "a")]),
        Value("g()", {3: None}),
        Value("set(f(1))", {1, 2}),
        Run("assert h(x) < 3"),
    ]
    assert steps_of("assert f() is None") == [Value("f()", None)]
    assert steps_of("assert f() is True") == [Run("assert f() is True")]


def test_code_reads_the_columns_of_known_data_sets():
    assert read_tests({"tests": "assert f() == 1"}) == [[Value("f()", 1)]]
    assert read_tests({"test_list": ["assert f() == 1", "assert f() == 2"]}) == [[Value("f()", 1)], [Value("f()", 2)]]
    humaneval = {"test": "def check(candidate):\n    assert candidate(1) == 2\n", "entry_point": "f"}
    assert read_tests(humaneval)[0][1:] == [Value("candidate(1)", 2)]
    assert "candidate = f" in read_tests(humaneval)[0][0].source
    early = {"test": "def check(candidate):\n    if candidate(1): return\n    assert False\n", "entry_point": "f"}
    assert read_tests(early)[0][-1].source.endswith("check(f)")
    assert read_tests({"inputs": ["1\n", ["2", "3"]], "outputs": ["2\n", ["4"]]}) == [Whole("1\n", "2\n"), Whole("2\n3", "4")]
    apps = {"input_output": json.dumps({"inputs": [[1, [2]]], "outputs": [[3]], "fn_name": "f"})}
    assert read_tests(apps) == [[Value("(f if 'f' in globals() else Solution().f)(*[1, [2]])", 3)]]
    assert read_tests({"tests": None, "answer": "x"}) == []
    setup = {"test_list": ["assert f() == 1"], "test_setup_code": "import math"}
    assert read_tests(setup) == [[Run("import math"), Value("f()", 1)]]


@pytest.mark.parametrize(
    "record",
    [{"tests": "assert f( =="}, {"tests": [1]}, {"inputs": ["1"], "outputs": []}, {"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}],
)
def test_code_names_tests_that_it_cannot_read(record):
    with pytest.raises(ValueError, match="expected"):
        read_tests(record)


def test_code_values_compare_as_python_does():
    one, half = {"int": "0x1"}, {"float": (0.5).hex()}
    assert matches(1, one) and matches(1.0, one) and matches(True, one) and matches(1, True)  # noqa: PT018
    assert matches([1, 0.5], {"list": [one, half]}) and not matches((1, 0.5), {"list": [one, half]})  # noqa: PT018
    assert matches({(1, "a")}, {"set": [{"tuple": [one, {"str": "61"}]}]})
    assert matches({1: [None]}, {"dict": [[one, {"list": [None]}]]})
    assert not matches({1: [None]}, {"dict": []})
    assert not matches(1, {"list": [one]})
    assert not matches(math.inf, one) and matches(math.inf, {"float": math.inf.hex()})  # noqa: PT018
    for nonsense in (3, "1", [], {}, {"int": 4}, {"int": "x"}, {"list": 3}, {"a": 1, "b": 2}, {"str": "0x1"}):
        assert not matches(1, nonsense)
        assert not matches([1], nonsense)
        assert not matches({1}, nonsense)


# ---- scoring


def test_code_scores_the_fraction_of_tests(confined):
    tests = ["assert add(1, 2) == 3", "assert add(5, 0) == 5", "x = 4\nassert abs(add(x, 1) - 5) < 1e-9", "assert add('a', 'b') == 'ab'"]
    completions = [fenced(ADD), fenced(SUBTRACT), fenced("def add(:"), "no program", ADD]
    assert score("code", completions, tests=tests) == [1.0, 0.25, 0.0, 0.0, 0.0]
    assert score("code:all=1,block=any", completions, tests=tests) == [1.0, 0.0, 0.0, 0.0, 1.0]


def test_code_leaves_out_a_record_without_tests(confined):
    with load_rewards(["code"]) as rewards:
        values = rewards.score(["p"] * 3, [fenced(ADD)] * 3, columns={"tests": [None, "assert add(", "assert add(1, 1) == 2"]})["code"]
    assert math.isnan(values[0])
    assert math.isnan(values[1])
    assert values[2] == 1.0


def test_code_grades_humaneval_and_mbpp_records(confined):
    check = """
METADATA = {}

def check(candidate):
    assert candidate(1, 2) == 3
    for i in range(5):
        assert candidate(i, i) == 2 * i
"""
    assert score("code", [fenced(ADD), fenced(SUBTRACT)], test=check, entry_point="add") == [1.0, 0.0]
    mbpp = {"test_list": ["assert add(1, 2) == 3", "assert set(add([1], [2])) == set([2, 1])"], "test_setup_code": ""}
    assert score("code", [fenced(ADD), fenced(SUBTRACT)], **mbpp) == [1.0, 0.0]


def test_code_runs_test_functions_and_unittest_classes(confined):
    functions = """
from solution import add

def test_small():
    assert add(1, 1) == 2

def test_loop():
    for i in range(3):
        assert add(i, 0) == i
"""
    assert score("code", [fenced(ADD), fenced(SUBTRACT)], tests=functions) == [1.0, 0.0]
    case = """
import unittest

class TestAdd(unittest.TestCase):
    def test_sum(self):
        self.assertEqual(add(2, 2), 4)
"""
    assert score("code", [fenced(ADD), fenced(SUBTRACT)], test=case, entry_point="add") == [1.0, 0.0]


def test_code_compares_stdout(confined):
    programs = [
        "print(sum(map(int, input().split())))\n",
        "import sys\n\ndef main():\n    print(sum(map(int, sys.stdin.read().split())), end='  ')\n\n"
        "if __name__ == '__main__':\n    main()\n",
        "import threading\nthreading.Thread(target=lambda: print(sum(map(int, input().split())))).start()\n",
        "print(3)\n",
        "print(sum(map(int, input().split())))\nraise SystemExit(1)\n",
        "print(sum(map(int, input().split())))\nexit()\n",
        "while True: print('x' * 1000)\n",
    ]
    values = score("code", [fenced(p) for p in programs], inputs=["1 2\n", "3 4", "0 3\n"], outputs=["3\n", "7\n\n", "3"])
    assert values == [1.0, 1.0, 1.0, 2 / 3, 0.0, 1.0, 0.0]


def test_code_runs_of_one_record_do_not_see_each_other(confined):
    program = (
        "import os\nif os.path.exists('seen'):\n    print('seen')\nopen('seen', 'w').close()\n"
        "if os.fork() == 0:\n    import time\n    os.setsid()\n    time.sleep(60)\nprint(input())\n"
    )
    began = time.monotonic()
    passed = verdicts(program, [Whole("a", "a"), Whole("b", "seen\nb")], Limits(seconds=30.0))
    assert passed == [True, True]  # they share the folder, which is why no expectation lies in it; what a run starts ends with it
    assert time.monotonic() - began < 50


def test_code_calls_functions_with_arguments_and_results(confined):
    pair = {"inputs": [[1, 2], [5, 5]], "outputs": [[3], 10], "fn_name": "add"}
    method = "class Solution:\n    def add(self, a, b):\n        return a + b\n"
    assert score("code", [fenced(ADD), fenced(SUBTRACT), fenced(method)], **pair) == [1.0, 0.0, 1.0]


def test_code_goes_on_after_a_test_that_ends_the_program(confined):
    program = "import os\ndef f(x):\n    if x == 1:\n        os._exit(0)\n    if x == 2:\n        raise SystemExit(0)\n    return x\n"
    tests = [steps_of(f"assert f({i}) == {i}") for i in range(5)]
    assert verdicts(program, tests, Limits(seconds=30.0)) == [True, False, False, True, True]
    assert verdicts(program, tests, Limits(seconds=30.0), stop=True) == [True, False, False, False, False]


def test_code_tests_share_no_names(confined):
    tests = [steps_of("x = 1\nassert f(x) == 1"), steps_of("assert f(x) == 1")]
    assert verdicts("def f(x): return x\n", tests, Limits(seconds=30.0)) == [True, False]


def test_code_a_hanging_sample_costs_its_timeout_alone(confined):
    hang = fenced("def add(a, b):\n    while True: pass\n")
    completions = [hang, fenced(ADD), fenced("while True: pass\n"), fenced(ADD)]
    assert score("code:timeout=2,workers=4", completions, tests="assert add(1, 2) == 3") == [0.0, 1.0, 0.0, 1.0]


def test_code_answers_of_other_types_are_compared(confined):
    program = """
import collections, enum

class Names(list):
    pass

class Letter(enum.IntEnum):
    A = 1

ANSWERS = [
    Names([1, 2]), collections.OrderedDict(a=1), collections.Counter('aab'), Letter.A, float('inf'), 1 << 70000,
    chr(0xd800), bytes([255]), 2j, frozenset([1]), range(3), {1: {2: (3,)}},
]
"""
    expected = ["[1, 2]", "{'a': 1}", "{'a': 2, 'b': 1}", "1", "1e999", f"0x1{'0' * 17500}"]
    expected += [r"'\ud800'", r"b'\xff'", "2j", "{1}", "[0, 1, 2]", "{1: {2: (3,)}}"]
    tests = [steps_of(f"assert ANSWERS[{i}] == {text}") for i, text in enumerate(expected)]
    passed = verdicts(program, tests, Limits(seconds=30.0))
    assert [i for i, value in enumerate(passed) if not value] == [10]  # a range is no list, for Python either


def test_code_runs_in_a_process_that_shows_nothing_of_ours(confined, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    program = """
import gc, os, sys

def environment():
    return sorted(os.environ)

def importable():
    found = []
    for name in ("kernel", "watch", "enter", "examine", "landlock", "fastalign"):
        try:
            found.append(__import__(name).__name__)
        except ImportError:
            pass
    return found

def descriptors():
    found = []
    for number in range(256):
        try:
            os.fstat(number)
            found.append(number)
        except OSError:
            pass
    return len(found)

def held():
    containers = [found for found in gc.get_objects() if type(found) in (list, tuple, dict, set)]
    secret = "".join(["hunt", "er2"])
    return any(secret in value for found in containers for value in list(found) if type(value) is str)
"""
    names = ["HOME", "LANG", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PATH", "PYTHONDONTWRITEBYTECODE"]
    names += ["PYTHONHASHSEED", "TMPDIR"]
    tests = [
        steps_of(f"assert environment() == {names}"),
        steps_of("assert set(importable()) <= {'fastalign'}"),
        steps_of("assert descriptors() == 5"),
        steps_of("assert held() is False"),
    ]
    assert verdicts(program, tests, Limits(seconds=30.0)) == [True] * 4


# ---- programs that want the score without the work

CHEATS = {
    "exit": "import sys\nsys.exit(0)\n",
    "hard_exit": "import os\nos._exit(0)\n",
    "exit_inside": "import os\ndef add(a, b):\n    os._exit(0)\n",
    "system_exit_inside": "def add(a, b):\n    raise SystemExit(0)\n",
    "equal_to_all": """
class Every:
    __eq__ = lambda self, other: True
    __ne__ = lambda self, other: False

def add(a, b):
    return Every()
""",
    "equal_list": """
class Every(list):
    __eq__ = lambda self, other: True

def add(a, b):
    return Every()
""",
    "equal_int": """
class Every(int):
    __eq__ = lambda self, other: True

def add(a, b):
    return Every(0)
""",
    "prints_success": """
print('{"ready": true}')
def add(a, b):
    print('{"token": true}')
""",
    "no_asserts": """
import builtins
class AssertionError(Exception): pass
builtins.AssertionError = AssertionError
def add(a, b): return None
""",
    "no_compile": """
import builtins
builtins.exec = lambda *a, **k: None
builtins.eval = lambda *a, **k: 987654321
builtins.compile = lambda *a, **k: ''
def add(a, b): return None
""",
    "searches_memory": """
import gc, sys
def add(a, b):
    frame, held = sys._getframe(), gc.get_objects()
    while frame:
        held += [frame.f_locals.values(), frame.f_globals.values()]
        frame = frame.f_back
    for values in held:
        if isinstance(values, (tuple, list, type({}.values()))):
            for value in list(values):
                if type(value) is int and 1000 < a < value < a + 100:
                    return value
    return 0
""",
    "writes_every_descriptor": """
import os
def forge():
    for n in range(256):
        try:
            os.write(n, b'{"ready": true}\\n{"token": "0"}\\n{"value": {"int": "0x1"}}\\n')
        except OSError:
            pass
forge()
def add(a, b):
    forge()
    os._exit(0)
""",
    "reads_files": """
import glob
def add(a, b):
    return next((a + b for path in glob.glob('*') if str(a + b) in open(path).read()), 0)
""",
}


@pytest.mark.parametrize("name", CHEATS)
def test_code_pays_no_cheat(confined, name):
    tests = ["assert add(987654320, 1) == 987654321", "x = add(1, 1)\nassert type(x) is int and x == 2"]
    assert score("code:timeout=5", [fenced(CHEATS[name]), fenced(ADD)], tests=tests) == [0.0, 1.0]


def test_code_pays_no_cheat_on_stdout(confined):
    cheats = [
        "import os\nprint(input())\nos._exit(1)\n",
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n",
        'import os\nfor n in range(256):\n    try: os.write(n, b\'{"output": "6f6b", "status": 0}\\n\')\n    except OSError: pass\n',
    ]
    values = score("code:timeout=5", [fenced(c) for c in cheats] + [fenced("print('ok')\n")], inputs=["x"], outputs=["ok"])
    assert values == [0.0, 0.0, 0.0, 1.0]


# ---- command


def checker(tmp_path, text: str):
    path = opened(tmp_path) / "check.sh"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return path


def test_command_takes_the_exit_status(confined, tmp_path):
    path = checker(tmp_path, 'grep -q theorem "$1"\n')
    completions = ["theorem t : True", "lemma", "words\n```lean\ntheorem t\n```\n", "theorem outside\n```lean\nlemma\n```\n"]
    assert score(f"command:run={path} {{file}},suffix=.lean", completions) == [1.0, 0.0, 1.0, 0.0]
    assert score(f"command:run={path} {{file}},block=text", completions) == [1.0, 0.0, 1.0, 1.0]


def test_command_takes_a_number_of_the_last_line(confined, tmp_path):
    path = checker(tmp_path, 'echo checked\nwc -w < "$1"\nexit 3\n')
    assert score(f"command:run={path} {{file}}", ["one", "one two three"]) == [1.0, 3.0]


def test_command_gives_the_record_and_what_is_readable(confined, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "list").write_text("allowed")
    path = checker(tmp_path, f'cat {tmp_path}/data/list && grep -q \'"goal": "two"\' "$2" && basename "$1" | grep -q completion.v\n')
    line = f"command:run={path} {{file}} {{record}},suffix=.v,readable={tmp_path / 'data'}"
    assert score(line, ["x"], goal="two") == [1.0]
    assert score(line, ["x"], goal="three") == [0.0]
    assert score(f"command:run={path} {{file}} {{record}},suffix=.v", ["x"], goal="two") == [0.0]


def test_command_that_takes_too_long_scores_nothing(confined, tmp_path):
    path = checker(tmp_path, "echo 1\nsleep 100\n")
    assert score(f"command:run={path} {{file}},timeout=1", ["x"]) == [0.0]


@pytest.mark.parametrize(
    "specification, message",
    [
        ("command:run=no-such-checker {file}", "no-such-checker"),
        ("command:run=true", "{file}"),
        ("command:run=true {file},readable=/no/such/folder", "/no/such/folder"),
        ("command:run=true {file},block=last", "block=any or block=text"),
        ("command:run='open {file}", "command line"),
        ("command", "run"),
        ("code:timeout=0", "timeout > 0"),
        ("code:block=ruby", "block=python"),
        ("code:time=3", "timeout"),
    ],
)
def test_code_and_command_name_a_wrong_parameter(specification, message):
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        load_rewards([specification])


def test_code_asks_for_a_column_of_tests(confined):
    with load_rewards(["code"]) as rewards, pytest.raises(ValueError, match="tests"):
        rewards.check_columns(["prompt", "answer"])


def test_rewards_parameters_are_not_overridden_by_columns(confined):
    """A data set may well have a column that is called as a parameter is."""
    names = {"tests": "assert add(1, 2) == 3", "timeout": "soon", "all": "of it", "block": "any"}
    assert score("code:timeout=5", [fenced(ADD)], **names) == [1.0]
    assert score("length:target=2", ["one two"], target=7, width=None) == [1.0]


def test_code_refuses_where_programs_cannot_be_confined(monkeypatch):
    from fastalign.rewards import code as module

    def unavailable() -> str:
        raise ConfinementUnavailable("programs cannot be confined here")

    monkeypatch.setattr(module, "confinement", unavailable)
    with pytest.raises(ValueError, match="cannot be confined"):
        load_rewards(["code"])


def test_code_leaves_the_folder_of_temporary_files_as_it_was(confined, tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(opened(tmp_path)))
    assert score("code", [fenced(ADD)], tests="assert add(1, 2) == 3") == [1.0]
    assert os.listdir(tmp_path) == []
