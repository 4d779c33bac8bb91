"""A reward tried before training: what it says of ready-made completions, a line each. `python -m reward_model`."""

import argparse
import math
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

from grpo.data import Dataset, Sample
from grpo.datasets.formats import Columns, load_dataset
from grpo.datasets.rows import json_lines
from grpo.errors import InputError
from grpo.rewards.calls import asked
from grpo.rewards.loading import Reward
from grpo.settings.command_line import SettingsParser
from grpo.settings.config import Config, load_config
from grpo.settings.sources import Source, sources_of

if TYPE_CHECKING:  # they import torch, which --help can do without
    from grpo.rewards.scores import Scores


def parse_arguments(
    description: str | None, arguments: Sequence[str] | None = None
) -> tuple[argparse.Namespace, Config]:
    """The files, and the settings they are judged with."""
    parser = SettingsParser(description or "", "--data FILE --completions FILE")
    add = parser.own.add_argument
    add("--data", metavar="FILE", required=True, help="rows as a run has them: prompts, and the columns of the rewards")
    add(
        "--completions",
        metavar="FILE",
        required=True,
        help='JSON lines with a "completion": one for each row, in order; or each with the "prompt" of its row, as '
        "samples.jsonl has them",
    )
    parsed, overrides = parser.parse(arguments)
    return parsed, load_config(parsed.config, overrides)


def source_of(path: str, config: Config) -> Source:
    """What the config says of the data at `path`: of a mixture, that of the data set it belongs to."""
    sources = sources_of(vars(config))
    if config.datasets is None:
        return sources[0]
    for source in sources:
        if path in (source.path, source.eval_path):
            return source
    allowed = ", ".join(own.path for own in sources)
    raise InputError(f"--data: got {path}, which is none of the data sets of the mixture: {allowed}")


def try_rewards(
    arguments: argparse.Namespace,
    source: Source,
    rewards: Sequence[Reward],
    check: Callable[[Dataset], object],
    score: Callable[[Sequence[Sample], Sequence[str]], "Scores"],
) -> str:
    """The table of scores.

    `check` raises an InputError for a row that cannot be scored; `score` takes samples and as many completions.
    """
    data = load_dataset(arguments.data, Columns(source.prompt_column, source.answer_column))
    check(data)
    rows, completions = paired(data, arguments.data, arguments.completions)
    samples = [data[row] for row in rows]
    return table(rows, completions, score(samples, completions), explained(rewards, samples, completions))


def explained(rewards: Sequence[Reward], samples: Sequence[Sample], completions: Sequence[str]) -> list[list[str]]:
    """Of each completion, why it does not earn more: the words of the rewards that have any."""
    said = {r.name: asked(r.name, "explain", list, r.explain, samples, completions) for r in rewards if r.explain}
    rows = zip(*said.values(), strict=True) if said else repeat((), len(completions))
    return [[f"{name}: {words}" for name, words in zip(said, row, strict=True) if words] for row in rows]


def paired(data: Dataset, data_name: str, path: str) -> tuple[list[int], list[str]]:
    """Which row of the data each completion of a file answers, and its text.

    A line with a "prompt" belongs to the row of that prompt (and of that "answer", if it has one); without any, lines
    belong to the rows in order, to the first ones where there are fewer of them.

    Raises:
        InputError: a line has no completion, or belongs to no row, or to several that are not the same; some lines have
            a prompt and some not; or there are more of them than rows.
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


def table(rows: Sequence[int], completions: Sequence[str], scores: "Scores", words: Sequence[Sequence[str]]) -> str:
    """A line for every completion, with what there is to say of it, the mean of each column, and what looks wrong."""
    columns = {"reward": scores.combined.tolist()} | {name: v.tolist() for name, v in scores.by_name.items()}
    widths = {name: max(len(name), 8) for name in columns}
    verdicts = {1.0: "yes", 0.0: "no"}

    def line(first: Any, numbers: Sequence[float], right: str, text: str) -> str:
        cells = [f"{_shown(number):>{width}}" for number, width in zip(numbers, widths.values(), strict=True)]
        return "  ".join([f"{first:>5}", *cells, f"{right:>5}", text]).rstrip()

    lines = ["  ".join(["  row", *(f"{name:>{width}}" for name, width in widths.items()), "right", "completion"])]
    is_correct = scores.is_correct.tolist()
    for row, right, text, said, *numbers in zip(rows, is_correct, completions, words, *columns.values(), strict=True):
        lines.append(line(row + 1, numbers, verdicts.get(right, "-"), " ".join(text.split())[:60]))
        lines += [f"       {reason}" for reason in said]
    means = [_mean(values) for values in columns.values()]
    lines.append(line("mean", means, _shown(_mean(is_correct)), f"{len(completions)} completions"))
    for name, mean in zip(columns, means, strict=True):
        if math.isnan(mean) and name != "reward":
            lines.append(f"The reward {name} applies to none of these completions.")
    if len(completions) > 1 and len(set(columns["reward"])) == 1:
        lines.append("All of them earn the same: there is nothing to learn from such completions.")
    return "\n".join(lines)


def _shown(number: float) -> str:
    return "-" if math.isnan(number) else format(number, ".3f")


def _mean(values: Sequence[float]) -> float:
    valid = [value for value in values if not math.isnan(value)]
    return math.fsum(valid) / len(valid) if valid else math.nan
