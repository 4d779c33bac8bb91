"""The whole objective against loops over single tokens in plain Python: value, gradient and metrics, to 1e-12.

The oracle takes rewards and log-probs, or logits, and knows nothing of grpo/: only the math module, and for the
gradient the chain rule written out by hand.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

import grpo.fast.lm_head
from grpo.advantages import BASELINES, SCALES, group_advantages, zero_variance_groups
from grpo.fast.capabilities import find_head
from grpo.logprobs import compute_logprobs
from grpo.loss import AGGREGATIONS, KL_ESTIMATORS, clipped_surrogate, clipped_tokens, kl_divergence, loss_weights
from grpo.run.metrics import TokenMeans

NAN = float("nan")
PAIRS = [(b, s) for b in BASELINES for s in SCALES if s != "group" or b in ("group", "leave_one_out")]
Table = list[list[float]]


@dataclass(frozen=True)
class Setting:
    """The objective, in the names of config.yaml."""

    aggregation: str = "token"
    estimator: str = "k3_corrected"
    baseline: str = "group"
    scale: str = "group"
    clip_range: float = 0.15
    clip_range_high: float = 0.35
    kl_coeff: float = 0.3
    max_completion_length: int = 9


@dataclass(frozen=True)
class Case:
    """One optimizer step. Padding holds NaN, so whatever reads it shows."""

    rewards: Table  # (P, G), NaN = no reward applies
    lengths: list[int]  # B, 0 = a completion that is not trained on
    logps: Table  # (B, C)
    old_logps: Table
    ref_logps: Table
    entropies: Table


def random_case(seed: int) -> Case:
    random = Random(seed)
    groups, size, width = random.randint(1, 4), random.randint(2, 5), random.randint(1, 6)

    def reward() -> float:
        return random.choice([0.0, 1.0, random.gauss(0, 2), NAN])

    rewards = [[reward() for _ in range(size)] for _ in range(groups)]
    if groups > 1:
        rewards[0] = [0.5] * size  # a group without spread
    lengths = [random.randint(0, width) for _ in range(groups * size)]

    def table(around: Table | None, spread: float) -> Table:
        return [
            [(around[i][t] if around else -2.0) + random.gauss(0, spread) if t < length else NAN for t in range(width)]
            for i, length in enumerate(lengths)
        ]

    logps = table(None, 0.7)
    return Case(rewards, lengths, logps, table(logps, 0.4), table(logps, 0.8), table(None, 0.5))


# The oracle


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def std(values: list[float]) -> float:
    return math.sqrt(sum((value - mean(values)) ** 2 for value in values) / (len(values) - 1))


def has_spread(values: list[float]) -> bool:
    return len(values) >= 2 and max(values) - min(values) > 1e-6 * max(1.0, max(abs(value) for value in values))


def oracle_advantage(reward: float, group: list[float], batch: list[float], setting: Setting) -> float:
    """Of one completion; `group` and `batch` are the rewards it is compared with, its own among them."""
    if math.isnan(reward):
        return 0.0
    if setting.baseline in ("group", "leave_one_out") and not has_spread(group):
        return 0.0
    if setting.baseline == "group":
        advantage = reward - mean(group)
    elif setting.baseline == "leave_one_out":
        others = list(group)
        others.remove(reward)
        advantage = reward - mean(others)
    elif setting.baseline == "batch":
        advantage = reward - mean(batch) if has_spread(batch) else 0.0
    else:
        advantage = reward
    if setting.scale == "group":
        return advantage / (std(group) + 1e-4)
    if setting.scale == "batch" and has_spread(batch):
        return advantage / (std(batch) + 1e-4)
    return advantage


def oracle_advantages(rewards: Table, setting: Setting) -> list[float]:
    """One a completion, groups after one another."""
    valid = [[reward for reward in group if not math.isnan(reward)] for group in rewards]
    batch = [reward for group in valid for reward in group]
    return [oracle_advantage(reward, valid[p], batch, setting) for p, group in enumerate(rewards) for reward in group]


def oracle_surrogate(logp: float, old: float, advantage: float, setting: Setting) -> tuple[float, float, str]:
    """Loss of one token, its derivative with respect to logp, and which clip binds."""
    ratio = math.exp(logp - old)
    low, high = 1 - setting.clip_range, 1 + setting.clip_range_high
    if advantage > 0 and ratio > high:
        return -high * advantage, 0.0, "high"
    if advantage < 0 and ratio < low:
        return -low * advantage, 0.0, "low"
    return -ratio * advantage, -ratio * advantage, ""


def oracle_kl(logp: float, ref: float, old: float, estimator: str) -> tuple[float, float]:
    """Estimate of one token and its derivative with respect to logp."""
    difference, ratio = ref - logp, math.exp(logp - old)
    k3 = math.exp(difference) - difference - 1
    return {
        "k1": (-difference, 1.0),
        "k2": (difference * difference / 2, -difference),
        "k3": (k3, 1 - math.exp(difference)),
        "k3_corrected": (ratio * k3, -ratio * difference),
    }[estimator]


def oracle_weight(length: int, lengths: list[int], setting: Setting) -> float:
    """Of every token of a completion of this length."""
    return {
        "sequence": 1 / (len(lengths) * length),
        "token": 1 / sum(lengths),
        "constant": 1 / (len(lengths) * setting.max_completion_length),
    }[setting.aggregation]


def oracle_step(case: Case, setting: Setting) -> tuple[float, Table, dict[str, float]]:
    """(loss, d loss / d logps (B, C), metrics)."""
    loss, gradient = 0.0, [[0.0] * len(row) for row in case.logps]
    sums = {"kl": 0.0, "low": 0.0, "high": 0.0, "entropy": 0.0}
    advantages = oracle_advantages(case.rewards, setting)
    for i, length in enumerate(case.lengths):
        for t in range(length):
            logp, old, ref = case.logps[i][t], case.old_logps[i][t], case.ref_logps[i][t]
            surrogate, surrogate_slope, binding = oracle_surrogate(logp, old, advantages[i], setting)
            kl, kl_slope = oracle_kl(logp, ref, old, setting.estimator)
            weight = oracle_weight(length, case.lengths, setting)
            loss += weight * (surrogate + setting.kl_coeff * kl)
            gradient[i][t] = weight * (surrogate_slope + setting.kl_coeff * kl_slope)
            sums["kl"] += kl
            sums["entropy"] += case.entropies[i][t]
            if binding:
                sums[binding] += 1
    return loss, gradient, {name: total / max(sum(case.lengths), 1) for name, total in sums.items()}


def oracle_distribution(logits: list[float], temperature: float) -> tuple[list[float], list[float], float]:
    """(log-probs, probabilities, entropy) of one position."""
    scaled = [logit / temperature for logit in logits]
    total = math.log(sum(math.exp(value - max(scaled)) for value in scaled)) + max(scaled)
    logps = [value - total for value in scaled]
    probs = [math.exp(logp) for logp in logps]
    return logps, probs, -sum(p * logp for p, logp in zip(probs, logps, strict=True))


# Ours


def doubles(rows: Table) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def our_objective(
    rewards: Tensor, logps: Tensor, old: Tensor, ref: Tensor, mask: Tensor, entropies: Tensor, setting: Setting
) -> tuple[Tensor, dict[str, float]]:
    """As train_grpo.py puts it together."""
    advantages = group_advantages(rewards, baseline=setting.baseline, scale=setting.scale).view(-1, 1)
    clip: dict[str, Any] = {"clip_range": setting.clip_range, "clip_range_high": setting.clip_range_high}
    kl = kl_divergence(logps, ref, estimator=setting.estimator, old_logps=old, completion_mask=mask)
    per_token_loss = clipped_surrogate(logps, old, advantages, mask, **clip) + setting.kl_coeff * kl
    length = setting.max_completion_length
    weights = loss_weights(mask, setting.aggregation, max_completion_length=length, dtype=torch.float64)
    low, high = clipped_tokens(logps, old, advantages, mask, **clip)
    means = TokenMeans()
    means.add(mask, {"kl": kl, "low": low, "high": high, "entropy": entropies})
    return (per_token_loss * weights).sum(), means.metrics()


def our_step(case: Case, setting: Setting) -> tuple[float, Table, dict[str, float]]:
    logps = doubles(case.logps).requires_grad_()
    old, ref, entropies = doubles(case.old_logps), doubles(case.ref_logps), doubles(case.entropies)
    mask = torch.tensor([[t < length for t in range(logps.shape[1])] for length in case.lengths])
    loss, metrics = our_objective(doubles(case.rewards), logps, old, ref, mask, entropies, setting)
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss.item(), gradient.tolist(), metrics


def exactly(table: Table | list[float] | float) -> Any:
    if isinstance(table, float):
        return pytest.approx(table, rel=1e-12, abs=1e-12)
    return [exactly(row) for row in table]


def cases(seeds: Iterable[int]) -> list[Case]:
    return [random_case(seed) for seed in seeds]


# From rewards and log-probs


@pytest.mark.parametrize(("baseline", "scale"), PAIRS)
def test_advantages_equal_the_loops(baseline: str, scale: str) -> None:
    setting = Setting(baseline=baseline, scale=scale)
    for case in cases(range(60)):
        ours = group_advantages(doubles(case.rewards), baseline=baseline, scale=scale)
        assert ours.flatten().tolist() == exactly(oracle_advantages(case.rewards, setting))
        valid = [[reward for reward in group if not math.isnan(reward)] for group in case.rewards]
        assert zero_variance_groups(doubles(case.rewards)).tolist() == [not has_spread(group) for group in valid]


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_loss_gradient_and_metrics_equal_the_loops(aggregation: str, estimator: str) -> None:
    for seed, case in enumerate(cases(range(40))):
        baseline, scale = PAIRS[seed % len(PAIRS)]
        setting = Setting(aggregation, estimator, baseline, scale)
        loss, gradient, metrics = our_step(case, setting)
        expected_loss, expected_gradient, expected_metrics = oracle_step(case, setting)
        assert loss == exactly(expected_loss)
        assert gradient == exactly(expected_gradient)
        assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-6)  # summed in float32


def test_the_cases_reach_every_branch() -> None:
    everything = cases(range(40))
    metrics = [oracle_step(case, Setting())[2] for case in everything]
    assert sum(row["low"] > 0 for row in metrics) > 10
    assert sum(row["high"] > 0 for row in metrics) > 10
    assert any(math.isnan(reward) for case in everything for group in case.rewards for reward in group)
    assert any(0 in case.lengths for case in everything)
    assert any(len(set(case.lengths)) > 2 for case in everything)


@pytest.mark.parametrize(
    "wrong",
    [
        {"aggregation": "sequence"},
        {"aggregation": "constant"},
        {"estimator": "k1"},
        {"estimator": "k2"},
        {"estimator": "k3"},
        {"baseline": "leave_one_out"},
        {"scale": "none"},
        {"clip_range": 0.35},
        {"clip_range_high": 0.15},
        {"kl_coeff": -0.3},
        {"max_completion_length": 6},
    ],
    ids=str,
)
def test_the_loops_see_every_wrong_setting(wrong: dict[str, Any]) -> None:
    """The twin: each setting changes the loss and the gradient by far more than the tolerance."""
    right = Setting("constant") if "max_completion_length" in wrong else Setting()  # only constant asks for it
    differences = []
    for case in cases(range(10)):
        ours, oracle = our_step(case, replace(right, **wrong)), oracle_step(case, right)
        slope = (doubles(ours[1]) - doubles(oracle[1])).abs().max().item()
        differences.append((abs(ours[0] - oracle[0]), slope))
    assert max(loss for loss, _ in differences) > 1e-3
    assert max(slope for _, slope in differences) > 1e-3


def test_no_token_at_all_is_loss_zero() -> None:
    case = random_case(0)
    nothing = [[NAN] * len(row) for row in case.logps]
    empty = Case(case.rewards, [0] * len(case.lengths), nothing, nothing, nothing, nothing)
    for aggregation in AGGREGATIONS:
        assert our_step(empty, Setting(aggregation)) == oracle_step(empty, Setting(aggregation))
        assert our_step(empty, Setting(aggregation))[0] == 0.0


# From logits


VOCABULARY, TEMPERATURE = 5, 0.6
PROMPTS = [[1, 2, 3], [4], [2, 2], [3, 1, 4, 1]]
COMPLETIONS = [[2, 0], [1, 4, 3, 0], [3], [2, 1, 0]]


def random_logits(seed: int) -> Tensor:
    """(positions, V, V): the logits after a token depend on it and on its position, so a shift by one shows."""
    return torch.randn(9, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Lookup(PreTrainedModel):
    """Looks its logits up: the hidden state is one-hot, of position and token, and the LM head holds their logits."""

    config_class = PreTrainedConfig
    base_model_prefix = "trunk"

    def __init__(self, logits: Tensor) -> None:
        num_pairs = len(logits) * VOCABULARY
        super().__init__(PreTrainedConfig(vocab_size=VOCABULARY, hidden_size=num_pairs))
        self.trunk = OneHot(num_pairs)
        self.lm_head = nn.Linear(num_pairs, VOCABULARY, bias=False)
        self.lm_head.weight = nn.Parameter(logits.flatten(0, 1).T)  # (V, positions * V)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.lm_head(self.trunk(**inputs).last_hidden_state))


class OneHot(nn.Module):
    def __init__(self, num_pairs: int) -> None:
        super().__init__()
        self.num_pairs = num_pairs

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **_: Any) -> SimpleNamespace:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])
        pairs = position_ids * VOCABULARY + input_ids
        return SimpleNamespace(last_hidden_state=nn.functional.one_hot(pairs, self.num_pairs).double())


@pytest.fixture(params=["all logits", "head"])
def score(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Tensor, Tensor]]:
    """score(model): log-probs and entropies, from logits the model gives, or from its head by chunks of 2 tokens."""
    monkeypatch.setattr(grpo.fast.lm_head, "CHUNK", 2 * VOCABULARY)

    def score(model: Lookup, temperature: float = TEMPERATURE) -> tuple[Tensor, Tensor]:
        assert find_head(model) is not None
        tokens = (*padded(PROMPTS, is_left=True), *padded(COMPLETIONS, is_left=False))
        scored: Any = model if request.param == "head" else model.forward
        return compute_logprobs(scored, *tokens, temperature=temperature)

    return score


def padded(rows: list[list[int]], *, is_left: bool) -> tuple[Tensor, Tensor]:
    """Padding is a token of the vocabulary, as where the pad token is the eos token."""
    width = max(map(len, rows))
    gaps = [width - len(row) for row in rows]
    ids = [[0] * gap + row if is_left else row + [0] * gap for row, gap in zip(rows, gaps, strict=True)]
    places = [[t >= gap if is_left else t < width - gap for t in range(width)] for gap in gaps]
    return torch.tensor(ids), torch.tensor(places)


def predicting(i: int, t: int) -> tuple[int, int]:
    """(position, token) whose logits speak of token t of completion i."""
    sequence = PROMPTS[i] + COMPLETIONS[i]
    position = len(PROMPTS[i]) + t - 1
    return position, sequence[position]


def oracle_logprobs(logits: Tensor) -> tuple[Table, Table]:
    """(logps, entropies), each (B, C), 0 in padding."""
    width = max(map(len, COMPLETIONS))
    logps, entropies = ([[0.0] * width for _ in COMPLETIONS] for _ in range(2))
    for i, completion in enumerate(COMPLETIONS):
        for t, token in enumerate(completion):
            all_logps, _, entropies[i][t] = oracle_distribution(logits[predicting(i, t)].tolist(), TEMPERATURE)
            logps[i][t] = all_logps[token]
    return logps, entropies


@pytest.mark.parametrize("seed", range(5))
def test_logps_and_entropies_equal_a_softmax_by_hand(score: Callable[..., tuple[Tensor, Tensor]], seed: int) -> None:
    logits = random_logits(seed)
    logps, entropies = score(Lookup(logits))
    expected_logps, expected_entropies = oracle_logprobs(logits)
    assert logps.tolist() == exactly(expected_logps)
    assert entropies.tolist() == exactly(expected_entropies)
    for wrong in (score(Lookup(logits), temperature=1.0), score(Lookup(logits.roll(1, dims=0)))):
        assert (wrong[0] - logps).abs().max() > 0.1
        assert (wrong[1] - entropies).abs().max() > 0.1


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_gradient_reaches_the_logits_as_the_chain_rule_says(
    score: Callable[..., tuple[Tensor, Tensor]], aggregation: str, estimator: str
) -> None:
    """From logits and rewards to d loss / d logits: the softmax's part is (1[v = token] - p_v) / temperature."""
    setting = Setting(aggregation, estimator)
    rewards = [[1.0, 0.0], [0.5, 3.0]]
    policy, lengths = random_logits(0), [len(completion) for completion in COMPLETIONS]
    old, ref = (oracle_logprobs(policy + 0.3 * random_logits(seed))[0] for seed in (1, 2))
    logps, entropies = oracle_logprobs(policy)
    expected_loss, slopes, _ = oracle_step(Case(rewards, lengths, logps, old, ref, entropies), setting)
    expected = torch.zeros_like(policy)
    for i, completion in enumerate(COMPLETIONS):
        for t, token in enumerate(completion):
            _, probs, _ = oracle_distribution(policy[predicting(i, t)].tolist(), TEMPERATURE)
            for v in range(VOCABULARY):
                expected[predicting(i, t)][v] += slopes[i][t] * ((v == token) - probs[v]) / TEMPERATURE

    model = Lookup(policy)
    ours, our_entropies = score(model)
    _, mask = padded(COMPLETIONS, is_left=False)
    loss, _ = our_objective(doubles(rewards), ours, doubles(old), doubles(ref), mask, our_entropies, setting)
    (gradient,) = torch.autograd.grad(loss, model.lm_head.weight)
    assert loss.item() == exactly(expected_loss)
    torch.testing.assert_close(gradient.T.view_as(expected), expected, rtol=0, atol=1e-12)
    assert expected.abs().max() > 1e-3
