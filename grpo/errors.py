"""Errors are for people: one line that says what was found and what is allowed, and an exit status that tells why.

0 done, 1 the run failed, 2 wrong input, 130 stopped by Ctrl-C. A traceback is a bug of ours.
"""

import contextlib
import difflib
import io
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn


class OneLineError(Exception):
    """Its message is one line for people: where it quotes a text of several, their ends are written as backslash n."""

    def __init__(self, message: str) -> None:
        super().__init__("\\n".join(message.splitlines()))


class InputError(OneLineError, ValueError):
    """Something the user gave is wrong; the exit status is 2."""


class RunError(OneLineError, RuntimeError):
    """The run itself failed; the exit status is 1."""


class NotFiniteError(RunError):
    """A loss or gradient that is no number: the same settings would lead there again."""


def unreadable(path: str | Path, error: OSError | UnicodeDecodeError) -> InputError:
    """The InputError for a file that cannot be read as text."""
    return InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}")


def did_you_mean(name: str, names: Iterable[str], *, prefix: str = "") -> str:
    """The end of an error message about an unknown name: the nearest known one, or nothing."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{found[0]}?" if found else ""


def missing_package(package: str, what: str) -> InputError:
    """The InputError for an optional package that is not installed; `what` needs it: "lora_rank: LoRA"."""
    return InputError(f"{what} need the package {package}: pip install {package}")


@contextlib.contextmanager
def errors_explained() -> Iterator[None]:
    """What is not a bug of ours ends in one line: wrong input with status 2, a failed run with 1, Ctrl-C with 130."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it was off during the imports
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show must not end the run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        _flush()
    except InputError as error:
        exit_with(error)
    except RunError as error:
        sys.exit(f"error: {error}")  # status 1
    except BrokenPipeError as error:  # all others that there may be are dealt with where they are
        sys.exit(f"error: {_not_printed(error)}")
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        with contextlib.suppress(RunError):
            _flush()  # what comes too late for a message of its own must not change the exit status


def _flush() -> None:
    """Print what is still to be printed; where that fails it is dropped, or Python would fail at it once more."""
    if sys.stdout is None:  # closed when this was started
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise RunError(_not_printed(error)) from error


def _not_printed(error: OSError) -> str:
    return f"standard output cannot be written to: {error.strerror}"


def exit_with(error: InputError) -> NoReturn:
    """One line for people, exit status 2."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
