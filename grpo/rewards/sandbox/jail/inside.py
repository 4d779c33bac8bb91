"""The inside of a sandbox: a judge and, in a separate process, the program. They share only a socket.

The tests never enter the program's process. The judge runs them. When a test calls a function of the program, a stub
sends the name and the arguments through the socket and receives the result as plain data (None, numbers, texts, bytes,
lists, tuples, sets, dicts). The program may patch anything in its process, exit at any time, return an object that
claims to equal everything, or write to the socket itself. All of this can only produce an answer, and only the correct
answer passes. The program cannot know the correct answer, because its process was forked before the judge read the
tests.
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
MAX_MESSAGE = 1 << 20  # bytes per message between judge and program
JUDGE_MEMORY = 1 << 29  # minimum memory limit of the judge in bytes; any answer of the program must fit


class ProgramError(Exception):
    """The program gave no valid answer: it ended, took too long, or sent an invalid message."""


# Plain data


def pack(value: Any) -> Any:
    """Convert plain data to JSON data. Numbers and texts stay unchanged; other values become [kind, ...].

    >>> pack([1, (2.5, "x")])
    ['list', 1, ['tuple', 2.5, 'x']]
    """
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return ["int", hex(value)]  # hexadecimal, because Python refuses decimal texts of thousands of digits
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
    """The inverse of `pack`. Raises a ValueError for a JSON object, which `pack` never produces.

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
    """Send one message: its length in 4 bytes, then JSON."""
    text = json.dumps(message).encode()
    if len(text) > MAX_MESSAGE:
        raise ValueError(f"more than {MAX_MESSAGE} bytes")
    connection.sendall(len(text).to_bytes(4, "big") + text)


def receive(connection: socket.socket) -> Any:
    """Receive the next message. Raises an EOFError if the connection has ended."""

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
    """Type and message of an error in one short line: "ValueError: too large"."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


# The program's side


def serve(connection: socket.socket, program: str) -> None:
    """Run the program as a module, then answer requests for the values of names and for the results of calls."""
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
    """The description of a value for the judge: a constant is sent; a function (or other value) can only be called."""
    if callable(value):
        return {"function": True}
    try:
        return {"value": pack(value)}
    except (TypeError, RecursionError):
        return {"function": True}


def _short(arguments: tuple[Any, ...]) -> Any:
    """The arguments of an exception, packed if they are plain and short; otherwise none."""
    try:
        packed = pack(arguments)
        return packed if len(json.dumps(packed)) < 1000 else pack(())
    except (TypeError, ValueError, RecursionError):
        return pack(())


def run_script(program: str) -> NoReturn:
    """Run the program as a script that writes to standard output, then exit with its status."""
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
    """The names that a test uses but that neither Python nor the test defines. The program must define them.

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
    """The judge's connection to the program, valid until `deadline` (of time.monotonic)."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self.connection, self.deadline = connection, deadline

    def ask(self, message: Any) -> Any:
        """Send a message (None: send nothing) and return the answer. Raises a ProgramError if there is none."""
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
        """Those of the names that the program defines: functions as stubs, constants as their values."""
        found = self.ask({"names": wanted})
        return {
            name: unpack(found[name]["value"]) if "value" in found[name] else self.function(name)
            for name in wanted
            if name in found
        }

    def function(self, name: str) -> Callable[..., Any]:
        """A stub, which calls the function of this name in the program's process."""

        def call(*args: Any, **kwargs: Any) -> Any:
            answer = self.ask({"call": name, "args": pack(args), "kwargs": pack(kwargs)})
            if "result" in answer:
                return unpack(answer["result"])
            kind: Any = getattr(builtins, str(answer["raised"]), None)
            if not (isinstance(kind, type) and issubclass(kind, Exception)) or "Iteration" in kind.__name__:
                kind = RuntimeError  # unknown to the judge, or could end the judge or a loop of the test (PEP 479)
            try:
                error = kind(*unpack(answer["args"]))
            except TypeError:  # this type needs other arguments
                error = RuntimeError(kind.__name__)
            raise error

        return call


def run_tests(program: Program, tests: list[str], report: Callable[[dict[str, Any]], None]) -> None:
    """Run each test with its own global names. Report at once whether it passed, and otherwise why not."""
    try:
        error = program.ask(None)
    except ProgramError as problem:
        error = str(problem)
    for test in tests:
        why = str(error or "")
        if not why:
            try:
                names = {"__name__": "tests", **program.names(names_of_program(test))}
                exec(compile(test, "<test>", "exec"), names)  # code of the dataset, also inside the sandbox
            except BaseException as problem:
                # Only the type of an error is reported, because its message may contain the expected value.
                why = str(problem) if isinstance(problem, ProgramError) else type(problem).__name__
        report({"passed": not why, "why": why[:200]})


# Judge and program: building the sandbox


@dataclass(frozen=True)
class Cell:
    """The settings of one sandbox."""

    namespaces: bool  # whether to use this protection, as the next two
    landlock: bool
    seccomp: bool
    shown: list[str]  # readable folders: the standard library, and the libraries that Python is linked with
    work: str  # without namespaces: the writable folder, created by `enter`; with namespaces it is an empty /tmp
    seconds: float  # of wall clock
    memory: int  # in bytes
    file: int  # in bytes; per file, or with namespaces for all files together
    output: int  # in bytes


@dataclass(frozen=True)
class Parts:
    """The texts of a job as (offset, length) in one open file. So each process reads only the texts that it needs."""

    file: int  # descriptor
    program: tuple[int, int]
    tests: tuple[int, int] | None  # a JSON list; None: the program is a script
    stdin: tuple[int, int]  # the standard input of a script

    def read(self, part: tuple[int, int]) -> str:
        offset, length = part
        return os.pread(self.file, length, offset).decode()


def run_job(parts: Parts, cell: Cell, result: int) -> NoReturn:
    """Run judge and program of one job. The judge writes to the descriptor `result`, one JSON object per line."""

    def report(line: dict[str, Any]) -> None:
        os.write(result, json.dumps(line).encode() + b"\n")

    try:
        for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # so that a program cannot end its judge with them
        os.setpgid(0, 0)
        file, result = keep_open(parts.file, result)
        parts = replace(parts, file=file)
        uid = enter(cell, result)
        kernel.prctl(kernel.DUMPABLE, 0)  # other processes cannot read the judge's memory or descriptors
        judge_end, program_end = socket.socketpair()
        output = os.memfd_create("output")
        child = os.fork()
        if child == 0:
            be_program(parts, cell, uid, program_end, output)
        program_end.close()
        lock(replace(cell, memory=max(cell.memory, JUDGE_MEMORY)), uid)
        problem = receive(judge_end)  # why the program's process could not be locked, or None; the program has not run
        if problem is None:
            be_judge(parts, cell, child, judge_end, output, report)
        else:
            report({"failed": problem})
    except ProgramError:
        pass  # the time limit was reached during a report
    except BaseException as error:
        report({"failed": described(error)})
    finally:
        os._exit(0)


def keep_open(*descriptors: int) -> list[int]:
    """Close all other descriptors, and replace standard input, output and error by /dev/null."""
    highest = os.sysconf("SC_OPEN_MAX")
    null = os.open("/dev/null", os.O_RDWR)
    copies = [fcntl.fcntl(number, fcntl.F_DUPFD, 3 + len(descriptors)) for number in (*descriptors, null)]
    for target in range(3):
        os.dup2(copies[-1], target)
    kept = [os.dup2(copy, target) for target, copy in enumerate(copies[:-1], start=3)]
    os.closerange(3 + len(kept), highest)
    return kept


def enter(cell: Cell, result: int | None = None) -> int | None:
    """Enter the sandbox. With namespaces, this returns only in their first process; when it ends, all others end.

    Returns the user id to change to inside the sandbox; None: keep the current one.
    """
    kernel.prctl(kernel.PDEATHSIG, signal.SIGKILL)
    uid = NOBODY if os.geteuid() == 0 else None
    if not cell.namespaces:
        if cell.landlock and cell.seccomp:
            uid = None  # both also restrict root, and a standard library in root's home must stay readable
        os.mkdir(cell.work, 0o700)
        if uid is not None:
            os.chown(cell.work, uid, uid)
        os.chdir(cell.work)
        return uid
    kernel.prctl(kernel.DUMPABLE, 1)  # needed to write /proc/self/uid_map
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
    """Irreversibly restrict this process: limits, privileges, files, system calls."""
    kernel.set_limits(seconds=math.ceil(cell.seconds) + 1, memory_bytes=cell.memory, file_bytes=cell.file)
    kernel.drop_privileges(uid)
    kernel.prctl(kernel.PDEATHSIG, signal.SIGKILL)  # again, because changing the user id has cleared it
    if cell.landlock and not cell.namespaces:
        kernel.restrict_files(cell.shown, cell.work)
    if cell.seccomp:
        kernel.deny_system_calls()


def be_program(parts: Parts, cell: Cell, uid: int | None, connection: socket.socket, output: int) -> NoReturn:
    """Run the program's process. It knows nothing about the tests, and its only open descriptor is the socket."""
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
            connection.close()  # a script does not need the connection
            run_script(program)
        serve(connection, program)
    finally:
        os._exit(1)


def be_judge(
    parts: Parts, cell: Cell, child: int, connection: socket.socket, output: int, report: Callable[[Any], None]
) -> None:
    """Run the judge's process, after the program's process has been started."""

    def stop(*_: Any) -> None:
        raise ProgramError("took too long")

    signal.signal(signal.SIGALRM, stop)
    if parts.tests is not None:
        signal.setitimer(signal.ITIMER_REAL, cell.seconds + 0.2)  # stops a test with an endless loop
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
