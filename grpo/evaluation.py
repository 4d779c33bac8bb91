"""Greedy accuracy on held-out problems, its interval, pass@k, two models compared; and the pre-flight of a run."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.advantages import groups_without_spread
from grpo.data import SOURCE, Sample, model_input, prompt_text
from grpo.errors import InputError
from grpo.rollout import Rollout, generate_completions

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


class Scored(Protocol):
    """What a score function returns for b completions; NaN = not applicable."""

    @property
    def by_name(self) -> dict[str, Tensor]:
        """Each (b,), one entry a reward function."""

    @property
    def combined(self) -> Tensor:
        """(b,) the combined reward."""

    @property
    def is_right(self) -> Tensor:
        """(b,) 1.0 right, 0.0 wrong."""

    @property
    def has_answer(self) -> Tensor:
        """(b,) bool: there is something in the completion to be right or wrong about."""

    def metrics(self) -> dict[str, float]:
        """What a step's row of metrics.jsonl says of them."""

    @property
    def is_right_leniently(self) -> Tensor:
        """(b,) the same where the answer need not have the form that was asked for; NaN where nothing is said of it."""

    def select(self, rows: Tensor) -> Self:
        """The scores of these rows alone."""

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """The scores of all parts, one after another."""


ScoreFn = Callable[[Sequence[Sample], Rollout], Scored]


@dataclass(frozen=True)
class Evaluation:
    """One pass over a data set, one greedy completion a sample. Rows where no reward applies count nowhere."""

    completions: list[str]
    is_right: list[bool | None]  # None: the first reward does not apply to this row
    reward: float
    rewards: dict[str, float]  # the mean of each reward function
    mean_length: float  # tokens, the stop token included
    clipped_ratio: float  # share of completions cut off at max_completion_length
    seconds: float
    is_right_leniently: Sequence[bool | None] = ()  # right, be it not in the form that was asked for; None: unknown
    combined: Sequence[float] = ()  # the reward of each sample, NaN = not applicable
    datasets: Sequence[str | None] = ()  # where each sample comes from; None: there is only one data set

    @property
    def num_right(self) -> int:
        return sum(right is True for right in self.is_right)

    @property
    def num_scored(self) -> int:
        return sum(right is not None for right in self.is_right)

    @property
    def accuracy(self) -> float | None:
        """None where no row is scored as right or wrong."""
        return self.num_right / self.num_scored if self.num_scored else None

    def metrics(self) -> dict[str, float]:
        """The eval/* columns of metrics.jsonl; no accuracy where it is defined for no row."""
        row = {
            "eval/reward": self.reward,
            "eval/mean_length": self.mean_length,
            "eval/clipped_ratio": self.clipped_ratio,
            "eval/time": self.seconds,
        }
        row |= _accuracy("eval/accuracy", self.is_right) | _accuracy("eval/accuracy_lenient", self.is_right_leniently)
        for name, numbers in self.by_dataset().items():
            row |= {f"eval/{name}/{key}": value for key, value in numbers.items()}
        return row

    def by_dataset(self) -> dict[str, dict[str, float]]:
        """n, reward and accuracies of each data set of a mixture; empty where there is only one."""
        parts = {}
        for name in dict.fromkeys(name for name in self.datasets if name is not None):
            rows = [index for index, own in enumerate(self.datasets) if own == name]
            parts[name] = {"n": len(rows), "reward": mean_of([self.combined[index] for index in rows])}
            parts[name] |= _accuracy("accuracy", [self.is_right[index] for index in rows])
            parts[name] |= _accuracy("accuracy_lenient", [self.is_right_leniently[index] for index in rows])
        return parts

    def having(self, metric: str) -> Self:
        """Itself; an InputError if it lacks the metric that chooses best/."""
        if math.isnan(self.reward):
            raise InputError("rewards: none of them applies to any row of eval_file")
        if metric not in self.metrics():
            raise InputError(
                f"eval_metric: got {metric}, which is undefined here: the first of the rewards applies to no row of "
                "eval_file; use eval/reward"
            )
        return self

    def __str__(self) -> str:
        row = self.metrics()
        text = f"reward {self.reward:.3f}  length {self.mean_length:.1f}"
        if self.accuracy is not None:
            interval = f"[{row['eval/accuracy_low']:.3f}, {row['eval/accuracy_high']:.3f}]"
            text = f"held-out accuracy {self.accuracy:.3f} {interval} of {self.num_scored}  {text}"
        return text


def _accuracy(name: str, verdicts: Sequence[bool | None]) -> dict[str, float]:
    """Share and 95 % interval of those that are right; nothing where there are no verdicts."""
    scored = [verdict for verdict in verdicts if verdict is not None]
    if not scored:
        return {}
    low, high = wilson_interval(sum(scored), len(scored))
    return {name: sum(scored) / len(scored), f"{name}_low": low, f"{name}_high": high}


def mean_of(values: Sequence[float]) -> float:
    """The mean of those that are not NaN; NaN where there are none."""
    return torch.tensor(values, dtype=torch.float64).nanmean().item()


def evaluate_greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    score_fn: ScoreFn,
    *,
    max_completion_length: int,
    batch_rows: int,
    stop_strings: Sequence[str] = (),
    progress: str | None = None,
    generate: Callable[..., Rollout] | None = None,
) -> Evaluation:
    """One greedy completion for every sample, `batch_rows` at a time; `progress` names a bar.

    `score_fn(samples, rollout)` is the training run's own, so held-out problems are judged by the same rewards.
    """
    start_time = time.perf_counter()
    rollouts: list[Rollout] = []
    parts: list[Scored] = []
    for start in _batches(len(samples), batch_rows, progress):
        batch = samples[start : start + batch_rows]
        rollout = (generate or generate_completions)(
            model,
            tokenizer,
            [model_input(sample) for sample in batch],
            group_size=1,
            max_completion_length=max_completion_length,
            temperature=0.0,
            stop_strings=stop_strings,
        )
        rollouts.append(rollout)
        parts.append(score_fn(batch, rollout))
    scores = type(parts[0]).cat(parts)
    return Evaluation(
        completions=[text for rollout in rollouts for text in rollout.completions],
        is_right=_verdicts(scores.is_right),
        reward=mean_of(scores.combined.tolist()),
        rewards={name: mean_of(values.tolist()) for name, values in scores.by_name.items()},
        mean_length=sum(int(rollout.completion_mask.sum()) for rollout in rollouts) / len(samples),
        clipped_ratio=sum(int(rollout.is_truncated.sum()) for rollout in rollouts) / len(samples),
        seconds=time.perf_counter() - start_time,
        is_right_leniently=_verdicts(scores.is_right_leniently),
        combined=scores.combined.tolist(),
        datasets=[sample.get(SOURCE) for sample in samples],
    )


def count_right(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    score_fn: ScoreFn,
    *,
    k: int,
    max_completion_length: int,
    batch_rows: int,
    seed: int,
    stop_strings: Sequence[str] = (),
    progress: str | None = None,
    generate: Callable[..., Rollout] | None = None,
) -> list[int | None]:
    """How many of k completions sampled at temperature 1 are right, for every sample; None where not all are scored.

    The noise of completion g of sample i depends on (seed, i, g) alone, so `batch_rows` changes nothing.
    """
    counts: list[int | None] = []
    size = max(1, batch_rows // k)  # samples a batch
    for start in _batches(len(samples), size, progress):
        batch = samples[start : start + size]
        rollout = (generate or generate_completions)(
            model,
            tokenizer,
            [model_input(sample) for sample in batch],
            group_size=k,
            stop_strings=stop_strings,
            max_completion_length=max_completion_length,
            seed=seed,
            completion_indices=range(start * k, (start + len(batch)) * k),
        )
        verdicts = _verdicts(score_fn([sample for sample in batch for _ in range(k)], rollout).is_right)
        for row in range(0, len(verdicts), k):
            scored = [verdict for verdict in verdicts[row : row + k] if verdict is not None]
            counts.append(sum(scored) if len(scored) == k else None)
    return counts


def _batches(num_samples: int, size: int, progress: str | None) -> Iterator[int]:
    """The first sample of each batch, behind a bar that counts samples."""
    with tqdm(total=num_samples, desc=progress, unit="problem", disable=progress is None, leave=False) as bar:
        for start in range(0, num_samples, size):
            yield start
            bar.update(min(size, num_samples - start))


def _verdicts(is_right: Tensor) -> list[bool | None]:
    return [None if math.isnan(right) else right == 1.0 for right in is_right.tolist()]


def outcome_shares(scores: Scored, is_truncated: Tensor) -> dict[str, float]:
    """How answers end, as shares of the completions that the first reward applies to; empty where it applies to none.

    answers/right, and of those not right: answers/truncated (cut off), answers/none (nothing to judge), answers/wrong.
    """
    outcomes: Counter[str] = Counter()
    rows = zip(_verdicts(scores.is_right), scores.has_answer.tolist(), is_truncated.tolist(), strict=True)
    for verdict, has_answer, is_cut in rows:
        if verdict is not None:
            outcomes["right" if verdict else "truncated" if is_cut else "wrong" if has_answer else "none"] += 1
    names = ("right", "wrong", "none", "truncated") if outcomes else ()
    return {f"answers/{name}": outcomes[name] / outcomes.total() for name in names}


def preflight(samples: Sequence[Sample], rollout: Rollout, score_fn: ScoreFn) -> str:
    """What there is to learn from: P groups sampled from the base, of which only mixed ones say right from wrong.

    `samples` are the P prompts; row p * G + g of `rollout` belongs to prompt p.

    Raises:
        InputError: no reward applies to any of them, so training would teach nothing.
    """
    group_size = len(rollout.completions) // len(samples)
    scores = score_fn([sample for sample in samples for _ in range(group_size)], rollout)
    if scores.combined.isnan().all():
        drawn = f"any of the first step's {len(rollout.completions)} completions"
        raise InputError(f"rewards: none of them applies to {drawn}: nothing to learn")
    verdicts = _verdicts(scores.is_right)
    kinds: Counter[str] = Counter()
    for start in range(0, len(verdicts), group_size):
        found = {verdict for verdict in verdicts[start : start + group_size] if verdict is not None}
        kind = "mixed" if len(found) == 2 else "all right" if True in found else "all wrong" if found else "unscored"
        kinds[kind] += 1
    num_signal = int((~groups_without_spread(scores.combined.view(-1, group_size))).sum())
    cut = rollout.is_truncated.float().mean().item()
    lines = [
        f"pre-flight: {len(samples)} groups of {group_size} from the base: {kinds['all right']} all right, "
        f"{kinds['mixed']} mixed, {kinds['all wrong']} all wrong"
        + (f", {kinds['unscored']} not scored" if kinds["unscored"] else "")
        + f"; {cut:.0%} of the completions cut off"
    ]
    # Show a right completion if there is one: it says what the reward takes for right.
    row = verdicts.index(True) if True in verdicts else 0
    sample = samples[row // group_size]
    terms = ", ".join(f"{name} {values[row]:.2f}" for name, values in scores.by_name.items())
    reward = f"reward {scores.combined[row]:.2f}" + (f" ({terms})" if len(scores.by_name) > 1 else "")
    lines.append(side_by_side(sample, {reward: rollout.completions[row]}))
    lines += [
        f"  The reward {name} applies to none of these completions."
        for name, values in scores.by_name.items()
        if values.isnan().all()
    ]
    if not kinds["mixed"]:
        lines.append(f"  No group is mixed: {_advice(kinds, cut)}")
        if num_signal:
            lines.append(f"  In {num_signal} of {len(samples)} groups the rewards still differ, so there is a signal.")
    return "\n".join(lines)


def _advice(kinds: Counter[str], cut: float) -> str:
    """What to change where right and wrong never meet in one group."""
    if kinds["all right"] and kinds["all wrong"]:
        return "every problem is solved always or never. Try a larger group_size, or problems between the two."
    if kinds["all right"]:
        return "the base can do this already. Try harder problems."
    if not kinds["all wrong"]:
        return "the first of the rewards applies to none of these rows; see eval_metric."
    longer = " a larger max_completion_length (many are cut off)," if cut > 0.5 else ""
    return f"the base never found a right answer. Try{longer} a larger group_size, easier problems, a better base."


def pick_examples(evaluation: Evaluation, num_examples: int = 3) -> list[dict[str, Any]]:
    """Problems to look at again after training: the first ones that are not right, then any others."""
    order = sorted(range(len(evaluation.is_right)), key=lambda index: evaluation.is_right[index] is True)  # stable
    return [{"index": index, "completion": evaluation.completions[index]} for index in order[:num_examples]]


def side_by_side(sample: Sample, completions: dict[str, str]) -> str:
    """One problem and what each model answers."""
    width = max(map(len, completions))
    expected = f"   (answer: {sample['answer']})" if "answer" in sample else ""
    lines = [f"    {name:{width}}  {_one_line(text)}" for name, text in completions.items()]
    return "\n".join([f"  {_one_line(prompt_text(sample['prompt']))}{expected}", *lines])


def _one_line(text: str, limit: int = 300) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= limit else f"{text[:limit]}…"


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value that two models which disagree this often are equally good.

    Of the n problems that exactly one of them solves, each would be the first one's with probability 1/2.
    Paper: McNemar, "Note on the sampling error of the difference between correlated proportions" (1947).

    >>> mcnemar(1, 9)
    0.021484375
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n)


def wilson_interval(num_right: int, num_samples: int) -> tuple[float, float]:
    """95 % interval of a share; unlike the textbook p +- 1.96 s it stays in [0, 1] and has a width at 0 and 1.

    Paper: Wilson, "Probable inference, the law of succession, and statistical inference" (1927).

    >>> [round(bound, 3) for bound in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    if not 0 <= num_right <= num_samples or num_samples == 0:
        raise ValueError(f"num_right, num_samples: got {num_right}, {num_samples}, expected 0 <= right <= samples >= 1")
    share = num_right / num_samples
    shrink = 1 / (1 + Z_95**2 / num_samples)
    centre = shrink * (share + Z_95**2 / (2 * num_samples))
    spread = math.sqrt(share * (1 - share) / num_samples + Z_95**2 / (4 * num_samples**2))
    return max(0.0, centre - shrink * Z_95 * spread), min(1.0, centre + shrink * Z_95 * spread)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that at least one of k samples is right, unbiased, from n >= k samples: 1 - C(n - c, k) / C(n, k).

    Paper: "Evaluating Large Language Models Trained on Code" (2107.03374) eq. 1.

    >>> pass_at_k(num_samples=4, num_right=1, k=2)
    0.5
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k: got {k}, allowed with {num_samples} samples: 1 … {num_samples}")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)
