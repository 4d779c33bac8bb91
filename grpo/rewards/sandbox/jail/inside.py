"""What happens in a sandbox: a judge and, in a process of its own, the program. They share a socket and nothing else.

The tests never enter the program's process. The judge runs them; where a test calls a function of the program, a stub
sends name and arguments over and gets the result back as plain data (None, numbers, texts, bytes, lists, tuples, sets,
dicts). So the program can patch whatever it likes, exit when it likes, return what claims to equal everything, or write
to the socket itself: all it can do is to answer, and only the right answer is right. It does not know which one that
is: it was forked before the judge read the tests.
"""

import ast
import builtins
import fcntl
import json
import math
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from grpo.rewards.sandbox.jail import kernel

NOBODY = 65534
MAX_MESSAGE = 1 << 20  # bytes, between judge and program
JUDGE_MEMORY = 1 << 29  # bytes, at least: whatever the program answers must fit


class ProgramError(Exception):
    """The program has no answer to give: it ended, or took too long."""


# Plain data


def pack(value: Any) -> Any:
    """Plain data as JSON has it: numbers and texts as they are, anything else a list that begins with its kind.

    >>> pack([1, (2.5, "x")])
    ['list', 1, ['tuple', 2.5, 'x']]
    """
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return ["int", hex(value)]  # of thousands of digits Python makes no decimal text
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, dict):
        return ["dict", *[[pack(key), pack(item)] for key, item in value.items()]]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, *map(pack, value)]
    raise TypeError(f"{type(value).__name__}: only plain data goes in and out of a program")


def unpack(data: Any) -> Any:
    """The value that `pack` made `data` of; a ValueError if it made it of none.

    >>> unpack(pack({(1, 2): {3}, "x": b"y"}))
    {(1, 2): {3}, 'x': b'y'}
    """
    if not isinstance(data, list):
        if isinstance(data, dict):
            raise ValueError("no value is packed like this")
        return data
    kind, *items = data
    if kind == "int":
        return int(items[0], 16)
    if kind == "bytes":
        return bytes.fromhex(*items)
    if kind == "complex":
        return complex(*items)
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in items}
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(unpack, items))


def send(connection: socket.socket, message: Any) -> None:
    """One message: its length, then JSON."""
    text = json.dumps(message).encode()
    if len(text) > MAX_MESSAGE:
        raise ValueError(f"more than {MAX_MESSAGE} bytes")
    connection.sendall(len(text).to_bytes(4, "big") + text)


def receive(connection: socket.socket) -> Any:
    """The next message; an EOFError where there is none."""

    def exactly(size: int) -> bytes:
        parts = b""
        while len(parts) < size:
            part = connection.recv(size - len(parts))
            if not part:
                raise EOFError
            parts += part
        return parts

    size = int.from_bytes(exactly(4), "big")
    if size > MAX_MESSAGE:
        raise ValueError(f"more than {MAX_MESSAGE} bytes")
    return json.loads(exactly(size))


def described(error: BaseException) -> str:
    """One short line: ValueError: too large."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


# The program's side


def serve(connection: socket.socket, program: str) -> None:
    """Run the program as a module, then answer: what is there under these names, what does this call return?"""
    names: dict[str, Any] = {"__name__": "program"}
    try:
        exec(compile(program, "<program>", "exec"), names)
        send(connection, None)
    except BaseException as error:
        send(connection, described(error))
    while True:
        request = receive(connection)
        if "names" in request:
            send(connection, {name: _shown(names[name]) for name in request["names"] if name in names})
        else:
            try:
                result = names[request["call"]](*unpack(request["args"]), **unpack(request["kwargs"]))
                send(connection, {"result": pack(result)})
            except BaseException as error:
                send(connection, {"raised": type(error).__name__, "args": _short(error.args)})


def _shown(value: Any) -> Any:
    """A function can only be called, a constant be had."""
    if callable(value):
        return {"function": True}
    try:
        return {"value": pack(value)}
    except (TypeError, RecursionError):
        return {"function": True}


def _short(arguments: tuple[Any, ...]) -> Any:
    """An exception's, packed where they are plain and short."""
    try:
        packed = pack(arguments)
        return packed if len(json.dumps(packed)) < 1000 else pack(())
    except (TypeError, ValueError, RecursionError):
        return pack(())


def run_script(program: str) -> NoReturn:
    """Run the program as a script, its output in standard output."""
    status = 1
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        try:
            print(end="", flush=True)
        finally:
            os._exit(status & 255)


# The judge's side


def names_of_program(test: str) -> list[str]:
    """The names in a test that are neither Python's own nor bound by the test: the program must define them.

    >>> names_of_program("import math\\nassert math.isclose(root(2), max(LOW, 1.41))")
    ['LOW', 'root']
    """
    tree = ast.parse(test)
    bound, loaded = set(dir(builtins)), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (loaded if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return sorted(loaded - bound)


class Program:
    """The other end of the socket, until `deadline` (of time.monotonic)."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self.connection, self.deadline = connection, deadline

    def ask(self, message: Any) -> Any:
        """Its answer; a ProgramError where there is none."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise ProgramError("took too long")
        try:
            self.connection.settimeout(left)
            if message is not None:
                send(self.connection, message)
            return receive(self.connection)
        except TimeoutError as error:
            raise ProgramError("took too long") from error
        except (OSError, EOFError) as error:
            raise ProgramError("the program ended") from error
        except (ValueError, RecursionError) as error:
            raise ProgramError(f"the program answered nonsense: {described(error)}") from error

    def names(self, wanted: list[str]) -> dict[str, Any]:
        """What the program defines of them: functions as stubs, constants as they are."""
        found = self.ask({"names": wanted})
        return {
            name: unpack(found[name]["value"]) if "value" in found[name] else self.function(name)
            for name in wanted
            if name in found
        }

    def function(self, name: str) -> Callable[..., Any]:
        """A stub: calls the function over there."""

        def call(*args: Any, **kwargs: Any) -> Any:
            answer = self.ask({"call": name, "args": pack(args), "kwargs": pack(kwargs)})
            if "result" in answer:
                return unpack(answer["result"])
            kind: Any = getattr(builtins, str(answer["raised"]), None)
            if not (isinstance(kind, type) and issubclass(kind, Exception)) or "Iteration" in kind.__name__:
                kind = RuntimeError  # one of its own, one that would end the judge, or a loop of the test (PEP 479)
            try:
                error = kind(*unpack(answer["args"]))
            except TypeError:  # a kind that takes other arguments
                error = RuntimeError(kind.__name__)
            raise error

        return call


def run_tests(program: Program, tests: list[str], report: Callable[[dict[str, Any]], None]) -> None:
    """Run each test in a namespace of its own, and report at once whether it passed, else why not."""
    try:
        error = program.ask(None)
    except ProgramError as problem:
        error = str(problem)
    for test in tests:
        why = str(error or "")
        if not why:
            try:
                names = {"__name__": "tests", **program.names(names_of_program(test))}
                exec(compile(test, "<test>", "exec"), names)  # the data set's own code, shut in as well
            except BaseException as problem:
                why = str(problem) if isinstance(problem, ProgramError) else type(problem).__name__  # no expected value
        report({"passed": not why, "why": why[:200]})


# Both: how a sandbox comes into being


@dataclass(frozen=True)
class Cell:
    """How one sandbox is shut."""

    namespaces: bool  # which of the three walls the kernel gives
    landlock: bool
    seccomp: bool
    shown: list[str]  # folders to read from: the standard library, and what it is linked with
    work: str  # without namespaces the one folder to write to, which is made here; with them that is an empty /tmp
    seconds: float  # of wall clock
    memory: int  # bytes, as are the next two
    file: int  # each; with namespaces all together
    output: int


@dataclass(frozen=True)
class Parts:
    """A job is three texts in one open file, (offset, length) each: nobody reads what is not meant for it."""

    file: int  # descriptor
    program: tuple[int, int]
    tests: tuple[int, int] | None  # a JSON list; None: the program is a script
    stdin: tuple[int, int]  # what a script reads

    def read(self, part: tuple[int, int]) -> str:
        offset, length = part
        return os.pread(self.file, length, offset).decode()


def run_job(parts: Parts, cell: Cell, result: int) -> NoReturn:
    """Judge and program of one job. What the judge finds goes to the descriptor `result`, a JSON object a line."""

    def report(line: dict[str, Any]) -> None:
        os.write(result, json.dumps(line).encode() + b"\n")

    try:
        for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # nothing a program could send ends its judge
        os.setpgid(0, 0)
        file, result = keep_open(parts.file, result)
        parts = replace(parts, file=file)
        uid = enter(cell, result)
        kernel.prctl(kernel.DUMPABLE, 0)  # nobody reads the judge's memory or descriptors
        judge_end, program_end = socket.socketpair()
        output = os.memfd_create("output")
        child = os.fork()
        if child == 0:
            be_program(parts, cell, uid, program_end, output)
        program_end.close()
        lock(replace(cell, memory=max(cell.memory, JUDGE_MEMORY)), uid)
        problem = receive(judge_end)  # the program's side is shut in now, or says why not; nothing of the program ran
        if problem is None:
            be_judge(parts, cell, child, judge_end, output, report)
        else:
            report({"failed": problem})
    except ProgramError:
        pass  # its time was up in the middle of a report
    except BaseException as error:
        report({"failed": described(error)})
    finally:
        os._exit(0)


def keep_open(*descriptors: int) -> list[int]:
    """Close all others, and put /dev/null in the place of standard input, output and error."""
    highest = os.sysconf("SC_OPEN_MAX")
    null = os.open("/dev/null", os.O_RDWR)
    copies = [fcntl.fcntl(number, fcntl.F_DUPFD, 3 + len(descriptors)) for number in (*descriptors, null)]
    for target in range(3):
        os.dup2(copies[-1], target)
    kept = [os.dup2(copy, target) for target, copy in enumerate(copies[:-1], start=3)]
    os.closerange(3 + len(kept), highest)
    return kept


def enter(cell: Cell, result: int | None = None) -> int | None:
    """Into the cell; in namespaces of its own this returns in their first process only, with which everything ends.

    Returns who to be in there, where that is somebody else.
    """
    kernel.prctl(kernel.PDEATHSIG, signal.SIGKILL)
    uid = NOBODY if os.geteuid() == 0 else None
    if not cell.namespaces:
        if cell.landlock and cell.seccomp:
            uid = None  # they hold root as well, which may have to read a standard library in its home
        os.mkdir(cell.work, 0o700)
        if uid is not None:
            os.chown(cell.work, uid, uid)
        os.chdir(cell.work)
        return uid
    kernel.prctl(kernel.DUMPABLE, 1)  # else who we are in there could not be written down
    if kernel.enter_namespaces():
        uid = None
    child = os.fork()
    if child:
        if result is not None:
            os.close(result)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
    kernel.prctl(kernel.PDEATHSIG, signal.SIGKILL)
    kernel.build_root(cell.shown, cell.file)
    return uid


def lock(cell: Cell, uid: int | None) -> None:
    """No way back: limits, privileges, files, system calls."""
    kernel.set_limits(seconds=math.ceil(cell.seconds) + 1, memory_bytes=cell.memory, file_bytes=cell.file)
    kernel.drop_privileges(uid)
    kernel.prctl(kernel.PDEATHSIG, signal.SIGKILL)  # again: becoming somebody else has cleared it
    if cell.landlock and not cell.namespaces:
        kernel.restrict_files(cell.shown, cell.work)
    if cell.seccomp:
        kernel.deny_system_calls()


def be_program(parts: Parts, cell: Cell, uid: int | None, connection: socket.socket, output: int) -> NoReturn:
    """The program's process: from here on nothing is known of the tests, and nothing open but the socket."""
    try:
        program, is_script = parts.read(parts.program), parts.tests is None
        if is_script:
            given = os.memfd_create("input")
            os.write(given, parts.read(parts.stdin).encode())
            os.lseek(given, 0, os.SEEK_SET)
            os.dup2(given, 0)
            os.dup2(output, 1)
        connection = socket.socket(fileno=os.dup2(connection.detach(), 3))
        os.closerange(4, os.sysconf("SC_OPEN_MAX"))
        os.environ.clear()
        try:
            lock(cell, uid)
        except Exception as error:
            send(connection, described(error))
            raise
        send(connection, None)
        if is_script:
            connection.close()  # it has no use for one
            run_script(program)
        serve(connection, program)
    finally:
        os._exit(1)


def be_judge(
    parts: Parts, cell: Cell, child: int, connection: socket.socket, output: int, report: Callable[[Any], None]
) -> None:
    """The judge's process, once the program's is on its way."""

    def stop(*_: Any) -> None:
        raise ProgramError("took too long")

    signal.signal(signal.SIGALRM, stop)
    if parts.tests is not None:
        signal.setitimer(signal.ITIMER_REAL, cell.seconds + 0.2)  # for a test that does not end by itself
        run_tests(Program(connection, time.monotonic() + cell.seconds), json.loads(parts.read(parts.tests)), report)
        return
    signal.setitimer(signal.ITIMER_REAL, cell.seconds)
    try:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        why = f"ended with status {status}" if status else ""
    except ProgramError as problem:
        why = str(problem)
    if os.fstat(output).st_size > cell.output:
        why = "wrote too much"
    report({"output": os.pread(output, cell.output, 0).decode(errors="replace"), "why": why})
