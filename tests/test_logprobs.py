"""Scoring: log-probs and entropies by hand, the one shift, positions, padding, dtypes, dropout."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from grpo.logprobs import compute_logprobs, positions_from_mask
from grpo.loss import clipped_surrogate, loss_weights
from grpo.policy import disable_dropout, load_policy

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


def ragged_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts of 3, 6, 1 and 5 tokens, completions of 4, 2, 5 and 1: the four arguments of compute_logprobs."""
    generator = torch.Generator().manual_seed(seed)
    prompt_ids, completion_ids = torch.randint(3, 40, (2, 4, 6), generator=generator)
    prompt_mask = torch.tensor([[t >= 6 - n for t in range(6)] for n in (3, 6, 1, 5)])
    completion_mask = torch.tensor([[t < n for t in range(6)] for n in (4, 2, 5, 1)])
    return prompt_ids, prompt_mask, completion_ids, completion_mask


# ---------------------------------------------------------------- by hand


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


# ---------------------------------------------------------------- padding and positions, on real architectures


def test_padded_batch_equals_single_rows(model: PreTrainedModel) -> None:
    model.eval()
    batch = prompt_ids, prompt_mask, completion_ids, completion_mask = ragged_batch()
    logps, entropies = score(model, *batch, temperature=0.7)
    for row in range(4):
        prompt = prompt_ids[row][prompt_mask[row]].unsqueeze(0)
        completion = completion_ids[row][completion_mask[row]].unsqueeze(0)
        # Alone, without padding and without our function: plain forward, plain arange positions.
        logits = model(torch.cat([prompt, completion], 1)).logits[0] / 0.7
        all_logps = logits.log_softmax(-1)[prompt.shape[1] - 1 : -1]
        expected = all_logps.gather(1, completion.T).squeeze(1)
        length = completion.shape[1]
        torch.testing.assert_close(logps[row, :length], expected, rtol=0, atol=1e-5)
        expected_entropies = torch.distributions.Categorical(logits=all_logps).entropy()
        torch.testing.assert_close(entropies[row, :length], expected_entropies, rtol=0, atol=1e-5)
        assert (logps[row, length:] == 0).all()


def test_left_padding_without_positions_would_be_wrong_for_learned_positions(
    make_model: Callable[..., PreTrainedModel],
) -> None:
    # The twin of the test above: it shows that GPT-2 there sees missing position ids.
    model = make_model("gpt2").eval()
    batch = ragged_batch()
    right, _ = score(model, *batch)
    wrong, _ = score(lambda position_ids, **rest: model(**rest), *batch)
    padded = batch[1].sum(1) < 6
    assert (right - wrong)[padded].abs().max() > 0.1
    torch.testing.assert_close(right[~padded], wrong[~padded], rtol=0, atol=1e-5)


def test_what_stands_in_the_padding_does_not_matter(model: PreTrainedModel) -> None:
    model.eval()
    prompt_ids, prompt_mask, completion_ids, completion_mask = ragged_batch()
    expected, _ = score(model, prompt_ids, prompt_mask, completion_ids, completion_mask)
    for filler in (0, 1, 45):
        filled = torch.where(prompt_mask, prompt_ids, filler), torch.where(completion_mask, completion_ids, filler)
        logps, _ = score(model, filled[0], prompt_mask, filled[1], completion_mask)
        torch.testing.assert_close(logps, expected, rtol=0, atol=1e-6)
    # A token that is one does matter.
    changed = prompt_ids.clone()
    changed[:, -1] = 45
    assert (score(model, changed, prompt_mask, completion_ids, completion_mask)[0] - expected).abs().max() > 0.1


def test_more_padding_does_not_matter(model: PreTrainedModel) -> None:
    model.eval()
    batch = ragged_batch()
    wider = [torch.nn.functional.pad(x, (4, 0)) for x in batch[:2]] + [
        torch.nn.functional.pad(x, (0, 3)) for x in batch[2:]
    ]
    logps, entropies = score(model, *wider)
    for result, expected in zip((logps, entropies), score(model, *batch), strict=True):
        torch.testing.assert_close(result[:, :6], expected, rtol=0, atol=1e-5)
        assert (result[:, 6:] == 0).all()


def test_gradients_are_finite_with_left_padding_and_fully_masked_completions(model: PreTrainedModel) -> None:
    prompt_ids, prompt_mask, completion_ids, completion_mask = ragged_batch()
    completion_mask[3] = False
    logps, _ = score(model, prompt_ids, prompt_mask, completion_ids, completion_mask)
    weights = loss_weights(completion_mask, "sequence", max_completion_length=6)
    loss = clipped_surrogate(logps, logps.detach(), torch.ones(4, 1), completion_mask, clip_range=0.2)
    (loss * weights).sum().backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert max(gradient.abs().max() for gradient in gradients) > 1e-3


def test_masked_tokens_send_no_gradient() -> None:
    table = TRANSITIONS.log().requires_grad_()
    # Kept: 0 -> 1. Masked: 1 -> 2. Only the row of 0 may learn.
    logps, _ = score(bigram(table), ids([0]), ids([1]), ids([1, 2]), ids([1, 0]))
    (gradient,) = torch.autograd.grad(logps.sum(), table)
    # d log p(1 | 0) = one-hot(1) - p
    torch.testing.assert_close(gradient[0], torch.tensor([-0.5, 0.75, -0.25], dtype=torch.float64), **EXACT)
    assert (gradient[1:] == 0).all()


def test_inputs_are_unchanged_and_the_mode_is_left_alone(model: PreTrainedModel) -> None:
    batch = ragged_batch()
    before = [tensor.clone() for tensor in batch]
    for is_training in (True, False):
        model.train(is_training)
        score(model, *batch)
        assert model.training is is_training
    assert all(torch.equal(now, then) for now, then in zip(batch, before, strict=True))


# ---------------------------------------------------------------- dtypes


def test_bf16_logits_are_cast_before_the_log_softmax() -> None:
    table = (8 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).bfloat16()
    completion = torch.arange(16).unsqueeze(0)
    arguments = ids([0]), ids([1]), completion, torch.ones_like(completion)
    logps, entropies = score(bigram(table), *arguments)
    assert logps.dtype == entropies.dtype == torch.float32
    rows = table[torch.cat([ids([0]), completion[:, :-1]], 1)]
    exact = rows.double().log_softmax(-1).gather(-1, completion.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logps.double(), exact, rtol=0, atol=1e-5)
    in_bf16 = rows.log_softmax(-1).gather(-1, completion.unsqueeze(-1)).squeeze(-1)
    assert (in_bf16.double() - exact).abs().max() > 0.01


def test_gradcheck_in_float64() -> None:
    table = TRANSITIONS.log().requires_grad_()
    mask = ids([1, 1, 1], [1, 0, 0])

    def logps(table: Tensor) -> Tensor:
        arguments = ids([0, 1], [2, 2]), ids([1, 1], [0, 1]), ids([2, 0, 1], [1, 1, 1]), mask
        return score(bigram(table), *arguments, temperature=0.7)[0]

    assert logps(table).dtype == torch.float64
    assert torch.autograd.gradcheck(logps, (table,))


def test_weights_of_a_bf16_checkpoint_are_loaded_in_float32(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    llama.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16  # what happens unless told
    policy, _ = load_policy(str(tmp_path), base_seed=0, device=torch.device("cpu"))
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}


# ---------------------------------------------------------------- dropout: the ratio is exactly 1


def test_dropout_is_switched_off_so_that_the_ratio_is_exactly_1(
    architecture: str, make_model: Callable[..., PreTrainedModel]
) -> None:
    model = make_model(architecture, dropout=0.1).train()
    batch = ragged_batch()
    mask = batch[3]
    first, second = score(model, *batch)[0], score(model, *batch)[0]
    assert not torch.equal(first, second)  # a Llama's attention_dropout is a float field, no module
    disable_dropout(model)
    model.train()
    with torch.no_grad():
        old_logps = score(model, *batch)[0]
    logps = score(model, *batch)[0]
    assert torch.equal((logps - old_logps).exp()[mask], torch.ones(int(mask.sum())))
    model.eval()
    assert torch.equal(score(model, *batch)[0], logps)


def test_dropout_stays_off_after_the_model_is_saved_and_loaded(
    architecture: str, make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = make_model(architecture, dropout=0.1)
    disable_dropout(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    batch = ragged_batch()
    assert torch.equal(score(loaded, *batch)[0], score(loaded, *batch)[0])


def test_impossible_tokens_have_no_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]] * 3)
    one = torch.ones(1, 1, dtype=torch.long)
    _, entropies = compute_logprobs(
        lambda input_ids, **_: SimpleNamespace(logits=logits[input_ids]), one, one, one, one
    )
    assert entropies.item() == pytest.approx(math.log(2))
