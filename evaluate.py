"""Evaluate a model: greedy accuracy and pass@k on held-out problems. Also compare two models, or ask one question.

    python evaluate.py checkpoints/final                         accuracy, pass@8, rewards on the run's eval_file
    python evaluate.py checkpoints/final --compare tiny          compare with the base model by McNemar's test
    python evaluate.py checkpoints/final --prompt "What is 47 + 38? Answer with an integer."

MODEL is tiny, a folder or a Hub name. The settings (rewards, lengths, base_seed) come from the run.json in the folder
that contains MODEL, or from config.yaml if there is none. --config and flags such as --base_seed 1 override them.

Reading order: ... -> train_grpo.py -> [evaluate.py]. The work is done in grpo/evaluation/.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from grpo.errors import InputError, errors_explained
from grpo.settings.command_line import SettingsParser
from grpo.settings.config import Config, load_config, read_run_json
from grpo.settings.sources import sources_of


def parse_arguments() -> tuple[argparse.Namespace, Config]:
    """Parse the command line. Returns the options of this command and the settings to evaluate with."""
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
        has_rewards = any(item.startswith("rewards=") for item in overrides)
        config = _with_data_file(config, arguments.data, has_rewards=has_rewards)
    return arguments, dataclasses.replace(config, quantization="none")  # adapters are merged into unquantized weights


def _with_data_file(config: Config, path: str, *, has_rewards: bool) -> Config:
    """The settings for the problems in one file. For a run on a mixture, they come from the dataset with this file.

    `has_rewards`: whether the command line sets the rewards. If so, the file need not belong to the mixture.
    """
    changes: dict[str, Any] = {"eval_file": path, "datasets": None, "total_rows": None}
    if config.datasets is not None and not has_rewards:
        sources = sources_of(vars(config))
        sources = [own for own in sources if path == own.eval_path] + [own for own in sources if path == own.path]
        if not sources:
            raise InputError(
                f"--data: {path} is of none of the run's data sets, so nothing says its rewards: add --rewards"
            )
        keys = ("rewards", "system_prompt", "prompt_column", "answer_column")
        changes |= {key: getattr(sources[0], key) for key in keys}
    return dataclasses.replace(config, **changes)


if __name__ == "__main__":  # before the slow imports, so that --help and a misspelled flag answer at once
    with errors_explained():
        ARGUMENTS, CONFIG = parse_arguments()

from grpo.evaluation.kept_rollouts import KeptRollouts
from grpo.evaluation.measure import answer, load_problems, measure
from grpo.evaluation.report import compare, table
from grpo.files import without_nan
from reward_model import load_rewards_of


def main(arguments: argparse.Namespace, config: Config) -> None:
    """Evaluate one model or two, print the numbers and write them to a file."""
    if arguments.prompt is not None:
        print(answer(arguments.model, arguments.prompt, config))
        return
    rewards = load_rewards_of(sources_of(vars(config)), config.combine)
    output = Path(arguments.output)
    if output.is_dir() or not output.parent.is_dir():
        raise InputError(f"--output: got {output}, expected a file in a folder that exists")
    models = {"MODEL": arguments.model} | ({} if arguments.compare is None else {"--compare": arguments.compare})
    names = list(models.values())
    datasets = load_problems(models, config, rewards)  # all input is checked before the first model is measured
    print(f"{len(datasets[0])} problems of {datasets[0].path}")
    circumstances = {key: getattr(config, key) for key in ("dtype", "device", "attn_implementation")}
    kept = KeptRollouts(output.with_name(f"{output.name}.unfinished.jsonl"), **circumstances)
    pairs = zip(names, datasets, strict=True)
    try:
        measured = [measure(name, dataset, rewards, config, arguments.k, kept) for name, dataset in pairs]
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"stopped; the same command goes on with the answers in {kept.path}") from error
    evaluations, reports = zip(*measured, strict=True)
    print(table(reports))
    result = reports[0]
    if len(names) == 2:
        comparison, text = compare(names, datasets[0], evaluations)
        print(text)
        result |= {"compare": reports[1], "comparison": comparison}
    try:
        output.write_text(json.dumps(without_nan(result), indent=2) + "\n")
    except OSError as error:
        raise InputError(f"--output: {output} cannot be written: {error.strerror}") from error
    kept.forget()
    print(f"The numbers lie in {output}")


def evaluate_model(name: str, config: Config, *, k: int = 8) -> dict[str, Any]:
    """Evaluate one model and return the report as a dict. For use in notebooks."""
    rewards = load_rewards_of(sources_of(vars(config)), config.combine)
    (dataset,) = load_problems({"MODEL": name}, config, rewards)
    _, report = measure(name, dataset, rewards, config, k)
    return report


if __name__ == "__main__":
    with errors_explained():
        main(ARGUMENTS, CONFIG)
