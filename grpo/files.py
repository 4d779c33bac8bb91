"""Files that are whole or absent, whenever the process is killed; and JSON lines.

A reader never finds half a file here: text and folders are written under a hidden name and renamed when they are
complete and on disk.
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
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def complete_folder(folder: Path, *, replace: bool = True) -> Iterator[Path]:
    """Write into the folder this yields; at the end it takes the name `folder`, on disk to the last byte.

    An earlier `folder` is replaced, or kept where `replace` is false (another process was faster).

    Raises:
        RunError: it could not be written; an earlier `folder` is untouched.
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
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        raise RunError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        for leftover in (unfinished, earlier):
            shutil.rmtree(leftover, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """A text file, replaced in one go; a RunError if it cannot be written."""
    unfinished = _unfinished(path)
    try:
        unfinished.write_text(text, encoding="utf-8")
        sync(unfinished)
        unfinished.replace(path)
        sync(path.parent)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from error


def remove_folder(folder: Path) -> None:
    """Delete a folder that vanishes under its name at once: a process killed meanwhile leaves no half of it."""
    doomed = _unfinished(folder).with_suffix(".deleted.unfinished")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def files_in(folder: Path) -> list[Path]:
    """All of them, also those of subfolders: a tokenizer with several chat templates has one."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unfinished(path: Path) -> Path:
    """A hidden neighbour to write into; what a killed process leaves under such a name is removed by the next run."""
    return path.with_name(f".{path.name}.{os.getpid()}.unfinished")


def append_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to a file, one JSON object a line."""
    try:
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:  # half a surrogate pair: \\ud83d
            file.write(to_jsonl(rows))
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from error


def to_jsonl(rows: Sequence[dict[str, Any]]) -> str:
    """One JSON object a line; NaN becomes null, which is JSON."""
    return "".join(_to_json(row) + "\n" for row in rows)


def _to_json(row: dict[str, Any]) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False)
    except ValueError:  # there is a NaN in it: rare, so looked for only then
        return json.dumps(without_nan(row), ensure_ascii=False)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `append_jsonl` wrote. A last line without its end is still being written: left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # not splitlines, which splits at U+2028 too
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:  # also a number of thousands of digits, thousands of brackets
            raise InputError(f"{path}, line {number}: not JSON: {error}") from error
    return rows


def without_nan(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
