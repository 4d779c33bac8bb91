"""Process-level support for a run: folder lock, graceful Ctrl-C, and provenance (command, commit, versions)."""

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
except ImportError:  # Windows has no fcntl, so two runs in one folder are not detected
    fcntl = None  # type: ignore[assignment]


def acquire_lock(folder: Path) -> IO[str] | None:
    """Take an exclusive lock, which the system releases when the process ends. None if locks are not supported."""
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
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # some cluster file systems have no locks
                raise
            lock.close()
            return None
        if path.exists() and os.fstat(lock.fileno()).st_ino == path.stat().st_ino:
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            return lock
        lock.close()  # the file was deleted before it was locked, so try again


@contextmanager
def signals_ask(request_stop: Callable[[], bool]) -> Iterator[None]:
    """Make SIGINT and SIGTERM call `request_stop`. If it returns False, KeyboardInterrupt is raised."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield
        return

    def ask(signal_number: int, frame: FrameType | None) -> None:
        if not request_stop():
            raise KeyboardInterrupt
        # print would fail if the signal interrupts a write to the same stream, so os.write is used.
        os.write(2, b"\nstopping: this step will be finished and saved; Ctrl-C again stops at once\n")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def origin() -> dict[str, Any]:
    """Provenance of a run: command, commit, versions."""
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
    """The git commit of this project. None if it is not a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
