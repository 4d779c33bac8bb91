"""The sandbox, attacked: one property a test. The standard library and pytest are all this file needs.

Every attack is made with all walls, and with those of a container that gives no namespaces, as far as the kernel here
gives them; what it does not give is skipped. The last test makes all of them again as an ordinary user, where this one
is root.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo.errors import RunError
from grpo.rewards.sandbox import host as sandbox
from grpo.rewards.sandbox.host import ALL_WALLS, Job, Limits, Verdict
from grpo.rewards.sandbox.jail import inside, kernel

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 1.0
SECRET = "a-secret-that-nobody-must-see"
WITHOUT_NAMESPACES = ("landlock", "seccomp")


def kernel_does(what: str) -> bool:
    """Found without any of the sandbox's own code, in a process of its own."""
    code = f"import ctypes\nlibc = ctypes.CDLL(None)\nassert {what}"
    return subprocess.run([sys.executable, "-S", "-c", code], stderr=subprocess.DEVNULL).returncode == 0


HAS_NAMESPACES = kernel_does(  # mount, process, network and others; of an ordinary user, a user namespace as well
    "0 in (libc.unshare(0x6C020000), libc.unshare(0x7C020000)) and libc.mount(b'none', b'/', b'', 0x44000, None) == 0"
)
HAS_LANDLOCK = kernel_does("libc.syscall(444, None, 0, 1) >= 3")
needs_namespaces = pytest.mark.skipif(not HAS_NAMESPACES, reason="the kernel gives no namespaces")
needs_landlock = pytest.mark.skipif(not HAS_LANDLOCK, reason="the kernel has no Landlock, or an old one")


@pytest.fixture(
    params=[
        pytest.param(ALL_WALLS, id="all walls"),
        pytest.param(WITHOUT_NAMESPACES, id="no namespaces", marks=pytest.mark.slow),
    ]
)
def walls(request: pytest.FixtureRequest) -> tuple[str, ...]:
    if not (HAS_LANDLOCK or (HAS_NAMESPACES and "namespaces" in request.param)):
        pytest.skip("the kernel gives nothing to shut a program in with")
    return request.param


def attack(program: str, walls: tuple[str, ...], *tests: str, **limits: Any) -> Verdict:
    """The verdict on one program; without tests it is a script."""
    own = Limits(**({"seconds": SECONDS} | limits))
    [verdict] = sandbox.run([Job(program, tests or None)], own, walls=walls)
    return verdict


def output(program: str, walls: tuple[str, ...], **limits: Any) -> str:
    """What a script prints that ends as it should."""
    verdict = attack(program, walls, **limits)
    assert verdict.why == ""
    return verdict.output.strip()


def processes(parent: int | None = None) -> set[int]:
    """Every process of the sandboxes that `parent` (this process) has asked for, supervisors among them."""
    found, mark = set(), f"grpo.rewards.sandbox.jail\0of-{parent or os.getpid()}\0".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
        except OSError:
            pass
    return found


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """After every attack: no process, no open file, nothing in the folder for temporary files."""

    def left() -> tuple[set[int], int, list[str]]:
        folders = [name for name in os.listdir(tempfile.gettempdir()) if name.startswith(f"grpo-{os.getpid()}-")]
        return processes(), len(os.listdir("/proc/self/fd")), folders

    before = left()
    yield
    assert left() == before
    assert before[0] == set()
    assert before[2] == []


# What it is for


def test_the_walls_are_there() -> None:
    """Where one is missing that the kernel gives the attacks below would be made on less than they say."""
    given = {"namespaces": HAS_NAMESPACES, "landlock": HAS_LANDLOCK, "seccomp": True}
    first, *others = sandbox._answers(request(), patience=10)
    assert first["missing"].keys() == {name for name, is_given in given.items() if not is_given}
    assert others == []


def request(**changes: Any) -> dict[str, Any]:
    cell = {"namespaces": True, "landlock": True, "seccomp": True, "shown": list(sandbox._shown_folders()),
            "work": "/there/is/no/such/folder", "seconds": 1.0, "memory": 1 << 28, "file": 1 << 20, "output": 1 << 20}  # fmt: skip
    return {"cell": cell | changes, "file": 0, "jobs": [], "parallel": 1}


def test_a_right_program_passes_and_a_wrong_one_does_not(walls: tuple[str, ...]) -> None:
    tests = ("assert add(2, 3) == 5", "assert add('a', 'b') == 'ab'", "assert add(-1, 1) == 0")
    assert attack("def add(a, b): return a + b", walls, *tests) == Verdict((True, True, True), "", "")
    half = attack("def add(a, b): return abs(a) + abs(b) if isinstance(a, int) else a + b", walls, *tests)
    assert half.passed == (True, True, False)
    assert half.why == "AssertionError"


def test_a_script_reads_and_writes(walls: tuple[str, ...]) -> None:
    [verdict] = sandbox.run([Job("print(sum(map(int, input().split())))", stdin="1 2 39\n")], walls=walls)
    assert verdict == Verdict((True,), "42\n", "")
    assert attack("import sys; print('x'); sys.exit(3)", walls) == Verdict((False,), "x\n", "ended with status 3")
    assert attack("raise SystemExit", walls).why == ""
    assert attack("1 / 0", walls).why == "ended with status 1"
    assert attack("if __name__ == '__main__': print('main')", walls).output == "main\n"


def test_solutions_may_import_the_standard_library(walls: tuple[str, ...]) -> None:
    names = "asyncio bz2 calendar collections csv ctypes dataclasses datetime decimal email enum fractions hashlib " \
        "heapq itertools json math queue random re sqlite3 statistics string struct textwrap typing unicodedata " \
        "uuid xml.etree.ElementTree zlib"  # fmt: skip
    program = f"import {', '.join(names.split())}\nprint(hashlib.md5(b'').hexdigest()[:4], math.pi)"
    assert output(program, walls, seconds=10) == "d41d 3.141592653589793"
    assert attack("import torch", walls).why == "ended with status 1"
    assert attack("import grpo.errors", walls).why == "ended with status 1"


def test_a_caller_whose_files_are_its_own_alone(walls: tuple[str, ...]) -> None:
    """What is made for the program must be open to it all the same."""
    before = os.umask(0o077)
    try:
        assert output("import csv\nopen('x', 'w').close()\nprint(csv.QUOTE_ALL)", walls) == "1"  # not loaded yet
    finally:
        os.umask(before)


def test_plain_data_goes_in_and_out(walls: tuple[str, ...]) -> None:
    program = "from collections import Counter, OrderedDict\ndef same(*x, **y): return x, y\n" \
        "def count(s): return Counter(s)\ndef fail(): raise KeyError('k')\nLIMIT = (7, float('inf'))\n" \
        "def twice(n): return n * 2\nclass Thing: pass\ndef thing(): return Thing()"  # fmt: skip
    tests = [
        "assert same(1, 2.5, 'x', b'y', None, True, 1j, k={(1, 2): {3}}) == "
        "((1, 2.5, 'x', b'y', None, True, 1j), {'k': {(1, 2): {3}}})",
        "assert type(same([frozenset([1])])[0][0][0]) is frozenset",
        "assert count('aab') == {'a': 2, 'b': 1}",
        "try:\n    fail()\nexcept KeyError as e:\n    assert e.args == ('k',)\nelse:\n    assert False",
        "assert LIMIT[0] == 7 and LIMIT[1] > 1e308",
        "def check(candidate):\n    assert candidate(4) == 8\ncheck(twice)",
        "import math\nassert math.isclose(twice(0.1), 0.2)",
        "assert [twice(i) for i in range(3)] == [0, 2, 4]",
    ]
    assert attack(program, walls, *tests) == Verdict((True,) * len(tests), "", "")
    assert attack(program, walls, "assert thing()").why == "TypeError"
    assert attack(program, walls, "assert nothing()").why == "NameError"


def test_integers_of_any_size_go_in_and_out(walls: tuple[str, ...]) -> None:
    program = "import math\ndef f(n): return math.factorial(n)\ndef same(n): return n"
    tests = (
        "import math\nassert f(5000) == math.factorial(5000)",
        "assert same(-10**6000) == -10**6000",
        "assert same(2**64) == 2**64",
    )
    assert attack(program, walls, *tests, seconds=5) == Verdict((True,) * 3, "", "")


@pytest.mark.parametrize(
    "answer", ["b'[' + b'0,' * 500_000 + b'0]'", "b'{\"a\":' * 90_000 + b'1' + b'}' * 90_000", "b'9' * 1_000_000"]
)
def test_what_a_program_answers_never_breaks_the_judge(answer: str, walls: tuple[str, ...]) -> None:
    """Its first word, before any test, and to a call: large, deep, or a number without end; with as little memory as can be."""
    say = f"import os\ndef say():\n    t = {answer}\n    t = len(t).to_bytes(4, 'big') + t\n    while t: t = t[os.write(3, t):]\n"
    for program in (say + "say()", say + "def f(n): say()"):
        assert attack(program, walls, "assert f(1) == 1", memory_mb=64, seconds=3).passed == (False,)


def test_a_test_that_writes_what_the_judge_would_say_hurts_nobody(walls: tuple[str, ...]) -> None:
    """Tests come from a data set. They may spoil their own verdict, and nothing else."""
    test = "import os\nfor n in range(3, 100):\n    try: os.write(n, b'garbage\\n[]\\n{\"process\": -1}\\n')\n" \
        "    except OSError: pass\nassert f(1) == 1"  # fmt: skip
    jobs = [Job("def f(n): return n", (test,)), Job("def f(n): return n", ("assert f(1) == 1",))]
    assert sandbox.run(jobs, Limits(seconds=2), walls=walls)[1].passed == (True,)


def test_what_does_not_run_fails_every_test(walls: tuple[str, ...]) -> None:
    for program, why in [("def f(:", "SyntaxError"), ("1 / 0\ndef f(): return 1", "ZeroDivisionError"), ("", "NameError"),
                         ("f = (" + "(" * 10_000, "SyntaxError"), ("\0", "")]:  # fmt: skip
        verdict = attack(program, walls, "assert f() == 1", "assert f() == 1")
        assert verdict.passed == (False, False)
        assert verdict.why.startswith(why)


def test_what_one_program_printed_is_nowhere_in_the_memory_of_the_next(walls: tuple[str, ...]) -> None:
    """The second of two siblings could print what the first one has found out."""
    search = """
import ctypes, gc
found = [o for o in gc.get_objects() if isinstance(o, (list, dict, tuple)) and any("forty-" + "two" in str(x) for x in list(o)[:50] if isinstance(x, (str, bytes)))]
objects = [vars(o) for o in gc.get_objects() if type(o).__name__ == "Running"]
print(any("forty-" + "two" in str(o) for o in objects), len([f for f in found if "forty-" + "two" in str(f)]) > 3)
"""
    verdicts = sandbox.run([Job("print('forty-two' * 100)"), Job(search)], Limits(seconds=5), walls=walls, parallel=1)
    assert verdicts[0].output.startswith("forty-two")
    assert verdicts[1].output.split()[0] == "False"


def test_hashing_is_the_same_every_time(walls: tuple[str, ...]) -> None:
    program = "print(list({'a', 'b', 'c', 'd', 'e', 'f'}), hash('x'))"
    assert len({output(program, walls) for _ in range(4)}) == 1


def test_nothing_of_one_program_is_seen_by_the_next(walls: tuple[str, ...]) -> None:
    write = (
        "import builtins, os\nopen('mark', 'w').write('x')\nbuiltins.mark = 1\nos.environ['mark'] = '1'\nprint('done')"
    )
    read = "import builtins, os\nprint(os.path.exists('mark'), hasattr(builtins, 'mark'), 'mark' in os.environ)"
    verdicts = sandbox.run([Job(write), Job(read)], walls=walls, parallel=1)
    assert [verdict.output.strip() for verdict in verdicts] == ["done", "False False False"]


# Time


@pytest.mark.parametrize(
    "program",
    [
        "import time; time.sleep(1000)",
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\n"
        "    except ValueError: pass\nwhile True: pass",
        pytest.param("while True: pass", marks=pytest.mark.slow),
        pytest.param(
            "import time\nwhile True:\n    try: time.sleep(100)\n    except BaseException: pass", marks=pytest.mark.slow
        ),
        pytest.param("9 ** 9 ** 9", marks=pytest.mark.slow),
        pytest.param(
            "def f():\n    while True:\n        try: f()\n        except BaseException: pass\nf()",
            marks=pytest.mark.slow,
        ),
        pytest.param("import re; re.fullmatch('(a+)+b', 'a' * 100)", marks=pytest.mark.slow),
    ],
)
def test_an_endless_loop_ends(program: str, walls: tuple[str, ...]) -> None:
    start = time.monotonic()
    jobs = [Job(program, stdin="\n"), Job(program, ("assert f(1) == 1",)), Job(f"def g(n):\n    {program!r}\n    exec({program!r})", ("assert g(1) == 1",))]  # fmt: skip
    verdicts = sandbox.run(jobs, Limits(seconds=SECONDS), walls=walls, parallel=3)
    assert time.monotonic() - start < SECONDS + 4  # three of them on two cores
    for verdict in verdicts[:2]:
        assert verdict.why in (
            "took too long",
            "ended with status -24",
            "the program ended",
            "ProgramError: took too long",
        )
    assert verdicts[1].passed == (False,)
    assert verdicts[2].passed == (False,)


def test_what_passed_before_the_time_was_up_counts(walls: tuple[str, ...]) -> None:
    program = "def f(n):\n    while n > 1: pass\n    return n"
    verdict = attack(program, walls, "assert f(1) == 1", "assert f(2) == 2", "assert f(0) == 0")
    assert verdict.passed == (True, False, False)
    assert verdict.why == "took too long"


@pytest.mark.parametrize(
    "test",
    [
        "while True:\n    try: assert f(2) == 1\n    except BaseException: pass",
        pytest.param("while True: assert f(1) == 1", marks=pytest.mark.slow),
        pytest.param("import time\nwhile True: time.sleep(1)", marks=pytest.mark.slow),
        pytest.param(
            "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_test_that_does_not_end_is_ended(test: str, walls: tuple[str, ...]) -> None:
    start = time.monotonic()
    verdict = attack("def f(n): return n", walls, "assert f(1) == 1", test, "assert f(1) == 1")
    assert verdict.passed == (True, False, False)
    assert "took too long" in verdict.why
    assert time.monotonic() - start < SECONDS + 4


# Memory, files, output, processes


def test_ten_gigabytes_cannot_be_had(walls: tuple[str, ...]) -> None:
    program = "try:\n    x = bytearray(10 << 30)\n    print('had')\nexcept MemoryError:\n    print('refused')"
    assert output(program, walls) == "refused"
    grow = "x = []\ntry:\n    while True: x.append(bytearray(1 << 20))\nexcept MemoryError:\n    n = len(x); x = None; print(n)"
    assert 100 < int(output(grow, walls, memory_mb=256, seconds=5)) < 256
    mapped = "import mmap\ntry:\n    mmap.mmap(-1, 10 << 30); print('had')\nexcept OSError:\n    print('refused')"
    assert output(mapped, walls) == "refused"


@pytest.mark.slow
def test_a_gigabyte_of_output_is_cut(walls: tuple[str, ...]) -> None:
    verdict = attack("while True: print('x' * 1000)", walls, output_kb=64, seconds=3)
    assert len(verdict.output) == 64 << 10
    assert verdict.why == "wrote too much"
    many = attack(
        "import sys\nfor _ in range(1000): sys.stderr.write('x' * 1_000_000)\nprint('done')", walls, seconds=10
    )
    assert many.output == "done\n"  # nobody keeps it
    calls = "def f():\n    for _ in range(1000): print('x' * 1_000_000)\n    return 1"
    assert attack(calls, walls, "assert f() == 1", seconds=10).passed == (True,)


def test_a_file_cannot_grow_without_end(walls: tuple[str, ...]) -> None:
    program = "import os\nf = open('big', 'wb')\ntry:\n    while True: f.write(b'x' * (1 << 20)); f.flush()\n" \
        "except OSError: print(os.path.getsize('big') >> 20)"  # fmt: skip
    assert 2 <= int(output(program, walls, file_mb=4)) <= 4
    memory = (
        "import os\ntry: os.memfd_create('x')\nexcept OSError: print('refused')"  # 64 of them would be no file's size
    )
    assert output(memory, walls) == "refused"


@needs_namespaces
def test_many_files_cannot_fill_the_memory() -> None:
    program = "n = 0\ntry:\n    for n in range(100_000):\n        with open(f'f{n}', 'wb') as f: f.write(b'x' * 100_000)\n" \
        "except OSError: print(n)"  # fmt: skip
    assert int(output(program, ALL_WALLS, file_mb=4, seconds=10)) < 50
    empty = program.replace("* 100_000", "* 0")
    assert int(output(empty, ALL_WALLS, seconds=10)) < 1000


def test_a_fork_bomb_does_not_go_off(walls: tuple[str, ...]) -> None:
    program = "import os\ntry:\n    while True: os.fork()\nexcept OSError as e:\n    print('refused')"
    assert output(program, walls) == "refused"
    for way in ("import multiprocessing as m\nm.Process(target=print).start()", "import subprocess\nsubprocess.run(['ls'])",
                "import os\nos.posix_spawn('/bin/sh', ['sh'], {})", "import threading\nthreading.Thread(target=print).start()",
                "import os\nos.execv('/bin/sh', ['sh'])", "import os\nassert os.system('true') == 0"):  # fmt: skip
        assert attack(way, walls).why.startswith("ended with status")


@pytest.mark.slow
def test_nobody_survives_by_forking_twice(walls: tuple[str, ...], tmp_path: Path) -> None:
    program = f"""
import os, time
try:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(2)
            open({str(tmp_path / "survived")!r}, "w")
except OSError:
    pass
def f(): return 1
"""
    assert attack(program, walls, "assert f() == 1").passed == (True,)
    time.sleep(2.5)
    assert not list(tmp_path.iterdir())


def test_descriptors_are_few(walls: tuple[str, ...]) -> None:
    program = "import os\nfiles = []\ntry:\n    while True: files.append(os.open('/dev/null', os.O_RDONLY))\n" \
        "except OSError: print(len(files))"  # fmt: skip
    assert int(output(program, walls)) < 64


# Files and environment


def test_nothing_outside_can_be_written(walls: tuple[str, ...], tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    victim = tmp_path / "victim"
    victim.write_text("whole")
    victim.chmod(0o666)
    library = Path(os.__file__)
    program = f"""
import os
path = {str(victim)!r}
for number, way in enumerate((
    lambda: open(path, "w"), lambda: os.remove(path), lambda: os.rename(path, path + "~"), lambda: os.chmod(path, 0),
    lambda: os.truncate(path, 0), lambda: os.link(path, path + "~"), lambda: os.symlink("x", path + "~"),
    lambda: os.utime(path), lambda: os.chown(path, os.getuid(), os.getgid()), lambda: os.setxattr(path, "user.x", b"x"),
    lambda: os.fchmod(os.open(path, os.O_PATH), 0), lambda: os.replace(path, "x"), lambda: os.link(path, "x"),
)):
    try:
        way()
        print("did it", number)
    except OSError:
        pass
for path in {[str(library), str(ROOT / "config.yaml"), "/etc/passwd"]!r}:
    try:
        os.open(path, os.O_WRONLY)  # touches nothing where it works
        print("did it", path)
    except OSError:
        pass
for folder in {[str(tmp_path), str(ROOT), str(library.parent), "/", "/usr", "/usr/lib", "/dev", "/dev/shm", "/var/tmp"]!r}:
    for way in (lambda path: open(path, "w"), os.mkdir, os.mkfifo):
        try:
            way(folder + "/grpo-test")
            print("did it", folder)
        except OSError:
            pass
print("tried")
"""
    assert output(program, walls) == "tried"
    assert victim.read_text() == "whole"
    assert victim.stat().st_mode & 0o777 == 0o666
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]


@needs_namespaces
def test_what_is_shown_is_read_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder that anybody may write to, shown to the program: only the mount says no."""
    tmp_path.chmod(0o777)
    shown = (*sandbox._shown_folders(), str(tmp_path))
    monkeypatch.setattr(sandbox, "_shown_folders", lambda: shown)
    program = f"import os\nprint(os.listdir({str(tmp_path)!r}))\ntry: open({str(tmp_path / 'x')!r}, 'w'); print('did it')\n" \
        "except OSError as error: print(error.strerror)"  # fmt: skip
    assert output(program, ALL_WALLS) == "[]\nRead-only file system"
    assert list(tmp_path.iterdir()) == []


def test_the_parents_files_cannot_be_read(walls: tuple[str, ...], tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o644)
    program = f"""
import os
for path in {[str(secret), "/etc/passwd", "/etc/hostname", str(ROOT / "config.yaml"), str(tmp_path)]!r}:
    for way in (lambda: open(path).read(), lambda: os.listdir(path), lambda: os.readlink(path)):
        try:
            print(way())
        except OSError:
            pass
"""
    assert output(program, walls) == ""
    work = "import os\nprint(os.listdir('.'), os.listdir(os.getcwd()))"
    assert output(work, walls) == "[] []"


def test_the_parents_environment_cannot_be_read(walls: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", SECRET)
    program = f"""
import ctypes, os
print(dict(os.environ))
libc = ctypes.CDLL(None)
libc.getenv.restype = ctypes.c_char_p
print(libc.getenv(b"A_KEY"))
end = "its own /dev/null"
for pid in ["self", 1, os.getppid(), {os.getpid()}, *range(1, 100)]:
    for name in ("environ", "cmdline", "mem", "maps", "fd/0", "root/etc/passwd", "cwd"):
        try:
            print(open(f"/proc/{{pid}}/{{name}}", "rb").read(100) or end)
        except OSError:
            pass
"""
    assert output(program, walls).removesuffix("\nits own /dev/null") == "{}\nNone"


def test_the_environment_is_not_even_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, str]] = []
    popen = subprocess.Popen

    def spied(*args: Any, **kwargs: Any) -> Any:
        given.append(kwargs["env"])
        return popen(*args, **kwargs)

    monkeypatch.setenv("A_KEY", SECRET)
    monkeypatch.setattr(subprocess, "Popen", spied)
    assert output("print(1)", ALL_WALLS) == "1"
    assert [set(environment) - {"LD_LIBRARY_PATH"} for environment in given] == [{"PYTHONHASHSEED"}]


@needs_namespaces
def test_only_the_standard_library_is_to_be_seen() -> None:
    program = "import os\nprint(sorted(os.listdir('/')), os.listdir('/tmp'), sorted(os.listdir('/dev')), os.getpid())"
    seen = output(program, ALL_WALLS)
    top = {path.split("/")[1] for path in sandbox._shown_folders()} | {"dev", "tmp", "lib", "lib64"}
    assert set(eval(seen.split("]")[0] + "]")) <= top  # of our own script above
    assert "['null', 'urandom', 'zero']" in seen


# Sockets


def test_no_socket_reaches_anybody(walls: tuple[str, ...], tmp_path: Path) -> None:
    heard: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0grpo-test-" + str(os.getpid()))
        abstract.listen()
        for listener in (server, abstract):
            listener.settimeout(0.01)
        program = f"""
import socket
for family, address in ((socket.AF_INET, ("127.0.0.1", {server.getsockname()[1]})), (socket.AF_INET, ("192.0.2.1", 80)),
                        (socket.AF_UNIX, "\\0grpo-test-{os.getpid()}"), (socket.AF_INET6, ("::1", 80))):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        try:
            s = socket.socket(family, kind)
            s.settimeout(0.2)
            s.connect(address)
            s.send(b"x")
            print("connected", address)
        except OSError:
            pass
try:
    socket.create_server(("127.0.0.1", 0))
    print("listening")
except OSError:
    pass
print("tried")
"""
        assert output(program, walls, seconds=5) == "tried"
        for listener in (server, abstract):
            with contextlib.suppress(TimeoutError):
                heard.append(listener.accept())
    assert heard == []


def test_an_event_loop_of_its_own_is_allowed(walls: tuple[str, ...]) -> None:
    program = "import asyncio\nasync def f():\n    await asyncio.sleep(0.01)\n    return 5\nprint(asyncio.run(f()))"
    assert output(program, walls, seconds=5) == "5"


# Other processes, the kernel


def test_it_cannot_kill_anybody(walls: tuple[str, ...]) -> None:
    program = f"""
import os, signal
for pid in (-1, 0, 1, os.getppid(), {os.getpid()}, {os.getppid()}):
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
def f(): return 1
"""
    assert attack(program, walls, "assert f() == 1").passed == (True,)


SIGNALS = """
import fcntl, os, time
def sig(pid, number):
    r, w = os.pipe()
    for way in (lambda: fcntl.fcntl(r, fcntl.F_SETOWN, pid), lambda: fcntl.fcntl(r, 10, number)):
        try: way(); print("did it")
        except OSError: pass
    fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    os.write(w, b"x")
for number in (2, 9, 14, 15):
    sig(os.getppid(), number)
time.sleep(0.2)
def f(n): return n
print("tried")
"""


def test_no_file_sends_signals_to_others(walls: tuple[str, ...]) -> None:
    """A pipe's owner gets a signal when there is something to read, and the owner can be anybody."""
    assert output(SIGNALS, walls) == "tried"
    assert attack(SIGNALS, walls, "assert f(1) == 1").passed == (True,)


def test_every_system_call_that_is_denied_fails(walls: tuple[str, ...]) -> None:
    names = [name for name, row in kernel.DENIED.items() if row[kernel._MACHINE or 0] is not None]
    numbers = [kernel.DENIED[name][kernel._MACHINE or 0] for name in names]
    program = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for name, number in {list(zip(names, numbers, strict=True))!r}:
    if libc.syscall(number, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 1:
        print(name)
if libc.syscall({0x40000000 + 39}) != -1:  # getpid by the numbering of x32
    print("x32")
"""
    assert output(program, walls) == ""


def test_the_numbers_of_system_calls_are_those_of_this_machine() -> None:
    """A wrong number would deny another call. Two that are easily told apart, and the header where there is one."""
    headers = list(Path("/usr/include").glob("**/asm/unistd_64.h")) + list(
        Path("/usr/include").glob("asm-generic/unistd.h")
    )
    known: dict[str, int] = {}
    for header in headers[:1]:
        for line in header.read_text().splitlines():
            parts = line.split()
            if len(parts) == 3 and parts[1].startswith("__NR_") and parts[2].isdigit():
                known[parts[1].removeprefix("__NR_")] = int(parts[2])
    wrong = {
        name: row for name, row in kernel.DENIED.items() if name in known and row[kernel._MACHINE or 0] != known[name]
    }
    assert wrong == {}
    for column in (0, 1):
        numbers = [row[column] for row in kernel.DENIED.values() if row[column] is not None]
        assert len(set(numbers)) == len(numbers)


def test_no_privilege_is_left(walls: tuple[str, ...]) -> None:
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
data = ctypes.create_string_buffer(24)
header = ctypes.create_string_buffer((0x20080522).to_bytes(4, "little") + bytes(4))
libc.capget(ctypes.addressof(header), data)
print(data.raw == bytes(24))
for way in (lambda: os.setuid(0) or os.setuid(1), lambda: os.chroot("/"), lambda: os.mknod("x", 0o20666, os.makedev(1, 1)), lambda: os.nice(-5)):
    try:
        way()
        print("did it")
    except OSError:
        pass
"""
    assert output(program, walls).splitlines()[0] == "True"
    assert "did it" not in output(program, walls)


# The tests cannot be cheated

CHEATS = {
    "exit before the tests": "import sys\nsys.exit(0)",
    "_exit before the tests": "import os\nos._exit(0)",
    "exit in the function": "import sys\ndef f(n): sys.exit(0)",
    "_exit in the function": "import os\ndef f(n): os._exit(0)",
    "exit at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef f(n): raise SystemExit(0)",
    "equals everything": "class Yes:\n    def __eq__(self, other): return True\n    __ne__ = lambda self, other: False\n"
    "    __hash__ = None\ndef f(n): return Yes()",
    "an int that equals everything": "class Yes(int):\n    def __eq__(self, other): return True\n"
    "    __hash__ = int.__hash__\ndef f(n): return Yes(7)",
    "a text that equals everything": "class Yes(str):\n    def __eq__(self, other): return True\n"
    "    __hash__ = str.__hash__\ndef f(n): return Yes('x')",
    "patched assert": "import builtins\nclass Never(Exception):\n    def __new__(cls, *a): raise SystemExit(0)\n"
    "builtins.AssertionError = Never\n__builtins__['AssertionError'] = Never\ndef f(n): return 0",
    "patched judge": "import grpo.rewards.sandbox.jail.inside as j, json, socket, os, builtins\nj.run_tests = j.described = "
    "lambda *a: ''\njson.dumps = lambda *a: '{\"passed\": true, \"why\": \"\"}'\nbuiltins.exec = lambda *a: None\n"
    "def f(n): return 0",
    "prints the success marker": "import sys\nfor s in (sys.stdout, sys.stderr):\n"
    "    print('{\"passed\": true, \"why\": \"\"}', file=s, flush=True)\ndef f(n):\n"
    "    print('{\"passed\": true, \"why\": \"\"}', flush=True)\n    return 0",
    "writes it everywhere": "import os\nfor n in range(100):\n    for text in (b'{\"passed\": true, \"why\": \"\"}\\n', "
    "b'\\0\\0\\0\\x04null'):\n        try: os.write(n, text)\n        except OSError: pass\ndef f(n): return 0",
    "reads the tests": "import gc, sys, os\nfound = []\nfor o in gc.get_objects():\n    try:\n"
    "        if isinstance(o, (str, list, dict)) and 'f(20)' in o: found.append(o)\n    except Exception: pass\n"
    "frame = sys._getframe()\nwhile frame:\n    found += [v for v in frame.f_locals.values() if isinstance(v, str) and 'f(20)' in v]\n"
    "    frame = frame.f_back\nfor n in range(100):\n    try: found.append(os.pread(n, 10000, 0))\n    except OSError: pass\n"
    "def f(n): return 1 / len(found) if found else 0",
    "claims that the test passed": "import socket, json\ns = socket.socket(fileno=3)\n"
    "for m in (None, {'names': {}}, {'passed': True, 'why': ''}, {'result': True}) * 50:\n"
    "    t = json.dumps(m).encode(); s.send(len(t).to_bytes(4, 'big') + t)\ndef f(n): return 0",
    "raises what the test may catch": "def f(n): raise AssertionError",
    "raises what ends everything": "def f(n): raise KeyboardInterrupt",
    "answers nonsense": "import os\nos.write(3, b'\\xff' * 100)\ndef f(n): return 0",
    "answers without end": "import os\nos.write(3, b'\\0\\0\\0\\xff' + b'x' * 10)\ndef f(n): return 0",
    "answers a deep list": "import os\nt = b'[' * 100000\nos.write(3, len(t).to_bytes(4, 'big') + t)\ndef f(n): return 0",
    "answers a wrong kind": "import os, json\nfor m in (None, {'f': {'value': ['set', ['list']]}}, 5, [], {'f': 3}):\n"
    "    t = json.dumps(m).encode(); os.write(3, len(t).to_bytes(4, 'big') + t)\ndef f(n): return 0",
    "closes everything": "import os\nos.closerange(0, 100)\ndef f(n): return 0",
    "a huge result": "def f(n): return 'x' * 10**7",
    "an endless result": "def f(n):\n    x = []\n    x.append(x)\n    return x",
    "ends the tests' loops": "def f(n): raise StopIteration",
    "not a number": "def f(n): return float('nan')",
}  # fmt: skip


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_passes_nothing(name: str, walls: tuple[str, ...]) -> None:
    tests = (
        "assert f(20) == 6765",
        "assert abs(f(20) - 6765) < 0.5",
        "assert f(20) in {6765}",
        "assert not f(20) != 6765",
    )
    verdict = attack(CHEATS[name], walls, *tests)
    assert verdict.passed == (False,) * 4
    assert verdict.why


def test_the_tests_that_cheats_fail_are_passed_by_an_honest_program(walls: tuple[str, ...]) -> None:
    honest = "def f(n):\n    a, b = 0, 1\n    for _ in range(n): a, b = b, a + b\n    return a"
    tests = (
        "assert f(20) == 6765",
        "assert abs(f(20) - 6765) < 0.5",
        "assert f(20) in {6765}",
        "assert not f(20) != 6765",
    )
    assert attack(honest, walls, *tests) == Verdict((True,) * 4, "", "")


def test_the_judge_cannot_be_read_or_traced(walls: tuple[str, ...]) -> None:
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
done = [libc.ptrace(16, os.getppid(), 0, 0)]
try:
    open(f"/proc/{os.getppid()}/mem", "rb")
    done.append(0)
except OSError:
    pass
def f(n): return done
"""
    assert attack(program, walls, "assert f(1) == [-1]").passed == (True,)


def test_names_of_the_program_are_found() -> None:
    test = "import os.path as p\nfrom math import pi\ndef g(x, *, y=1):\n    z = x + y\n    return z\nclass C: pass\n" \
        "try:\n    assert [h(i) for i in (lambda q: q)(LOW)] == g(pi)\nexcept ValueError as e:\n    raise e"  # fmt: skip
    assert inside.names_of_program(test) == ["LOW", "h"]


def test_packed_data_is_plain() -> None:
    assert inside.unpack(["tuple", 1, ["list"]]) == (1, [])
    for data in ({"a": 1}, ["object"], ["bytes", "zz"], ["dict", [1]], ["set", ["list"]]):
        with pytest.raises((ValueError, KeyError, TypeError)):
            inside.unpack(data)


# As a whole


@pytest.mark.slow
def test_sixty_four_programs_in_parallel_leave_nothing_behind(walls: tuple[str, ...]) -> None:
    kinds = [
        "def f(n): return n", "while True: pass", "import os\nwhile True: os.fork()", "x = bytearray(10 << 30)",
        "open('x', 'w').write('x' * 10000)\ndef f(n): return n", "import os\nos._exit(0)", "print('x' * 10**7)\ndef f(n): return n",
        "def f(n):\n    import time\n    time.sleep(100)",
    ]  # fmt: skip
    jobs = [Job(kinds[number % len(kinds)], (f"assert f({number}) == {number}",)) for number in range(64)]
    verdicts = sandbox.run(jobs, Limits(seconds=3), parallel=64, walls=walls)
    assert [verdict.passed for verdict in verdicts] == [(number % len(kinds) in (0, 4, 6),) for number in range(64)]


def test_nothing_survives_whoever_started_it() -> None:
    """The run is killed with SIGKILL in the middle of a batch."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom grpo.rewards.sandbox.host import *\n" \
        "own = 'import os; os.mkdir(\"closed\", 0o300); open(\"closed/x\", \"w\")\\nwhile True: pass'\n" \
        "run([Job(own)] * 4, Limits(seconds=60), parallel=4, walls=%r)"  # fmt: skip
    num_expected = 1 + 4 * 2  # the supervisor, and of each a judge and a program; what it tries first takes three
    for walls in (ALL_WALLS, WITHOUT_NAMESPACES):
        with subprocess.Popen([sys.executable, "-c", code % (walls,)]) as process:
            deadline = time.monotonic() + 30
            while (num_started := len(processes(process.pid))) < num_expected and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.3)  # for the folders
            process.kill()
        deadline = time.monotonic() + 10
        while processes(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert num_started >= num_expected
        assert processes(process.pid) == set()
        for folder in Path(tempfile.gettempdir()).glob(f"grpo-{process.pid}-*"):
            assert list(folder.iterdir()) == []  # what the programs wrote is gone
            folder.rmdir()


def test_ctrl_c_ends_a_batch(walls: tuple[str, ...]) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where these tests run in the background
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            sandbox.run([Job("while True: pass")] * 3, Limits(seconds=30), walls=walls)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 10


def test_a_supervisor_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sandbox, "ROOT", tmp_path)  # nothing to start there
    with pytest.raises(RunError, match=r"the sandbox failed: its supervisor ended: .*No module named"):
        sandbox.run([Job("")])
    with pytest.raises(RunError, match=r"the sandbox failed: its supervisor ended: .*No module named"):
        sandbox.run([Job("")] * 20_000)  # more than a pipe holds, and nobody reads it


@needs_landlock
def test_a_sandbox_that_cannot_be_made_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """No verdict is better than a wrong one."""
    monkeypatch.setattr(sandbox, "_shown_folders", lambda: ("/there/is/no/such/folder",))
    with pytest.raises(RunError, match="the sandbox failed"):
        sandbox.run([Job("print(1)")], walls=WITHOUT_NAMESPACES)


def test_what_the_kernel_does_not_give_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    sandbox._warn_once.cache_clear()
    for _ in range(2):
        sandbox._say_what_is_missing({"namespaces": "unshare: Operation not permitted", "landlock": "none"})
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1
    assert "it can read and write this user's files" in said
    assert "namespaces: unshare: Operation not permitted" in said
    sandbox._say_what_is_missing({"landlock": "the kernel has none"})  # nothing is lost by that alone
    assert capsys.readouterr().err == ""


def test_a_program_that_cannot_be_shut_in_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is not the program's fault, so it is no verdict: neither that it ended nor that its test failed."""

    def lock(cell: inside.Cell, uid: int | None) -> None:
        if cell.memory < inside.JUDGE_MEMORY:  # the program's process, not the judge's
            raise OSError("prctl: Operation not permitted")

    monkeypatch.setattr(inside, "lock", lock)
    cell = inside.Cell(False, False, False, [], str(tmp_path / "work"), 5.0, 1 << 28, 1 << 20, 1 << 20)
    text = b'["assert f(1) == 1"]def f(n): return n'
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as file:
        file.write(text)
        file.flush()
        parts = inside.Parts(file.fileno(), (20, len(text) - 20), (0, 20), (0, 0))
        child = os.fork()
        if child == 0:
            inside.run_job(parts, cell, writing)
    os.close(writing)
    with os.fdopen(reading) as said:
        assert json.loads(said.read()) == {"failed": "OSError: prctl: Operation not permitted"}
    os.waitpid(child, 0)


@pytest.mark.slow
def test_without_any_wall_limits_and_verdicts_still_hold() -> None:
    none: tuple[str, ...] = ()
    assert attack("while True: pass", none).why == "took too long"
    assert output("try: bytearray(10 << 30)\nexcept MemoryError: print('refused')", none) == "refused"
    assert attack(CHEATS["equals everything"], none, "assert f(1) == 1").passed == (False,)
    assert attack("def f(n): return n", none, "assert f(1) == 1").passed == (True,)
    bomb = "import os\ntry:\n    while True: os.fork()\nexcept OSError as e:\n    print('refused')"
    assert output(bomb, none) == "refused"
    hidden = "import os\ntry: os.setsid()\nexcept OSError: pass\nimport time\ntime.sleep(100)"
    assert attack(hidden, none).why == "took too long"


def test_what_there_is_no_sandbox_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match="needs Linux, whose kernel can shut them in; this is darwin"):
        sandbox.run([Job("")])


AS_NOBODY = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x20000) == 0
assert libc.mount(b"none", b"/", None, 16384 | 1 << 18, None) == 0
for source, target in (argument.split("=") for argument in sys.argv[2:]):
    os.makedirs(target)
    assert libc.mount(source.encode(), target.encode(), None, 4096 | 16384, None) == 0
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
top = sys.argv[1]
os.chdir(f"{top}/project")
environment = {"PYTHONPATH": f"{top}/packages", "HOME": f"{top}/home", "TMPDIR": f"{top}/home", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
python = f"{top}/python/bin/python{sys.version_info[0]}.{sys.version_info[1]}"
command = ["-B", "-m", "pytest", "-q", "--noconftest", "-o", "addopts=", "-p", "no:cacheprovider", "-x", "tests/rewards/test_sandbox.py"]
os.execve(python, [python, *command], environment)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user makes all these attacks anyway")
@pytest.mark.skipif(not kernel_does("libc.unshare(0x20000) == 0"), reason="this root may not mount anything")
def test_all_of_it_holds_for_an_ordinary_user() -> None:
    """The attacks once more as nobody, who reads interpreter, packages and a copy of the project where anybody may."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as top:
        for folder in ("grpo", "tests"):  # a copy, since the project itself may be in a folder that only root may enter
            shutil.copytree(ROOT / folder, f"{top}/project/{folder}", ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("pyproject.toml", "config.yaml"):  # of pytest, and one that must not be read
            shutil.copy(ROOT / file, f"{top}/project")
        subprocess.run(["chmod", "-R", "a+rX", top], check=True)
        os.mkdir(f"{top}/home")
        os.chmod(f"{top}/home", 0o777)
        binds = {sys.base_prefix: "python", str(Path(pytest.__file__).parent.parent): "packages"}
        command = [sys.executable, "-c", AS_NOBODY, top, *(f"{source}={top}/{name}" for source, name in binds.items())]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        assert " passed, 1 skipped" in done.stdout  # this very test


def test_requests_are_one_line_of_json() -> None:
    assert json.loads(json.dumps(request()))["cell"]["seccomp"] is True
