"""Scoring: log-probs and entropies by hand, the one shift, positions, gradients. Real architectures: fidelity/."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.logprobs import compute_logprobs, positions_from_mask

EXACT = {"rtol": 0.0, "atol": 1e-12}
LN2, LN4 = 0.6931471805599453, 1.3862943611198906

# P(next token | this token) of a model that looks one token back, over three tokens.
TRANSITIONS = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]], dtype=torch.float64)


def bigram(table: Tensor) -> Callable[..., SimpleNamespace]:
    """A model whose logits at every position are the row of `table` that belongs to the token there."""
    return lambda input_ids, **_: SimpleNamespace(logits=table[input_ids])


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def score(model: Any, *arguments: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    return compute_logprobs(model, *arguments, **settings)


# By hand


def test_logps_and_entropies_by_hand_and_not_shifted() -> None:
    # Prompt 0 1, completion 2 0 1: P(2 | 1) = 0.7, P(0 | 2) = 0.3, P(1 | 0) = 0.25.
    arguments = ids([0, 1]), ids([1, 1]), ids([2, 0, 1]), ids([1, 1, 1])
    logps, entropies = score(bigram(TRANSITIONS.log()), *arguments)
    expected = torch.tensor([[-0.35667494393873245, -1.2039728043259361, -LN4]], dtype=torch.float64)
    torch.testing.assert_close(logps, expected, **EXACT)
    # Entropies of the rows of 1, 2 and 0.
    expected_entropies = torch.tensor([[0.8018185525433373, 1.0888999753452238, 1.0397207708399179]])
    torch.testing.assert_close(entropies, expected_entropies.double(), rtol=0, atol=1e-7)
    # Off by one in either direction: P(2 | 2), P(0 | 0), P(1 | 1), or P(2 | 0), P(0 | 1), P(1 | 2).
    for wrong in ([0.4, 0.5, 0.2], [0.25, 0.1, 0.3]):
        assert (logps - torch.tensor([wrong]).log()).abs().min() > 0.1


def test_temperature_by_hand() -> None:
    # T = 0.5 squares the probabilities: 0.49 / 0.54, 0.09 / 0.34, 0.0625 / 0.375
    arguments = ids([0, 1]), ids([1, 1]), ids([2, 0, 1]), ids([1, 1, 1])
    logps, entropies = score(bigram(TRANSITIONS.log()), *arguments, temperature=0.5)
    expected = torch.tensor([[-0.09716374845364786, -1.3291359472799422, -1.791759469228055]], dtype=torch.float64)
    torch.testing.assert_close(logps, expected, **EXACT)
    expected_entropies = torch.tensor([[0.3548290085661214, 1.0583763496782659, 0.8675632284814612]])
    torch.testing.assert_close(entropies, expected_entropies.double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused_by_name(temperature: float) -> None:
    one = ids([1])
    with pytest.raises(ValueError, match="temperature"):
        score(bigram(TRANSITIONS), one, one, one, one, temperature=temperature)


def test_entropy_is_of_the_full_distribution_and_has_no_gradient() -> None:
    table = torch.zeros(4, 4, requires_grad=True)
    arguments = ids([0, 1]), ids([1, 1]), ids([2, 3]), ids([1, 1])
    logps, entropies = score(bigram(table), *arguments)
    torch.testing.assert_close(entropies, torch.full((1, 2), LN4))  # uniform: log V
    assert not entropies.requires_grad
    assert logps.requires_grad
    # -log p of the token that happens to be sampled is not the entropy: 0.9 0.1 has 0.325, not 0.105 or 2.303.
    skewed = torch.tensor([[0.9, 0.1], [0.9, 0.1]]).log()
    logps, entropies = score(bigram(skewed), ids([0]), ids([1]), ids([0, 1]), ids([1, 1]))
    torch.testing.assert_close(entropies, torch.full((1, 2), 0.3250830), rtol=0, atol=1e-6)
    assert (entropies + logps).abs().min() > 0.2


def test_positions_count_tokens_only() -> None:
    mask = ids([0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0])
    expected = [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 0, 1, 2, 2], [0, 0, 0, 0, 0]]
    assert positions_from_mask(mask).tolist() == expected
    assert positions_from_mask(mask.bool()).tolist() == expected


def test_masked_positions_are_exactly_zero() -> None:
    arguments = ids([0], [1]), ids([1], [1]), ids([2, 0, 1], [1, 1, 1]), ids([1, 1, 0], [0, 0, 0])
    for result in score(bigram(TRANSITIONS.log()), *arguments):
        assert (result[arguments[3] == 0] == 0).all()
        assert (result[arguments[3] == 1] != 0).all()


# Gradients


def test_masked_tokens_send_no_gradient() -> None:
    table = TRANSITIONS.log().requires_grad_()
    # Kept: 0 -> 1. Masked: 1 -> 2. Only the row of 0 may learn.
    logps, _ = score(bigram(table), ids([0]), ids([1]), ids([1, 2]), ids([1, 0]))
    (gradient,) = torch.autograd.grad(logps.sum(), table)
    # d log p(1 | 0) = one-hot(1) - p
    torch.testing.assert_close(gradient[0], torch.tensor([-0.5, 0.75, -0.25], dtype=torch.float64), **EXACT)
    assert (gradient[1:] == 0).all()


def test_gradcheck_in_float64() -> None:
    table = TRANSITIONS.log().requires_grad_()
    mask = ids([1, 1, 1], [1, 0, 0])

    def logps(table: Tensor) -> Tensor:
        arguments = ids([0, 1], [2, 2]), ids([1, 1], [0, 1]), ids([2, 0, 1], [1, 1, 1]), mask
        return score(bigram(table), *arguments, temperature=0.7)[0]

    assert logps(table).dtype == torch.float64
    assert torch.autograd.gradcheck(logps, (table,))


def test_impossible_tokens_have_no_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]] * 3)
    one = torch.ones(1, 1, dtype=torch.long)
    _, entropies = compute_logprobs(
        lambda input_ids, **_: SimpleNamespace(logits=logits[input_ids]), one, one, one, one
    )
    assert entropies.item() == pytest.approx(math.log(2))
