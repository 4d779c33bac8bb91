"""Sampled tokens follow the distribution they claim to: chi-square tests, each with distributions that it rejects."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from grpo.fast.noise import sampling_noise
from grpo.rollout import generate_completions, sample_tokens
from tests.conftest import EOS_ID, make_tiny_model

LOGITS = [0.3, -0.7, 1.2, 0.0, -1.5, 0.8, -0.2, 0.5]
# Seeds are fixed, so these are not chances of failing but how surprising a right sampler's counts may look, and how
# impossible a wrong one's must.
PLAUSIBLE, REJECTED = 1e-3, 1e-6


def distribution(
    logits: Sequence[float], *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> list[float]:
    """By definition, in plain Python: temperature, then the top_k likeliest, then the smallest nucleus >= top_p."""
    weights = [math.exp(logit / temperature) for logit in logits]
    kept = sorted(range(len(weights)), key=lambda token: -weights[token])[: top_k or None]
    total = sum(weights[token] for token in kept)
    nucleus, mass = list[int](), 0.0
    for token in kept:
        if mass < top_p:
            nucleus.append(token)
            mass += weights[token] / total
    return [weights[token] / total / mass if token in nucleus else 0.0 for token in range(len(weights))]


def p_value(counts: Tensor, probabilities: Sequence[float]) -> float:
    """Of Pearson's chi-square test, with (cells - 1) degrees of freedom.

    A cell is a possible token; those with fewer than 5 expected draws are pooled. A draw of an impossible token: 0.
    """
    drawn = counts.double()
    expected = torch.tensor(probabilities, dtype=torch.float64) * drawn.sum()
    if drawn[expected == 0].any():
        return 0.0
    is_rare = (expected > 0) & (expected < 5)
    cells = [(drawn[expected >= 5], expected[expected >= 5])]
    if is_rare.any():
        cells.append((drawn[is_rare].sum().view(1), expected[is_rare].sum().view(1)))
    statistic = sum(((seen - wanted) ** 2 / wanted).sum() for seen, wanted in cells)
    freedom = sum(len(seen) for seen, _ in cells) - 1
    return torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), statistic / 2).item()


def test_p_values_are_those_of_the_tables() -> None:
    # Two cells, 1 degree of freedom: the statistic is 2 * 31^2 / 500 = 3.844, the 95 % quantile is 3.841.
    assert p_value(torch.tensor([531, 469]), [0.5, 0.5]) == pytest.approx(0.0499, abs=1e-4)
    # Six cells, 5 degrees of freedom: 20.52 is the 99.9 % quantile; here 2 * 32^2 / 100 = 20.48.
    assert p_value(torch.tensor([132, 68, 100, 100, 100, 100]), [1 / 6] * 6) == pytest.approx(0.001, abs=2e-5)
    assert p_value(torch.tensor([10, 10, 1]), [0.5, 0.5, 0.0]) == 0.0


# What is asked for (7 degrees of freedom without top-k and top-p, fewer with) and what is easily sampled instead.
CASES: list[tuple[dict[str, Any], dict[str, list[float]]]] = [
    *(
        (
            {"temperature": temperature},
            {
                "10 % hotter": distribution(LOGITS, temperature=1.1 * temperature),
                "10 % colder": distribution(LOGITS, temperature=temperature / 1.1),
            },
        )
        for temperature in (0.5, 1.0, 2.0)
    ),
    (
        {"temperature": 1.0, "top_k": 3},
        {
            "top_k 2": distribution(LOGITS, top_k=2),
            "top_k 4": distribution(LOGITS, top_k=4),
            "no top_k": distribution(LOGITS),
            "10 % hotter": distribution(LOGITS, top_k=3, temperature=1.1),
        },
    ),
    (
        {"temperature": 1.0, "top_p": 0.7},
        {
            "the token that crosses the line left out": distribution(LOGITS, top_k=3),
            "one token more": distribution(LOGITS, top_k=5),
            "no top_p": distribution(LOGITS),
            "10 % hotter": distribution(LOGITS, top_k=4, temperature=1.1),
        },
    ),
    (
        {"temperature": 1.0, "top_k": 4, "top_p": 0.7},
        {
            "top_p before top_k, or top_k alone": distribution(LOGITS, top_k=4),  # the nucleus of all tokens has 4
            "top_p alone": distribution(LOGITS, top_p=0.7),
            "10 % hotter": distribution(LOGITS, top_k=3, temperature=1.1),
        },
    ),
    (
        {"temperature": 0.5, "top_p": 0.7},
        {
            "top_p before temperature": distribution(LOGITS, temperature=0.5, top_k=4),
            "temperature forgotten": distribution(LOGITS, top_p=0.7),
        },
    ),
]


@pytest.fixture(scope="module")
def uniforms() -> Tensor:
    """As a run draws them: many completions, few tokens each."""
    return sampling_noise(11, range(10_000), 20).flatten()


@pytest.mark.parametrize(("settings", "wrong"), CASES, ids=[str(settings) for settings, _ in CASES])
def test_tokens_follow_the_softmax_and_not_what_is_easily_sampled_instead(
    uniforms: Tensor, settings: dict[str, Any], wrong: dict[str, list[float]]
) -> None:
    tokens, _ = sample_tokens(torch.tensor(LOGITS).expand(len(uniforms), -1), uniforms, **settings)
    counts = torch.bincount(tokens, minlength=len(LOGITS))
    assert p_value(counts, distribution(LOGITS, **settings)) > PLAUSIBLE
    for name, probabilities in wrong.items():
        assert p_value(counts, probabilities) < REJECTED, name


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.7}, {"temperature": 1.0}, {"temperature": 1.5}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}],
    ids=str,
)
@torch.no_grad()
def test_generated_tokens_follow_the_models_own_softmax(
    tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any]
) -> None:
    """The first token, and the second one where the first is the commonest: that one comes out of the cache."""
    model = make_tiny_model("llama").eval()
    prompt = [7, 12, 30, 9]
    rollout = generate_completions(
        model, tokenizer, [prompt], group_size=20_000, max_completion_length=2, seed=5, **settings
    )
    first = rollout.completion_ids[:, 0]
    commonest = int(first.mode().values)
    assert commonest != EOS_ID  # after which nothing is sampled
    for prefix, tokens in [(prompt, first), ([*prompt, commonest], rollout.completion_ids[first == commonest, 1])]:
        logits = model.double()(torch.tensor([prefix])).logits[0, -1].tolist()
        counts = torch.bincount(tokens, minlength=len(logits))
        assert p_value(counts, distribution(logits, **settings)) > PLAUSIBLE
        hotter = settings | {"temperature": 1.25 * settings["temperature"]}
        assert p_value(counts, distribution(logits, **hotter)) < REJECTED


# The noise itself


def neighbours(noise: Callable[[int, Sequence[int], int], Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of numbers that must have nothing to do with each other, 80,000 of each kind."""
    by_row = noise(11, range(4001), 20)
    by_seed = torch.stack([noise(seed, range(200), 20) for seed in range(21)])  # (21, 200, 20)
    far = noise(11, [index << 32 for index in range(4001)], 20)
    return {
        "completions": (by_row[1:], by_row[:-1]),
        "completions whose indices differ above bit 32": (far[1:], far[:-1]),
        "tokens": (by_row[:, 1:], by_row[:, :-1]),
        "tokens four apart": (by_row[:, 4:], by_row[:, :-4]),
        "seeds": (by_seed[1:], by_seed[:-1]),
    }


def p_value_of_pairs(pairs: tuple[Tensor, Tensor]) -> float:
    """Of 256 equally likely squares: any dependence that leaves its mark there shows, correlation is only one."""
    first, second = ((16 * numbers.flatten()).long() for numbers in pairs)
    return p_value(torch.bincount(16 * first + second, minlength=256), [1 / 256] * 256)


def test_noise_is_uniform_and_neighbours_are_independent() -> None:
    for name, pairs in neighbours(sampling_noise).items():
        assert p_value_of_pairs(pairs) > PLAUSIBLE, name
        first, second = (numbers.double().flatten() for numbers in pairs)
        # Four standard errors of the moments of a uniform number: mean 1/2, variance 1/12, correlation 0.
        assert first.mean().item() == pytest.approx(1 / 2, abs=4 * math.sqrt(1 / 12 / len(first))), name
        assert first.var().item() == pytest.approx(1 / 12, abs=4 * math.sqrt(1 / 180 / len(first))), name
        assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < 4 / math.sqrt(len(first)), name


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("completions", lambda seed, indices, length: sampling_noise(seed, [index // 16 for index in indices], length)),
        (
            "completions whose indices differ above bit 32",
            lambda seed, indices, length: sampling_noise(seed, [index % 2**32 for index in indices], length),
        ),
        ("tokens", lambda seed, indices, length: sampling_noise(seed, indices, 1).expand(-1, length)),
        ("tokens four apart", lambda seed, indices, length: sampling_noise(seed, indices, 4).repeat(1, length // 4)),
        ("seeds", lambda seed, indices, length: sampling_noise(seed // 16, indices, length)),
        ("seeds", lambda seed, indices, length: (sampling_noise(0, indices, length) + seed / 7) % 1),
    ],
)
def test_noise_that_hangs_together_is_rejected(name: str, wrong: Callable[[int, Sequence[int], int], Tensor]) -> None:
    assert p_value_of_pairs(neighbours(wrong)[name]) < REJECTED


def test_noise_shared_by_all_completions_is_rejected() -> None:
    """The right softmax, one draw instead of many."""
    shared = sampling_noise(11, [0], 20).expand(2000, 20).flatten()
    tokens, _ = sample_tokens(torch.tensor(LOGITS).expand(len(shared), -1), shared, temperature=1.0)
    assert p_value(torch.bincount(tokens, minlength=len(LOGITS)), distribution(LOGITS)) < REJECTED
