"""A place to run programs that nobody trusts, such as what a model wrote.

    [verdict] = run([Job("def add(a, b): return a + b", tests=["assert add(2, 3) == 5"])])
    verdict.passed                                                        # [True]
    [verdict] = run([Job("print(int(input()) + 1)", stdin="41")])
    verdict.output                                                        # "42\\n"

Every program gets a process of its own, and its tests run in another one (grpo/rewards/sandbox/jail/inside.py): the
program never holds the tests, the expected values or the channel that the verdict goes through, so there is nothing in
its reach to patch, to read or to forge.

What is around it (grpo/rewards/sandbox/jail/kernel.py):
  namespaces    user, process, mount, network, IPC, host name: it sees no other process, no network, and of the files
                only the libraries of the base Python and of the system, read-only; an empty /tmp in memory is all it
                can write to, and is gone with it
  limits        wall clock (everything in the sandbox is killed), CPU time, memory, size of files and of output, one
                process with one thread, 64 open files; an empty environment
  privileges    none: no capability, no way to gain one; nobody where we are root
  seccomp       the system calls that start or touch other processes, open sockets, or lead to rarely used parts of the
                kernel fail
Where the kernel gives no namespaces (some containers), Landlock keeps it from all files but those, in a folder of its
own that is deleted afterwards, and seccomp from sockets and processes; what is missing altogether is said once.

What it does not cover:
  - a bug of the kernel itself: for programs of an adversary, rather than of a model in training, use a virtual machine
  - side channels, and the load on the machine: programs run side by side with the training, for as long as they may
  - without namespaces: that files exist, and how large they are, can be seen outside, as can the machine's name; what
    it writes is in a folder on the disk, whose files are limited one by one and not in their sum
  - without namespaces and Landlock: the user's files can be read, and be written to
  - without seccomp as well: sockets can be opened, and the user's other processes be killed
  - tests that are wrong: a test that passes without the program's help pays for nothing, and what it does not ask for
    is not checked
  - programs whose result depends on the time or on chance: of such, a run cannot be repeated to the bit. (Hashing is
    not random here.)
It needs Linux.
"""

import functools
import json
import os
import selectors
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from grpo.errors import InputError, RunError

ROOT = Path(__file__).resolve().parents[3]
ALL_WALLS = ("namespaces", "landlock", "seccomp")
PATIENCE = 60.0  # seconds beyond its limit without a word from the supervisor: it must be broken


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    seconds: float = 5.0  # of wall clock and of CPU, for all its tests together
    memory_mb: int = 256  # address space, Python's own included
    file_mb: int = 16  # all files together with namespaces, else each
    output_kb: int = 256  # of what a script prints


@dataclass(frozen=True)
class Job:
    """A program and what is to be done with it: with tests they are run, without it runs as a script."""

    program: str
    tests: tuple[str, ...] | None = None  # Python with asserts, each in a namespace of its own
    stdin: str = ""  # what a script reads


@dataclass(frozen=True)
class Verdict:
    """What became of it."""

    passed: tuple[bool, ...]  # one a test; of a script one, that it ended as it should
    output: str  # what a script printed
    why: str  # the first thing that went wrong, for people; empty where nothing did. Half of it is the program's words


def check_platform() -> None:
    """An InputError where there is no sandbox."""
    if sys.platform != "linux":
        what = "running programs of a model needs Linux, whose kernel can shut them in"
        raise InputError(f"{what}; this is {sys.platform}")


def run(
    jobs: Sequence[Job], limits: Limits = Limits(), *, parallel: int | None = None, walls: Sequence[str] = ALL_WALLS
) -> list[Verdict]:
    """Run every program, some of them (as many as there are cores) at a time; verdicts in the order of the jobs.

    Args:
        parallel: how many at a time.
        walls: which to use where the kernel gives them. Fewer make it less safe: for tests of what then still holds.

    Raises:
        RunError: the sandbox itself failed, so nothing is known of the program.
    """
    check_platform()
    if not jobs:
        return []
    with _files(jobs) as (file, parts, work):
        cell = {
            **{wall: wall in walls for wall in ALL_WALLS},
            "shown": list(_shown_folders()),
            "work": work,
            "seconds": limits.seconds,
            "memory": limits.memory_mb << 20,
            "file": limits.file_mb << 20,
            "output": limits.output_kb << 10,
        }
        parallel = parallel or len(os.sched_getaffinity(0))
        request = {"cell": cell, "file": file, "jobs": parts, "parallel": parallel}
        lines = _answers(request, patience=limits.seconds + PATIENCE)
        _say_what_is_missing({name: why for name, why in next(lines)["missing"].items() if name in walls})
        said = dict.fromkeys(range(len(jobs)), b"")
        for answer in lines:
            said[answer["number"]] += answer["bytes"]
    return [_verdict(job, _parsed(said[number])) for number, job in enumerate(jobs)]


def _parsed(said: bytes) -> list[dict[str, Any]]:
    """What a judge said. Half a line, where it was killed, is left out, as is what a test may have written."""
    lines = []
    for line in said.split(b"\n")[:-1]:
        with suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def _verdict(job: Job, lines: Sequence[dict[str, Any]]) -> Verdict:
    for line in lines:
        if "failed" in line:
            raise RunError(f"the sandbox failed: {line['failed']}")
    found = [line for line in lines if "why" in line]
    expected = 1 if job.tests is None else len(job.tests)
    reasons = [line["why"] for line in found if line["why"]] + ["took too long"] * (len(found) < expected)
    passed = [line["passed"] if job.tests is not None else not line["why"] for line in found]
    passed += [False] * (expected - len(passed))  # its time was up before
    output = "".join(line["output"] for line in found if "output" in line)
    why = (reasons[0] if reasons else "").encode("ascii", "backslashreplace").decode()  # some of it is the program's
    return Verdict(tuple(passed), output, why)


@contextmanager
def _files(jobs: Sequence[Job]) -> Iterator[tuple[int, list[list[tuple[int, int] | None]], str]]:
    """All texts of the jobs in one file without a name, (offset, length) of each, and a folder for what they write."""
    parts: list[list[tuple[int, int] | None]] = []
    folder = tempfile.TemporaryDirectory(prefix=f"grpo-{os.getpid()}-", ignore_cleanup_errors=True)
    with tempfile.TemporaryFile() as file, folder as work:
        os.chmod(work, 0o711)  # noqa: S103 (a program that runs as nobody must get to its own folder in it)

        def place(text: str) -> tuple[int, int]:
            data = text.encode(errors="replace")
            file.write(data)
            return file.tell() - len(data), len(data)

        for job in jobs:
            tests = None if job.tests is None else place(json.dumps(job.tests))
            parts.append([place(job.program), tests, place(job.stdin)])
        file.flush()
        yield file.fileno(), parts, work


def _answers(request: dict[str, Any], patience: float) -> Iterator[dict[str, Any]]:
    """What a supervisor says, as it comes: what is missing, then number and bytes of what judges say."""
    environment = {"PYTHONHASHSEED": "0"} | {
        name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ
    }
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-S", "-B", "-m", "grpo.rewards.sandbox.jail", f"of-{os.getpid()}"],  # for whoever asks ps
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            pass_fds=[request["file"]],
            start_new_session=True,  # Ctrl-C is for us: it ends when its standard input does
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it has ended: what it said of that comes below
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            num_left = 1 + len(request["jobs"])
            for answer in _messages(process.stdout, patience):
                yield answer
                num_left -= not answer.get("size", 0)
            if num_left:
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip().splitlines()
                raise RunError(f"the sandbox failed: its supervisor ended: {said[-1] if said else 'without a word'}")
        finally:
            with suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()  # its children die with it
                process.wait()
            process.stdout.close()


def _messages(stream: IO[bytes], patience: float) -> Iterator[dict[str, Any]]:
    """A line of JSON each, with the "size" bytes behind it as "bytes"; a RunError where nothing comes for so long."""
    buffer, header = b"", None
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while selector.select(patience):
            part = os.read(stream.fileno(), 1 << 16)
            if not part:
                return
            buffer += part
            while True:
                if header is None and b"\n" in buffer:
                    line, _, buffer = buffer.partition(b"\n")
                    header = json.loads(line)
                size = 0 if header is None else header.get("size", 0)
                if header is None or len(buffer) < size:
                    break
                yield header | {"bytes": buffer[:size]}
                buffer, header = buffer[size:], None
    raise RunError("the sandbox failed: its supervisor does not answer")


@functools.lru_cache
def _shown_folders() -> tuple[str, ...]:
    """What a program may read: Python's standard library, and the libraries it is linked with."""
    base = {"platbase": sys.base_exec_prefix}  # not that of a virtual environment, with all that is installed in it
    paths = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib", vars=base), f"{sys.base_prefix}/lib"]
    paths += ["/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    folders = sorted({os.path.realpath(path) for path in paths if os.path.isdir(path)})
    return tuple(path for path in folders if not any(path.startswith(f"{other}/") for other in folders))


CONSEQUENCES = {  # what is open where walls are missing
    ("namespaces",): "it has no namespaces of its own, so it can fill the disk",
    ("namespaces", "landlock"): "it can read and write this user's files",
    ("seccomp",): "the kernel's system calls are all open to it",
    ("namespaces", "seccomp"): "it can open sockets, and kill this user's processes",
}


def _say_what_is_missing(reasons: dict[str, str]) -> None:
    open_ = [text for walls, text in CONSEQUENCES.items() if reasons.keys() >= set(walls)]
    if open_:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        _warn_once(f"a model's program is not shut in as it should be: {'; '.join(open_)} ({why})")


@functools.lru_cache
def _warn_once(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
