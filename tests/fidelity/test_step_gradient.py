"""An optimizer step's gradient and metrics depend on neither micro-batches, nor the order of rows, nor padding."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from grpo.advantages import group_advantages
from grpo.logprobs import compute_logprobs
from grpo.loss import AGGREGATIONS, clipped_surrogate, clipped_tokens, kl_divergence, loss_weights
from grpo.records import TokenMeans
from tests.conftest import make_tiny_model

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
    wrong = WithoutPositions(policy)
    narrow, _ = optimizer_step(wrong, batch, "token")
    wide, _ = optimizer_step(wrong, batch.padded(5, 0), "token")
    has_learned_positions = policy.config.model_type == "gpt2"
    assert ((wide - narrow).norm() / narrow.norm() > 0.05) == has_learned_positions


@pytest.mark.slow
def test_a_float32_run_of_several_updates_does_not_depend_on_micro_batches(
    train_tiny: Callable[..., tuple[dict[str, Any], Path]],
) -> None:
    """The real loop: two passes over the rollout, two optimizer steps a pass, ratios beyond both clips."""
    settings = {"num_iterations": 2, "num_minibatches": 2, "kl_coeff": 0.1, "learning_rate": 1e-3, "clip_range": 0.01}
    expected, folder = train_tiny("gpt2", micro_batch_size=16, **settings)
    names = ["loss", "grad_norm", "kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean"]
    assert min(expected[name] for name in names[1:]) > 0.01
    weights = AutoModelForCausalLM.from_pretrained(folder / "final").state_dict()
    for size in (1, 3):
        row, folder = train_tiny("gpt2", micro_batch_size=size, **settings)
        assert {name: row[name] for name in names} == pytest.approx(
            {name: expected[name] for name in names}, rel=1e-5, abs=1e-6
        )
        for name, weight in AutoModelForCausalLM.from_pretrained(folder / "final").state_dict().items():
            # A bias of all keys leaves the attention as it is: its gradient is rounding, and Adam makes steps of that.
            if not name.endswith("c_attn.bias"):
                torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-6, msg=name)
