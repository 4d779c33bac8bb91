"""The datasets of a run: train_file and eval_file, or the entries of `datasets` with their weights and rewards.

    datasets:
      - {path: data/gsm8k_train.jsonl, eval_path: data/gsm8k_test.jsonl, weight: 3}
      - {path: openai/gsm8k:main:train, name: hub, weight: 1, system_prompt: Be brief., rewards: [boxed]}

Nothing here imports torch or opens a file.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.errors import InputError, did_you_mean
from grpo.settings.rules import one_of, shown


@dataclass(frozen=True)
class Source:
    """One dataset of a run."""

    path: str  # training data
    eval_path: str | None  # held-out data; None: none
    rewards: list[Any]  # of its completions, as in the config
    name: str | None = None  # None: the run has no other dataset
    weight: float = 1.0  # its share of an epoch, relative to the other weights or as a percentage of total_rows
    system_prompt: str | None = None
    prompt_column: str = "prompt"
    answer_column: str = "answer"


TEXTS = ("path", "eval_path", "name", "system_prompt", "prompt_column", "answer_column")
ENTRY_KEYS = (*TEXTS, "weight", "percentage", "rewards")


def sources_of(settings: Mapping[str, Any]) -> list[Source]:
    """The datasets that the settings of a config name.

    Raises:
        InputError: an entry of `datasets` is wrong; the message says which and why.
    """
    common = {key: settings[key] for key in ("system_prompt", "prompt_column", "answer_column", "rewards")}
    if settings["datasets"] is None:
        return [Source(path=settings["train_file"], eval_path=settings["eval_file"], **common)]
    sources = [_source(entry, number, common) for number, entry in enumerate(settings["datasets"], start=1)]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f'datasets: the name "{name}" is used {names.count(name)} times. Give each dataset a unique name.'
            )
    if all(source.eval_path is None for source in sources):
        raise InputError(
            "datasets: no entry has an eval_path, so there is nothing to evaluate on. Add one to an entry."
        )
    _check_shares(settings["datasets"], settings["total_rows"])
    return sources


def _source(entry: Any, number: int, common: dict[str, Any]) -> Source:
    where = f"datasets, entry {number}"
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise InputError(f"{where}: {shown(entry)} has no path. Write {{path: …, eval_path: …, weight: …}}.")
    for key, value in entry.items():
        if key not in ENTRY_KEYS:
            hint = did_you_mean(str(key), ENTRY_KEYS)
            raise InputError(f"{where}: {key}: not a key of a dataset{hint or f'. Use {one_of(ENTRY_KEYS)}.'}")
        if key in TEXTS and not isinstance(value, str):
            raise InputError(f"{where}: {key}: {shown(value)} is not a text. Put it in quotes.")
        if key == "name" and not re.fullmatch(r"[\w.-]+", value):
            raise InputError(
                f"{where}: name: {shown(value)} has other characters than letters, digits, _ . and -. Rename it."
            )
        if key in ("weight", "percentage"):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(f"{where}: {key}: {shown(value)} is not a number. Use one above 0, such as 2.")
            if not (0 < value < math.inf):
                raise InputError(f"{where}: {key}: {shown(value)} is out of range. Use a finite number above 0.")
        if key == "rewards" and not (isinstance(value, list | str) and value):
            raise InputError(f"{where}: rewards: {shown(value)} is not a list of rewards. Use a list such as [math].")
    own = {key: value for key, value in entry.items() if key not in ("weight", "percentage")}
    if isinstance(own.get("rewards"), str):
        own["rewards"] = [own["rewards"]]
    weight = float(entry["weight"] if "weight" in entry else entry.get("percentage", 1.0))
    return Source(**({"eval_path": None, "name": Path(entry["path"]).stem} | common | own), weight=weight)


def _check_shares(entries: list[dict[str, Any]], total_rows: int | None) -> None:
    """Check that all entries have a weight (1 if it is missing), or all have a percentage of total_rows."""
    counts = [sum(key in entry for entry in entries) for key in ("weight", "percentage")]
    if counts[1] == 0:
        return
    if counts[1] < len(entries) or counts[0] > 0:
        raise InputError(
            "datasets: an entry has no percentage, or also a weight. Use percentages in all entries, or weights in all."
        )
    if total_rows is None:
        raise InputError(
            "total_rows: null, but datasets have a percentage, which is a share of total_rows. Set total_rows."
        )
    total = sum(entry["percentage"] for entry in entries)
    if not math.isclose(total, 100, abs_tol=1e-6):
        raise InputError(f"datasets: the percentages add up to {total:g}. Change them to add up to 100.")
