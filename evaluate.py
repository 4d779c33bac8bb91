"""How good is a model? Greedy accuracy and pass@k on held-out problems; two models side by side; one question.

    python evaluate.py checkpoints/final                         accuracy, pass@8, rewards on the run's eval_file
    python evaluate.py checkpoints/final --compare tiny          against the base, with McNemar's test
    python evaluate.py checkpoints/final --prompt "What is 47 + 38? Answer with an integer."

MODEL is tiny, a folder or a Hub name. Settings (rewards, lengths, base_seed) come from the run.json beside MODEL, else
from config.yaml; --config and any key as a flag change them.

Reading order: ... -> train_grpo.py -> [evaluate.py].
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo.errors import InputError, errors_explained
from grpo.settings.command_line import SettingsParser
from grpo.settings.config import Config, load_config, read_run_json
from grpo.settings.sources import sources_of

MAX_CHANGED_SHOWN = 5


def parse_arguments() -> tuple[argparse.Namespace, Config]:
    """MODEL and this command's own options, and the settings it is judged with."""
    parser = SettingsParser(__doc__, "MODEL [--compare OTHER] [--data FILE] [--k K] [--prompt TEXT] [--output FILE]")
    add = parser.own.add_argument
    add("model", metavar="MODEL", help="tiny, a folder or a Hub name")
    add("--compare", metavar="OTHER", help="a second model, judged with the same settings")
    add("--data", metavar="FILE", help="problems to solve (default: eval_file)")
    add("--k", type=int, default=8, metavar="K", help="samples a problem for pass@k, at temperature 1 (default: 8)")
    add("--prompt", metavar="TEXT", help="answer this one question greedily and stop")
    add("--output", metavar="FILE", default="evaluation.json", help="where the numbers go (default: evaluation.json)")
    arguments, overrides = parser.parse()
    if arguments.k < 1:
        raise InputError(f"--k: got {arguments.k}, allowed: >= 1")
    if arguments.model_name is not None:
        raise InputError("--model_name: the model to evaluate is the first argument, without a flag")
    if arguments.prompt is not None and not arguments.prompt:
        raise InputError("--prompt: got an empty text")
    folder = Path(arguments.model).expanduser()
    run_folder = folder.resolve().parent
    has_run = folder.is_dir() and (run_folder / "run.json").is_file()
    recorded = read_run_json(run_folder)["settings"] if has_run else None
    config = load_config(arguments.config, overrides, recorded=recorded)
    if arguments.data is not None:
        config = _on_file(config, arguments.data, judged_anew=any(item.startswith("rewards=") for item in overrides))
    config = dataclasses.replace(config, quantization="none")  # the adapter is merged, into weights as they are
    return arguments, config


def _on_file(config: Config, path: str, *, judged_anew: bool) -> Config:
    """The settings for one file: of a mixture, those of the data set that it belongs to."""
    changes: dict[str, Any] = {"eval_file": path, "datasets": None, "total_rows": None}
    if config.datasets is not None and not judged_anew:
        sources = sources_of(vars(config))
        sources = [own for own in sources if path == own.eval_path] + [own for own in sources if path == own.path]
        if not sources:
            raise InputError(
                f"--data: {path} is of none of the run's data sets, so nothing says its rewards: add --rewards"
            )
        keys = ("rewards", "system_prompt", "prompt_column", "answer_column")
        changes |= {key: getattr(sources[0], key) for key in keys}
    return dataclasses.replace(config, **changes)


if __name__ == "__main__":  # before the slow imports: --help and a misspelt flag answer at once
    with errors_explained():
        ARGUMENTS, CONFIG = parse_arguments()

from grpo.data import Dataset, Sample
from grpo.datasets.chat import PromptFormat
from grpo.datasets.mixture import load_eval_set
from grpo.evaluation.greedy import Evaluation, count_correct, evaluate_greedy
from grpo.evaluation.kept_rollouts import KeptRollouts
from grpo.evaluation.preflight import side_by_side
from grpo.evaluation.statistics import mcnemar, pass_at_k
from grpo.files import without_nan
from grpo.models.device import choose_device, make_autocast
from grpo.models.loading import check_lengths, check_positions, load_policy, load_skeleton, loading_settings
from grpo.rollout import Rollout, generate_completions
from reward_model import RewardsOf, Scores, check_mixture, load_rewards_of, score_mixture


def main(arguments: argparse.Namespace, config: Config) -> None:
    """Evaluate one model or two, print the numbers and write them to a file."""
    if arguments.prompt is not None:
        print(answer(arguments.model, arguments.prompt, config))
        return
    rewards = load_rewards_of(sources_of(vars(config)), config.combine)
    output = Path(arguments.output)
    if output.is_dir() or not output.parent.is_dir():
        raise InputError(f"--output: got {output}, expected a file in a folder that exists")
    names = [arguments.model] + ([arguments.compare] if arguments.compare is not None else [])
    datasets = [  # the same problems in the tokens of each model, before the first one is measured
        problems_for(name, config, rewards, which) for which, name in zip(("MODEL", "--compare"), names, strict=False)
    ]
    prompts = [[sample["prompt"] for sample in dataset] for dataset in datasets]
    if prompts[0] != prompts[-1]:
        raise InputError(
            f"long_prompts: got drop, which leaves {len(datasets[0])} problems to MODEL and {len(datasets[1])} to "
            "--compare: they could not be compared; a larger max_prompt_length drops none"
        )
    print(f"{len(datasets[0])} problems of {datasets[0].path}")
    evaluations, reports = [], []
    circumstances = {key: getattr(config, key) for key in ("dtype", "device", "attn_implementation")}
    kept = KeptRollouts(output.with_name(f"{output.name}.unfinished.jsonl"), **circumstances)
    try:
        for name, dataset in zip(names, datasets, strict=True):
            evaluation, report = measure(name, dataset, rewards, config, arguments.k, kept)
            evaluations.append(evaluation)
            reports.append(report)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"stopped; the same command goes on with the answers in {kept.path}") from error
    print(table(reports))
    result = reports[0]
    if len(names) == 2:
        comparison = compare(names, datasets[0], evaluations)
        result |= {"compare": reports[1], "comparison": comparison}
    try:
        output.write_text(json.dumps(without_nan(result), indent=2) + "\n")
    except OSError as error:
        raise InputError(f"--output: {output} cannot be written: {error.strerror}") from error
    kept.forget()
    print(f"The numbers lie in {output}")


def evaluate_model(name: str, config: Config, *, k: int = 8) -> dict[str, Any]:
    """What this command says of one model, as a dict: for notebooks."""
    rewards = load_rewards_of(sources_of(vars(config)), config.combine)
    return measure(name, problems_for(name, config, rewards), rewards, config, k)[1]


def problems_for(name: str, config: Config, rewards: RewardsOf, which: str = "MODEL") -> Dataset:
    """What is held out, in this model's tokens; whatever is wrong with it is found here."""
    try:
        skeleton, tokenizer = load_skeleton(name, chat_template=config.chat_template)
        dataset = load_eval_set(config, tokenizer)
        check_lengths(dataset, skeleton, config)
    except InputError as error:
        raise InputError(str(error).replace("model_name:", f"{which}:")) from error
    check_mixture(rewards, dataset, dataset.place)
    return dataset


def measure(
    name: str, dataset: Dataset, rewards: RewardsOf, config: Config, k: int, kept: KeptRollouts | None = None
) -> tuple[Evaluation, dict[str, Any]]:
    """One model: its greedy answers, and the numbers for people and for the file. `kept`: what it answered before."""

    def score(samples: Sequence[Sample], rollout: Rollout) -> Scores:
        how: dict[str, Any] = {"combine": config.combine, "per_token": config.combine == "sum"}  # lists: of PPO's runs
        return score_mixture(rewards, samples, rollout.completions, rollout.token_lists(), **how)

    device = choose_device(config.device)
    model, tokenizer = load_policy(name, **loading_settings(config), device=device)
    generate = kept.of(model) if kept is not None else None
    limits: dict[str, Any] = {key: getattr(config, key) for key in ("max_completion_length", "stop_strings")}
    rows = config.batch_size * config.group_size
    with make_autocast(config.dtype, device)():
        evaluation = evaluate_greedy(
            model,
            tokenizer,
            dataset,
            score,
            **limits,
            batch_rows=rows,
            progress=f"{name}, greedy",
            generate=generate,
        )
        counts = count_correct(
            model,
            tokenizer,
            dataset,
            score,
            k=k,
            **limits,
            batch_rows=rows,
            seed=config.seed,
            progress=f"{name}, {k} samples",
            generate=generate,
        )
    scored = [count for count in counts if count is not None]
    metrics = evaluation.metrics()
    return evaluation, {
        "model": name,
        "data": str(dataset.path),
        "n": evaluation.num_scored,
        "accuracy": metrics.get("eval/accuracy"),
        "accuracy_low": metrics.get("eval/accuracy_low"),
        "accuracy_high": metrics.get("eval/accuracy_high"),
        "accuracy_lenient": metrics.get("eval/accuracy_lenient"),
        "accuracy_lenient_low": metrics.get("eval/accuracy_lenient_low"),
        "accuracy_lenient_high": metrics.get("eval/accuracy_lenient_high"),
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
    """The numbers, one column a model."""

    def accuracy(numbers: dict[str, Any], name: str = "accuracy") -> str:
        if numbers.get(name) is None:
            return "undefined"
        return f"{numbers[name]:.3f} [{numbers[f'{name}_low']:.3f}, {numbers[f'{name}_high']:.3f}]"

    def share(value: float | None) -> str:
        return "undefined" if value is None else f"{value:.3f}"

    k = reports[0]["k"]
    rows = {
        "": [report["model"] for report in reports],
        f"accuracy, greedy, n = {reports[0]['n']} [95 %]": [accuracy(report) for report in reports],
    }
    if any(report.get("accuracy_lenient") is not None for report in reports):
        rows["  wherever the answer stands"] = [accuracy(report, "accuracy_lenient") for report in reports]
    for name, numbers in reports[0].get("datasets", {}).items():
        own = [report["datasets"][name] for report in reports]
        rows[f"  {name}, n = {numbers['n']}"] = [accuracy(part) for part in own]
        if any("accuracy_lenient" in part for part in own):
            rows[f"    {name}, wherever the answer stands"] = [accuracy(part, "accuracy_lenient") for part in own]
    rows |= {
        "pass@1, temperature 1": [share(report["pass_at_1"]) for report in reports],
        f"pass@{k}, temperature 1": [share(report["pass_at_k"]) for report in reports],
        "tokens an answer": [f"{report['mean_length']:.1f}" for report in reports],
        "cut off": [f"{report['clipped_ratio']:.1%}" for report in reports],
    } | {f"reward {name}": [f"{report['rewards'][name]:.3f}" for report in reports] for name in reports[0]["rewards"]}
    widths = [max(len(cells[column]) for cells in rows.values()) for column in range(len(reports))]
    label_width = max(map(len, rows))
    return "\n".join(
        f"  {label:{label_width}}  {'  '.join(cell.rjust(w) for cell, w in zip(cells, widths, strict=True))}"
        for label, cells in rows.items()
    )


def compare(names: Sequence[str], dataset: Dataset, evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """McNemar's test on the problems that exactly one of two models solves; some of them are shown."""
    first, second = evaluations
    verdicts = list(zip(first.is_correct, second.is_correct, strict=True))
    only_first = [index for index, pair in enumerate(verdicts) if pair == (True, False)]
    only_second = [index for index, pair in enumerate(verdicts) if pair == (False, True)]
    p_value = mcnemar(len(only_first), len(only_second))
    print(
        f"\n{len(only_first)} problems only {names[0]} solves, {len(only_second)} only {names[1]}: "
        f"McNemar's test, two-sided, exact: p = {p_value:.2g}"
    )
    for name, changed in zip(names, (only_first, only_second), strict=True):
        if changed:
            more = f" (the first {MAX_CHANGED_SHOWN} of {len(changed)})" if len(changed) > MAX_CHANGED_SHOWN else ""
            print(f"Only {name} solves{more}")
        for index in changed[:MAX_CHANGED_SHOWN]:
            answers = {names[0]: first.completions[index], names[1]: second.completions[index]}
            print(side_by_side(dataset[index], answers))
    prompts = [[dataset[index]["prompt"] for index in changed] for changed in (only_first, only_second)]
    return {"only_first": prompts[0], "only_second": prompts[1], "mcnemar_p": p_value}


def answer(name: str, prompt: str, config: Config) -> str:
    """The greedy answer to one question."""
    device = choose_device(config.device)
    model, tokenizer = load_policy(name, **loading_settings(config), device=device)
    form = PromptFormat(tokenizer, config.chat_template)
    (prompt_ids,) = form.ids([form.text(prompt, config.system_prompt)])
    check_positions(model, len(prompt_ids), config.max_completion_length, what="this prompt")
    with make_autocast(config.dtype, device)():
        rollout = generate_completions(
            model,
            tokenizer,
            [prompt_ids],
            group_size=1,
            max_completion_length=config.max_completion_length,
            temperature=0.0,
            stop_strings=config.stop_strings,
        )
    return rollout.completions[0]


if __name__ == "__main__":
    with errors_explained():
        main(ARGUMENTS, CONFIG)
