"""Scoring: log-probs and entropies by hand, the one shift, positions, gradients. Real architectures: fidelity/."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.fast import capabilities, layout
from grpo.fast.layout import completions_per_row, positions_from_mask
from grpo.logprobs import SHARED_PREFIX, compute_logprobs, plain_logprobs
from tests.conftest import make_tiny_model, ragged_batch

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


# Completions behind one prompt. The numbers they give, family by family: fidelity/test_shared_prefix.py


def test_the_layout_by_hand() -> None:
    """Prompt 5 6 with completions 1 2 and 3, prompt 7 8 9 with completion 4; two completions a row. _ is padding.

    _ 5 6 | 1 2 | 3 _
    7 8 9 | 4 _ | _ _
    """
    _ = layout.PADDING
    prompts, completions = ids([_, 5, 6], [_, 5, 6], [7, 8, 9]), ids([1, 2], [3, _], [4, _])
    rows = layout.lay_out(prompts, completions, 2, make_tiny_model("llama"))
    assert rows.inputs["input_ids"].tolist() == [[0, 5, 6, 1, 2, 3, 0], [7, 8, 9, 4, 0, 0, 0]]
    is_token = ids([0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0]).bool()
    expected = ids([0, 0, 1, 2, 3, 2, 3], [0, 1, 2, 3, 4, 3, 4])  # a completion begins where its prompt ends
    assert torch.equal(rows.inputs["position_ids"][is_token], expected[is_token])
    mask = rows.inputs["attention_mask"]
    assert mask.shape == (2, 1, 7, 7)
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}
    assert (mask[:, 0] == 0).int().tolist() == [
        [
            [1, 0, 0, 0, 0, 0, 0],  # padding sees itself
            [0, 1, 0, 0, 0, 0, 0],  # 5
            [0, 1, 1, 0, 0, 0, 0],  # 6
            [0, 1, 1, 1, 0, 0, 0],  # 1
            [0, 1, 1, 1, 1, 0, 0],  # 2
            [0, 1, 1, 0, 0, 1, 0],  # 3: the prompt and itself, not 1 2
            [0, 1, 1, 0, 0, 1, 1],
        ],
        [
            [1, 0, 0, 0, 0, 0, 0],  # 7
            [1, 1, 0, 0, 0, 0, 0],  # 8
            [1, 1, 1, 0, 0, 0, 0],  # 9
            [1, 1, 1, 1, 0, 0, 0],  # 4
            [1, 1, 1, 1, 1, 0, 0],
            [1, 1, 1, 0, 0, 1, 0],
            [1, 1, 1, 0, 0, 0, 1],
        ],
    ]
    assert [x.tolist() for x in rows.token_at] == [[0, 0, 1, 2], [0, 1, 0, 0]]  # 1 2, 3, 4
    assert rows.row.tolist() == [0, 0, 0, 1]
    # Counted from 6 and 9: they speak of 1, 3 and 4; the output at 1 speaks of 2.
    assert rows.place.tolist() == [0, 1, 0, 0]


def test_one_completion_a_row_by_hand() -> None:
    _ = layout.PADDING
    prompts, completions = ids([_, 5, 6], [_, 5, 6]), ids([1, 2], [3, _])
    rows = layout.lay_out(prompts, completions, 1, make_tiny_model("llama"))
    assert rows.inputs["input_ids"].tolist() == [[0, 5, 6, 1, 2], [0, 5, 6, 3, 0]]
    assert rows.inputs["attention_mask"].tolist() == [[0, 1, 1, 1, 1], [0, 1, 1, 1, 0]]
    assert rows.inputs["position_ids"][0].tolist() == [0, 0, 1, 2, 3]
    assert rows.inputs["position_ids"][1, :4].tolist() == [0, 0, 1, 2]
    assert rows.row.tolist() == [0, 0, 1]
    assert rows.place.tolist() == [0, 1, 0]


@pytest.mark.parametrize("counts", [[8], [8, 3, 5], [1], [2, 2, 2, 7]])
def test_completions_per_row_is_the_cheapest_of_all(counts: list[int]) -> None:
    chosen = set()
    for prompt_length in (1, 10, 100, 1000):
        for length in (1, 8, 64, 512):
            for hidden_size in (8, 64, 1024):
                costs = {}
                for k in range(1, 9):
                    width = prompt_length + k * length
                    rows = sum(math.ceil(count / k) for count in counts)
                    costs[k] = rows * (12 * hidden_size * width + width**2)
                k = completions_per_row(counts, prompt_length, length, hidden_size, range(1, 9))
                assert costs[k] == min(costs.values())
                assert k == min(k for k in costs if costs[k] == costs[min(costs, key=costs.__getitem__)])
                assert completions_per_row(counts, prompt_length, length, hidden_size, range(3, 5)) in (3, 4)
                chosen.add(k)
    assert chosen == {1} if counts == [1] else len(chosen) > 2


def widths(prompt_length: int, length: int, **settings: Any) -> set[tuple[int, int]]:
    """The shape of the batch that a model of width 32 is given for 4 completions of one prompt."""
    model = make_tiny_model("llama")
    capabilities.can_share_prefix(model, 1)  # has tried what it wants to try
    shapes: list[tuple[int, int]] = []
    model.model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(given["input_ids"].shape), with_kwargs=True
    )
    prompts = torch.arange(prompt_length).remainder(40).expand(4, -1)
    completions = torch.arange(4 * length).view(4, length).remainder(40)
    score(model, prompts, torch.ones_like(prompts), completions, torch.ones_like(completions), **settings)
    return {tuple(shape) for shape in shapes}


def test_auto_shares_long_prompts_alone_and_never_and_always_what_they_say() -> None:
    for shared_prefix in SHARED_PREFIX:
        assert widths(50, 2, shared_prefix=shared_prefix) == {(4, 52)}  # without groups nothing is shared
    assert widths(50, 2, group_size=4) == widths(50, 2, group_size=4, shared_prefix="auto") == {(1, 58)}
    assert widths(50, 2, group_size=4, shared_prefix="always") == {(1, 58)}
    assert widths(50, 2, group_size=2, shared_prefix="always") == {(2, 54)}  # no more than group_size
    assert widths(50, 2, group_size=4, shared_prefix="never") == {(4, 52)}
    assert widths(1, 50, group_size=4) == {(4, 51)}
    assert widths(1, 50, group_size=4, shared_prefix="always") == {(2, 101)}


@pytest.mark.parametrize("shared_prefix", ["Auto", "", "true", None])
def test_an_unknown_shared_prefix_is_refused_by_name(shared_prefix: Any) -> None:
    one = ids([1])
    with pytest.raises(ValueError, match=r"shared_prefix: got .*, allowed: auto, always, never"):
        score(bigram(TRANSITIONS), one, one, one, one, shared_prefix=shared_prefix)


def test_equal_rows_are_scored_once_and_both_count() -> None:
    """With group_size alone: a copy costs nothing, and its gradient is added to the other's."""
    model, seen = make_tiny_model("llama"), []
    prompts, completions = ids([3, 4], [3, 4], [3, 4]), ids([5, 6, 9], [7, 8, 2], [5, 6, 1])
    mask = ids([1, 1, 0], [1, 1, 1], [1, 1, 0])  # rows 0 and 2 differ in padding alone
    inputs = prompts, torch.ones_like(prompts), completions, mask
    expected, _ = score(model, *inputs)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), model.lm_head.weight)
    model.model.register_forward_pre_hook(lambda _, __, given: seen.append(len(given["input_ids"])), with_kwargs=True)
    logps, _ = score(model, *inputs, group_size=3, shared_prefix="never")
    (gradient,) = torch.autograd.grad(logps.sum(), model.lm_head.weight)
    assert seen == [2]
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    assert torch.equal(logps[0], logps[2])


def test_columns_of_padding_cost_nothing() -> None:
    model, seen = make_tiny_model("llama"), []
    expected, _ = score(model, ids([3, 4]), ids([1, 1]), ids([5, 6]), ids([1, 1]))
    model.model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    logps, entropies = score(model, ids([0, 0, 3, 4]), ids([0, 0, 1, 1]), ids([5, 6, 0, 0]), ids([1, 1, 0, 0]))
    assert seen == [4]
    assert logps.shape == entropies.shape == (1, 4)
    torch.testing.assert_close(logps, torch.nn.functional.pad(expected, (0, 2)), rtol=0, atol=1e-6)


def test_inputs_are_left_as_they_were_and_the_mode_too() -> None:
    model = make_tiny_model("llama")
    tensors = [ids([0, 3], [5, 4]), ids([0, 1], [1, 1]), ids([5, 6], [5, 6]), ids([1, 1], [1, 0])]
    copies = [tensor.clone() for tensor in tensors]
    for mode in (True, False):
        model.train(mode)
        score(model, *tensors, group_size=2)
        assert model.training == mode
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


# The plain computation


@pytest.mark.parametrize("settings", [{}, {"group_size": 4}, {"group_size": 4, "shared_prefix": "always"}])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_plain_computation_gives_the_same_numbers_and_gradients(
    architecture: str, settings: dict[str, Any], temperature: float
) -> None:
    """Forward, shift, log-softmax, gather against what a run uses, in float64: log-probs, entropies, gradients."""
    prompt_ids, prompt_mask, completion_ids, completion_mask = ragged_batch()
    rows = torch.tensor([0, 0, 1, 1, 2, 3])  # siblings, one of them twice
    completion_ids = torch.randint(3, 40, (6, 6), generator=torch.Generator().manual_seed(1))
    completion_ids[1] = completion_ids[0]
    batch = (prompt_ids[rows], prompt_mask[rows], completion_ids, completion_mask[[0, 0, 1, 2, 2, 3]])
    results = []
    for function, more in ((plain_logprobs, {}), (compute_logprobs, settings | {"entropy_grad": True})):
        model = make_tiny_model(architecture).double().eval()
        logps, entropies = function(model, *batch, temperature=temperature, **more)
        assert logps.dtype == torch.float64
        (logps * torch.arange(6) + entropies.square()).sum().backward()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        results.append((logps.detach(), entropies.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
    # Llama and Qwen norm in float32 whatever the weights: rows of another layout round differently there.
    error = 1e-5 if "shared_prefix" in settings and architecture in ("llama", "qwen3") else 1e-9
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=0, atol=error)
    assert (results[0][0][batch[3]] < 0).all()
    assert (results[0][0][~batch[3]] == 0).all()


def test_the_plain_computation_shifts_by_one() -> None:
    """A model that is certain that token t follows token t - 1: every log-prob is 0, and far from it if off by one."""

    def successor(input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=1e4 * torch.nn.functional.one_hot(input_ids + 1, 50).float())

    prompt, completion = ids([7, 8, 9]), ids([10, 11, 12])
    ones = torch.ones(1, 3, dtype=torch.bool)
    logps, entropies = plain_logprobs(successor, prompt, ones, completion, ones)  # type: ignore[arg-type]
    assert torch.equal(logps, torch.zeros(1, 3))
    assert torch.equal(entropies, torch.zeros(1, 3))
    logps, _ = plain_logprobs(successor, prompt, ones, completion + 1, ones)  # type: ignore[arg-type]
    assert logps[0, 0] < -1e3
