"""A sandbox for untrusted programs, such as those that a model writes.

    [verdict] = run([Job("def add(a, b): return a + b", tests=["assert add(2, 3) == 5"])])
    verdict.passed                                                        # [True]
    [verdict] = run([Job("print(int(input()) + 1)", stdin="41")])
    verdict.output                                                        # "42\\n"

Every program runs in a separate process, and its tests run in another process (grpo/rewards/sandbox/jail/inside.py).
The program has no access to the tests, the expected values or the channel that carries the verdict. So it cannot patch,
read or forge any of them.

Protections (grpo/rewards/sandbox/jail/kernel.py):
  namespaces    user, process, mount, network, IPC and host name. The program sees no other process and no network. It
                sees only the libraries of the base Python and of the system, read-only. It can write only to a /tmp in
                memory, which is empty at first and is deleted with the sandbox.
  limits        wall clock (everything in the sandbox is killed), CPU time, memory, size of files and of output, one
                process with one thread, 64 open files; an empty environment
  privileges    none: no capability, and no way to gain one. If we are root, the program runs as nobody.
  seccomp       system calls fail if they start or affect other processes, open sockets, or lead to rarely used parts of
                the kernel
If the kernel provides no namespaces (in some containers), Landlock denies access to all other files, and seccomp denies
sockets and processes. The program then writes to its own folder, which is deleted afterwards. If Landlock or seccomp is
missing as well, a warning is printed once.

What the sandbox does not cover:
  - Bugs of the kernel. Use a virtual machine for programs of an adversary, as opposed to those of a model in training.
  - Side channels and the load on the machine. Programs run in parallel to the training, up to their time limit.
  - Without namespaces: the program can see the machine's name, and the existence and size of files outside. It writes
    to a folder on the disk, where each file has a size limit but their total has none.
  - Without namespaces and Landlock: the program can read and write the user's files.
  - Without namespaces and seccomp: the program can open sockets and kill other processes of the user.
  - Wrong tests. A test that passes without the program's help rewards every program. Nothing is checked but what the
    tests check.
  - Programs whose result depends on time or chance. A run with such programs is not bit-reproducible. (Hashing is
    deterministic here.)
The sandbox needs Linux.
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
PATIENCE = 60.0  # seconds; a supervisor that is silent for the time limit plus this long is considered broken


@dataclass(frozen=True)
class Limits:
    """The resource limits of one program."""

    seconds: float = 5.0  # of wall clock and of CPU time, for all tests of the program together
    memory_mb: int = 256  # address space, including what Python itself needs
    file_mb: int = 16  # for all files together with namespaces, for each file without
    output_kb: int = 256  # for the output of a script


@dataclass(frozen=True)
class Job:
    """A program with its tests. Without tests, the program runs as a script."""

    program: str
    tests: tuple[str, ...] | None = None  # Python code with asserts; each test has its own global names
    stdin: str = ""  # the standard input of a script


@dataclass(frozen=True)
class Verdict:
    """The result of a job."""

    passed: tuple[bool, ...]  # one per test; for a script one value: whether it ended with status 0 within its limits
    output: str  # the output of a script
    why: str  # the first failure in words, or ""; never parse it, because parts of it are written by the program


def check_platform() -> None:
    """Raise an InputError if this platform has no sandbox."""
    if sys.platform != "linux":
        what = "running programs of a model needs Linux, whose kernel can shut them in"
        raise InputError(f"{what}; this is {sys.platform}")


def run(
    jobs: Sequence[Job], limits: Limits = Limits(), *, parallel: int | None = None, walls: Sequence[str] = ALL_WALLS
) -> list[Verdict]:
    """Run every program. Returns the verdicts in the order of the jobs.

    Args:
        parallel: how many programs run at the same time; None: the number of cores.
        walls: the protections to use, if the kernel provides them. Fewer are less safe; only tests of the sandbox use
            fewer.

    Raises:
        RunError: the sandbox itself failed, so there is no verdict on the program.
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
    """Parse the output of a judge. Incomplete lines (of a killed judge) and text that a test wrote are left out."""
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
    passed += [False] * (expected - len(passed))  # tests that were not reached in time
    output = "".join(line["output"] for line in found if "output" in line)
    why = (reasons[0] if reasons else "").encode("ascii", "backslashreplace").decode()  # may contain the program's text
    return Verdict(tuple(passed), output, why)


@contextmanager
def _files(jobs: Sequence[Job]) -> Iterator[tuple[int, list[list[tuple[int, int] | None]], str]]:
    """Write all texts of the jobs to one unnamed file. Yields it, (offset, length) of each text, and a work folder."""
    parts: list[list[tuple[int, int] | None]] = []
    folder = tempfile.TemporaryDirectory(prefix=f"grpo-{os.getpid()}-", ignore_cleanup_errors=True)
    with tempfile.TemporaryFile() as file, folder as work:
        os.chmod(work, 0o711)  # noqa: S103 (a program that runs as nobody must reach its own folder in it)

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
    """Yield the messages of a supervisor: first the missing protections, then job number and bytes of judges."""
    environment = {"PYTHONHASHSEED": "0"} | {
        name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ
    }
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-S", "-B", "-m", "grpo.rewards.sandbox.jail", f"of-{os.getpid()}"],  # `ps` shows the PID
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            pass_fds=[request["file"]],
            start_new_session=True,  # Ctrl-C must not reach the supervisor; it ends when its standard input ends
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # the supervisor has ended; its last error is raised below
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
                process.kill()  # the kernel then kills its children, too
                process.wait()
            process.stdout.close()


def _messages(stream: IO[bytes], patience: float) -> Iterator[dict[str, Any]]:
    """Yield each JSON line, with the "size" bytes after it as "bytes". RunError after `patience` seconds of silence."""
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
    """The folders that a program may read: Python's standard library, and the libraries that Python is linked with."""
    base = {"platbase": sys.base_exec_prefix}  # not a virtual environment's prefix, which has the installed packages
    paths = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib", vars=base), f"{sys.base_prefix}/lib"]
    paths += ["/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    folders = sorted({os.path.realpath(path) for path in paths if os.path.isdir(path)})
    return tuple(path for path in folders if not any(path.startswith(f"{other}/") for other in folders))


CONSEQUENCES = {  # missing protections -> what a program can then do
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
