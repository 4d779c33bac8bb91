"""The folder of one run: who may write into it, what happens to an earlier run there, run.json, the rows of metrics.

run.json               settings, command, versions, commit, sha256 of the base's weights, three of its answers
metrics.jsonl          one row a step
samples.jsonl          every completion with its rewards
training_curves.png    redrawn at every evaluation
step-000100/           checkpoints to resume from; best/ and final/ beside them; all three are Hugging Face folders
"""

import dataclasses
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.checkpoint import check_integrity, checkpoints, remove_folder, save_model, step_of, write_atomically
from grpo.config import Config, InputError, Options, RunError, load_config, read_run_json
from grpo.data import JSONLinesDataset
from grpo.evaluation import Evaluation, side_by_side
from grpo.plots import draw_curves
from grpo.policy import learning_rate_at
from grpo.records import append_jsonl, read_jsonl

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder go unnoticed there
    fcntl = None  # type: ignore[assignment]

# What a run leaves behind; the only names that --overwrite deletes.
RUN_FILES = re.compile(
    r"run\.json|metrics\.jsonl|samples\.jsonl|training_curves\.png|best|final|step-\d+|failed-\d+\.(jsonl|safetensors)"
)


@dataclass
class RunFolder:
    """The folder of a run while it is being written, held under a lock.

    `stop_requested` turns true at the first Ctrl-C (or SIGTERM) once training has begun: the loop then ends after its
    step. The second one stops at once, as does the first one before training.
    """

    config: Config
    options: Options = Options()
    facts: dict[str, Any] = field(default_factory=dict)  # run.json
    rows: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl, step 0 first
    is_training: bool = False
    stop_requested: bool = False
    lock: IO[str] | None = None

    @property
    def folder(self) -> Path:
        """config.output_dir."""
        return Path(self.config.output_dir)

    @property
    def is_finished(self) -> bool:
        """Whether the run in the folder came to its end (before "finished" was written down, final/ said so)."""
        return bool(self.facts.get("finished", (self.folder / "final").is_dir()))

    @property
    def holds_nothing(self) -> bool:
        """Whether the run in the folder was stopped before its first step: nobody misses it."""
        samples = self.folder / "samples.jsonl"
        return not (self.is_finished or checkpoints(self.folder) or (samples.is_file() and samples.stat().st_size))

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that --resume goes on from; None: the run starts at step 0."""
        return next(reversed(checkpoints(self.folder)), None) if self.options.resume else None

    def begin(self, **facts: Any) -> None:
        """Step 0: make room, then write run.json with `facts` beside settings and versions."""
        try:
            if (self.folder / "run.json").is_file():
                self._make_room()
            _remove_unfinished(self.folder)
        except OSError as error:
            raise InputError(f"output_dir: {self.folder} cannot be used: {error.strerror}") from error
        self._write_facts({"started": _now(), "finished": None, **_origin(), **facts, "resumed": []})
        self.is_training = True

    def resume(self, state: dict[str, Any]) -> None:
        """Go on after the checkpoint `state` was saved with: rows written after it are cut off, to be made again."""
        step = state["step"]
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.folder / name
            if not path.is_file() or path.stat().st_size < state[name]:
                raise InputError(f"--resume: {path} is shorter than it was at step {step}: damaged")
            os.truncate(path, state[name])
        _remove_unfinished(self.folder)
        try:
            self.rows = read_jsonl(self.folder / "metrics.jsonl")
        except ValueError as error:
            raise InputError(f"--resume: {self.folder / 'metrics.jsonl'} is damaged: {error}") from error
        if (best := self._best()) and best[
            "step"
        ] > step:  # it will be made again, unless changed settings lead elsewhere
            remove_folder(self.folder / "best")
        self._say_where(step, load_config(recorded=self.facts["settings"]))
        resumed = [*self.facts.get("resumed", []), {"after_step": step, "at": _now(), **_origin()}]
        self._write_facts(self.facts | {"finished": None, "resumed": resumed})
        self.is_training = True

    def append(self, row: dict[str, Any], samples: Sequence[dict[str, Any]] = ()) -> None:
        """One row of metrics.jsonl and the completions it came from."""
        append_jsonl(self.folder / "samples.jsonl", samples)
        append_jsonl(self.folder / "metrics.jsonl", [row])
        self.rows.append(row)

    def report(
        self, step: int, evaluation: Evaluation, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """What an evaluation leaves: a line, a fresh picture, and best/ if none was better: the first of equals."""
        tqdm.write(f"step {step:4d}  {evaluation}")
        draw_curves(self.rows, self.folder / "training_curves.png")
        metric = self.config.eval_metric
        about = {"step": step, "metric": metric, "value": evaluation.metrics()[metric]}
        if (best := self._best()) is None or about["value"] > best["value"]:
            save_model(policy, tokenizer, self.folder / "best", about=about)

    def status(self) -> dict[str, str]:
        """The newest numbers, for the progress bar."""
        shown = {
            "reward": ("reward", ".2f"),
            "accuracy": ("eval/accuracy", ".3f"),
            "length": ("completions/mean_length", ".1f"),
        }
        newest = {name: (self._newest(metric), form) for name, (metric, form) in shown.items()}
        return {name: f"{value:{form}}" for name, (value, form) in newest.items() if value is not None}

    def finish(self, evaluation: Evaluation, eval_set: JSONLinesDataset) -> None:
        """The run is whole, the next one may move it aside; the last words."""
        self._write_facts(self.facts | {"finished": _now()})
        before, after = self.rows[0], evaluation.metrics()
        metric = "eval/accuracy" if "eval/accuracy" in after else "eval/reward"
        change = f"{_with_interval(before, metric)} -> {_with_interval(after, metric)}"
        print(f"\nHeld-out {metric.removeprefix('eval/')}: {change}, n = {len(eval_set)} ({eval_set.path})")
        for example in self.facts.get("examples", []):
            answers = {"base": example["completion"], "trained": evaluation.completions[example["index"]]}
            print(side_by_side(eval_set[example["index"]], answers))
        names = [path.name + "/" * path.is_dir() for path in sorted(self.folder.iterdir()) if path.name[0] != "."]
        print(f"{self.folder} holds {', '.join(names)}")
        models = [shlex.quote(str(name)) for name in (self.folder / "final", self.config.model_name)]
        print(f"Next: python evaluate.py {models[0]} --compare {models[1]}")

    def _best(self) -> dict[str, Any] | None:
        """What best/ says of itself; None where there is no best/ that says it."""
        try:
            about = json.loads((self.folder / "best" / "about.json").read_text())
            return {"step": int(about["step"]), "value": float(about["value"])}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _newest(self, metric: str) -> float | None:
        return next((row[metric] for row in reversed(self.rows) if metric in row), None)

    def _write_facts(self, facts: dict[str, Any]) -> None:
        self.facts = facts | {"settings": dataclasses.asdict(self.config)}
        write_atomically(self.folder / "run.json", json.dumps(self.facts, indent=2) + "\n")

    def _say_where(self, step: int, earlier: Config) -> None:
        """Where a resumed run goes on, and what a new number of steps does to the learning rate."""
        print(f"Going on after step {step} of {self.config.num_train_steps}")
        num_updates = step * earlier.num_iterations * earlier.num_minibatches
        before, now = (learning_rate_at(config, num_updates) for config in (earlier, self.config))
        if before != now:
            change = f"num_train_steps was {earlier.num_train_steps} and is {self.config.num_train_steps}"
            print(f"The learning rate jumps from {before:.3g} to {now:.3g}: {change}")

    def how_to_go_on(self) -> str:
        """What is saved, and what to type to continue from there."""
        where = "" if self.folder == Path("checkpoints") else f" --output_dir {shlex.quote(str(self.folder))}"
        saved = checkpoints(self.folder)
        what = f"step {step_of(saved[-1])} is saved" if saved else "no checkpoint was saved yet"
        return f"{what}; to go on: python train_grpo.py --resume{where}"

    def _make_room(self) -> None:
        """The earlier run in this folder: deleted on request or when nothing was trained yet, else moved aside."""
        if self.options.overwrite or self.options.resume or self.holds_nothing:
            for path in list(self.folder.iterdir()):
                if RUN_FILES.fullmatch(path.name):
                    remove_folder(path) if path.is_dir() else path.unlink()
            return
        started = re.sub(r"[^0-9T-]", "-", str(self.facts.get("started")))  # no colons in names
        folder = self.folder.resolve()  # output_dir may be a link to where there is space
        aside = folder.with_name(f"{folder.name}-{started}")
        while aside.exists():  # several runs within a second
            aside = aside.with_name(f"{aside.name}+")
        folder.rename(aside)  # its lock goes with it
        print(f"The earlier run in {self.folder} now lies in {aside.name} beside it")
        folder.mkdir()
        self.lock = _acquire_lock(self.folder)


@contextmanager
def open_run(config: Config, options: Options) -> Iterator[RunFolder]:
    """Hold `output_dir` for one run. Refuses at once what would only fail later; leaves nothing if the run never began.

    Raises:
        InputError: the folder cannot be written, is in use, holds something else, or an unfinished run.
    """
    run = RunFolder(config, options)
    if options.dry_run or options.preflight:
        yield run
        return
    if Path.cwd().is_relative_to(run.folder.resolve()):
        raise InputError(
            f"output_dir: got {config.output_dir}, expected a folder that can be moved aside, not this one"
        )
    missing = [path for path in (run.folder, *run.folder.parents) if not path.exists()]
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        run.lock = _acquire_lock(run.folder)
    except OSError as error:
        raise InputError(f"output_dir: {run.folder} cannot be used: {error.strerror}") from error
    try:
        if (run.folder / "run.json").is_file():
            run.facts = read_run_json(run.folder)
        _check_folder(run)
        with _stopping_gently(run):
            yield run
    except RunError as error:
        raise RunError(f"{error}; {run.how_to_go_on()}" if run.is_training else str(error)) from error
    except KeyboardInterrupt as error:
        can_go_on = run.is_training or options.resume
        raise KeyboardInterrupt(f"stopped; {run.how_to_go_on()}" if can_go_on else "stopped before step 1") from error
    finally:
        with suppress(OSError):  # a folder that another run uses meanwhile stays
            if not (run.folder / "run.json").exists():
                (run.folder / ".lock").unlink()
                for path in missing:
                    path.rmdir()
        if run.lock:
            run.lock.close()


def _check_folder(run: RunFolder) -> None:
    """Refuse a folder that holds something else, or an unfinished run that nobody said what to do with."""
    if not run.facts:
        if any(not path.name.startswith(".") for path in run.folder.iterdir()):
            raise InputError(f"output_dir: {run.folder} is not empty and holds no run; choose another folder")
        if run.options.resume:
            raise InputError(f"--resume: {run.folder} holds no run")
    elif run.options.resume:
        check_integrity(run.folder, run.how_to_go_on().partition("to go on: ")[2])
        if run.is_finished and run.checkpoint is None:
            raise InputError(f"--resume: {run.folder} holds a finished run, but no step-… folder to go on from")
        if run.checkpoint and not isinstance(run.facts.get("base_sha256"), str):
            raise InputError(f'--resume: {run.folder / "run.json"} has no "base_sha256": damaged')
        step, num_train_steps = step_of(run.checkpoint) if run.checkpoint else 0, run.config.num_train_steps
        if step > num_train_steps or (step == num_train_steps and run.is_finished):
            print(f"{run.folder} is already at step {step} of {num_train_steps}; a larger --num_train_steps goes on")
            sys.exit(0)
    elif not (run.is_finished or run.options.overwrite or run.holds_nothing):
        raise InputError(
            f"output_dir: {run.folder} holds an unfinished run; --resume goes on with it, --overwrite deletes it, "
            "another --output_dir leaves it alone"
        )


def _remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left half-written; the lock says that it is dead."""
    for path in folder.glob(".*.unfinished"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _acquire_lock(folder: Path) -> IO[str]:
    """An exclusive lock that the system releases when its process ends, however it ends."""
    path = folder / ".lock"
    while True:
        lock = path.open("a+")
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                raise InputError(f"output_dir: {folder} is in use by another run (process {holder})") from error
            if not path.exists() or os.fstat(lock.fileno()).st_ino != path.stat().st_ino:
                lock.close()  # deleted in between: this would be a lock on nothing
                continue
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        return lock


@contextmanager
def _stopping_gently(run: RunFolder) -> Iterator[None]:
    """SIGINT and SIGTERM ask the run to stop after its step; where nothing is to be saved yet, or twice, at once."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield
        return

    def ask(signal_number: int, frame: FrameType | None) -> None:
        if run.stop_requested or not run.is_training:
            raise KeyboardInterrupt
        run.stop_requested = True
        # Not print: a handler may interrupt a write to the same stream, which Python refuses to nest.
        os.write(2, b"\nstopping: this step will be finished and saved; Ctrl-C again stops at once\n")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _with_interval(metrics: dict[str, Any], metric: str) -> str:
    """ "0.302 [0.263, 0.344]", or the value alone where there is no interval."""
    low, high = metrics.get(f"{metric}_low"), metrics.get(f"{metric}_high")
    return f"{metrics[metric]:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")


def _now() -> str:
    return datetime.now().isoformat(timespec="seconds")


def _origin() -> dict[str, Any]:
    """By what this run is made: command, commit, versions."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _commit() -> str | None:
    """The commit of this project's checkout; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
