"""One run, as used by the training loop: `steps`, `check_finite`, `record` and `finish`.

These four methods handle the evaluation of the base model, resuming, the progress bar, Ctrl-C, records, evaluations,
best/, checkpoints, plots, and saving after an error. grpo/run/folder.py lists the files.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from torch import Tensor
from tqdm import tqdm

from grpo.batch import Batch
from grpo.errors import NotFiniteError, RunError
from grpo.evaluation.greedy import Evaluation
from grpo.evaluation.preflight import pick_examples
from grpo.models.merge_lora import save_merged
from grpo.models.saving import save_model, weights_sha256
from grpo.run.checkpoint import COUNTS, load_checkpoint, save_checkpoint
from grpo.run.folder import RunFolder, open_folder
from grpo.run.metrics import StepMetrics
from grpo.run.records import leave_failed_batch, sample_rows
from grpo.run.setup import Setup
from grpo.settings.config import Config, Options


@dataclass
class Run:
    """A run in progress."""

    folder: RunFolder
    setup: Setup | None = None  # set when training starts
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))  # tokens and completions so far
    evaluation: Evaluation | None = None  # of the current weights; None if they were not evaluated
    whole_step: int | None = None  # step whose weights the policy has; None: in the middle of an update

    def steps(self, setup: Setup) -> Iterator[int]:
        """Yield the remaining steps: from 1, or from the one after the checkpoint that the run resumes from."""
        self.setup = setup
        last_step = setup.config.num_train_steps
        first_step = self._begin(setup) if self.folder.checkpoint is None else self._resume(setup)
        steps = range(first_step, last_step + 1)
        progress = tqdm(steps, desc="training", unit="step", initial=first_step - 1, total=last_step, disable=None)
        for step in progress:
            self.whole_step, self.evaluation = step - 1, None
            yield step
            progress.set_postfix(self.folder.status())

    def check_finite(self, metrics: StepMetrics, batch: Batch, advantages: Tensor) -> None:
        """Stop the run if the loss or the gradient is NaN or inf, before the optimizer step changes the weights."""
        if not metrics.is_finite():
            rows = sample_rows(metrics.step, batch.row_samples, batch.rollout, batch.scores, advantages)
            raise leave_failed_batch(self.folder.path, rows, batch.rollout, advantages, metrics.checked_numbers())
        self.whole_step = None

    def record(self, batch: Batch, advantages: Tensor, metrics: StepMetrics) -> None:
        """Write the step to metrics.jsonl and samples.jsonl. Evaluate and save a checkpoint if they are due.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed. The step has been saved.
        """
        assert self.setup is not None
        step, config = metrics.step, self.setup.config
        sampled = [batch.rollout, *batch.discarded]
        self.counts["num_tokens"] += sum(rollout.num_tokens for rollout in sampled)
        self.counts["num_completions"] += sum(len(rollout.completions) for rollout in sampled)
        samples = sample_rows(step, batch.row_samples, batch.rollout, batch.scores, advantages)
        row = metrics.row(batch, self.counts)
        try:
            self.evaluation = self.setup.evaluate() if self._is_due(step) else None
        except RunError:
            self.folder.append(row, samples)
            self.whole_step = step
            raise
        self.folder.append(row | (self.evaluation.metrics() if self.evaluation else {}), samples)
        if self.evaluation:
            self._report(step, self.evaluation)
        if step % config.save_every == 0 or step == config.num_train_steps or self.folder.stop_requested:
            self._save(step)
        if self.folder.stop_requested:
            raise KeyboardInterrupt

    def finish(self) -> None:
        """Save final/ and print the result."""
        assert self.setup is not None
        config, final = self.setup.config, self.folder.path / "final"
        save_model(self.setup.policy, self.setup.tokenizer, final)
        if config.save_merged:
            save_merged(final, final.with_name("final-merged"))
        self.folder.finish(self.evaluation or self.setup.evaluate(), self.setup.eval_set)

    def rescue(self) -> None:
        """After an error, save a checkpoint of the last complete step. Not for step 0 or in the middle of an update."""
        step, self.whole_step = self.whole_step, None
        if step is not None:
            with suppress(RunError):  # report the first error, not this one
                self._save(step)

    def _begin(self, setup: Setup) -> int:
        """Step 0: evaluate the base model and start the run folder. Returns the first step."""
        self.evaluation = setup.evaluate().having(setup.config.eval_metric)
        self.folder.begin(base_sha256=weights_sha256(setup.policy), examples=pick_examples(self.evaluation))
        self.folder.append({"step": 0} | self.evaluation.metrics())
        self._report(0, self.evaluation)
        return 1

    def _resume(self, setup: Setup) -> int:
        """Restore the run as it was after the newest checkpoint. Returns the next step."""
        checkpoint = self.folder.checkpoint
        assert checkpoint is not None
        base_sha256 = self.folder.facts["base_sha256"]
        state = load_checkpoint(checkpoint, setup.policy, setup.optimizer, setup.extra_modules, base_sha256)
        self.folder.resume(state)
        step, self.counts = state["step"], {name: state[name] for name in COUNTS}
        if self._is_due(step) and "eval/reward" not in self.folder.rows[-1]:
            # The evaluation failed, or this was not the last step of the interrupted run.
            self.evaluation = setup.evaluate()
            self.folder.amend(self.evaluation.metrics())
            self._report(step, self.evaluation)
        return step + 1

    def _is_due(self, step: int) -> bool:
        config = self.folder.config
        return step % config.eval_every == 0 or step == config.num_train_steps

    def _report(self, step: int, evaluation: Evaluation) -> None:
        assert self.setup is not None
        self.folder.report(step, evaluation, self.setup.policy, self.setup.tokenizer)

    def _save(self, step: int) -> None:
        """Save a checkpoint. Step 0 is the untrained base model, so it is not saved."""
        assert self.setup is not None
        if step > 0:
            save_checkpoint(
                self.folder.path,
                step,
                policy=self.setup.policy,
                tokenizer=self.setup.tokenizer,
                optimizer=self.setup.optimizer,
                modules=self.setup.extra_modules,
                counts=self.counts,
                keep_checkpoints=self.setup.config.keep_checkpoints,
            )


@contextmanager
def open_run(config: Config, options: Options = Options(), script: str = "train_grpo.py") -> Iterator[Run]:
    """Lock `output_dir` for one run of `script`. After an error, the last complete step is saved if possible.

    Raises:
        InputError: the folder cannot be written, is in use, holds other files, or holds an unfinished run.
        RunError: the run failed. The message says how to continue.
    """
    with open_folder(config, options, script) as folder:
        run = Run(folder)
        try:
            yield run
        except NotFiniteError:
            raise
        except RunError:
            run.rescue()
            raise
