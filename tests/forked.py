"""pytest, run again and again, each time in a fork of this process, which loads the libraries once.

    python -P tests/forked.py LIBRARY ...

For every line of standard input, {"folder": ..., "tests": [...], "environment": {...}, "timeout": seconds}, the tests
are run in the folder, as `python -m pytest` would, up to the first that fails. The answer is a line: pytest's exit
status, less than 0 for the signal it died of, or null where it took too long. Nothing of the project is loaded here: it
would be another version than that in the folder.
"""

import importlib
import json
import os
import signal
import sys
import time
from typing import Any

STEP = 0.02  # seconds between two looks at a fork


def run_tests(request: dict[str, Any]) -> int:
    """In the fork."""
    import pytest

    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path.insert(0, request["folder"])
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    # The plugin writes down which test failed, and of what: tests/mutants.py of the folder.
    return pytest.main(["-x", "-q", "-p", "tests.mutants", "-o", "addopts=", *request["tests"]])


def answer(request: dict[str, Any]) -> int | None:
    """The exit status of a fork; None if its time was up."""
    process = os.fork()
    if process == 0:
        status = 3  # pytest's for an error of its own
        try:
            os.setsid()  # all that the tests start is killed with it
            status = run_tests(request)
        finally:
            os._exit(status)
    deadline, ended = time.monotonic() + request["timeout"], 0
    try:
        while not ended and time.monotonic() < deadline:
            time.sleep(STEP)
            ended, status = os.waitpid(process, os.WNOHANG)
    finally:
        if not ended:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status) if ended else None


if __name__ == "__main__":
    for library in sys.argv[1:]:
        importlib.import_module(library)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
