"""The supervisor of one batch: starts a sandbox for each program, several at a time, and makes sure that all end.

It reads one line, the request, from standard input. It answers with a line that lists the protections that the kernel
does not provide. Then it forwards the output of the judges as it arrives: a line with job number and size, followed by
that many bytes. Size 0 ends the output of a judge. The bytes are spliced from pipe to pipe and never enter the memory
of this process, because the next programs are forked from it and could search its memory. When standard input ends,
the supervisor ends everything, because the process that started it may have been killed.
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

GRACE = 1.0  # seconds after the program's time limit in which the judge can still report the timeout itself
MAX_REPORT = 1 << 23  # maximum total output of a judge, in bytes
USUAL = (  # modules that solutions often import; loaded once instead of once per program
    "bisect", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools", "math",
    "operator", "random", "re", "statistics", "string", "typing",
)  # fmt: skip


@dataclass
class Running:
    """One running sandbox."""

    number: int  # of the job
    process: int  # process id
    result: int  # descriptor of the pipe from the judge
    deadline: float  # of time.monotonic
    num_bytes: int = 0  # forwarded so far

    def hand_on(self) -> bool:
        """Forward the available output of the judge. Call it when the pipe is ready; False: the output has ended."""
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
    """The folder that a program without namespaces writes to."""
    return f"{cell.work}/program-{number}"


def children() -> set[int]:
    """The ids of our child processes, including orphans that were assigned to us."""
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return set(map(int, file.read().split()))


def end(job: Running, cell: inside.Cell, keep: set[int]) -> None:
    """Kill the remaining processes of a sandbox, and delete its files. `keep`: the processes of other sandboxes.

    Without namespaces the program may outlive its judge. It then becomes our child.
    """
    for kill in (os.killpg, os.kill):  # the process may not have created its process group yet
        with contextlib.suppress(ProcessLookupError):
            kill(job.process, signal.SIGKILL)
    os.waitpid(job.process, 0)
    os.close(job.result)
    for orphan in children() - keep:
        os.kill(orphan, signal.SIGKILL)
        os.waitpid(orphan, 0)
    if not cell.namespaces:  # with commands: its folders may lack permissions, or be deeper than Python can delete
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, "--", own_folder(cell, job.number)], stderr=subprocess.DEVNULL)


def refusal(try_it: Callable[[], Any]) -> str | None:
    """Call `try_it` in a separate process. Returns why the kernel refuses it; None if the kernel allows it."""
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
    """The cell with those requested protections that this kernel provides, and the reason for each missing one."""

    def need_landlock() -> None:
        if kernel.landlock_version() < 3:  # earlier versions do not prevent the truncation of read-only files
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
    """Write one line to the process that started the supervisor."""
    print(json.dumps(line), flush=True)


def main() -> None:
    """Run one batch."""
    request = json.loads(sys.stdin.buffer.readline())
    os.chdir("/")
    os.umask(0o022)  # a program that runs as nobody must have access to the files made for it
    sys.path.pop(0)  # removes the project, so a sandbox cannot import it
    kernel.prctl(kernel.DUMPABLE, 0)
    kernel.prctl(kernel.CHILD_SUBREAPER, 1)
    for name in USUAL:
        importlib.import_module(name)
    cell, missing = walls(inside.Cell(**request["cell"]))
    say({"missing": missing})
    waiting = [(number, inside.Parts(request["file"], *parts)) for number, parts in enumerate(request["jobs"])][::-1]
    running: dict[int, Running] = {}  # result descriptor -> sandbox
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
            with contextlib.suppress(OSError):  # the host process also removes the folder, if it is still alive
                os.rmdir(cell.work)


if __name__ == "__main__":
    main()
