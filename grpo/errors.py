"""Errors with a one-line message that says what is wrong and what to do, and an exit status for each kind of error.

Exit statuses: 0 success, 1 the run failed, 2 wrong input, 130 stopped by Ctrl-C. A traceback means a bug in this code.
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
    """An error whose message is one line. Line breaks in quoted text are shown as a backslash and n."""

    def __init__(self, message: str) -> None:
        super().__init__("\\n".join(message.splitlines()))


class InputError(OneLineError, ValueError):
    """The user's input is wrong. The exit status is 2."""


class RunError(OneLineError, RuntimeError):
    """The run failed. The exit status is 1."""


class NotFiniteError(RunError):
    """The loss or the gradient is NaN or inf. Running again with the same settings would give the same error."""


def unreadable(path: str | Path, error: OSError | UnicodeDecodeError) -> InputError:
    """The InputError for a file that cannot be read as text."""
    return InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}")


def did_you_mean(name: str, names: Iterable[str], *, prefix: str = "") -> str:
    """A "did you mean" suffix for an error about an unknown name. Empty if no known name is similar."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{found[0]}?" if found else ""


def missing_package(package: str, what: str) -> InputError:
    """The InputError for a missing optional package. `what` is the feature that needs it, such as "lora_rank: LoRA"."""
    return InputError(f"{what} need the package {package}: pip install {package}")


@contextlib.contextmanager
def errors_explained() -> Iterator[None]:
    """Turn expected errors into one line and an exit status: 2 for wrong input, 1 for a failed run, 130 for Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C was disabled during the imports
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
    except BrokenPipeError as error:  # every other OSError is handled where it occurs
        sys.exit(f"error: {_not_printed(error)}")
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        with contextlib.suppress(RunError):
            _flush()  # an error this late must not change the exit status


def _flush() -> None:
    """Flush standard output. If this fails, discard the rest, or Python would fail again when it exits."""
    if sys.stdout is None:  # standard output was closed before the program started
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise RunError(_not_printed(error)) from error


def _not_printed(error: OSError) -> str:
    return f"standard output cannot be written to: {error.strerror}"


def exit_with(error: InputError) -> NoReturn:
    """Print the error as one line and exit with status 2."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
