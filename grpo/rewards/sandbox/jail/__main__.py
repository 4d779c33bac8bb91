"""The supervisor of one batch: starts a sandbox for each program, some at a time, and sees that all of them end.

It reads one line, the request, from standard input, and answers with a line that says what the kernel gives. Then, as
they come, what the judges say: a line with number and size, and behind it so many bytes; size 0 is the end of one. The
bytes go from pipe to pipe: they never are in this process, which the next programs are forked from and could search.
When standard input ends, so does everything else: whoever started this may be killed.
"""

import array
import contextlib
import fcntl
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from grpo.rewards.sandbox.jail import inside, kernel

GRACE = 1.0  # seconds that a judge has beyond its program's, to say so itself
MAX_REPORT = 1 << 23  # bytes of all that a judge says
USUAL = (  # what solutions import most: loaded once instead of once a program
    "bisect", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools", "math",
    "operator", "random", "re", "statistics", "string", "typing",
)  # fmt: skip


@dataclass
class Running:
    """One sandbox."""

    number: int
    process: int
    result: int  # descriptor
    deadline: float
    num_bytes: int = 0  # handed on so far

    def hand_on(self) -> bool:
        """Hand on what its judge has said; False where there is nothing more to come."""
        size = array.array("i", [0])
        fcntl.ioctl(self.result, termios.FIONREAD, size)
        left = size[0]
        if left:
            say({"number": self.number, "size": left})
        self.num_bytes += left
        while left:
            left -= os.splice(self.result, sys.stdout.fileno(), left)
        return size[0] > 0


def start(number: int, parts: inside.Parts, cell: inside.Cell) -> Running:
    """Fork one sandbox."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        inside.run_job(parts, replace(cell, work=own_folder(cell, number)), writing)
    os.close(writing)
    return Running(number, process, reading, time.monotonic() + cell.seconds + GRACE)


def own_folder(cell: inside.Cell, number: int) -> str:
    """Where a program without namespaces writes."""
    return f"{cell.work}/program-{number}"


def children() -> set[int]:
    """Our own, those among them that have lost their parent."""
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return set(map(int, file.read().split()))


def end(job: Running, cell: inside.Cell, keep: set[int]) -> None:
    """Kill what is left of a sandbox, and delete what it wrote; `keep` are the processes of others.

    Without namespaces the program outlives its judge, and has become our child.
    """
    for kill in (os.killpg, os.kill):  # it may not have a group of its own yet
        with contextlib.suppress(ProcessLookupError):
            kill(job.process, signal.SIGKILL)
    os.waitpid(job.process, 0)
    os.close(job.result)
    for orphan in children() - keep:
        os.kill(orphan, signal.SIGKILL)
        os.waitpid(orphan, 0)
    if not cell.namespaces:  # by these, since it may have made folders that are closed, or deeper than Python deletes
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, "--", own_folder(cell, job.number)], stderr=subprocess.DEVNULL)


def refusal(try_it: Callable[[], Any]) -> str | None:
    """Why the kernel refuses something, tried in a process of its own; None if it does not."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            try_it()
        except OSError as error:
            os.write(writing, str(error).encode()[:500])
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        reason = file.read().decode()
    os.waitpid(process, 0)
    return reason or None


def walls(cell: inside.Cell) -> tuple[inside.Cell, dict[str, str]]:
    """The cell with the walls that this kernel gives, of those asked for, and why not the others."""

    def need_landlock() -> None:
        if kernel.landlock_version() < 3:  # before, files could be cut off that may only be read
            raise OSError("the kernel has none, or an old one")

    def need_seccomp() -> None:
        kernel.drop_privileges(None)
        kernel.deny_system_calls()

    trials = {
        "namespaces": lambda: inside.enter(replace(cell, namespaces=True)),
        "landlock": need_landlock,
        "seccomp": need_seccomp,
    }
    reasons = {name: refusal(trial) if getattr(cell, name) else "not asked for" for name, trial in trials.items()}
    given: dict[str, Any] = {name: reason is None for name, reason in reasons.items()}
    return replace(cell, **given), {name: reason for name, reason in reasons.items() if reason is not None}


def say(line: dict[str, Any]) -> None:
    """One line to whoever started this."""
    print(json.dumps(line), flush=True)


def main() -> None:
    """The batch."""
    request = json.loads(sys.stdin.buffer.readline())
    os.chdir("/")
    os.umask(0o022)  # a program that runs as nobody must get to what is made for it
    sys.path.pop(0)  # the project: nothing to be imported in a sandbox
    kernel.prctl(kernel.DUMPABLE, 0)
    kernel.prctl(kernel.CHILD_SUBREAPER, 1)
    for name in USUAL:
        importlib.import_module(name)
    cell, missing = walls(inside.Cell(**request["cell"]))
    say({"missing": missing})
    waiting = [(number, inside.Parts(request["file"], *parts)) for number, parts in enumerate(request["jobs"])][::-1]
    running: dict[int, Running] = {}  # by their descriptors
    stdin = sys.stdin.fileno()
    with selectors.DefaultSelector() as selector:
        selector.register(stdin, selectors.EVENT_READ)
        try:
            while waiting or running:
                while waiting and len(running) < request["parallel"]:
                    job = start(*waiting.pop(), cell)
                    running[job.result] = job
                    selector.register(job.result, selectors.EVENT_READ)
                first = min(job.deadline for job in running.values())
                ready = {key.fd for key, _ in selector.select(max(first - time.monotonic(), 0))}
                if stdin in ready:
                    return
                for job in list(running.values()):
                    is_over = job.result in ready and not job.hand_on()
                    if is_over or time.monotonic() > job.deadline or job.num_bytes > MAX_REPORT + 6 * cell.output:
                        selector.unregister(running.pop(job.result).result)
                        end(job, cell, {other.process for other in running.values()})
                        say({"number": job.number, "size": 0})
        finally:
            for job in running.values():
                end(job, cell, {other.process for other in running.values()})
            with contextlib.suppress(OSError):  # whoever made it removes it, if still alive
                os.rmdir(cell.work)


if __name__ == "__main__":
    main()
