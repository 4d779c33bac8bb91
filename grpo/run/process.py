"""What a run wants of its process: a lock on its folder, signals that ask before they kill, and by what it was made."""

import errno
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch
import transformers

from grpo.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder go unnoticed there
    fcntl = None  # type: ignore[assignment]


def acquire_lock(folder: Path) -> IO[str] | None:
    """An exclusive lock that the system releases when its process ends, however it ends; None where there is none."""
    if fcntl is None:
        return None
    path = folder / ".lock"
    while True:
        lock = path.open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise InputError(f"output_dir: {folder} is in use by another run (process {holder})") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # some file systems of clusters have no locks
                raise
            lock.close()
            return None
        if path.exists() and os.fstat(lock.fileno()).st_ino == path.stat().st_ino:
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            return lock
        lock.close()  # deleted in between: this would be a lock on nothing


@contextmanager
def signals_ask(request_stop: Callable[[], bool]) -> Iterator[None]:
    """SIGINT and SIGTERM call `request_stop`; where that returns False they raise KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield
        return

    def ask(signal_number: int, frame: FrameType | None) -> None:
        if not request_stop():
            raise KeyboardInterrupt
        # Not print: a handler may interrupt a write to the same stream, which Python refuses to nest.
        os.write(2, b"\nstopping: this step will be finished and saved; Ctrl-C again stops at once\n")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def origin() -> dict[str, Any]:
    """By what this run is made: command, commit, versions."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _commit() -> str | None:
    """The commit of this project's checkout; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
