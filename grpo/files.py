"""Atomic writes of files and folders, and JSON Lines.

Text files and folders are written under a hidden name. They are renamed when they are complete and on disk. So a
reader never sees a half-written file, even if the process is killed.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from grpo.errors import InputError, RunError


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as a hex string."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def complete_folder(folder: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary folder to write into. It is synced to disk and renamed to `folder` at the end.

    An existing `folder` is replaced. If `replace` is false, it is kept, because another process wrote it first.

    Raises:
        RunError: the folder could not be written. An existing `folder` is unchanged.
    """
    unfinished, earlier = _unfinished(folder), _unfinished(folder).with_suffix(".earlier.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
        for path in [*files_in(unfinished), *(path for path in unfinished.rglob("*") if path.is_dir()), unfinished]:
            sync(path)
        if replace and folder.is_dir():
            folder.rename(earlier)
        try:
            unfinished.rename(folder)
        except OSError:
            if earlier.is_dir():
                earlier.rename(folder)
            if replace or not folder.is_dir():
                raise
        sync(folder.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        # On a full disk, torch raises RuntimeError and safetensors raises SafetensorError.
        raise RunError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        for leftover in (unfinished, earlier):
            shutil.rmtree(leftover, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file, replacing an existing one atomically. Raises RunError if it cannot be written."""
    unfinished = _unfinished(path)
    try:
        unfinished.write_text(text, encoding="utf-8")
        sync(unfinished)
        unfinished.replace(path)
        sync(path.parent)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from error


def remove_folder(folder: Path) -> None:
    """Rename the folder, then delete it. So a half-deleted folder never has the original name."""
    doomed = _unfinished(folder).with_suffix(".deleted.unfinished")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def files_in(folder: Path) -> list[Path]:
    """All files, including those in subfolders. A tokenizer with several chat templates has a subfolder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unfinished(path: Path) -> Path:
    """A hidden temporary name in the same folder. The next run removes such files if a process was killed."""
    return path.with_name(f".{path.name}.{os.getpid()}.unfinished")


def append_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append rows to a file, one JSON object per line."""
    try:
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:  # lone surrogate -> \\ud83d
            file.write(to_jsonl(rows))
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from error


def to_jsonl(rows: Sequence[dict[str, Any]]) -> str:
    """One JSON object per line. NaN becomes null, because JSON has no NaN."""
    return "".join(_to_json(row) + "\n" for row in rows)


def _to_json(row: dict[str, Any]) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False)
    except ValueError:  # the row has a NaN or inf, which is rare, so it is searched only now
        return json.dumps(without_nan(row), ensure_ascii=False)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file written by `append_jsonl`. A last line without a newline is skipped: it is still being written."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # not splitlines, which also splits at U+2028
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:  # includes numbers and nestings that are too long for Python
            raise InputError(f"{path}, line {number}: not JSON: {error}") from error
    return rows


def without_nan(value: Any) -> Any:
    """A copy of the value with None instead of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
