"""An optimizer step depends on neither micro-batches, nor the order of rows, nor padding, nor idle groups."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import grpo.batch
from grpo.advantages import group_advantages
from grpo.batch import without_zero_variance
from grpo.logprobs import compute_logprobs
from grpo.loss import AGGREGATIONS, clipped_surrogate, clipped_tokens, kl_divergence, loss_weights
from grpo.models.loading import load_policy
from grpo.rollout import Rollout, generate_completions
from grpo.run.metrics import TokenMeans
from tests.conftest import later_slow, make_tiny_model, patch_loop

PROMPT_LENGTHS = (3, 3, 3, 3, 7, 7, 7, 7)  # two groups of four
LENGTHS = (4, 1, 6, 2, 3, 6, 5, 1)
CUT_OFF = 5  # a row that is read and not trained on, as under mask_truncated_completions
MAX_LENGTH = 6
WHOLE = [range(8)]
CLIP = {"clip_range": 0.2, "clip_range_high": 0.28}


@dataclass(frozen=True)
class Batch:
    """What an optimizer step is given; row for row."""

    tokens: tuple[Tensor, Tensor, Tensor, Tensor]
    mask: Tensor  # (B, C) of the loss
    advantages: Tensor  # (B, 1)
    old_logps: Tensor  # (B, C), as the two below
    ref_logps: Tensor
    sampling_logps: Tensor

    def in_order(self, rows: Sequence[int]) -> "Batch":
        values = {name: value[list(rows)] for name, value in vars(self).items() if name != "tokens"}
        prompt_ids, prompt_mask, ids, mask = (x[list(rows)] for x in self.tokens)
        return replace(self, tokens=(prompt_ids, prompt_mask, ids, mask), **values)

    def padded(self, left: int, right: int) -> "Batch":
        def pad(x: Tensor) -> Tensor:
            return torch.nn.functional.pad(x, (0, right))

        prompt_ids, prompt_mask = (torch.nn.functional.pad(x, (left, 0)) for x in self.tokens[:2])
        wide = {name: pad(getattr(self, name)) for name in ("mask", "old_logps", "ref_logps", "sampling_logps")}
        return replace(self, tokens=(prompt_ids, prompt_mask, pad(self.tokens[2]), pad(self.tokens[3])), **wide)


def shaken(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A copy some optimizer steps away."""
    generator, moved = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for weight in moved.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return moved


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def policy(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Rotary and learned positions; float64, so that nothing but an error is larger than 1e-10."""
    return make_tiny_model(request.param).double()


@pytest.fixture(scope="module")
def batch(policy: PreTrainedModel) -> Batch:
    """Ragged rows; old and reference log-probs are those of other weights, so that ratios are clipped."""
    generator = torch.Generator().manual_seed(0)
    prompt_ids, ids = (torch.randint(3, 40, (8, width), generator=generator) for width in (7, 6))
    prompt_mask = torch.tensor([[t >= 7 - n for t in range(7)] for n in PROMPT_LENGTHS])
    mask = torch.tensor([[t < n for t in range(6)] for n in LENGTHS])
    tokens = (prompt_ids, prompt_mask, ids, mask)
    with torch.no_grad():
        old, ref = (compute_logprobs(shaken(policy, seed), *tokens)[0] for seed in (1, 2))
    trained = mask.clone()
    trained[CUT_OFF] = False
    rewards = torch.tensor([[1.0, 0.0, 3.0, 0.5], [0.0, 2.0, 0.0, 1.0]], dtype=torch.float64)
    return Batch(tokens, trained, group_advantages(rewards).view(8, 1), old, ref, old + 1e-3 * ref)


def optimizer_step(
    policy: Any,
    batch: Batch,
    aggregation: str,
    pieces: Sequence[Sequence[int]] = WHOLE,
    *,
    is_mean_per_piece: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """(flat gradient, loss and metrics) as step [6] of train_grpo.py adds them up over these micro-batches."""
    policy.zero_grad()
    settings: dict[str, Any] = {"max_completion_length": MAX_LENGTH, "dtype": torch.float64}
    weights = loss_weights(batch.mask, aggregation, **settings)
    means, total = TokenMeans(), 0.0
    for rows in map(list, pieces):
        part = batch.in_order(rows)
        logps, entropies = compute_logprobs(policy, *part.tokens, temperature=0.9)
        loss = clipped_surrogate(logps, part.old_logps, part.advantages, part.mask, **CLIP)
        kl = kl_divergence(
            logps, part.ref_logps, estimator="k3_corrected", old_logps=part.old_logps, completion_mask=part.mask
        )
        used = loss_weights(part.mask, aggregation, **settings) / len(pieces) if is_mean_per_piece else weights[rows]
        weighted = ((loss + 0.1 * kl) * used).sum()
        weighted.backward()
        total += weighted.item()
        low, high = clipped_tokens(logps, part.old_logps, part.advantages, part.mask, **CLIP)
        values = {"kl": kl, "entropy": entropies, "clip_ratio/low_mean": low, "clip_ratio/high_mean": high}
        values["difference/mean"] = (part.sampling_logps - part.old_logps).abs()
        means.add(part.mask, values, maxima=["difference/mean"])
    gradient = torch.cat([weight.grad.flatten() for weight in policy.parameters() if weight.grad is not None])
    return gradient, means.metrics() | {"loss": total}


def assert_same_step(
    ours: tuple[Tensor, dict[str, float]], expected: tuple[Tensor, dict[str, float]], what: object
) -> None:
    torch.testing.assert_close(ours[0], expected[0], rtol=0, atol=1e-10, msg=str(what))
    assert ours[1]["loss"] == pytest.approx(expected[1]["loss"], rel=0, abs=1e-10), what
    # Metrics are added up in float32.
    assert ours[1] == pytest.approx(expected[1], rel=1e-6, abs=1e-7), what


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradient_and_metrics_do_not_depend_on_micro_batches_or_the_order_of_rows(
    policy: PreTrainedModel, batch: Batch, aggregation: str
) -> None:
    expected = optimizer_step(policy, batch, aggregation)
    assert expected[0].norm() > 0.1
    assert min(value for name, value in expected[1].items() if name != "loss") > 0  # KL, both clips: all take part
    for size in (1, 2, 3):
        pieces = [range(start, min(start + size, 8)) for start in range(0, 8, size)]
        assert_same_step(optimizer_step(policy, batch, aggregation, pieces), expected, size)
    for order in ([7, 6, 5, 4, 3, 2, 1, 0], [3, 0, 6, 5, 1, 7, 2, 4]):
        assert_same_step(optimizer_step(policy, batch.in_order(order), aggregation), expected, order)
        pieces = [order[:3], order[3:]]
        assert_same_step(optimizer_step(policy, batch, aggregation, pieces), expected, pieces)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("left", "right"), [(5, 0), (0, 4), (3, 2)])
def test_gradient_and_metrics_do_not_depend_on_padding(
    policy: PreTrainedModel, batch: Batch, aggregation: str, left: int, right: int
) -> None:
    expected = optimizer_step(policy, batch, aggregation)
    wider = batch.padded(left, right)
    assert wider.tokens[0].shape[1] == 7 + left
    assert wider.mask.shape[1] == 6 + right
    assert_same_step(optimizer_step(policy, wider, aggregation), expected, (left, right))
    assert_same_step(optimizer_step(policy, wider, aggregation, [range(3), range(3, 8)]), expected, (left, right))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_mean_per_micro_batch_is_another_step(policy: PreTrainedModel, batch: Batch, aggregation: str) -> None:
    pieces = [range(2), range(2, 8)]  # 5 and 17 tokens
    expected, metrics = optimizer_step(policy, batch, aggregation)
    wrong, _ = optimizer_step(policy, batch, aggregation, pieces, is_mean_per_piece=True)
    assert (wrong - expected).norm() / expected.norm() > 0.05
    # And a metric that is the mean of its micro-batches' means is another metric.
    parts = [optimizer_step(policy, batch, aggregation, [rows])[1] for rows in pieces]
    for name in ("entropy", "kl", "difference/mean"):
        assert abs(sum(part[name] for part in parts) / 2 - metrics[name]) > 1e-3 * metrics[name], name


class WithoutPositions(torch.nn.Module):
    """Leaves the position ids out, as a call of the model that names only ids and mask does."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, position_ids: Tensor | None = None, **rest: Any) -> Any:
        return self.model(**rest)


def test_without_position_ids_left_padding_would_move_the_gradient_of_learned_positions(
    policy: PreTrainedModel, batch: Batch
) -> None:
    """The short prompts of the first group are padded beside the second, and not where they are alone."""
    groups = [range(4), range(4, 8)]
    together, _ = optimizer_step(WithoutPositions(policy), batch, "token")
    apart, _ = optimizer_step(WithoutPositions(policy), batch, "token", groups)
    has_learned_positions = policy.config.model_type == "gpt2"
    assert ((together - apart).norm() / apart.norm() > 0.05) == has_learned_positions


@pytest.mark.slow
def test_a_float32_run_of_several_updates_does_not_depend_on_micro_batches(
    train_tiny: Callable[..., tuple[dict[str, Any], Path]],
) -> None:
    """The real loop: two passes over the rollout, two optimizer steps a pass, ratios beyond both clips."""
    settings = {"num_iterations": 2, "num_minibatches": 2, "kl_coeff": 0.1, "clip_range": 0.01}
    settings["learning_rate"] = 3e-4  # Adam makes a step of about this size of a gradient that is nearly rounding alone
    expected, folder = train_tiny("gpt2", **settings)
    names = ["loss", "grad_norm", "kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean"]
    assert min(expected[name] for name in names[1:]) > 1e-3
    weights = AutoModelForCausalLM.from_pretrained(folder / "final").state_dict()
    for cut in ({"micro_batch_size": 1}, {"micro_batch_size": 3}, {"micro_batch_tokens": 35}):
        row, folder = train_tiny("gpt2", **cut, **settings)
        assert {name: row[name] for name in names} == pytest.approx(
            {name: expected[name] for name in names}, rel=1e-5, abs=1e-6
        )
        for name, weight in AutoModelForCausalLM.from_pretrained(folder / "final").state_dict().items():
            # A bias of all keys leaves the attention as it is: its gradient is rounding, and Adam makes steps of that.
            # Other weights move by up to four steps of 3e-4: they agree to half a percent of that.
            if not name.endswith("c_attn.bias"):
                torch.testing.assert_close(weight, weights[name], rtol=0, atol=5e-6, msg=partial("{}: {}".format, name))


# Groups whose rewards are all alike

ALIKE_REWARD = """
def alike(prompts, completions, **_):
    return [0.5 for _ in prompts]

def alike_for_sums(prompts, completions, **_):
    return [0.5 if "=" in prompt else len(text) / 8 for prompt, text in zip(prompts, completions)]
"""


class Watched:
    """What the loop sampled and chose to score in its runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rollout: Rollout | None = None  # the last one
        self.scored: list[list[int]] = []  # rows of every minibatch, sorted
        self.scores_all = False  # scored behind a copy of the prompt each, alike or not, as the naive loop would
        self.counts_all = True  # the tokens that are not scored too
        for name in ("generate_completions", "loss_weights"):
            patch_loop(monkeypatch, name, getattr(self, name))
        monkeypatch.setattr(grpo.batch, "without_zero_variance", self.without_zero_variance)
        micro_batches = grpo.batch.micro_batches

        def cut(rollout: Rollout, groups: Tensor, **limits: int) -> list[Tensor]:
            self.scored.append(groups.flatten().tolist())
            return micro_batches(rollout, groups, **limits)

        monkeypatch.setattr(grpo.batch, "micro_batches", cut)

    def generate_completions(self, *arguments: Any, **settings: Any) -> Rollout:
        self.rollout = generate_completions(*arguments, **settings)
        return self.rollout

    def without_zero_variance(self, rows: Tensor, is_zero_variance: Tensor) -> Tensor:
        return rows if self.scores_all else without_zero_variance(rows, is_zero_variance)

    def loss_weights(self, mask: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        if self.counts_all:
            return loss_weights(mask, *arguments, **settings)
        weights, rows = torch.zeros(mask.shape), self.scored[-1]
        weights[rows] = loss_weights(mask[rows], *arguments, **settings)
        return weights

    def num_tokens(self, rows: Any = slice(None)) -> int:
        assert self.rollout is not None
        return int(self.rollout.completion_mask[rows].sum())


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    (tmp_path / "alike_reward.py").write_text(ALIKE_REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    return Watched(monkeypatch)


SOME_ALIKE = {"rewards": "[alike_reward:alike_for_sums]", "kl_coeff": 0, "learning_rate": 3e-4}  # two of four groups


@pytest.mark.slow
@pytest.mark.parametrize(
    ("aggregation", "baseline"),
    [
        ("token", "group"),
        pytest.param("sequence", "leave_one_out", marks=pytest.mark.slow),
        pytest.param("constant", "group", marks=pytest.mark.slow),
    ],
)
def test_a_group_without_a_signal_may_be_left_out(
    train_tiny: Callable[..., tuple[dict[str, Any], Path]], watched: Watched, aggregation: str, baseline: str
) -> None:
    """Same gradient, same weights; its tokens still count in the denominator."""
    settings = SOME_ALIKE | {"loss_aggregation": aggregation, "advantage_baseline": baseline, "num_iterations": 2}
    settings |= {"max_grad_norm": 1e9, "clip_range": 0.01}
    row, folder = train_tiny("llama", **settings)
    assert row["frac_reward_zero_std"] == 0.5
    (scored,) = watched.scored
    assert len(scored) == 8

    watched.scores_all = True
    expected, expected_folder = train_tiny("llama", shared_prefix="never", **settings)
    assert watched.scored[1] == list(range(16))
    assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6)
    assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert row["grad_norm"] > 0.01
    weights = [AutoModelForCausalLM.from_pretrained(path / "final").state_dict() for path in (folder, expected_folder)]
    # Two steps of AdamW move a weight by up to 2 * 3e-4. Where its gradient is near 0, rounding decides a part of that.
    for name, weight in weights[1].items():
        torch.testing.assert_close(weights[0][name], weight, rtol=0, atol=3e-5, msg=partial("{}: {}".format, name))
    # A token that clips is one that is scored: the shares differ by what they are shares of.
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean"):
        assert row[name] * watched.num_tokens(scored) == pytest.approx(expected[name] * watched.num_tokens(), rel=1e-5)
        assert row[name] > expected[name] > 0

    watched.scores_all, watched.counts_all = False, False
    wrong, _ = train_tiny("llama", **settings)
    assert wrong["grad_norm"] > 1.2 * row["grad_norm"]


def test_metrics_cover_the_rows_that_are_scored(
    train_tiny: Callable[..., tuple[dict[str, Any], Path]], watched: Watched, tmp_path: Path
) -> None:
    names = ("entropy", "sampling/logp_difference/mean", "sampling/logp_difference/max")

    def run_and_work_out(**changes: Any) -> tuple[list[float], list[float]]:
        """What the run says, and what its rows give; a narrow sampler, so that it differs from the scorer."""
        row, _ = train_tiny("llama", top_k=3, **SOME_ALIKE, **changes)
        policy, _ = load_policy(str(tmp_path / "llama"), base_seed=0, device=torch.device("cpu"))
        assert watched.rollout is not None
        rollout = watched.rollout.select(torch.tensor(watched.scored[-1]))
        with torch.no_grad():
            logps, entropies = compute_logprobs(policy, *rollout.tokens())
        mask = rollout.completion_mask
        differences = (rollout.sampling_logps - logps).abs()[mask]
        values = [entropies[mask].mean(), differences.mean(), differences.max()]
        return [row[name] for name in names], [value.item() for value in values]

    found, expected = run_and_work_out()
    assert found == pytest.approx(expected, rel=1e-4)
    watched.scores_all = True
    found_of_all, expected_of_all = run_and_work_out()
    assert found_of_all == pytest.approx(expected_of_all, rel=1e-4)
    assert abs(found_of_all[0] / found[0] - 1) > 1e-3
    assert abs(found_of_all[1] / found[1] - 1) > 1e-3


@pytest.mark.parametrize(
    ("num_scored", "settings"),
    later_slow(
        [
            (8, {}),
            (16, {"kl_coeff": 0.1}),
            (8, {"advantage_baseline": "leave_one_out", "advantage_scale": "batch"}),
            (16, {"advantage_baseline": "batch", "advantage_scale": "none"}),
            (16, {"advantage_baseline": "none", "advantage_scale": "none"}),
            (16, {"advantage_scale": "tokens"}),
            (16, {"entropy_coeff": 0.1}),
            (8, {"algorithm": "gspo"}),
        ],
        3,
    ),
    ids=str,
)
def test_nothing_is_left_out_that_has_a_gradient(
    train_tiny: Callable[..., tuple[dict[str, Any], Path]], watched: Watched, num_scored: int, settings: dict[str, Any]
) -> None:
    """A KL holds every token, an entropy bonus pushes every token, and against the whole batch, or whitened with it, a
    group may be better than others as a whole."""
    train_tiny("llama", **(SOME_ALIKE | settings))
    assert [len(rows) for rows in watched.scored] == [num_scored]


def test_where_no_group_has_a_signal_the_first_optimizer_step_is_one_of_nothing(
    train_tiny: Callable[..., tuple[dict[str, Any], Path]], watched: Watched, tmp_path: Path
) -> None:
    row, folder = train_tiny("llama", **(SOME_ALIKE | {"rewards": "[alike_reward:alike]", "num_minibatches": 2}))
    assert row["frac_reward_zero_std"] == 1.0
    assert watched.scored == [[0], [8]]
    assert row["loss"] == row["grad_norm"] == 0.0
    assert row["entropy"] > 0.1
    state = torch.load(folder / "step-000001" / "optimizer.pt", weights_only=True)["state"]
    assert len(state) > 10
    assert {weight["step"].item() for weight in state.values()} == {2.0}
    assert not any(weight["exp_avg"].any() for weight in state.values())
    weights = [load_file(path / "model.safetensors") for path in (tmp_path / "llama", folder / "final")]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_where_no_group_has_a_signal_momentum_moves_the_weights(
    train_tiny: Callable[..., tuple[dict[str, Any], Path]], watched: Watched, tmp_path: Path
) -> None:
    """Step 1 has a signal, step 2 has none."""
    settings = SOME_ALIKE | {"batch_size": 1, "num_train_steps": 2, "save_every": 1, "adam_beta1": 0.8}
    _, folder = train_tiny("llama", **settings)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[1:]]
    assert [row["frac_reward_zero_std"] for row in rows] == [0.0, 1.0]  # else take another seed
    assert [len(scored) for scored in watched.scored] == [4, 1]
    assert rows[0]["grad_norm"] > 0.01
    assert rows[1]["loss"] == rows[1]["grad_norm"] == 0.0
    first, second = (folder / f"step-{step:06d}" for step in (1, 2))
    moments = [torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in (first, second)]
    for before, after in zip(moments[0].values(), moments[1].values(), strict=True):
        assert (before["step"], after["step"]) == (1, 2)
        torch.testing.assert_close(after["exp_avg"], 0.8 * before["exp_avg"])
    weights = [load_file(path / "model.safetensors") for path in (first, second)]
    assert all(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0] if "norm" in name)
