"""Compare the default run with TRL's GRPOTrainer on the same problem, machine and environment.

    python -m benchmarks.vs_trl                    all parts, five minutes on two cores; continues where it stopped
    python -m benchmarks.vs_trl --parts step       one part

    step          seconds per step: whole runs of 150 steps, which take turns; medians over steps and seeds
    to_accuracy   seconds of training until 0.95 of the held-out problems are solved (greedy, tested every 5 steps)
    memory        peak memory of 20 steps, each side in a separate process

The time of a step is measured in the same way on both sides: the wall clock from the end of one step to the end of the
next, without evaluations. The first step of a run is a warm-up and counts only for to_accuracy. Both sides get the same
model folder, prompts in the same order, reward function and settings (`trl_settings` translates them to TRL's names,
and the script prints them). TRL generates with transformers, as it does without vLLM, and logs nothing.

Remaining differences:
  - The sampling noise: TRL uses torch's global generator, we use one stream per completion.
  - The first `warmup_steps`: TRL's learning rate starts at 0 (n / w), ours above 0 ((n + 1) / (w + 1)). Then both are
    equal.
  - TRL scores its 256 completions at once, we use the micro-batches of config.yaml.
  - We write every completion and a row of metrics to a file in every step, TRL writes nothing.

TRL is not a requirement of the project: pip install -r requirements-dev.txt. Results: benchmarks/results/vs_trl.json.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

import train_grpo
from benchmarks.common import RESULTS, ROOT, Results, in_fresh_process, peak_memory_gb, spread
from grpo.data import Sample, samples_for_step
from grpo.datasets.rows import JSONLinesDataset
from grpo.evaluation.greedy import Evaluation, evaluate_greedy
from grpo.models.loading import load_policy
from grpo.models.tiny import tiny_base_model
from grpo.rollout import Rollout
from grpo.run.folder import RunFolder
from grpo.run.run import Run
from grpo.run.setup import set_up
from grpo.settings.config import Config, load_config
from reward_model import Scores, load_rewards, math_reward, score_completions

SEEDS = (0, 1, 2)
TARGET = 0.95  # held-out accuracy to reach
EVAL_EVERY = 5  # steps between two evaluations
NEVER = 10**6  # steps
MEMORY_STEPS = 20
MAX_RATIO = 0.5  # the bar: at most this fraction of TRL's seconds,
MAX_OVER_FLOOR = 1.15  # or at most this multiple of our model calls alone (benchmarks/results/floor.json)

LOSS_TYPES = {"sequence": "grpo", "token": "dapo", "constant": "dr_grpo"}  # ours -> TRL's name


@dataclass
class Training:
    """One timed training run; the same code measures both sides.

    The training ends after `num_steps`, or at the first evaluation with an accuracy of at least `target`.
    """

    num_steps: int
    target: float = math.inf
    step_seconds: list[float] = field(default_factory=list)  # wall clock of whole steps, without evaluations
    mean_lengths: list[float] = field(default_factory=list)  # tokens per completion, one value per step
    step_times: list[float] = field(default_factory=list)  # only ours: "step_time", which excludes writing files
    accuracies: list[tuple[int, float]] = field(default_factory=list)  # (step, held-out accuracy)
    started: float = 0.0

    def start_clock(self) -> None:
        """Called when a step begins."""
        self.started = time.perf_counter()

    def stop_clock(self, evaluation_seconds: float = 0.0) -> None:
        """Called when a step has ended. `evaluation_seconds` are subtracted."""
        self.step_seconds.append(time.perf_counter() - self.started - evaluation_seconds)

    @property
    def has_reached_target(self) -> bool:
        """Whether the latest evaluation reached the target accuracy."""
        return bool(self.accuracies) and self.accuracies[-1][1] >= self.target

    @property
    def is_over(self) -> bool:
        """Whether the measurement is complete."""
        return self.has_reached_target or len(self.step_seconds) >= self.num_steps


# Ours


class TimedFolder(RunFolder):
    """A run folder that notifies a clock when a step ends. It draws no picture and keeps no best/."""

    def __init__(self, config: Config, training: Training) -> None:
        super().__init__(config)
        self.training = training

    def append(self, row: dict[str, Any], samples: Sequence[dict[str, Any]] = ()) -> None:
        """Called at the end of a step."""
        super().append(row, samples)
        if row["step"] == 0:
            return
        self.training.stop_clock(evaluation_seconds=row.get("eval/time", 0.0))
        self.training.step_times.append(row["step_time"])
        self.training.mean_lengths.append(row["completions/mean_length"])
        if "eval/accuracy" in row:
            self.training.accuracies.append((row["step"], row["eval/accuracy"]))
        self.stop_requested = self.training.is_over
        self.training.start_clock()

    def report(
        self, step: int, evaluation: Evaluation, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Called after an evaluation, including that of the base model at step 0. The next step begins."""
        self.training.start_clock()


def train_ours(config: Config, training: Training) -> None:
    """Run the loop of train_grpo.py until the training ends. It evaluates every `eval_every` steps."""
    folder = TimedFolder(config, training)
    setup = set_up(folder)
    assert setup is not None
    try:
        train_grpo.train(setup, Run(folder))
    except KeyboardInterrupt:  # the loop ends like this after a requested stop
        if not training.is_over:
            raise


# TRL's


def import_trl() -> Any:
    """Import TRL. If it is missing, the error says how to install it."""
    try:
        import trl
    except ImportError as error:
        raise SystemExit("TRL is needed to compare with it: pip install -r requirements-dev.txt") from error
    return trl


def trl_settings(config: Config) -> dict[str, Any]:
    """The settings of a run with TRL's names."""
    # What has no counterpart there would make it another problem.
    assert config.advantage_baseline == "group"
    assert config.lr_schedule in ("cosine", "linear")
    assert config.kl_estimator in ("k3", "k3_corrected")
    assert (config.num_minibatches, config.ref_update_every) == (1, 0)
    return {
        "output_dir": config.output_dir,
        "seed": config.seed,
        "max_steps": config.num_train_steps,
        "per_device_train_batch_size": config.batch_size * config.group_size,  # a rollout is one optimizer step
        "num_generations": config.group_size,
        "max_completion_length": config.max_completion_length,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "scale_rewards": config.advantage_scale,
        "epsilon": config.clip_range,
        "epsilon_high": config.clip_range_high,
        "beta": config.kl_coeff,
        "use_bias_correction_kl": config.kl_estimator == "k3_corrected",
        "loss_type": LOSS_TYPES[config.loss_aggregation],
        "mask_truncated_completions": config.mask_truncated_completions,
        "num_iterations": config.num_iterations,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_schedule,
        "warmup_steps": config.warmup_steps,
        "max_grad_norm": config.max_grad_norm,
        "weight_decay": config.weight_decay,
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        # The data come in our order already, see train_trl.
        "shuffle_dataset": False,
        # float32 on the CPU, as fast as TRL can.
        "model_init_kwargs": {"dtype": "float32"},
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "log_completions": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


class ClockCallback(TrainerCallback):
    """Notifies the clock when a step of TRL ends. Evaluates every `eval_every` steps while the clock is stopped."""

    def __init__(self, training: Training, accuracy_of: Callable[[PreTrainedModel], float], eval_every: int) -> None:
        self.training, self.accuracy_of, self.eval_every = training, accuracy_of, eval_every

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.training.start_clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training.stop_clock()
        if state.global_step % self.eval_every == 0:
            self.training.accuracies.append((state.global_step, self.accuracy_of(kwargs["model"])))
        control.should_training_stop = self.training.is_over
        self.training.start_clock()


def train_trl(config: Config, training: Training) -> None:
    """Run TRL's loop, started as its users do, until the training ends."""
    trl = import_trl()
    from datasets import Dataset  # type: ignore[import-untyped]

    model, tokenizer = load_policy(config.model_name, base_seed=config.base_seed, device=torch.device("cpu"))
    train_set, eval_set = JSONLinesDataset(config.train_file), JSONLinesDataset(config.eval_file)
    rewards, reward_fn = load_rewards(config.rewards), math_reward()

    def math_fn(completion_ids: list[list[int]], **columns: Any) -> Sequence[Any]:
        """Our reward function. It also records the lengths, to show that both sides do the same work."""
        training.mean_lengths.append(statistics.fmean(map(len, completion_ids)))
        return reward_fn(**columns)

    def score(samples: Sequence[Sample], rollout: Rollout) -> Scores:
        return score_completions(rewards, samples, rollout.completions, rollout.token_lists())

    def accuracy_of(policy: PreTrainedModel) -> float:
        """Evaluate TRL's weights with our code, in a separate model, because TRL changes the model's forward."""
        model.load_state_dict(policy.state_dict())
        length, rows = config.max_completion_length, config.batch_size * config.group_size
        evaluation = evaluate_greedy(model, tokenizer, eval_set, score, max_completion_length=length, batch_rows=rows)
        assert evaluation.accuracy is not None
        return evaluation.accuracy

    # TRL reads the data from front to back, so this is our order.
    steps = range(1, config.num_train_steps + 1)
    batches = [samples_for_step(train_set, step=s, batch_size=config.batch_size, seed=config.seed) for s in steps]
    trainer = trl.GRPOTrainer(
        model=config.model_name,
        reward_funcs=math_fn,
        args=trl.GRPOConfig(**trl_settings(config)),
        train_dataset=Dataset.from_list([sample for batch in batches for sample in batch]),
        callbacks=[ClockCallback(training, accuracy_of, config.eval_every)],
    )
    trainer.train()


SIDES: dict[str, Callable[[Config, Training], None]] = {"ours": train_ours, "trl": train_trl}


# The measurements


def default_run(seed: int) -> list[str]:
    """The settings of the default run in float32 on the CPU. Its base model is cached before any clock starts."""
    return [f"model_name={tiny_base_model(seed)}", f"seed={seed}", "device=cpu", "dtype=float32"]


def train(side: str, settings: Sequence[str], training: Training, *, eval_every: int = NEVER) -> Training:
    """Train one side once, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        paces = [f"eval_every={eval_every}", f"save_every={NEVER}", f"output_dir={folder}"]
        SIDES[side](load_config(None, [*settings, *paces]), training)
    assert len(training.step_seconds) == len(training.mean_lengths)
    return training


def turns(settings: dict[int, list[str]]) -> list[tuple[int, str]]:
    """(seed, side) in the order of measurement. The first side alternates from seed to seed."""
    orders = [list(SIDES), list(reversed(SIDES))]
    return [(seed, side) for number, seed in enumerate(settings) for side in orders[number % 2]]


def measure_step(settings: dict[int, list[str]]) -> dict[str, Any]:
    """Measure a pair of whole runs for every seed. The first step of each run is a warm-up."""
    trainings: dict[str, list[Training]] = {side: [] for side in SIDES}
    for seed, side in turns(settings):
        config = load_config(None, settings[seed])
        training = train(side, settings[seed], Training(config.num_train_steps))
        trainings[side].append(training)
        print(f"step: seed {seed}, {side}: {statistics.median(training.step_seconds[1:]):.4f} s", flush=True)
    num_rows = config.batch_size * config.group_size
    return {side: summary_of_steps(runs, num_rows) for side, runs in trainings.items()}


def summary_of_steps(runs: Sequence[Training], num_rows: int) -> dict[str, Any]:
    """The content of the result file for the runs of one side, with `num_rows` completions per step."""
    seconds = [value for run in runs for value in run.step_seconds[1:]]
    step_times = [value for run in runs for value in run.step_times[1:]]
    return {
        "seconds": spread(seconds),
        "seconds_by_seed": [statistics.median(run.step_seconds[1:]) for run in runs],
        "mean_seconds": statistics.fmean(seconds),
        "completions_per_second": num_rows / statistics.median(seconds),
        "mean_length": statistics.fmean(value for run in runs for value in run.mean_lengths[1:]),
        **({"step_time": spread(step_times)} if step_times else {}),
    }


def measure_to_accuracy(
    settings: dict[int, list[str]], *, target: float = TARGET, eval_every: int = EVAL_EVERY
) -> dict[str, Any]:
    """Seconds of training up to the first evaluation that reaches `target`; None if no evaluation does."""
    result: dict[str, Any] = {"target": target, "eval_every": eval_every, **{side: [] for side in SIDES}}
    for seed, side in turns(settings):
        config = load_config(None, settings[seed])
        training = train(side, settings[seed], Training(config.num_train_steps, target), eval_every=eval_every)
        seconds = sum(training.step_seconds) if training.has_reached_target else None
        run = {"seed": seed, "seconds": seconds, "steps": len(training.step_seconds), "curve": training.accuracies}
        result[side].append(run)
        print(f"to_accuracy: seed {seed}, {side}: {in_seconds(seconds)}, {run['steps']} steps", flush=True)
    return result


def measure_memory(settings: dict[int, list[str]]) -> dict[str, Any]:
    """Peak memory in GB of the imports and of the whole run, for the first seed."""
    seed = next(iter(settings))
    return {side: in_fresh_process("benchmarks.vs_trl", "--memory_of", side, f"--seed={seed}") for side in SIDES}


def train_for_memory(side: str, settings: Sequence[str], num_steps: int = MEMORY_STEPS) -> dict[str, float]:
    """The code of the fresh process. It prints its result as its last line."""
    if side == "trl":
        import_trl().GRPOTrainer  # noqa: B018  TRL imports its parts lazily, on access
    imported = peak_memory_gb()
    training = train(side, settings, Training(num_steps))
    return {"imports_gb": imported, "steps": len(training.step_seconds)}


MEASURES: dict[str, Callable[[dict[int, list[str]]], dict[str, Any]]] = {
    "step": measure_step,
    "to_accuracy": measure_to_accuracy,
    "memory": measure_memory,
}


# The results


def median_to_accuracy(part: dict[str, Any], side: str) -> float:
    """Median seconds over the seeds. A run that never reached the target counts as infinite."""
    return statistics.median(math.inf if run["seconds"] is None else run["seconds"] for run in part[side])


def allowed_ratio(parts: dict[str, Any], folder: Path = RESULTS) -> tuple[float, str]:
    """The larger of the two bars on seconds per step, as a fraction of TRL's seconds, and its name."""
    floor_file = folder / "floor.json"
    floor = json.loads(floor_file.read_text())["parts"].get("step") if floor_file.is_file() else None
    of_floor = MAX_OVER_FLOOR * floor["floor_seconds"] / parts["step"]["trl"]["seconds"]["median"] if floor else 0.0
    if of_floor > MAX_RATIO:
        return of_floor, f"<= {of_floor:.2f} ({MAX_OVER_FLOOR} x the floor)"
    return MAX_RATIO, f"<= {MAX_RATIO:.2f}"


def bars(parts: dict[str, Any], folder: Path = RESULTS) -> list[tuple[str, str, float, bool]]:
    """The bars of the measured parts: (name, the bar in words, measured value, whether it is met)."""
    found = []
    if "step" in parts:
        allowed, words = allowed_ratio(parts, folder)
        ratio = parts["step"]["ours"]["seconds"]["median"] / parts["step"]["trl"]["seconds"]["median"]
        found.append(("seconds a step, over TRL's", words, ratio, ratio <= allowed))
        if "to_accuracy" in parts:
            part = parts["to_accuracy"]
            ratio = median_to_accuracy(part, "ours") / median_to_accuracy(part, "trl")
            found.append((f"seconds to {part['target']} held out, over TRL's", words, ratio, ratio <= allowed))
    return found


def in_seconds(seconds: float | None) -> str:
    """ "3.2 s", or "never"."""
    return "never" if seconds is None or math.isinf(seconds) else f"{seconds:.1f} s"


def describe(parts: dict[str, Any]) -> str:
    """The results as text, one line per measurement."""
    lines = []
    for side in SIDES:
        if "step" in parts:
            part = parts["step"][side]
            own = f" (step_time {part['step_time']['median']:.4f})" if "step_time" in part else ""
            lines.append(
                f"{side:4}  {part['seconds']['median']:.4f} s a step{own}, "
                f"{part['completions_per_second']:.0f} completions/s of {part['mean_length']:.1f} tokens"
            )
        if "to_accuracy" in parts:
            part = parts["to_accuracy"]
            steps = " ".join(str(run["steps"]) for run in part[side])
            lines.append(f"{side:4}  {in_seconds(median_to_accuracy(part, side))} to {part['target']} (steps: {steps})")
        if "memory" in parts:
            part = parts["memory"][side]
            lines.append(f"{side:4}  {part['peak_memory_gb']:.2f} GB, of which imports {part['imports_gb']:.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--memory_of", choices=SIDES, help="what the part memory runs in a process of its own")
    parser.add_argument("--seed", type=int, default=SEEDS[0], help="of --memory_of")
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(json.dumps(train_for_memory(arguments.memory_of, default_run(arguments.seed))))
        return

    import_trl()
    settings = {seed: default_run(seed) for seed in SEEDS}
    config = load_config(None, settings[SEEDS[0]])
    print("TRL's settings:", ", ".join(f"{name}={value}" for name, value in trl_settings(config).items()))
    results = Results(__file__, data=[ROOT / config.train_file, ROOT / config.eval_file])
    for part in arguments.parts:
        if not results.has(part):
            about = {"trl_version": importlib.metadata.version("trl"), "threads": torch.get_num_threads()}
            results.save(part, MEASURES[part](settings) | about)
    print(describe(results.parts))
    for what, bar, value, is_met in bars(results.parts):
        print(f"{what}: {value:.3f}, bar {bar}: {'met' if is_met else 'NOT met'}")


if __name__ == "__main__":
    main()
