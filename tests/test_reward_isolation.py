"""Users' reward functions may raise, hang, die, print or return nonsense: only the sample that did it is lost."""

import logging
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from fastalign.rewards import RewardSet, load_rewards
from fastalign.rewards.isolation import MAX_HUNG

ROOT = Path(__file__).parents[1]
NAN = math.nan

SOURCE = '''
import asyncio, os, subprocess, sys, time

state = {"calls": 0}

def log(name, completions):
    with open(os.environ["REWARD_LOG"], "a") as file:
        file.write(f"{name} {len(completions)}\\n")

def moody(prompts, completions, **columns):
    """Does what each completion tells it to."""
    log("moody", completions)
    scores = []
    for text in completions:
        if text == "raise": raise RuntimeError("no mood")
        if text == "exit": sys.exit(3)
        if text == "die": os._exit(3)
        if text == "hang": time.sleep(600)
        if text == "drop": continue
        scores.append(float(len(text)))
    return scores

def odd(completions, values):
    return values

def whole(completions):
    return 1.0

def array(completions):
    import numpy
    return numpy.arange(len(completions), dtype=numpy.float32)

def noisy(completions):
    print("to stdout"); os.write(1, b"raw\\n"); subprocess.run(["echo", "from a child"])
    return [float(len(sys.stdin.read())) for _ in completions]

async def patient(completions, **columns):
    state["calls"] += 1
    state.setdefault("lock", asyncio.Lock())
    async with state["lock"]:
        await asyncio.gather(*(asyncio.sleep(0.01) for _ in completions))
    return [state["calls"]] * len(completions)

def process(completions):
    return [os.getpid()] * len(completions)

def light(completions):
    return ["torch" in sys.modules or "transformers" in sys.modules] * len(completions)

def slow(completions):
    log("slow", completions)
    time.sleep(0.25 * len(completions))
    return [1.0] * len(completions)

def arguments(prompts, completions, completion_ids, level, **rest):
    assert completion_ids == [[1], [2]] and sorted(rest) == ["other"] and level == [3, 4]
    return [float(isinstance(p, list) and c == [{"role": "assistant", "content": "x"}]) for p, c in zip(prompts, completions)]

class Scorer:
    def __call__(self, completions, **columns):
        return [os.getpid()] * len(completions)

constant = 3
'''


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "my_rewards_for_tests.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """How the functions were called: their log as a function."""
    log = tmp_path / "calls"
    monkeypatch.setenv("REWARD_LOG", str(log))
    return lambda: log.read_text().split("\n")[:-1]


def score(rewards: RewardSet, completions: list, **columns) -> list[float]:
    (values,) = rewards.score([f"prompt {i}" for i in range(len(completions))], completions, None, columns).values()
    return values


def same(values: list[float], expected: list[float]) -> bool:
    return len(values) == len(expected) and all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(values, expected, strict=True))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_gone(pid: int, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def test_good_batch_is_one_call(source, calls):
    with load_rewards([f"{source}:moody"]) as rewards:
        assert rewards.names == ["moody"]
        assert score(rewards, ["a", "bb", "ccc"]) == [1.0, 2.0, 3.0]
        assert calls() == ["moody 3"]


def test_bad_samples_alone_are_lost_and_named_with_their_prompts(source, calls, caplog):
    texts = ["a", "raise", "bb", "die", "drop", "exit", "ccc", "hang"]
    with load_rewards([f"{source}:moody"], timeout=1.0) as rewards:
        assert same(score(rewards, texts), [1.0, NAN, 2.0, NAN, NAN, NAN, 3.0, NAN])
        assert score(rewards, ["a", "bb"]) == [1.0, 2.0], "and the next batch is as if nothing had been"
    lost = {r.getMessage() for r in caplog.records if r.levelno == logging.WARNING}
    reasons = {
        1: "RuntimeError: no mood (",
        3: "its process died with exit code 3",
        4: "expected one number a completion, 1, got 0",
        5: "SystemExit: 3",
        7: "no answer within 1 s",
    }
    (told,) = (m for m in lost if "a call with 8 samples failed, and is repeated in halves" in m)
    assert len(lost) == len(reasons) + 1, told
    for i, reason in reasons.items():
        assert any(f"reward 'moody': sample {i} has no reward: {reason}" in m and m.endswith(f"; prompt: 'prompt {i}'") for m in lost), i


def test_one_error_among_many_costs_few_calls(source, calls):
    texts = ["a"] * 32
    texts[11] = "raise"
    with load_rewards([f"{source}:moody"]) as rewards:
        assert same(score(rewards, texts), [NAN if t == "raise" else 1.0 for t in texts])
    assert len(calls()) == 1 + 2 * 5, "halving: two calls a level"


def test_function_that_always_hangs_does_not_hold_up_the_run(source, calls, caplog):
    began = time.monotonic()
    with load_rewards([f"{source}:moody"], timeout=0.2) as rewards:
        assert all(map(math.isnan, score(rewards, ["hang"] * 40)))
    assert time.monotonic() - began < 0.2 * (MAX_HUNG + 1) + 10
    assert len(calls()) <= MAX_HUNG + 1
    assert "not called: 8 samples of its batch ran past 0.2 s before it" in caplog.text


def test_slow_batch_gets_the_time_that_it_was_seen_to_need(source, calls, caplog):
    with load_rewards([f"{source}:slow"], timeout=0.9) as rewards:
        assert score(rewards, ["a"] * 4) == [1.0] * 4
        assert score(rewards, ["a"] * 4) == [1.0] * 4
    assert calls() == ["slow 4"] + ["slow 1"] * 4 + ["slow 4"]
    assert "4 samples together ran past 0.9 s, though none of them did alone" in caplog.text


def test_values_are_converted_strictly(source, caplog):
    values = [1, True, 0.5, None, NAN, math.inf, "1.0", [1.0], 10**400]
    with load_rewards([f"{source}:odd"]) as rewards:
        assert same(score(rewards, ["c"] * len(values), values=values), [1.0, 1.0, 0.5, NAN, NAN, NAN, NAN, NAN, NAN])
    assert "sample 5 has no reward: expected a finite number or None, got inf" in caplog.text
    assert "sample 6 has no reward: expected a number or None, got str '1.0'" in caplog.text
    assert "sample 7 has no reward: expected a number or None, got list" in caplog.text
    assert "sample 8 has no reward: expected a finite number or None, got a number over the float range" in caplog.text
    assert "sample 3 has" not in caplog.text
    assert "sample 4 has" not in caplog.text, "None and NaN say that there is no reward; they are no error"


def test_arrays_are_lists_and_a_single_number_is_none(source, caplog):
    with load_rewards([f"{source}:array", f"{source}:whole"]) as rewards:
        scores = rewards.score(["p"] * 3, ["c"] * 3)
        assert scores["array"] == [0.0, 1.0, 2.0]
        assert all(map(math.isnan, scores["whole"]))
    assert "reward 'whole': 3 samples have no reward: expected a list of 3 numbers, got float" in caplog.text


def test_a_list_of_the_wrong_length_costs_all_samples(source, calls, caplog):
    """In halves a function that returns one number, whatever it is given, would seem to be right in the end."""
    with load_rewards([f"{source}:moody"]) as rewards:
        assert all(map(math.isnan, score(rewards, ["a", "drop", "bb", "ccc"])))
    assert "reward 'moody': 4 samples have no reward: expected one number a completion, 4, got 3" in caplog.text
    assert len(calls()) == 1


def test_printing_and_reading_do_not_touch_the_protocol(source, capfd):
    with load_rewards([f"{source}:noisy"]) as rewards:
        assert score(rewards, ["a", "b"]) == [0.0, 0.0]
        assert score(rewards, ["a"]) == [0.0]
    out, err = capfd.readouterr()
    assert out == ""
    assert all(text in err for text in ("to stdout", "raw", "from a child"))


def test_async_functions_keep_their_loop(source):
    with load_rewards([f"{source}:patient"]) as rewards:
        assert [score(rewards, ["a"] * 3) for _ in range(2)] == [[1.0] * 3, [2.0] * 3]


def test_function_gets_the_arguments_that_it_names(source):
    with load_rewards([f"{source}:arguments"]) as rewards:
        chat = [{"role": "user", "content": "q"}]
        scores = rewards.score(["p", chat], ["x", "x"], [[1], [2]], {"level": [3, 4], "other": [5, 6]})
        assert scores == {"arguments": [0.0, 1.0]}
        with pytest.raises(
            ValueError, match=r"expected a column 'level', got columns \['levels'\]; rename with --dataset_map levels=level"
        ):
            rewards.score(["p"], ["x"], [[1]], {"levels": [3]})


def test_workers_are_light_persistent_and_end_with_the_set(source, monkeypatch):
    monkeypatch.syspath_prepend(str(source.parent))
    import my_rewards_for_tests

    with load_rewards([f"{source}:light", "my_rewards_for_tests:process", my_rewards_for_tests.Scorer()]) as rewards:
        assert rewards.names == ["light", "process", "Scorer"]
        first, second = (rewards.score(["p"], ["c"]) for _ in range(2))
        assert first == second
        assert first["light"] == [0.0]
        pids = {int(first["process"][0]), int(first["Scorer"][0])}
        assert os.getpid() not in pids
        assert len(pids) == 2
    assert all(wait_gone(pid) for pid in pids)
    assert math.isnan(rewards.score(["p"], ["c"])["process"][0]), "closed: no reward, and nothing starts again"


def test_worker_that_is_killed_between_calls_starts_again(source):
    with load_rewards([f"{source}:process"]) as rewards:
        pid = int(score(rewards, ["a"])[0])
        os.kill(pid, signal.SIGKILL)
        assert wait_gone(pid)
        again = score(rewards, ["a"])[0]
        assert again > 0
        assert again != pid


def test_worker_that_dies_unseen_between_calls_costs_no_reward(source, monkeypatch):
    with load_rewards([f"{source}:process"]) as rewards:
        pid = int(score(rewards, ["a"])[0])
        process = rewards._rewards[0].isolated.caller._workers[0]._process
        os.kill(pid, signal.SIGKILL)
        assert wait_gone(pid)
        monkeypatch.setattr(process, "poll", lambda: None)  # a process is a zombie before `waitpid` has it
        again = score(rewards, ["a"])[0]
        assert again > 0
        assert again != pid


def test_interrupted_call_does_not_answer_the_next(source, calls):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a script it is ignored
    with load_rewards([f"{source}:moody"], timeout=30.0) as rewards:
        assert score(rewards, ["a"]) == [1.0]
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            score(rewards, ["hang"])
        assert score(rewards, ["bb", "ccc"]) == [2.0, 3.0]
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "hanging"])
def test_workers_die_with_a_killed_parent(source, tmp_path, busy):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, signal, sys, threading
        sys.path.insert(0, {str(ROOT)!r})
        from fastalign.rewards import load_rewards
        rewards = load_rewards([{f"{source}:process"!r}, {f"{source}:moody"!r}], timeout=60)
        print(rewards._rewards[1].isolated.caller._workers[0]._process.pid, flush=True)
        if {busy}:
            threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
            rewards.score(["p"], ["hang"])
        os.kill(os.getpid(), signal.SIGKILL)
        """)
    )
    environment = {**os.environ, "REWARD_LOG": str(tmp_path / "log")}
    result = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment, timeout=60)
    assert result.returncode == -signal.SIGKILL
    assert wait_gone(int(result.stdout))


def test_closures_run_in_a_thread_with_the_same_care(caplog):
    caplog.set_level(logging.INFO, "fastalign")
    seen = []

    def closure(completions, **columns):
        seen.append(len(completions))
        if "hang" in completions:
            time.sleep(3)
        if "exit" in completions:
            sys.exit(1)
        return [1.0] * len(completions)

    with load_rewards([closure, lambda completions, **columns: [0.5] * len(completions)], timeout=0.5) as rewards:
        scores = rewards.score(["p"] * 3, ["a", "hang", "exit"])
        assert same(scores["closure"], [1.0, NAN, NAN])
        assert scores["<lambda>"] == [0.5] * 3
    assert seen[0] == 3
    assert "reward 'closure': no other process can import it, so it runs in a thread" in caplog.text


def test_builtin_that_backtracks_for_ever_is_killed():
    """The pattern is exponential, and the regular expression engine never lets go of the interpreter meanwhile."""
    with load_rewards(["regex:pattern=(a+)+b"], timeout=1.0) as rewards:
        assert same(score(rewards, ["aab", "a" * 60, "c"]), [1.0, NAN, 0.0])


def test_math_runs_apart_and_shares_the_batch_among_workers():
    with load_rewards(["math"], timeout=60.0) as rewards:
        texts = [rf"\boxed{{{i}}}" for i in range(40)]
        assert score(rewards, texts, answer=[str(i - i % 2) for i in range(40)]) == [1.0, 0.0] * 20


@pytest.mark.parametrize(
    "attribute, message",
    [
        ("mody", r"has no function 'mody'; did you mean 'moody'\?"),
        ("constant", "'constant' of .* is a int, expected a function"),
        ("Scorer.nothing", r"has no function 'Scorer\.nothing'"),
    ],
)
def test_functions_that_are_not_there_fail_at_load(source, attribute, message):
    with pytest.raises(ValueError, match=message):
        load_rewards([f"{source}:{attribute}"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("def f(:\n", "SyntaxError"),
        ("import no_such_module_here\n", "ModuleNotFoundError"),
        ("import os; os._exit(4)\n", "died with exit code 4"),
    ],
)
def test_files_that_cannot_be_loaded_fail_at_load(tmp_path, text, message):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_rewards([f"{path}:f"])
