"""examples/train_ppo.py: the whole loop worked by hand, exact resume, rewards for single tokens, what it refuses."""

import copy
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import grpo.run.plots
import grpo.run.run
import grpo.run.setup
import train_grpo
from examples import train_ppo
from grpo.data import samples_for_step
from grpo.datasets.rows import JSONLinesDataset
from grpo.errors import InputError, RunError
from grpo.fast.noise import step_seed
from grpo.models.loading import load_policy
from grpo.ppo.critic import Critic
from grpo.rollout import generate_completions
from grpo.settings.command_line import parse_command_line
from grpo.settings.config import Config, Options, load_config, resumed_config
from tests.conftest import later_slow
from tests.fidelity.test_gae import awake, plain_gae
from tests.run import test_train as helpers
from tests.run.test_resume import assert_same_run
from tests.run.test_train import EVERY_EVALUATION, EVERY_STEP, ROOT, read, weights_of

small = helpers.small  # the fixture

OF_THE_CRITIC = {"value_loss", "value/explained_variance", "value/clip_ratio", "critic_grad_norm", "num_completions"}
FOUR = {
    "num_train_steps": 4, "save_every": 2, "eval_every": 4, "warmup_steps": 1, "num_minibatches": 2,
    "num_iterations": 2, "critic_learning_rate": 2e-3, "micro_batch_size": 5,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than these runs."""
    monkeypatch.setattr(grpo.run.plots, "_save", lambda figure, path: None)


def config_of(settings: dict[str, Any], **changes: object) -> Config:
    return load_config(None, [f"{key}={value}" for key, value in ({"algorithm": "ppo"} | settings | changes).items()])


def train(settings: dict[str, Any], folder: Path, **changes: object) -> list[dict[str, Any]]:
    """A run within this process; returns the rows of metrics.jsonl."""
    train_ppo.main(config_of(settings, **changes, output_dir=folder))
    return read(folder / "metrics.jsonl")


def resume(folder: Path, **changes: object) -> list[dict[str, Any]]:
    config = resumed_config(None, [f"output_dir={folder}"] + [f"{key}={value}" for key, value in changes.items()])
    train_ppo.main(config, Options(resume=True))
    return read(folder / "metrics.jsonl")


def moved(folder: Path, base: str) -> bool:
    """Whether the policy at the end is another than at the start."""
    start = AutoModelForCausalLM.from_pretrained(base).state_dict()
    return any(not torch.equal(start[name], weight) for name, weight in weights_of(folder).items())


# The command


@pytest.mark.slow
def test_the_command_runs_from_the_root_and_writes_what_train_grpo_does(small: dict[str, Any], tmp_path: Path) -> None:
    flags = [f"--{key}={value}" for key, value in (small | {"rewards": "[math]"}).items()]
    command = [sys.executable, "examples/train_ppo.py", *flags, f"--output_dir={tmp_path / 'run'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = read(tmp_path / "run" / "metrics.jsonl")
    expected = (EVERY_STEP | OF_THE_CRITIC) - {"frac_reward_zero_std"}  # no groups
    assert set(rows[1]) == expected
    assert set(rows[2]) == expected | EVERY_EVALUATION
    assert rows[2]["num_completions"] == 32
    names = {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
    assert names == {
        "run.json", "metrics.jsonl", "samples.jsonl", "training_curves.png", "step-000002", "best", "final",
    }  # fmt: skip
    assert (tmp_path / "run" / "step-000002" / "critic.safetensors").is_file()


def test_its_steps_are_those_of_train_grpo() -> None:
    headings = [
        re.findall(r"^        # (\[\d\] \w+)", (ROOT / name).read_text(), flags=re.MULTILINE)
        for name in ("train_grpo.py", "examples/train_ppo.py")
    ]
    assert len(headings[0]) == 7
    assert headings[0] == headings[1]


def test_ppo_is_its_algorithm_unless_another_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    config, _ = parse_command_line("", [], has_critic=True)
    assert (config.algorithm, config.advantage_baseline, config.kl_in) == ("ppo", "critic", "reward")
    for arguments, has_critic in ((["--algorithm", "grpo"], True), (["--algorithm", "ppo"], False)):
        with pytest.raises(SystemExit) as raised:
            parse_command_line("", arguments, has_critic=has_critic)
        assert raised.value.code == 2
        line = capsys.readouterr().err
        assert "train_grpo.py" in line if has_critic else "examples/train_ppo.py" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantage_scale": "batch"}, 'advantage_scale: "batch" does not work with a critic. Use tokens or none.'),
        ({"surrogate": "gspo"}, 'surrogate: "gspo" does not work with a critic. Use clipped.'),
        ({"kl_in": "loss"}, 'kl_in: "loss" does not work with a critic. Use reward.'),
        ({"algorithm": "grpo"}, 'advantage_baseline: "group" does not work with a critic. Use critic.'),
        (
            {"advantage_baseline": "group"},
            'advantage_baseline: "group" does not work with algorithm "ppo", which trains a critic. '
            "Use critic, or another algorithm.",
        ),
        (
            {"max_resample_rounds": 2},
            'max_resample_rounds: 2 has no use with advantage_baseline "critic", where a group with equal rewards '
            "still has a signal. Use 0.",
        ),
    ],
)
def test_what_ppo_has_no_use_for_is_refused_before_anything_is_written(
    small: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as raised:
        train(small, tmp_path / "run", **changes)
    assert str(raised.value) == message
    assert not (tmp_path / "run").exists()


def test_help_says_what_there_is_no_choice_of() -> None:
    command = [sys.executable, "examples/train_ppo.py", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "--algorithm X only ppo works with this script" in " ".join(shown.stdout.split())
    assert "--advantage_baseline X only critic works with this script" in " ".join(shown.stdout.split())


def test_without_a_kl_there_is_no_reference(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpo.run.setup, "make_reference", lambda model: pytest.fail("a reference"))
    rows = train(small, tmp_path / "run", kl_coeff=0, num_train_steps=1)
    assert "kl" not in rows[1]
    assert moved(tmp_path / "run", small["model_name"])


# The loop by hand


def token_marks(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[Any]:
    """A reward for every token of most completions, one for others as a whole, none for some."""
    marks: list[Any] = []
    for prompt, ids in zip(prompts, completion_ids, strict=True):
        kind = (ids[0] + len(prompt)) % 5
        marks.append(None if kind == 0 else ids[0] % 7 / 7 if kind == 1 else [token % 5 / 5 - 0.3 for token in ids])
    return marks


BY_HAND: list[dict[str, Any]] = [
    {
        "temperature": 0.8, "kl_coeff": 0.5, "gamma": 0.97, "gae_lambda": 0.7, "value_clip_range": 0.02,
        "clip_range": 0.01, "clip_range_high": 0.015, "num_minibatches": 2, "num_iterations": 2, "weight_decay": 0.1,
        "critic_learning_rate": 3e-3, "max_grad_norm": 0.05, "lr_schedule": "constant", "micro_batch_size": 3,
    },
    {
        "kl_coeff": 0.1, "gae_lambda": 1.0, "value_clip_range": ".inf", "clip_range": ".inf", "num_minibatches": 4,
        "loss_aggregation": "sequence", "advantage_scale": "none", "entropy_coeff": 0.3, "lr_schedule": "constant",
        "max_grad_norm": ".inf", "seed": 2,
    },
]  # fmt: skip


@pytest.mark.parametrize("changes", later_slow(BY_HAND, 1), ids=["everything on", "other values"])
def test_two_steps_of_the_loop_worked_by_hand(small: dict[str, Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    """The whole wiring against a naive twin: row by row, without padding, masks or micro-batches."""
    settings = small | {"rewards": "[tests.ppo.test_ppo:token_marks]", "eval_metric": "eval/reward", "warmup_steps": 0}
    settings |= changes
    rows = train(settings, tmp_path / "run")
    trained = load_file(tmp_path / "run" / "step-000002" / "critic.safetensors")

    config = config_of(settings)
    low = 1 - config.clip_range if config.clip_range < 1 else 0.0
    high = 1 + (config.clip_range if config.clip_range_high is None else config.clip_range_high)
    policy, tokenizer = load_policy(small["model_name"], base_seed=0, device=torch.device("cpu"))
    reference, critic = copy.deepcopy(policy), Critic(policy)
    starts = [copy.deepcopy(model.state_dict()) for model in (policy, critic)]
    rates = (config.learning_rate, config.critic_learning_rate or config.learning_rate)
    optimizers = [
        torch.optim.AdamW(
            [
                {"params": [w for w in model.parameters() if w.dim() >= 2], "weight_decay": config.weight_decay},
                {"params": [w for w in model.parameters() if w.dim() < 2], "weight_decay": 0.0},
            ],
            lr=rate,
            betas=(config.adam_beta1, config.adam_beta2),
        )
        for model, rate in zip((policy, critic), rates, strict=True)
    ]
    dataset = JSONLinesDataset(small["train_file"])

    def logps_of(model: Any, prompt: list[int], completion: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(torch.tensor([prompt + completion])).logits[0] / config.temperature
        table = logits[len(prompt) - 1 : -1].log_softmax(-1)  # (T, V)
        return table.gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1), -(table.exp() * table).sum(1)

    def values_of(prompt: list[int], completion: list[int]) -> torch.Tensor:
        states = critic.trunk(input_ids=torch.tensor([prompt + completion])).last_hidden_state[0]
        return critic.head(states[len(prompt) - 1 : -1]).squeeze(1)  # (T,)

    for step in (1, 2):
        samples = samples_for_step(dataset, step=step, batch_size=4, seed=config.seed)
        rollout = generate_completions(
            policy, tokenizer, [sample["prompt"] for sample in samples], group_size=4,
            max_completion_length=config.max_completion_length, temperature=config.temperature,
            seed=step_seed(config.seed, step),
        )  # fmt: skip
        prompts = [tokenizer(samples[row // 4]["prompt"])["input_ids"] for row in range(16)]
        texts = rollout.token_lists()
        marks = token_marks([samples[row // 4]["prompt"] for row in range(16)], rollout.completions, texts)
        kinds = {type(mark) for mark in marks}
        assert kinds == {list, float, type(None)}  # else take another seed
        kept = [row for row in range(16) if marks[row] is not None]
        with torch.no_grad():
            old = [logps_of(policy, *pair)[0] for pair in zip(prompts, texts, strict=True)]
            ref = [logps_of(reference, *pair)[0] for pair in zip(prompts, texts, strict=True)]
            old_values = [values_of(*pair) for pair in zip(prompts, texts, strict=True)]
        advantages, returns = {}, {}
        for row in kept:
            mark, length = marks[row], len(texts[row])
            earned = mark if isinstance(mark, list) else [0.0] * (length - 1) + [mark]
            kl = (old[row] - ref[row]).tolist()
            paid = [r - config.kl_coeff * k for r, k in zip(earned, kl, strict=True)]
            both = plain_gae(paid, old_values[row].tolist(), config.gamma, config.gae_lambda)
            advantages[row], returns[row] = map(torch.tensor, both)
        if config.advantage_scale == "tokens":
            every = torch.cat([advantages[row] for row in kept])
            advantages = {row: (a - every.mean()) / (every.std() + 1e-4) for row, a in advantages.items()}
        losses, value_losses = [], []
        for iteration in range(config.num_iterations):
            order = torch.as_tensor(train_ppo.np.random.default_rng([config.seed, step, iteration]).permutation(16))
            for minibatch in order.chunk(config.num_minibatches):
                rows_here = [row for row in minibatch.tolist() if row in kept]
                num_tokens = sum(len(texts[row]) for row in rows_here)
                loss = value_loss = torch.zeros(())
                for row in rows_here:
                    new, entropy = logps_of(policy, prompts[row], texts[row])
                    ratio, a = (new - old[row]).exp(), advantages[row]
                    terms = -torch.minimum(ratio * a, ratio.clamp(low, high) * a) - config.entropy_coeff * entropy
                    values, before = values_of(prompts[row], texts[row]), old_values[row]
                    near = before + (values - before).clamp(-config.value_clip_range, config.value_clip_range)
                    errors = torch.maximum((values - returns[row]) ** 2, (near - returns[row]) ** 2) / 2
                    is_sequence = config.loss_aggregation == "sequence"
                    weight = 1 / (len(minibatch) * len(texts[row])) if is_sequence else 1 / num_tokens
                    loss, value_loss = loss + terms.sum() * weight, value_loss + errors.sum() * weight
                (loss + value_loss).backward()
                losses.append(loss.item())
                value_losses.append(value_loss.item())
                norms = []
                for model, optimizer in zip((policy, critic), optimizers, strict=True):
                    grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
                    norms.append(torch.cat([grad.flatten() for grad in grads]).norm().item())
                    for grad in grads:
                        grad *= min(1.0, config.max_grad_norm / norms[-1])
                    optimizer.step()
                    optimizer.zero_grad()
        row = rows[step]
        assert row["loss"] == pytest.approx(mean(losses), abs=2e-5)
        assert row["value_loss"] == pytest.approx(mean(value_losses), rel=1e-3)
        assert (row["grad_norm"], row["critic_grad_norm"]) == pytest.approx(norms, rel=2e-3)
    assert (row["value/clip_ratio"] > 0) == (config.value_clip_range < 1)
    assert (row["clip_ratio/high_mean"] > 0) == (config.clip_range < 1)
    ours = (weights_of(tmp_path / "run"), trained)
    for mine, model, start in zip(ours, (policy, critic), starts, strict=True):
        by_hand = model.state_dict()
        error = sum((mine[name] - by_hand[name]).square().sum() for name in by_hand)
        change = sum((by_hand[name] - start[name]).square().sum() for name in by_hand)
        assert error < 1e-5 * change


def test_a_fresh_ratio_is_exactly_1_and_a_later_one_is_not(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surrogate, differences = train_ppo.clipped_surrogate, []

    def spy(logps: torch.Tensor, old_logps: torch.Tensor, *others: Any, **clip: Any) -> torch.Tensor:
        differences.append((logps - old_logps).abs().max().item())
        return surrogate(logps, old_logps, *others, **clip)

    monkeypatch.setattr(train_ppo, "clipped_surrogate", spy)
    train(small, tmp_path / "run", num_train_steps=1, num_iterations=2, micro_batch_size=5, warmup_steps=0)
    assert len(differences) == 8  # 16 completions by 5, twice
    assert differences[:4] == [0.0] * 4
    assert min(differences[4:]) > 0


def test_every_pass_takes_every_completion_once_and_in_its_own_order(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks: list[list[int]] = []
    micro_batches = train_ppo.micro_batches

    def spy(rollout: Any, groups: torch.Tensor, **limits: int) -> list[torch.Tensor]:
        chunks.append(groups.flatten().tolist())
        return micro_batches(rollout, groups, **limits)

    monkeypatch.setattr(train_ppo, "micro_batches", spy)
    train(small, tmp_path / "run", num_minibatches=2, num_iterations=2)
    assert [len(chunk) for chunk in chunks] == [8] * 8  # 2 steps of 2 passes of 2 minibatches
    orders = [chunks[start] + chunks[start + 1] for start in range(0, 8, 2)]
    assert all(sorted(order) == list(range(16)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert list(range(16)) not in orders


# Rewards


NUM_GROUPED = itertools.count()  # calls of the next function for groups


def silent(prompts: list[str], completions: list[str], **_: Any) -> list[Any]:
    """A reward that applies in the pre-flight and in evaluations, but never in training."""
    is_training = len(set(prompts)) < len(prompts) and next(NUM_GROUPED) > 0
    return [None if is_training else 1.0] * len(completions)


def first_token(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[Any]:
    """The first token earns something, whatever follows."""
    return [[ids[0] % 2, *[0.0] * (len(ids) - 1)] for ids in completion_ids]


@pytest.mark.parametrize(
    "changes",
    [
        {"rewards": "[tests.ppo.test_ppo:silent]", "eval_metric": "eval/reward"},
        {"max_completion_length": 1, "mask_truncated_completions": True, "seed": 1},  # nobody ends so soon
    ],
    ids=["no reward", "cut off"],
)
def test_completions_that_are_left_out_teach_nothing(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Neither by the KL, nor by the entropy, nor by a value: the critic is awake, so a return of 0 would move it."""
    monkeypatch.setattr(grpo.run.setup, "Critic", lambda policy: awake(Critic(policy)))
    monkeypatch.setattr("tests.ppo.test_ppo.NUM_GROUPED", itertools.count())  # as which the run imports this file
    rows = train(small, tmp_path / "run", **changes, kl_coeff=0.5, entropy_coeff=0.1)
    assert [row["grad_norm"] for row in rows[1:]] == [row["critic_grad_norm"] for row in rows[1:]] == [0.0, 0.0]
    assert not moved(tmp_path / "run", small["model_name"])
    assert {row["completions/clipped_ratio"] for row in rows[1:]} == {1.0} or "rewards" in changes


def test_a_reward_of_the_first_token_is_no_merit_of_the_later_ones(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    gae = train_ppo.generalized_advantages

    def spy(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, **settings: float) -> Any:
        seen.append((rewards, gae(rewards, values, mask, **settings)))
        return seen[-1][1]

    monkeypatch.setattr(train_ppo, "generalized_advantages", spy)
    rewards = "[tests.ppo.test_ppo:first_token]"
    rows = train(small, tmp_path / "run", rewards=rewards, num_train_steps=1, kl_coeff=0, gae_lambda=1)
    given, (advantages, _) = seen[0]
    assert given[:, 1:].abs().max() == 0
    assert given[:, 0].sum() == 16 * rows[1]["reward"] > 0
    assert torch.equal(advantages[:, 0], given[:, 0])  # the critic is new: its values are 0
    assert advantages[:, 1:].abs().max() == 0


def test_train_grpo_refuses_token_rewards_and_names_this_example(small: dict[str, Any], tmp_path: Path) -> None:
    settings = small | {"rewards": "[tests.ppo.test_ppo:first_token]", "output_dir": tmp_path / "run"}
    with pytest.raises(RunError) as raised:
        train_grpo.main(load_config(None, [f"{key}={value}" for key, value in settings.items()]))
    assert "reward tests.ppo.test_ppo:first_token returned a list for " in str(raised.value)
    assert "examples/train_ppo.py" in str(raised.value)


# What is saved


@pytest.fixture(scope="module")
def whole(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps, the reference moved after each; not to be touched."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo.run.plots, "_save", lambda figure, path: None)
        train(small, folder, **FOUR, ref_update_every=1)
    return folder


def half(whole: Path, folder: Path) -> Path:
    """A copy as it was after its second step."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "step-000004")
    shutil.rmtree(folder / "final")
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(facts | {"finished": None}))
    return folder


def test_a_resumed_run_is_the_whole_one_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    """Weights, both models' moments, reference, metrics and samples."""
    folder = half(whole, tmp_path / "run")
    resume(folder)
    assert_same_run(whole, folder)
    assert len(torch.load(whole / "step-000004" / "optimizer.pt", weights_only=True)["param_groups"]) == 4
    for name in ("critic.safetensors", "reference.safetensors"):
        first, last = ((whole / f"step-00000{step}" / name).read_bytes() for step in (2, 4))
        assert first != last  # it is being trained, or moves


@pytest.mark.parametrize("name", ["critic", "reference"])
def test_a_resume_that_leaves_a_model_behind_is_another_run(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The comparison above can fail."""
    folder = half(whole, tmp_path / "run")
    load = grpo.run.run.load_checkpoint

    def forgetful(folder: Path, policy: Any, optimizer: Any, modules: dict[str, Any], base: str) -> Any:
        assert set(modules) == {"critic", "reference"}
        return load(folder, policy, optimizer, {key: modules[key] for key in modules if key != name}, base)

    monkeypatch.setattr(grpo.run.run, "load_checkpoint", forgetful)
    resume(folder)
    with pytest.raises(AssertionError):
        assert_same_run(whole, folder)


def test_a_checkpoint_without_its_critic_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = half(whole, tmp_path / "run")
    sums = folder / "step-000002" / "checksums.json"
    sums.write_text(json.dumps({k: v for k, v in json.loads(sums.read_text()).items() if "critic" not in k}))
    (folder / "step-000002" / "critic.safetensors").unlink()
    with pytest.raises(InputError, match=r"step-000002 cannot be loaded: critic.safetensors is missing"):
        resume(folder)


def test_how_to_go_on_names_this_script(small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_ppo, "explained_variance", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt, match=r"to begin again: python examples/train_ppo.py --resume --output_dir"):
        train(small, tmp_path / "run")


def test_each_model_has_its_own_rate_and_both_follow_the_schedule(whole: Path) -> None:
    """After three of four steps' optimizer steps: one of warm-up, then a cosine over the other fifteen."""
    for step, num_updates in ((2, 8), (4, 16)):
        groups = torch.load(whole / f"step-00000{step}" / "optimizer.pt", weights_only=True)["param_groups"]
        factor = 0.5 * (1 + math.cos(math.pi * (num_updates - 1 - 1) / 15))
        assert [group["lr"] for group in groups] == pytest.approx([5e-4 * factor] * 2 + [2e-3 * factor] * 2)
        assert [group["weight_decay"] for group in groups] == [0.0] * 4


def test_a_value_loss_that_is_no_number_ends_the_run(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = train_ppo.clipped_value_loss
    monkeypatch.setattr(train_ppo, "clipped_value_loss", lambda *terms, **clip: loss(*terms, **clip) * math.nan)
    with pytest.raises(RunError, match=r"^step 1: loss .*, gradient norm .*, value_loss nan, critic_grad_norm nan"):
        train(small, tmp_path / "run")


# Learning


@pytest.mark.slow
def test_it_learns_the_toy_task(tmp_path: Path) -> None:
    """40 of the 150 steps of `python examples/train_ppo.py`, after which 0.97 and more was measured."""
    rows = train({"num_train_steps": 40, "lr_schedule": "constant", "device": "cpu"}, tmp_path / "run")
    assert rows[0]["eval/accuracy"] < 0.4
    assert rows[-1]["eval/accuracy"] > 0.9


@pytest.mark.slow
def test_the_critic_learns_to_foretell_a_policy_that_stands_still(tmp_path: Path) -> None:
    settings = {"learning_rate": 0, "critic_learning_rate": 1e-3, "gae_lambda": 1, "num_train_steps": 60}
    rows = train(settings | {"lr_schedule": "constant", "device": "cpu", "eval_every": 60}, tmp_path / "run")
    explained = [row["value/explained_variance"] for row in rows[1:]]
    assert mean(explained[:3]) < 0.05
    assert mean(explained[-10:]) > 0.3  # 0.5 was measured
