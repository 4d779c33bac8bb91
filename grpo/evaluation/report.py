"""Reports: the numbers of one model, a table of several models, and the comparison of two models."""

from collections.abc import Sequence
from typing import Any

from grpo.data import Dataset
from grpo.evaluation.greedy import Evaluation
from grpo.evaluation.preflight import side_by_side
from grpo.evaluation.statistics import mcnemar, pass_at_k

MAX_PROBLEMS_SHOWN = 5  # in a comparison, per model
ACCURACIES = [f"{name}{bound}" for name in ("accuracy", "accuracy_lenient") for bound in ("", "_low", "_high")]


def make_report(
    name: str, dataset: Dataset, evaluation: Evaluation, counts: Sequence[int | None], k: int
) -> dict[str, Any]:
    """The numbers of one model, as they are written to the file.

    Args:
        name: the model.
        dataset: its problems.
        evaluation: its greedy answers.
        counts: for each problem, how many of k sampled completions are correct; None = not scored.
        k: samples per problem.
    """
    metrics = evaluation.metrics()
    scored = [count for count in counts if count is not None]
    return {
        "model": name,
        "data": str(dataset.path),
        "n": evaluation.num_scored,
        **{key: metrics.get(f"eval/{key}") for key in ACCURACIES},
        "pass_at_1": sum(pass_at_k(k, count, 1) for count in scored) / len(scored) if scored else None,
        "pass_at_k": sum(pass_at_k(k, count, k) for count in scored) / len(scored) if scored else None,
        "k": k,
        "mean_length": evaluation.mean_length,
        "clipped_ratio": evaluation.clipped_ratio,
        "reward": evaluation.reward,
        "rewards": evaluation.rewards,
        "datasets": evaluation.by_dataset(),
    }


def table(reports: Sequence[dict[str, Any]]) -> str:
    """The reports of several models on the same problems, one column per model."""
    first = reports[0]
    rows = {
        "": [report["model"] for report in reports],
        f"accuracy, greedy, n = {first['n']} [95 %]": [_accuracy(report) for report in reports],
    }
    if any(report.get("accuracy_lenient") is not None for report in reports):
        rows["  wherever the answer stands"] = [_accuracy(report, "accuracy_lenient") for report in reports]
    for name, numbers in first.get("datasets", {}).items():
        parts = [report["datasets"][name] for report in reports]
        rows[f"  {name}, n = {numbers['n']}"] = [_accuracy(part) for part in parts]
        if any("accuracy_lenient" in part for part in parts):
            rows[f"    {name}, wherever the answer stands"] = [_accuracy(part, "accuracy_lenient") for part in parts]
    rows["pass@1, temperature 1"] = [_share(report["pass_at_1"]) for report in reports]
    rows[f"pass@{first['k']}, temperature 1"] = [_share(report["pass_at_k"]) for report in reports]
    rows["tokens an answer"] = [f"{report['mean_length']:.1f}" for report in reports]
    rows["cut off"] = [f"{report['clipped_ratio']:.1%}" for report in reports]
    for name in first["rewards"]:
        rows[f"reward {name}"] = [f"{report['rewards'][name]:.3f}" for report in reports]

    widths = [max(len(cells[column]) for cells in rows.values()) for column in range(len(reports))]
    label_width = max(map(len, rows))
    lines = []
    for label, cells in rows.items():
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append("  ".join([f"  {label:{label_width}}", *aligned]))
    return "\n".join(lines)


def _accuracy(numbers: dict[str, Any], name: str = "accuracy") -> str:
    """An accuracy with its 95 % interval."""
    if numbers.get(name) is None:
        return "undefined"
    return f"{numbers[name]:.3f} [{numbers[f'{name}_low']:.3f}, {numbers[f'{name}_high']:.3f}]"


def _share(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def compare(names: Sequence[str], dataset: Dataset, evaluations: Sequence[Evaluation]) -> tuple[dict[str, Any], str]:
    """Compare two models by McNemar's test on the problems that exactly one of them solves.

    Returns:
        The numbers for the file, and a text that shows some of these problems.
    """
    first, second = evaluations
    verdicts = list(zip(first.is_correct, second.is_correct, strict=True))
    only_first = [index for index, pair in enumerate(verdicts) if pair == (True, False)]
    only_second = [index for index, pair in enumerate(verdicts) if pair == (False, True)]
    p_value = mcnemar(len(only_first), len(only_second))
    lines = [
        f"\n{len(only_first)} problems only {names[0]} solves, {len(only_second)} only {names[1]}: "
        f"McNemar's test, two-sided, exact: p = {p_value:.2g}"
    ]
    for name, solved in zip(names, (only_first, only_second), strict=True):
        if solved:
            is_long = len(solved) > MAX_PROBLEMS_SHOWN
            lines.append(
                f"Only {name} solves" + (f" (the first {MAX_PROBLEMS_SHOWN} of {len(solved)})" if is_long else "")
            )
        for index in solved[:MAX_PROBLEMS_SHOWN]:
            answers = {names[0]: first.completions[index], names[1]: second.completions[index]}
            lines.append(side_by_side(dataset[index], answers))
    numbers = {
        "only_first": [dataset[index]["prompt"] for index in only_first],
        "only_second": [dataset[index]["prompt"] for index in only_second],
        "mcnemar_p": p_value,
    }
    return numbers, "\n".join(lines)
