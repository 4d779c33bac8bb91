"""Try rewards before training: score ready-made completions and print a table. See `python -m reward_model`."""

import math
from collections.abc import Sequence
from itertools import repeat
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.data import Dataset, Sample
from grpo.datasets.formats import Columns, load_dataset
from grpo.datasets.rows import json_lines
from grpo.errors import InputError
from grpo.rewards.calls import call_attribute
from grpo.rewards.loading import Reward
from grpo.rewards.scores import Scores
from grpo.rewards.scoring import check_samples, score_completions
from grpo.settings.config import Config
from grpo.settings.sources import Source, sources_of


def source_of(path: str, config: Config) -> Source:
    """The dataset that a file belongs to: in a mixture the one with this path, else the only one."""
    sources = sources_of(vars(config))
    if config.datasets is None:
        return sources[0]
    for source in sources:
        if path in (source.path, source.eval_path):
            return source
    allowed = ", ".join(own.path for own in sources)
    raise InputError(f"--data: got {path}, which is none of the data sets of the mixture: {allowed}")


def try_rewards(
    data_path: str,
    completions_path: str,
    rewards: Sequence[Reward],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
) -> str:
    """Score the completions of one file for the samples of the other. Returns the table to print.

    Raises:
        InputError: a file cannot be read, a row cannot be scored, or a completion belongs to no row.
    """
    source = source_of(data_path, config)
    data = load_dataset(data_path, Columns(source.prompt_column, source.answer_column))
    check_samples(rewards, data, data.place)
    rows, completions = paired(data, data_path, completions_path)
    samples = [data[row] for row in rows]
    ids = [token_ids(text, tokenizer) for text in completions]
    scores = score_completions(rewards, samples, completions, ids, combine=config.combine)
    return table(rows, completions, scores, explanations(rewards, samples, completions))


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a completion as the sampler returns them, the stop token included."""
    valid_text = text.encode(errors="replace").decode()  # a tokenizer refuses half a surrogate pair, JSON does not
    return [*tokenizer(valid_text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def explanations(rewards: Sequence[Reward], samples: Sequence[Sample], completions: Sequence[str]) -> list[list[str]]:
    """For each completion, what keeps it from a higher value, according to the rewards that can explain it."""
    by_name = {
        reward.name: call_attribute(reward.name, "explain", list, reward.explain, samples, completions)
        for reward in rewards
        if reward.explain is not None
    }
    rows = zip(*by_name.values(), strict=True) if by_name else repeat((), len(completions))
    return [[f"{name}: {reason}" for name, reason in zip(by_name, row, strict=True) if reason] for row in rows]


def paired(data: Dataset, data_name: str, path: str) -> tuple[list[int], list[str]]:
    """The completions in a file, and the row of the data that each one answers. Returns (row numbers, texts).

    If the lines have a "prompt", each belongs to the row with that prompt (and with its "answer", if the line has one).
    Otherwise the lines belong to the first rows, in order.

    Raises:
        InputError: a line has no completion, or belongs to no row, or to several rows that differ; some lines have a
            prompt and some do not; or there are more lines than rows.
    """
    lines = list(json_lines(path))
    if not lines:
        raise InputError(f"{path}: has no completions")
    for place, line in lines:
        if not isinstance(line.get("completion"), str):
            raise InputError(f'{place}: "completion": got {line.get("completion")!r}, expected a text')
    num_named = sum("prompt" in line for _, line in lines)
    if num_named not in (0, len(lines)):
        raise InputError(f'{path}: {num_named} of {len(lines)} lines have a "prompt", expected all or none of them')
    if num_named == 0 and len(lines) > len(data):
        raise InputError(f'{path}: {len(lines)} lines without a "prompt", but {data_name} has only {len(data)} rows')
    texts = [line["completion"] for _, line in lines]
    if num_named == 0:
        return list(range(len(lines))), texts
    by_prompt: dict[str, list[int]] = {}
    for row, sample in enumerate(data):
        by_prompt.setdefault(str(sample["prompt"]), []).append(row)
    return [_row_of(line, place, by_prompt, data, data_name) for place, line in lines], texts


def _row_of(line: Sample, place: str, by_prompt: dict[str, list[int]], data: Dataset, data_name: str) -> int:
    """The row with the line's prompt. `by_prompt`: the rows of each prompt."""
    rows = by_prompt.get(str(line["prompt"]), [])
    if not rows:
        raise InputError(f'{place}: "prompt": {line["prompt"]!r} is in no row of {data_name}')
    if "answer" in line:
        rows = [row for row in rows if data[row].get("answer") == line["answer"]]
        if not rows:
            raise InputError(f'{place}: "answer": no row of {data_name} has {line["answer"]!r} with this prompt')
    if any(data[row] != data[rows[0]] for row in rows):
        raise InputError(f'{place}: "prompt": {len(rows)} rows of {data_name} have it; an "answer" can say which one')
    return rows[0]


VERDICTS = {1.0: "yes", 0.0: "no"}  # NaN, no verdict: "-"


def table(
    rows: Sequence[int], completions: Sequence[str], scores: Scores, explanations: Sequence[Sequence[str]]
) -> str:
    """One line per completion, followed by its explanations; then the mean of each column, and warnings."""
    columns = {"reward": scores.combined.tolist()} | {name: v.tolist() for name, v in scores.by_name.items()}
    widths = [max(len(name), 8) for name in columns]
    is_correct = scores.is_correct.tolist()
    names = [f"{name:>{width}}" for name, width in zip(columns, widths, strict=True)]
    lines = ["  ".join(["  row", *names, "right", "completion"])]
    for index, (row, text) in enumerate(zip(rows, completions, strict=True)):
        numbers = [values[index] for values in columns.values()]
        verdict = VERDICTS.get(is_correct[index], "-")
        lines.append(_line(row + 1, numbers, widths, verdict, " ".join(text.split())[:60]))
        lines += [f"       {reason}" for reason in explanations[index]]
    means = [_mean(values) for values in columns.values()]
    lines.append(_line("mean", means, widths, _shown(_mean(is_correct)), f"{len(completions)} completions"))
    for name, mean in zip(columns, means, strict=True):
        if math.isnan(mean) and name != "reward":
            lines.append(f"The reward {name} applies to none of these completions.")
    if len(completions) > 1 and len(set(columns["reward"])) == 1:
        lines.append("All of them earn the same: there is nothing to learn from such completions.")
    return "\n".join(lines)


def _line(first: Any, numbers: Sequence[float], widths: Sequence[int], verdict: str, text: str) -> str:
    cells = [f"{_shown(number):>{width}}" for number, width in zip(numbers, widths, strict=True)]
    return "  ".join([f"{first:>5}", *cells, f"{verdict:>5}", text]).rstrip()


def _shown(number: float) -> str:
    return "-" if math.isnan(number) else format(number, ".3f")


def _mean(values: Sequence[float]) -> float:
    """The mean of the values that are not NaN; NaN if there are none."""
    valid = [value for value in values if not math.isnan(value)]
    return math.fsum(valid) / len(valid) if valid else math.nan
