"""What a run writes down: run.json, metrics.jsonl, samples.jsonl."""

import dataclasses
import json
import math
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from grpo.config import Config, InputError
from grpo.data import Sample
from grpo.evaluation import Scored
from grpo.rollout import Rollout


def start_run(config: Config) -> Path:
    """Make the output folder and its run.json. A folder that holds an earlier run is moved aside, never mixed into."""
    folder = Path(config.output_dir)
    run = {
        "started": datetime.now().isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "settings": dataclasses.asdict(config),
    }
    try:
        if folder.is_dir() and any(folder.iterdir()):
            _move_aside(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"output_dir: {folder} cannot be used: {error.strerror}") from error
    return folder


def _move_aside(folder: Path) -> None:
    if not (folder / "run.json").is_file():
        raise InputError(f"output_dir: {folder} is not empty and holds no run; choose another folder")
    started = datetime.fromtimestamp((folder / "run.json").stat().st_mtime)  # it is written once, at the start
    aside = folder.resolve().with_name(f"{folder.resolve().name}-{started:%Y-%m-%dT%H-%M-%S}")
    while aside.exists():  # several runs within a second
        aside = aside.with_name(f"{aside.name}+")
    folder.rename(aside)
    print(f"The earlier run in {folder} now lies in {aside.name} beside it")


def _commit() -> str | None:
    """The commit of this project's checkout; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def append_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line; NaN becomes null, which is JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(_without_nan(row), ensure_ascii=False) + "\n" for row in rows)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class TokenMeans:
    """Means over unmasked tokens, across micro-batches: sums and counts, divided once at the end.

    A mean of micro-batch means would weigh tokens by the company they happen to keep. Everything stays on the device
    until `metrics()`, so adding waits for nothing.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)

    def add(self, mask: Tensor, values: dict[str, Tensor], maxima: Sequence[str] = ()) -> None:
        """`values`: metric name -> (b, C); `mask`: (b, C) bool. A name "x/mean" in `maxima` also gives "x/max"."""
        for name, value in values.items():
            kept = torch.where(mask, value.detach().float(), 0.0)
            self.sums[name] = self.sums.get(name, 0) + kept.sum()
            self.counts[name] = self.counts.get(name, 0) + mask.sum()
            if name in maxima:
                peak = name.replace("/mean", "/max")
                self.maxima[peak] = torch.maximum(self.maxima.get(peak, kept.max()), kept.max())

    def metrics(self) -> dict[str, float]:
        means = {name: (total / self.counts[name].clamp(min=1)).item() for name, total in self.sums.items()}
        return means | {name: value.item() for name, value in self.maxima.items()}


def sample_rows(
    step: int, samples: Sequence[Sample], rollout: Rollout, scores: Scored, advantages: Tensor
) -> list[dict[str, Any]]:
    """The lines of samples.jsonl for one step; `samples` are repeated per completion, `advantages` are (B, 1)."""
    rewards = {name: values.tolist() for name, values in scores.by_name.items()}
    combined, is_truncated = scores.combined.tolist(), rollout.is_truncated.tolist()
    advantage = advantages.squeeze(1).tolist()
    return [
        {
            "step": step,
            "prompt": sample["prompt"],
            "completion": rollout.completions[row],
            "answer": sample.get("answer"),
            "reward": combined[row],
            "rewards": {name: values[row] for name, values in rewards.items()},
            "advantage": advantage[row],
            "is_truncated": is_truncated[row],
        }
        for row, sample in enumerate(samples)
    ]
