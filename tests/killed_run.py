"""One run that is killed with SIGKILL again and again, then left to finish.

    python -m tests.killed_run SETTINGS.json --kills 40 --seed 0

Each life is forked from this process, which has imported everything but has run no tensor operation (after OpenMP has
worked, a forked child hangs). A life is killed at a random moment: some time after it began or after it wrote a row.
Saving is slowed down, so that many of these moments fall inside it. Prints what happened as JSON.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import grpo.files
import grpo.run.checkpoint
import grpo.run.plots
import train_grpo
from grpo.errors import errors_explained
from grpo.settings.config import Options, load_config, resumed_config


def live(settings: dict[str, Any], folder: Path, *, slowly: bool) -> None:
    """What `python train_grpo.py` does, with --resume once there is a run to go on with."""
    grpo.run.plots._save = lambda figure, path: None  # pictures take longer than these steps
    if slowly:
        slow_down_saving()
    overrides = [f"{key}={value}" for key, value in {**settings, "output_dir": folder}.items()]
    with errors_explained():
        if (folder / "run.json").is_file():
            train_grpo.main(resumed_config(None, [f"output_dir={folder}"]), Options(resume=True))
        else:
            train_grpo.main(load_config(None, overrides))


def slow_down_saving() -> None:
    """Some milliseconds before every file is on disk, and around every change of a name: 50 ms or more a step."""
    sync, rename = grpo.files.sync, Path.rename

    def slow_sync(path: Path) -> None:
        time.sleep(0.003)
        sync(path)

    def slow_rename(path: Path, target: Path) -> Path:
        time.sleep(0.01)
        renamed = rename(path, target)
        time.sleep(0.01)
        return renamed

    grpo.files.sync = grpo.run.checkpoint.sync = slow_sync
    Path.rename = slow_rename


def begin(settings: dict[str, Any], folder: Path, *, slowly: bool) -> int:
    """Fork a life; returns its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # standard output is for the report
            live(settings, folder, slowly=slowly)
            status = 0
        except SystemExit as exit:
            status = exit.code if isinstance(exit.code, int) else 1
        finally:
            os._exit(status)
    return child


def num_rows(folder: Path) -> int:
    """Whole lines of metrics.jsonl."""
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, help="JSON, settings of the run; output_dir is the run's folder")
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    settings = json.loads(arguments.settings.read_text())
    folder, draw = Path(settings["output_dir"]), random.Random(arguments.seed)

    inside_a_save, after_rows = 0, []
    for _ in range(arguments.kills):
        awaited = num_rows(folder) + draw.choice([0, 1, 2])
        child = begin(settings, folder, slowly=True)
        patience = time.monotonic() + 60
        while num_rows(folder) < awaited:
            time.sleep(0.002)
            if time.monotonic() > patience:
                sys.exit("no row was written within a minute")
        time.sleep(draw.uniform(0, 0.25))
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            sys.exit("the run ended before it was killed")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        inside_a_save += any(folder.glob(".*.unfinished"))
        after_rows.append(num_rows(folder))
    _, status = os.waitpid(begin(settings, folder, slowly=False), 0)
    print(json.dumps({"status": status, "inside_a_save": inside_a_save, "after_rows": after_rows}))


if __name__ == "__main__":
    main()
