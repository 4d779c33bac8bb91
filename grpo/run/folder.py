"""The folder of one run: locking, treatment of an earlier run, run.json, and the rows of metrics.jsonl.

run.json               settings, command, versions, commit, sha256 of the base's weights, three answers of the base
metrics.jsonl          one row per step
samples.jsonl          every completion with its rewards
high_scoring.jsonl     completions with a reward above save_threshold
training_curves.png    redrawn at every evaluation
step-000100/           a checkpoint to resume from; this folder, best/ and final/ are Hugging Face folders
"""

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.data import Dataset
from grpo.errors import InputError, NotFiniteError, RunError
from grpo.evaluation.greedy import Evaluation
from grpo.evaluation.preflight import side_by_side
from grpo.files import append_jsonl, read_jsonl, remove_folder, sha256, to_jsonl, write_atomically
from grpo.models.optimizer import learning_rate_at, with_num_steps
from grpo.models.saving import save_model
from grpo.run.checkpoint import check_integrity, checkpoints, step_of
from grpo.run.plots import draw_curves
from grpo.run.process import acquire_lock, origin, signals_ask
from grpo.run.records import high_scoring
from grpo.settings.config import Config, Options, documented_defaults, load_config, read_run_json
from grpo.settings.sources import sources_of

HIGH_SCORING = "high_scoring.jsonl"
# The files and folders that a run writes. --overwrite deletes only these names.
RUN_FILES = re.compile(
    r"run\.json|metrics\.jsonl|samples\.jsonl|high_scoring\.jsonl|training_curves\.png|best|final|step-\d+|failed-\d+\.(jsonl|safetensors)"
)


@dataclass
class RunFolder:
    """The folder of an active run, locked while the run is active.

    During training, the first Ctrl-C (or SIGTERM) sets `stop_requested`, and the run stops after the current step. A
    second Ctrl-C stops immediately. Before training, the first Ctrl-C stops immediately.
    """

    config: Config
    options: Options = Options()
    script: str = "train_grpo.py"  # the script that the user runs from the project's root
    facts: dict[str, Any] = field(default_factory=dict)  # contents of run.json
    rows: list[dict[str, Any]] = field(default_factory=list)  # rows of metrics.jsonl, step 0 first
    is_training: bool = False
    stop_requested: bool = False
    lock: IO[str] | None = None

    @property
    def path(self) -> Path:
        """`config.output_dir` as a path."""
        return Path(self.config.output_dir)

    @property
    def is_finished(self) -> bool:
        """Whether the run in the folder has finished."""
        return bool(self.facts.get("finished"))

    @property
    def holds_nothing(self) -> bool:
        """Whether the run in the folder was stopped before the end of its first step, so it can be deleted."""
        samples = self.path / "samples.jsonl"
        return not (self.is_finished or checkpoints(self.path) or (samples.is_file() and samples.stat().st_size))

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that --resume continues from. None: the run starts at step 0."""
        return next(reversed(checkpoints(self.path)), None) if self.options.resume else None

    def plan(self, epoch_size: int) -> Config:
        """The settings with num_train_epochs converted to steps. Exits if a resumed run already has all its steps."""
        self.config = with_num_steps(self.config, epoch_size)
        step, last_step = step_of(self.checkpoint) if self.checkpoint else 0, self.config.num_train_steps
        if self.options.resume and (step > last_step or (step == last_step and self.is_finished)):
            print(f"{self.path} is already at step {step}; --num_train_steps {last_step} asks for no more")
            sys.exit(0)
        return self.config

    def begin(self, **facts: Any) -> None:
        """Step 0: move or delete an earlier run, then write run.json with `facts`, settings and versions."""
        try:
            if (self.path / "run.json").is_file():
                self._make_room()
            _remove_unfinished(self.path)
        except OSError as error:
            raise InputError(f"output_dir: {self.path} cannot be used: {error.strerror}") from error
        data = {path: sha256(Path(path)) for path in data_files(self.config)}
        self._write_facts(
            {"started": _now(), "finished": None, **origin(), "data_sha256": data, **facts, "resumed": []}
        )
        self.is_training = True

    def resume(self, state: dict[str, Any]) -> None:
        """Continue after the checkpoint of `state`. Rows and samples written after that checkpoint are removed."""
        step, metrics, samples = state["step"], self.path / "metrics.jsonl", self.path / "samples.jsonl"
        try:
            rows = [row for row in read_jsonl(metrics) if row["step"] <= step]
            if [row["step"] for row in rows] != list(range(step + 1)):
                raise InputError(f"--resume: {metrics} is damaged: it should have a row for every step up to {step}")
            if samples.stat().st_size < state["samples_size"]:
                raise InputError(f"--resume: {samples} is damaged: it is shorter than it was at step {step}")
            self._write_rows(rows)
            os.truncate(samples, state["samples_size"])
            high = self.path / HIGH_SCORING
            if high.is_file():
                write_atomically(high, to_jsonl([row for row in read_jsonl(high) if row["step"] <= step]))
            self._forget_later_models(step)
            _remove_unfinished(self.path)
        except (OSError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise InputError(f"--resume: {metrics} or {samples} is damaged: {error}") from error
        self._say_where(step, load_config(recorded=self.facts["settings"]))
        resumed = [*self.facts.get("resumed", []), {"after_step": step, "at": _now(), **origin()}]
        self._write_facts(self.facts | {"finished": None, "resumed": resumed})
        self.is_training = True

    def amend(self, metrics: dict[str, float]) -> None:
        """Add metrics to the newest row."""
        self._write_rows([*self.rows[:-1], self.rows[-1] | metrics])

    def append(self, row: dict[str, Any], samples: Sequence[dict[str, Any]] = ()) -> None:
        """Append a row to metrics.jsonl and its completions to samples.jsonl."""
        append_jsonl(self.path / "samples.jsonl", samples)
        if self.config.save_threshold is not None:
            append_jsonl(self.path / HIGH_SCORING, high_scoring(samples, self.config.save_threshold))
        append_jsonl(self.path / "metrics.jsonl", [row])
        self.rows.append(row)

    def report(
        self, step: int, evaluation: Evaluation, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """After an evaluation: print a line, redraw the plot, and save best/ if the metric has a new maximum."""
        tqdm.write(f"step {step:4d}  {evaluation}")
        draw_curves(self.rows, self.path / "training_curves.png")
        metric = self.config.eval_metric
        value = evaluation.metrics().get(metric, math.nan)
        if value > (self._best() or {"value": -math.inf})["value"]:
            about = {"step": step, "metric": metric, "value": value}
            save_model(policy, tokenizer, self.path / "best", about=about)

    def status(self) -> dict[str, str]:
        """The newest metrics, for the progress bar."""
        shown = {
            "reward": ("reward", ".2f"),
            "accuracy": ("eval/accuracy", ".3f"),
            "length": ("completions/mean_length", ".1f"),
        }
        newest = {name: (self._newest(metric), form) for name, (metric, form) in shown.items()}
        return {name: f"{value:{form}}" for name, (value, form) in newest.items() if value is not None}

    def finish(self, evaluation: Evaluation, eval_set: Dataset) -> None:
        """Mark the run as finished, and print the result and the next command."""
        self._write_facts(self.facts | {"finished": _now()})
        before, after = self.rows[0], evaluation.metrics()
        metric = next(name for name in ("eval/accuracy", "eval/reward") if name in before and name in after)
        change = f"{_with_interval(before, metric)} -> {_with_interval(after, metric)}"
        print(f"\nHeld-out {metric.removeprefix('eval/')}: {change}, n = {len(eval_set)} ({eval_set.path})")
        for example in self.facts.get("examples", []):
            answers = {"base": example["completion"], "trained": evaluation.completions[example["index"]]}
            print(side_by_side(eval_set[example["index"]], answers))
        names = [path.name + "/" * path.is_dir() for path in sorted(self.path.iterdir()) if path.name[0] != "."]
        print(f"{self.path} holds {', '.join(names)}")
        models = [shlex.quote(str(name)) for name in (self.path / "final", self.config.model_name)]
        print(f"Next: python evaluate.py {models[0]} --compare {models[1]}")

    def _best(self) -> dict[str, Any] | None:
        """Step and metric value of best/. None if best/ does not exist or its about.json cannot be read."""
        try:
            about = json.loads((self.path / "best" / "about.json").read_text())
            return {"step": int(about["step"]), "value": float(about["value"])}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write_rows(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        write_atomically(self.path / "metrics.jsonl", to_jsonl(rows))

    def _forget_later_models(self, step: int) -> None:
        """Delete best/ and final/ if they are from after `step`. The resumed run writes them again."""
        best = self._best()
        for name in ("best", "final"):
            is_later = name == "final" or best is None or best["step"] > step
            if is_later and (self.path / name).is_dir():
                remove_folder(self.path / name)

    def _newest(self, metric: str) -> float | None:
        return next((row[metric] for row in reversed(self.rows) if metric in row), None)

    def _write_facts(self, facts: dict[str, Any]) -> None:
        settings = dataclasses.asdict(self.config)
        self.facts = facts | {
            "settings": {key: ".inf" if value == math.inf else value for key, value in settings.items()}
        }
        write_atomically(self.path / "run.json", json.dumps(self.facts, indent=2) + "\n")

    def _say_where(self, step: int, earlier: Config) -> None:
        """Print the step that a resumed run continues from, and any jump of the learning rate."""
        print(f"Going on after step {step} of {self.config.num_train_steps}")
        num_updates = step * earlier.num_iterations * earlier.num_minibatches
        before, now = (learning_rate_at(config, num_updates) for config in (earlier, self.config))
        if before != now:
            change = f"num_train_steps was {earlier.num_train_steps} and is {self.config.num_train_steps}"
            print(f"The learning rate jumps from {before:.3g} to {now:.3g}: {change}")

    def request_stop(self) -> bool:
        """Ask the run to stop after the current step. False: stop immediately (second request, or before training)."""
        if self.stop_requested or not self.is_training:
            return False
        self.stop_requested = True
        return True

    def how_to_go_on(self) -> str:
        """Text that says what is saved and which command continues from there."""
        saved = checkpoints(self.path)
        where = f"step {step_of(saved[-1])} is saved; to go on" if saved else "no step is saved yet; to begin again"
        return f"{where}: {self.command('--resume')}"

    def command(self, option: str) -> str:
        """The shell command that runs the script on this folder with `option`."""
        is_default = self.path == Path(documented_defaults()["output_dir"][0])
        return f"python {self.script} {option}" + ("" if is_default else f" --output_dir {shlex.quote(str(self.path))}")

    def _make_room(self) -> None:
        """Delete the earlier run in this folder if that was requested or no step was trained. Otherwise rename it."""
        if self.options.overwrite or self.options.resume or self.holds_nothing:
            # run.json is replaced later. If the process is killed here, the folder still holds a run with settings.
            for path in list(self.path.iterdir()):
                if RUN_FILES.fullmatch(path.name) and path.name != "run.json":
                    remove_folder(path) if path.is_dir() else path.unlink()
            return
        started = re.sub(r"[^0-9T-]", "-", str(self.facts.get("started")))  # file names must not contain colons
        folder = self.path.resolve()  # output_dir may be a symbolic link
        aside = folder.with_name(f"{folder.name}-{started}")
        while aside.exists():  # several runs started in the same second
            aside = aside.with_name(f"{aside.name}+")
        folder.rename(aside)  # the lock file is renamed with it
        print(f"The earlier run in {self.path} now lies in {aside.name} beside it")
        folder.mkdir()
        self.lock = acquire_lock(self.path)


@contextmanager
def open_folder(config: Config, options: Options, script: str = "train_grpo.py") -> Iterator[RunFolder]:
    """Lock `output_dir` for one run of `script`.

    Problems with the folder are reported before any work. If the run never starts, no files remain.

    Raises:
        InputError: the folder cannot be written, is in use, holds other files, or holds an unfinished run.
    """
    run = RunFolder(config, options, script)
    if options.dry_run or options.preflight:
        yield run
        return
    if Path.cwd().is_relative_to(run.path.resolve()):
        raise InputError(
            f"output_dir: got {config.output_dir}, expected a folder that can be moved aside, not this one"
        )
    model = Path(config.model_name).expanduser()
    if not options.resume and model.is_dir() and model.resolve().is_relative_to(run.path.resolve()):
        raise InputError(
            f"model_name: {model} lies in output_dir, which this run needs for itself; choose another output_dir"
        )
    missing = [path for path in (run.path, *run.path.parents) if not path.exists()]
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        run.lock = acquire_lock(run.path)
    except OSError as error:
        raise InputError(f"output_dir: {run.path} cannot be used: {error.strerror}") from error
    try:
        if (run.path / "run.json").is_file():
            run.facts = read_run_json(run.path)
        _check_folder(run)
        with signals_ask(run.request_stop):
            yield run
    except torch.OutOfMemoryError as error:
        advice = (
            "turn down micro_batch_tokens or micro_batch_size, then max_completion_length, batch_size or group_size "
            "(see --dry_run)"
        )
        raise RunError(f"the device is out of memory: {advice}") from error
    except NotFiniteError as error:
        saved = checkpoints(run.path)
        start = f", from the base or with --model_name {saved[-1]}" if saved else ""
        raise RunError(
            f"{error}; --resume would lead there again: start anew with a lower learning_rate{start}"
        ) from error
    except RunError as error:
        raise RunError(f"{error}; {run.how_to_go_on()}" if run.is_training else str(error)) from error
    except KeyboardInterrupt as error:
        can_go_on = run.is_training or options.resume
        raise KeyboardInterrupt(f"stopped; {run.how_to_go_on()}" if can_go_on else "stopped before step 1") from error
    finally:
        with suppress(OSError):  # the folder is kept if another run is using it
            if not (run.path / "run.json").exists():
                (run.path / ".lock").unlink(missing_ok=True)
                for path in missing:
                    path.rmdir()
        if run.lock:
            run.lock.close()


def _check_folder(run: RunFolder) -> None:
    """Refuse a folder that holds other files, or an unfinished run without --resume or --overwrite."""
    if not run.facts:
        if any(not path.name.startswith(".") for path in run.path.iterdir()):
            raise InputError(f"output_dir: {run.path} is not empty and holds no run; choose another folder")
        if run.options.resume:
            raise InputError(f"--resume: {run.path} holds no run")
    elif run.options.resume:
        restart = run.command("--overwrite" if run.is_finished else "--resume")
        check_integrity(run.path, run.command("--resume"), restart)
        if run.is_finished and run.checkpoint is None:
            raise InputError(f"--resume: {run.path} holds a finished run, but no step-… folder to go on from")
        if run.checkpoint and not isinstance(run.facts.get("base_sha256"), str):
            raise InputError(f'--resume: {run.path / "run.json"} has no "base_sha256": damaged')
        for path, expected in run.facts.get("data_sha256", {}).items():
            if Path(path).is_file() and sha256(Path(path)) != expected:
                raise InputError(f"--resume: {path} is no longer the file that this run started with")
    elif not (run.is_finished or run.options.overwrite or run.holds_nothing):
        raise InputError(
            f"output_dir: {run.path} holds an unfinished run; --resume goes on with it, --overwrite deletes it, "
            "another --output_dir leaves it alone"
        )


def data_files(config: Config) -> list[str]:
    """The local data files, which must be unchanged when a run is resumed. Datasets from the Hub are not included."""
    paths = [path for source in sources_of(vars(config)) for path in (source.path, source.eval_path)]
    return [path for path in dict.fromkeys(paths) if path is not None and Path(path).is_file()]


def _remove_unfinished(folder: Path) -> None:
    """Remove partial files of a killed process. The lock ensures that no other process is still writing."""
    for path in folder.glob(".*.unfinished"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _with_interval(metrics: dict[str, Any], metric: str) -> str:
    """ "0.302 [0.263, 0.344]", or only the value if there is no interval."""
    low, high = metrics.get(f"{metric}_low"), metrics.get(f"{metric}_high")
    return f"{metrics[metric]:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")


def _now() -> str:
    return datetime.now().isoformat(timespec="seconds")
