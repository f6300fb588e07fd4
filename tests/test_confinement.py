"""What a confined program tries, and what comes of it: each attack runs for real, next to this very process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from open_folders import opened

from fastalign.rewards import confinement, nursery
from fastalign.rewards.confinement import ConfinementUnavailable, Limits, Outcome, probe, run_command, run_python

CONFINEMENT = confinement.confinement  # the tests of one way put that way in its place
WAYS = ("root", "uid") if os.geteuid() == 0 else ("user",)
SMALL = Limits(seconds=5.0, memory_mb=256, disk_mb=8, processes=16, output_bytes=1 << 16)


@pytest.fixture(params=WAYS, scope="module")
def way(request):
    """One way to confine programs, where it works here."""
    try:
        breaches = probe(request.param)
    except ConfinementUnavailable as error:
        pytest.skip(f"no sandbox of the kind {request.param!r} here: {error}")
    assert breaches == []
    patch = pytest.MonkeyPatch()
    patch.setattr(confinement, "confinement", lambda: request.param)
    yield request.param
    patch.undo()


def run(source: str, limits: Limits = SMALL, stdin: str = "") -> Outcome:
    """The program, with `attempt(f)`, which prints what a call gave or the error that it met."""
    prelude = (
        "import os, sys, time\n"
        "def attempt(f):\n"
        "    try:\n        print('done', f())\n"
        "    except Exception as error:\n        print(type(error).__name__, getattr(error, 'errno', None) or '')\n"
    )
    return run_python(prelude + source, stdin=stdin, limits=limits)


def processes_with(mark: str) -> list[int]:
    """Processes of this machine, whoever owns them, whose command line holds the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_confinement_runs_a_program_as_python_does(way):
    outcome = run("import json\nprint(json.dumps(input()), __name__, sys.argv)\nsys.exit(3)", stdin="αβ\nrest")
    assert outcome.stdout == "\"\\u03b1\\u03b2\" __main__ ['program.py']\n"
    assert (outcome.returncode, outcome.exceeded, outcome.timed_out) == (3, "", False)


def test_confinement_shows_the_program_its_own_traceback(way):
    outcome = run_python("def f():\n    return 1 / 0\nf()\n", limits=SMALL)
    assert outcome.returncode == 1
    assert outcome.stderr.startswith('Traceback (most recent call last):\n  File "program.py", line 3, in <module>')
    assert outcome.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_confinement_tells_the_signal_that_ended_a_program(way):
    assert run("os.kill(os.getpid(), 11)").returncode == -signal.SIGSEGV


def test_confinement_finds_the_packages_of_this_interpreter(way):
    outcome = run("import numpy\nprint(numpy.arange(4).sum())", Limits(seconds=60.0))
    assert outcome.stdout == "6\n", outcome.stderr


def test_confinement_gives_none_of_the_environment(way, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    outcome = run("print(sorted(os.environ), 'hunter2' in str(os.environ))")
    assert "SECRET_TOKEN" not in outcome.stdout
    assert outcome.stdout.endswith("False\n")


@pytest.mark.parametrize("what", ["environ", "mem", "maps", "cmdline", "root/etc/passwd", "fd"])
def test_confinement_hides_its_parent(way, what):
    read = "os.listdir" if what == "fd" else "lambda path: len(open(path, 'rb').read(8))"
    mine = f"/proc/{os.getpid()}/{what}"
    before = run(f"attempt(lambda: ({read})({mine!r}))").stdout
    assert before.split()[0] in ("FileNotFoundError", "PermissionError"), before


def test_confinement_shows_no_process_but_its_own(way):
    outcome = run("attempt(lambda: sorted(int(p) for p in os.listdir('/proc') if p.isdigit()))")
    assert outcome.stdout in ("done [1, 2]\n", "PermissionError 13\n")


def test_confinement_reads_and_writes_nothing_outside_its_folder(way, tmp_path):
    secret = opened(tmp_path) / "secret"  # so that only the sandbox stands between the program and the file
    secret.write_text("gold")
    secret.chmod(0o666)
    source = f"""
attempt(lambda: open({str(secret)!r}).read())
attempt(lambda: os.listdir({str(tmp_path)!r}))
attempt(lambda: open({str(secret)!r}, 'w').write('x'))
attempt(lambda: open({str(tmp_path / "new")!r}, 'w').write('x'))
attempt(lambda: os.chmod({str(secret)!r}, 0))
attempt(lambda: os.rename({str(secret)!r}, {str(tmp_path / "moved")!r}))
attempt(lambda: os.symlink('/etc', {str(tmp_path / "link")!r}))
attempt(lambda: open({sys.executable!r}, 'ab').write(b'x'))
attempt(lambda: open('/usr/new', 'w'))
attempt(lambda: open('/new', 'w'))
attempt(lambda: open('/etc/shadow').read())
"""
    lines = run(source).stdout.splitlines()
    assert len(lines) == 11
    assert not [line for line in lines if line.startswith("done")], lines
    assert secret.read_text() == "gold"
    assert secret.stat().st_mode & 0o777 == 0o666
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_confinement_leaves_no_trace_of_its_folder(way):
    first = run("open('kept', 'w').write('x'); print(os.getcwd(), sorted(os.listdir()))")
    folder, names = first.stdout.split(" ", 1)
    assert "'kept', 'program.py'" in names
    assert run("print(sorted(os.listdir()))").stdout == "['program.py']\n"
    assert not Path(folder, "kept").exists()


def test_confinement_has_no_network(way):
    source = """
import socket
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
        attempt(lambda: socket.socket(family, kind))
attempt(lambda: socket.create_connection(('127.0.0.1', 80), 1))
a, b = socket.socketpair()
a.send(b'inside')
print(b.recv(6))
"""
    lines = run(source).stdout.splitlines()
    assert len(lines) == 17
    assert not [line for line in lines if line.startswith("done")], lines
    assert lines[-1] == "b'inside'"


def test_confinement_refuses_the_kernel_entrances(way):
    source = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def call(f, *arguments):
    ctypes.set_errno(0)
    return f(*arguments) >= 0 or ctypes.get_errno()
print(call(libc.unshare, 0x10000000), call(libc.unshare, 0x20000), call(libc.setns, 0, 0))
print(call(libc.mount, b'tmpfs', b'.', b'tmpfs', 0, None), call(libc.chroot, b'.'), call(libc.ptrace, 0, 0, 0, 0))
print(call(libc.syscall, 425, 1, None), call(libc.shmget, 0, 4096, 0o1777), call(libc.setuid, 0), call(libc.setgid, 0))
print(call(libc.syscall, 56 if os.uname().machine == 'x86_64' else 220, 0x10000011, 0, 0, 0, 0), call(libc.syscall, 435, None, 0))
"""
    words = run(source).stdout.split()
    assert len(words) == 12
    assert "True" not in words, words


def test_confinement_survives_a_fork_bomb(way):
    began = time.monotonic()
    outcome = run("while True:\n    try:\n        os.fork()\n    except OSError:\n        pass", Limits(seconds=1.0, processes=16))
    assert outcome.timed_out
    assert time.monotonic() - began < 30
    assert run("print('next')").stdout == "next\n"


def test_confinement_counts_processes(way):
    source = """
children = []
try:
    for _ in range(200):
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
        children.append(pid)
except OSError as error:
    print(error.errno, len(children))
"""
    outcome = run(source)
    errno, count = map(int, outcome.stdout.split())
    assert errno == 11
    assert 8 <= count <= 20


def test_confinement_ends_an_endless_loop(way):
    outcome = run("print('begun', flush=True)\nwhile True: pass", Limits(seconds=0.5))
    assert outcome.timed_out
    assert (outcome.stdout, outcome.returncode) == ("begun\n", None)


def test_confinement_ends_a_sleeper_that_ignores_signals(way):
    source = "import signal\nfor n in range(1, 32):\n    if n not in (9, 19): signal.signal(n, signal.SIG_IGN)\ntime.sleep(600)"
    assert run(source, Limits(seconds=0.5)).timed_out


def test_confinement_refuses_ten_gigabytes(way):
    outcome = run("try:\n    x = bytearray(10 << 30)\nexcept MemoryError:\n    print('refused')")
    assert outcome.stdout == "refused\n"


def test_confinement_bounds_the_memory_of_all_processes(way):
    source = """
for _ in range(8):
    if os.fork() == 0:
        hog = bytearray(os.urandom(1 << 20)) * 100
        time.sleep(60)
time.sleep(60)
"""
    outcome = run(source, Limits(seconds=20.0, memory_mb=256))
    assert outcome.exceeded == "memory"


def test_confinement_bounds_the_disk(way):
    source = """
for i in range(64):
    with open(f'file{i}', 'wb') as file:
        for _ in range(4):
            file.write(b'x' * (1 << 20))
            file.flush()
print('filled')
"""
    outcome = run(source, Limits(seconds=20.0, disk_mb=8))
    assert outcome.stdout == ""
    assert outcome.exceeded == "disk" or "No space left" in outcome.stderr


def test_confinement_bounds_one_file(way):
    source = "import signal\nwith open('big', 'wb') as file:\n    file.seek(1 << 30)\n    file.write(b'x')"
    outcome = run(source)
    assert outcome.returncode not in (0, None)


def test_confinement_ends_one_that_prints_without_end(way):
    began = time.monotonic()
    outcome = run("while True:\n    os.write(1, b'x' * 65536)", Limits(seconds=30.0, output_bytes=1 << 20))
    assert outcome.exceeded == "output"
    assert len(outcome.stdout) == 1 << 20
    assert time.monotonic() - began < 25


def daemon_of(mark: str) -> str:
    """A program that leaves a daemon behind, in a session of its own and without its descriptors, and says when that runs."""
    body = f"open('up', 'w').close(); import time; time.sleep(300) # {mark}"
    return f"""
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 3)
        os.execv({sys.executable!r}, [{sys.executable!r}, '-I', '-S', '-c', {body!r}])
    os._exit(0)
while not os.path.exists('up'):
    time.sleep(0.01)
print('up', flush=True)
"""


def test_confinement_ends_a_daemon_that_outlives_its_program(way):
    mark = f"daemon-{os.urandom(8).hex()}"
    began = time.monotonic()
    outcome = run(daemon_of(mark), Limits(seconds=60.0))
    assert (outcome.stdout, outcome.returncode) == ("up\n", 0)
    assert time.monotonic() - began < 100
    assert processes_with(mark) == []


def test_confinement_ends_a_daemon_that_outlives_a_timeout(way):
    mark = f"daemon-{os.urandom(8).hex()}"
    outcome = run(daemon_of(mark) + "time.sleep(300)", Limits(seconds=3.0))
    assert outcome.timed_out
    assert outcome.stdout == "up\n"
    assert processes_with(mark) == []


def test_confinement_survives_one_that_kills_what_it_can(way):
    source = f"""
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for kill, target in ((os.kill, {os.getpid()}), (os.killpg, {os.getpgrp()}), (os.kill, os.getppid()), (os.kill, 1)):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        if target != os.getpid() and target > 0:
            attempt(lambda: kill(target, number))
print('alive', flush=True)
os.kill(-1, signal.SIGKILL)
os.kill(0, signal.SIGKILL)
"""
    outcome = run(source)
    assert "alive" in outcome.stdout or outcome.returncode is not None
    assert run("print('next')").stdout == "next\n"


def test_confinement_ends_with_the_process_that_asked_for_it(way, tmp_path):
    """A parent that is killed takes the program along, and what the program left behind."""
    mark = f"daemon-{os.urandom(8).hex()}"
    program = "import os, time\n" + daemon_of(mark) + "time.sleep(300)"
    script = (
        f"from fastalign.rewards import confinement\nconfinement.confinement = lambda: {way!r}\n"
        f"confinement.run_python({program!r}, limits=confinement.Limits(seconds=300.0))\n"
    )
    where = {**os.environ, "TMPDIR": str(opened(tmp_path))}
    parent = subprocess.Popen([sys.executable, "-"], stdin=subprocess.PIPE, cwd=Path(__file__).parent.parent, env=where)
    assert parent.stdin is not None
    parent.stdin.write(script.encode())  # not an argument: its command line must not hold the mark
    parent.stdin.close()
    try:
        wait_until(lambda: processes_with(mark))
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not processes_with(mark) and not list(tmp_path.iterdir()))


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.05)


def test_confinement_runs_many_at_once(way):
    outcomes: list[str] = [""] * 8

    def one(i: int) -> None:
        outcomes[i] = run(f"time.sleep(0.1)\nprint({i} * 2)").stdout

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [f"{2 * i}\n" for i in range(8)]


def test_confinement_leaks_neither_descriptors_nor_processes(way):
    run("pass")
    before, running = len(os.listdir("/proc/self/fd")), len(processes_with("enter.py"))
    for _ in range(3):
        run("print(1)")
        run("while True: pass", Limits(seconds=0.2))
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(processes_with("enter.py")) == running


def test_confinement_survives_the_end_of_its_nursery(way):
    run("pass")
    nursery._nursery._process.kill()
    nursery._nursery._process.wait()
    assert run("print('next')").stdout == "next\n"


def test_confinement_works_in_a_forked_process(way):
    run("pass")
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(send, run("print('forked')").stdout.encode())
        finally:
            os._exit(0)
    os.close(send)
    assert os.read(receive, 100) == b"forked\n"
    os.waitpid(child, 0)
    os.close(receive)
    assert run("print('next')").stdout == "next\n"


def test_confinement_passes_no_descriptor_on(way, tmp_path):
    source = """
for number in range(3, 256):
    try:
        os.fstat(number)
        print('open', number)
    except OSError:
        pass
"""
    with open(tmp_path / "open", "w") as file:
        os.set_inheritable(file.fileno(), True)
        assert run(source).stdout == ""


def test_confinement_feeds_more_stdin_than_a_pipe_holds(way):
    text = "line of text\n" * 100_000
    assert run("print(len(sys.stdin.read()))", stdin=text).stdout == f"{len(text)}\n"
    assert run("print('unread')", stdin=text).stdout == "unread\n"


def test_confinement_runs_a_command_with_its_file(way):
    outcome = run_command(["sh", "-c", "cat given.txt; touch made && ls; exit 7"], files={"given.txt": "words\n"}, limits=SMALL)
    assert outcome.stdout == "words\ngiven.txt\nmade\n"
    assert outcome.returncode == 7


def test_confinement_reads_what_a_command_was_given(way, tmp_path):
    for name in ("given", "kept"):
        (opened(tmp_path) / name).write_text(name)
    outcome = run_command(["cat", str(tmp_path / "given"), str(tmp_path / "kept")], readable=[str(tmp_path / "given")], limits=SMALL)
    assert outcome.stdout == "given"
    assert outcome.returncode == 1


def test_confinement_names_a_program_that_is_not_there(way):
    with pytest.raises(ValueError, match="no-such-checker"):
        run_command(["no-such-checker"])


def test_confinement_refuses_where_nothing_holds(monkeypatch):
    """A sandbox that leaks is no sandbox: the probe's findings and the remedy are in the error, and nothing runs."""
    monkeypatch.setattr(confinement, "probe", lambda way: ["it reaches the network"])
    monkeypatch.setattr(confinement, "confinement", CONFINEMENT.__wrapped__)  # without its cache
    with pytest.raises(ConfinementUnavailable, match=r"it reaches the network.*user namespaces"):
        run_python("print(1)")


def test_confinement_probe_finds_an_open_door():
    """The probe itself, run without a sandbox: it must see what it looks for."""
    import hashlib
    import json
    import socket

    script = Path(confinement.__file__).with_name("jail") / "probe.py"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        facts = {
            "pid": os.getpid(), "port": listener.getsockname()[1], "secret": __file__, "outside": os.devnull,
            "environment": hashlib.sha256(Path("/proc/self/environ").read_bytes()).hexdigest(),
        }  # fmt: skip
        done = subprocess.run([sys.executable, str(script)], input=json.dumps(facts), capture_output=True, text=True)
    found = done.stdout.splitlines()
    assert found[-1] == "end"
    expected = {"it reaches the network", "it sends datagrams", "it reads files that are not its own", "it writes outside its folder"}
    expected |= {"it reads the environment of the process that started it"}
    assert expected <= set(found)
