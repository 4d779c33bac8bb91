"""The pre-flight check, which shows whether a run can learn anything, and answers of several models side by side."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from grpo.advantages import zero_variance_groups
from grpo.batch import one_per_row
from grpo.data import Sample, prompt_text
from grpo.errors import InputError
from grpo.evaluation.greedy import Evaluation, ScoreFn, verdicts_of
from grpo.rewards.scores import Scores
from grpo.rollout import Rollout


def outcome_shares(scores: Scores, is_truncated: Tensor) -> dict[str, float]:
    """The answers/* columns: fractions of the completions to which the first reward applies; empty if there are none.

    answers/right is the fraction of correct completions. Each of the others counts as the first of these that is true:
    answers/truncated (cut off), answers/none (no answer to judge), answers/wrong.

    Args:
        scores: of B completions.
        is_truncated: (B,) bool.
    """
    outcomes: Counter[str] = Counter()
    rows = zip(verdicts_of(scores.is_correct), scores.has_answer.tolist(), is_truncated.tolist(), strict=True)
    for verdict, has_answer, is_cut_off in rows:
        if verdict is not None:
            outcomes["right" if verdict else "truncated" if is_cut_off else "wrong" if has_answer else "none"] += 1
    names = ("right", "wrong", "none", "truncated") if outcomes else ()
    return {f"answers/{name}": outcomes[name] / outcomes.total() for name in names}


def preflight(samples: Sequence[Sample], rollout: Rollout, score_fn: ScoreFn) -> str:
    """A text that shows how much a run can learn. Only groups with correct and wrong completions teach the answer.

    Args:
        samples: the P prompts of the first step.
        rollout: P * G completions of the base model; row p * G + g belongs to prompt p.
        score_fn: the score function of the run.

    Raises:
        InputError: no reward applies to any completion, so there is nothing to learn.
    """
    group_size = len(rollout.completions) // len(samples)
    scores = score_fn(one_per_row(samples, rollout), rollout)
    if scores.combined.isnan().all():
        drawn = f"any of the first step's {len(rollout.completions)} completions"
        raise InputError(f"rewards: none of them applies to {drawn}: nothing to learn")
    verdicts = verdicts_of(scores.is_correct)
    kinds: Counter[str] = Counter()
    for start in range(0, len(verdicts), group_size):
        found = {verdict for verdict in verdicts[start : start + group_size] if verdict is not None}
        kind = "mixed" if len(found) == 2 else "all right" if True in found else "all wrong" if found else "unscored"
        kinds[kind] += 1
    num_signal = int((~zero_variance_groups(scores.combined.view(-1, group_size))).sum())
    cut = rollout.is_truncated.float().mean().item()
    lines = [
        f"pre-flight: {len(samples)} groups of {group_size} from the base: {kinds['all right']} all right, "
        f"{kinds['mixed']} mixed, {kinds['all wrong']} all wrong"
        + (f", {kinds['unscored']} not scored" if kinds["unscored"] else "")
        + f"; {cut:.0%} of the completions cut off"
    ]
    # Show a correct completion if there is one, so that the user sees what the reward accepts.
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
    """What to change if no group has both correct and wrong completions."""
    if kinds["all right"] and kinds["all wrong"]:
        return "every problem is solved always or never. Try a larger group_size, or problems between the two."
    if kinds["all right"]:
        return "the base can do this already. Try harder problems."
    if not kinds["all wrong"]:
        return "the first of the rewards applies to none of these rows; see eval_metric."
    longer = " a larger max_completion_length (many are cut off)," if cut > 0.5 else ""
    return f"the base never found a right answer. Try{longer} a larger group_size, easier problems, a better base."


def pick_examples(evaluation: Evaluation, num_examples: int = 3) -> list[dict[str, Any]]:
    """Problems to show again after training: first those that are not solved, then the others, each in order."""
    order = sorted(range(len(evaluation.is_correct)), key=lambda index: evaluation.is_correct[index] is True)
    return [{"index": index, "completion": evaluation.completions[index]} for index in order[:num_examples]]


def side_by_side(sample: Sample, completions: dict[str, str]) -> str:
    """One problem and the answers to it. `completions`: name of the model -> its answer."""
    width = max(map(len, completions))
    expected = f"   (answer: {sample['answer']})" if "answer" in sample else ""
    lines = [f"    {name:{width}}  {_one_line(text)}" for name, text in completions.items()]
    return "\n".join([f"  {_one_line(prompt_text(sample['prompt']))}{expected}", *lines])


def _one_line(text: str, limit: int = 300) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= limit else f"{text[:limit]}…"
