"""Errors are for people: one line that says what is wrong and what to do, and an exit status that says who failed.

0: done. 1: the run failed. 2: wrong input. 130: stopped by Ctrl-C. A traceback is a bug in this project.
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
    """An error whose message is one line. Line breaks in a quoted text are written as backslash n."""

    def __init__(self, message: str) -> None:
        super().__init__("\\n".join(message.splitlines()))


class InputError(OneLineError, ValueError):
    """Wrong input from the user. The exit status is 2."""


class RunError(OneLineError, RuntimeError):
    """The run itself failed. The exit status is 1."""


class NotFiniteError(RunError):
    """A loss or gradient is NaN or infinite. Running again with the same settings gives the same result."""


def unreadable(path: str | Path, error: OSError | UnicodeDecodeError) -> InputError:
    """The InputError for a file that cannot be read as text."""
    return InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}")


def did_you_mean(name: str, names: Iterable[str], *, prefix: str = "") -> str:
    """The end of an error message about an unknown name: the known name with the nearest spelling, or nothing."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{found[0]}?" if found else ""


def missing_package(package: str, what: str) -> InputError:
    """The InputError for an optional package that is not installed; `what` needs it: "lora_rank: LoRA"."""
    return InputError(f"{what} need the package {package}: pip install {package}")


@contextlib.contextmanager
def errors_explained() -> Iterator[None]:
    """End the process with one line, not a traceback: status 2 for wrong input, 1 for a failed run, 130 for Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the default action was set during the imports
    for stream in (sys.stdout, sys.stderr):  # a character that the terminal cannot show must not end the run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        _flush()
    except InputError as error:
        exit_with(error)
    except RunError as error:
        sys.exit(f"error: {error}")  # status 1
    except BrokenPipeError as error:  # standard output was closed; other pipes are handled where they are used
        sys.exit(f"error: {_not_printed(error)}")
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        with contextlib.suppress(RunError):
            _flush()  # an error at this point must not change the exit status


def _flush() -> None:
    """Flush standard output. If that fails, the rest is dropped, because Python would try again at exit."""
    if sys.stdout is None:  # it was closed when the process started
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise RunError(_not_printed(error)) from error


def _not_printed(error: OSError) -> str:
    return f"standard output cannot be written to: {error.strerror}"


def exit_with(error: InputError) -> NoReturn:
    """Print the error as one line and end the process with status 2."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
