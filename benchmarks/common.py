"""Shared code of the measurements: interleaved timing, peak memory in fresh processes, result files.

Times on a busy machine are noisy, so the candidates take turns and their medians are compared. The peak memory of a
process never decreases, so each peak is measured in a fresh process. Each result is stored with the commit and the
fingerprint of the code. When a script is started again, it measures only what is missing or was measured with other
code.
"""

import ast
import contextlib
import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def interleaved(candidates: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """The seconds of every call. The candidates take turns, after one call of each that is not measured."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for candidate in candidates.values():
        candidate()
    for _ in range(repeats):
        for name, candidate in candidates.items():
            synchronize()
            start = time.perf_counter()
            candidate()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize() -> None:
    """Wait until the GPU has finished, because it works asynchronously."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Summarise a list of times for a result file: median, quartiles and n."""
    ordered = sorted(seconds)
    quarter = (len(ordered) - 1) // 4
    return {
        "median": statistics.median(ordered),
        "quartile_low": ordered[quarter],
        "quartile_high": ordered[-1 - quarter],
        "n": len(ordered),
    }


def run_watched(command: Sequence[str], *, stdout: IO[str], stderr: IO[str]) -> tuple[int, float, float]:
    """Run `python *command`. Returns its exit status, its seconds and its peak memory in GB.

    ru_maxrss, the kernel's value for a finished process, cannot be used, because it starts at the peak of the parent
    process. So the peak is read from /proc (Linux) while the process is running.
    """
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=stdout, stderr=stderr)
    peak = 0.0
    while process.poll() is None:
        with contextlib.suppress(OSError):  # the process may have ended
            peak = max(peak, peak_memory_gb(process.pid))
        time.sleep(0.01)
    return process.returncode, time.perf_counter() - start, peak


def peak_memory_gb(process: int | str = "self") -> float:
    """The peak memory of a process so far in GB, as the kernel reports it (only on Linux)."""
    return _kilobytes(f"/proc/{process}/status", "VmHWM") * 1024 / 1e9


def forget_peak() -> float:
    """Reset the peak memory of this process. Returns the memory that it uses now, in GB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory_gb()


def available_memory_gb() -> float:
    """The memory in GB that is available without swapping."""
    return _kilobytes("/proc/meminfo", "MemAvailable") * 1024 / 1e9


def _kilobytes(file: str, name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB", Path(file).read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def in_fresh_process(module: str, *arguments: str) -> dict[str, Any]:
    """Run `python -m module *arguments`. Returns the JSON object of its last line, with peak_memory_gb and seconds."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        status, seconds, peak = run_watched(["-m", module, *arguments], stdout=out, stderr=err)
        out.seek(0)
        err.seek(0)
        if status:
            raise RuntimeError(f"python -m {module} {' '.join(arguments)} failed:\n{err.read()[-2000:]}")
        return {"peak_memory_gb": peak, "seconds": seconds, **json.loads(out.read().splitlines()[-1])}


class Results:
    """benchmarks/results/NAME.json: {"machine": …, "parts": {part: {"fingerprint": …, "commit": …, …}}}."""

    def __init__(
        self, script: str | Path, *, name: str | None = None, folder: Path = RESULTS, data: Sequence[Path] = ()
    ) -> None:
        """`script`: the measuring script, whose name is the default `name`; `data`: further files that results need."""
        self.path = folder / f"{name or Path(script).stem}.json"
        self.fingerprint = fingerprint(Path(script), data)
        self.script, self.data = Path(script), data
        self.content = json.loads(self.path.read_text()) if self.path.is_file() else {"parts": {}}

    @property
    def parts(self) -> dict[str, Any]:
        return self.content["parts"]

    def has(self, part: str) -> bool:
        """Whether this part was measured with the current code."""
        return part in self.parts and self.parts[part]["fingerprint"] == self.fingerprint

    def save(self, part: str, result: dict[str, Any]) -> None:
        """Store the result of a part. Exits if the code has changed, because it is then unclear what was measured."""
        if fingerprint(self.script, self.data) != self.fingerprint:
            raise SystemExit("The code changed during the measurement; start again")
        self.content["machine"] = machine()
        self.parts[part] = {"fingerprint": self.fingerprint, "commit": commit(), **result}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.content, indent=1) + "\n")
        unfinished.replace(self.path)


def code_of(file: Path) -> str:
    """The code of a file without comments and docstrings, on which no result depends."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


def fingerprint(script: Path, data: Sequence[Path] = ()) -> str:
    """A hash of everything that a result depends on: the code, the settings, the script and the files that it reads."""
    code = [*ROOT.glob("grpo/**/*.py"), *ROOT.glob("*.py"), ROOT / "benchmarks" / "common.py"]
    texts = [code_of(file) for file in [*sorted(code), script]]
    texts += [file.read_text(encoding="utf-8") for file in [ROOT / "config.yaml", *data]]
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]


def commit() -> str:
    """The current commit, with a suffix if tracked files differ from it."""
    head = git("rev-parse", "HEAD")
    return head + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def machine() -> dict[str, Any]:
    """The machine and the library versions with which the numbers were measured."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
