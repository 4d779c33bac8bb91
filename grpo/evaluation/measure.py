"""Measure one model: load its problems, load it, let it answer them, and score the answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from grpo.data import Dataset, Sample
from grpo.datasets.chat import PromptFormat
from grpo.datasets.mixture import load_eval_set
from grpo.errors import InputError
from grpo.evaluation.greedy import Evaluation, count_correct, evaluate_greedy
from grpo.evaluation.kept_rollouts import KeptRollouts
from grpo.evaluation.report import make_report
from grpo.models.device import choose_device, make_autocast
from grpo.models.loading import check_lengths, check_positions, load_policy, load_skeleton, loading_settings
from grpo.rewards.scores import Scores
from grpo.rewards.scoring import RewardsOf, check_mixture, score_mixture
from grpo.rollout import Rollout, generate_completions
from grpo.settings.config import Config


def load_problems(models: Mapping[str, str], config: Config, rewards: RewardsOf) -> list[Dataset]:
    """The held-out problems for one model or two: a dataset for each, with prompts in the tokens of that model.

    The models themselves are not loaded.

    Args:
        models: flag -> name of the model: {"MODEL": "checkpoints/final", "--compare": "tiny"}.
        config: the settings.
        rewards: of each dataset.

    Raises:
        InputError: a model, the data or the rewards are wrong; the message names the flag of the model. Or the two
            models would not get the same problems.
    """
    datasets = [_load_problems_of(flag, name, config, rewards) for flag, name in models.items()]
    prompts = [[sample["prompt"] for sample in dataset] for dataset in datasets]
    if prompts[0] != prompts[-1]:
        raise InputError(
            f"long_prompts: got drop, which leaves {len(datasets[0])} problems to MODEL and {len(datasets[1])} to "
            "--compare: they could not be compared; a larger max_prompt_length drops none"
        )
    return datasets


def _load_problems_of(flag: str, name: str, config: Config, rewards: RewardsOf) -> Dataset:
    try:
        skeleton, tokenizer = load_skeleton(name, chat_template=config.chat_template)
        dataset = load_eval_set(config, tokenizer)
        check_lengths(dataset, skeleton, config)
    except InputError as error:
        raise InputError(str(error).replace("model_name:", f"{flag}:")) from error
    check_mixture(rewards, dataset, dataset.place)
    return dataset


def measure(
    name: str, dataset: Dataset, rewards: RewardsOf, config: Config, k: int, kept: KeptRollouts | None = None
) -> tuple[Evaluation, dict[str, Any]]:
    """Let one model answer every problem once greedily, and k times at temperature 1.

    `kept` holds completions of an earlier evaluation that was stopped; they are not sampled again.

    Returns:
        Its greedy answers, and the report for the table and the file.
    """

    def score_rollout(samples: Sequence[Sample], rollout: Rollout) -> Scores:
        texts, ids = rollout.completions, rollout.token_lists()
        per_token = config.combine == "sum"  # the rewards of a run with a critic may be lists
        return score_mixture(rewards, samples, texts, ids, combine=config.combine, per_token=per_token)

    device = choose_device(config.device)
    model, tokenizer = load_policy(name, **loading_settings(config), device=device)
    settings: dict[str, Any] = {
        "batch_rows": config.batch_size * config.group_size,
        "generate": kept.of(model) if kept is not None else None,
        **config.stop_kwargs,
    }
    with make_autocast(config.dtype, device)():
        evaluation = evaluate_greedy(model, tokenizer, dataset, score_rollout, progress=f"{name}, greedy", **settings)
        counts = count_correct(
            model, tokenizer, dataset, score_rollout, k=k, seed=config.seed, progress=f"{name}, {k} samples", **settings
        )
    return evaluation, make_report(name, dataset, evaluation, counts, k)


def answer(name: str, prompt: str, config: Config) -> str:
    """The greedy answer of the model `name` to one question."""
    device = choose_device(config.device)
    model, tokenizer = load_policy(name, **loading_settings(config), device=device)
    form = PromptFormat(tokenizer, config.chat_template)
    (prompt_ids,) = form.ids([form.text(prompt, config.system_prompt)])
    check_positions(model, len(prompt_ids), config.max_completion_length, what="this prompt")
    with make_autocast(config.dtype, device)():
        rollout = generate_completions(
            model, tokenizer, [prompt_ids], group_size=1, temperature=0.0, **config.stop_kwargs
        )
    return rollout.completions[0]
