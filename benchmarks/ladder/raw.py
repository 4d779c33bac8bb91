"""Compress the metrics of all runs into one file: selected columns, four significant digits.

    {"grpo seed 0": {"step": [0, 1, ...], "eval/accuracy": [0.2, null, ...], ...}, ...}

python -c "import json, lzma; print(list(json.load(lzma.open('benchmarks/results/ladder_metrics.json.xz'))))"
"""

import json
import lzma
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.ladder.measure import fingerprint_of
from grpo.files import read_jsonl

RAW = RESULTS / "ladder_metrics.json.xz"
COLUMNS = (
    "step", "num_completions", "reward", "eval/accuracy", "eval/mean_length", "completions/mean_length",
    "frac_reward_zero_std", "entropy", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "grad_norm", "step_time",
)  # fmt: skip

Columns = dict[str, list[float | None]]


def columns_of(rows: Sequence[dict[str, Any]]) -> Columns:
    """Convert rows of metrics.jsonl to columns, with null if a row lacks a number.

    >>> columns_of([{"step": 0, "eval/accuracy": 0.2}, {"step": 1, "reward": 0.123456}])
    {'step': [0, 1], 'reward': [None, 0.1235], 'eval/accuracy': [0.2, None]}
    """
    present = [name for name in COLUMNS if any(name in row for row in rows)]
    return {name: [_rounded(row.get(name)) for row in rows] for name in present}


def _rounded(value: float | None) -> float | None:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def read_raw(path: Path = RAW) -> dict[str, Columns]:
    """The columns of each part."""
    return json.loads(lzma.decompress(path.read_bytes())) if path.is_file() else {}


def pack(parts: Mapping[str, Any], work: Path, path: Path = RAW) -> None:
    """Write the metrics of the runs of these results to the file.

    A run in `work` is used only if it is the run of the result. (It is not if the run is being repeated.) Otherwise the
    file keeps the metrics that it has. Metrics of failed runs are not kept.
    """
    before = read_raw(path)
    packed = {}
    for name, part in parts.items():
        if "metrics_sha256" not in part:
            continue
        metrics = work / name.replace(" ", "-") / "metrics.jsonl"
        rows = read_jsonl(metrics) if metrics.is_file() else []
        if fingerprint_of(rows) == part["metrics_sha256"]:
            packed[name] = columns_of(rows)
        elif name in before:
            packed[name] = before[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(json.dumps(packed, separators=(",", ":")).encode(), preset=9))
