"""One run, as the loop sees it: four verbs. `steps`, `check_finite`, `record`, `finish`.

Behind them: the evaluation of the base model, resuming, the progress bar, Ctrl-C, records, evaluations, best/,
checkpoints, pictures, and saving after an error. The files are in grpo/run/folder.py.
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
    setup: Setup | None = None  # from the first step on
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))  # tokens and completions so far
    evaluation: Evaluation | None = None  # the newest one, if the weights are still those it was made with
    whole_step: int | None = None  # the weights are those after this step; None: an update is under way

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
        """A NaN or inf in loss or gradient ends the run here, before it reaches the weights."""
        if not metrics.is_finite():
            rows = sample_rows(metrics.step, batch.row_samples, batch.rollout, batch.scores, advantages)
            raise leave_failed_batch(self.folder.path, rows, batch.rollout, advantages, metrics.checked_numbers())
        self.whole_step = None

    def record(self, batch: Batch, advantages: Tensor, metrics: StepMetrics) -> None:
        """A row of metrics.jsonl, the lines of samples.jsonl; if they are due, an evaluation and a checkpoint.

        Raises:
            KeyboardInterrupt: Ctrl-C asked for it. The step is saved.
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
        """After an error: save the newest whole step, unless it is the base model or the weights are being updated."""
        step, self.whole_step = self.whole_step, None
        if step is not None:
            with suppress(RunError):  # the first error is the one to be told
                self._save(step)

    def _begin(self, setup: Setup) -> int:
        """Step 0: the base model is evaluated, and the folder made."""
        self.evaluation = setup.evaluate().having(setup.config.eval_metric)
        self.folder.begin(base_sha256=weights_sha256(setup.policy), examples=pick_examples(self.evaluation))
        self.folder.append({"step": 0} | self.evaluation.metrics())
        self._report(0, self.evaluation)
        return 1

    def _resume(self, setup: Setup) -> int:
        """Everything as it was after the newest checkpoint."""
        checkpoint = self.folder.checkpoint
        assert checkpoint is not None
        base_sha256 = self.folder.facts["base_sha256"]
        state = load_checkpoint(checkpoint, setup.policy, setup.optimizer, setup.extra_modules, base_sha256)
        self.folder.resume(state)
        step, self.counts = state["step"], {name: state[name] for name in COUNTS}
        if self._is_due(step) and "eval/reward" not in self.folder.rows[-1]:  # it failed then, or it was no last step
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
        """A checkpoint; none for step 0, which is the base model."""
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
    """Hold `output_dir` for one run of `script`. What fails in it is saved as far as possible, and explained.

    Raises:
        InputError: the folder cannot be written, is in use, holds something else, or an unfinished run.
        RunError: the run failed; the message says how to go on.
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
