"""The entropy bonus: its gradient, written by hand in the chunked head, and what it does in a step and in a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from grpo.fast import lm_head
from grpo.fast.lm_head import Head, log_probs_and_entropies
from grpo.logprobs import compute_logprobs
from grpo.loss import AGGREGATIONS, loss_weights
from tests.conftest import make_tiny_model, patch_loop, ragged_batch
from tests.fidelity import test_chunked_head as helpers
from tests.fidelity import test_oracle as oracle
from tests.fidelity.test_chunked_head import KINDS, TARGETS, VOCABULARY, N, inputs, plain, random
from tests.fidelity.test_oracle import COMPLETIONS, TEMPERATURE, Lookup, padded, predicting, random_logits
from tests.fidelity.test_shared_prefix import make_model

_chunk, score = helpers._chunk, oracle.score  # fixtures

EXACT = {"rtol": 0.0, "atol": 1e-10}


def bonus(logps: Tensor, entropies: Tensor) -> Tensor:
    """A sum of both, each token's with weights of its own."""
    slopes = random(2, N, seed=3, dtype=logps.dtype)
    return (slopes[0] * logps + slopes[1] * entropies).sum()


# The head


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_log_probs_and_entropies(kind: str) -> None:
    scale, cap, temperature, has_bias = KINDS[kind]

    def both(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return Head(weight, bias, scale, cap).log_probs(hidden, TARGETS, temperature, entropy_grad=True)

    assert gradcheck(both, tuple(leaf for leaf in inputs(has_bias) if leaf is not None))


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_autograd_says(kind: str) -> None:
    """Of the plain way in this file's neighbour, and of the one for models whose head is not known."""
    scale, cap, temperature, has_bias = KINDS[kind]
    leaves = inputs(has_bias)
    given = [leaf for leaf in leaves if leaf is not None]
    ours = Head(*leaves[1:], scale, cap).log_probs(leaves[0], TARGETS, temperature, entropy_grad=True)
    logits = Head(*leaves[1:], scale, cap).logits(leaves[0])
    for others in (
        plain(*leaves, scale, cap, temperature),
        log_probs_and_entropies(logits, TARGETS, temperature, entropy_grad=True),
    ):
        for our_values, values in zip(ours, others, strict=True):
            torch.testing.assert_close(our_values, values, **EXACT)
        found, expected = (
            torch.autograd.grad(bonus(*both), given, retain_graph=True, materialize_grads=True)
            for both in (ours, others)
        )
        for gradient, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(gradient, wanted, **EXACT)
            assert wanted.abs().max() > 0.01


@pytest.mark.parametrize("is_chunked", [True, False])
def test_without_being_asked_entropies_have_no_gradient(is_chunked: bool) -> None:
    hidden, weight, _ = inputs(False)

    def both(**settings: Any) -> tuple[Tensor, Tensor]:
        head = Head(weight, None)
        if is_chunked:
            return head.log_probs(hidden, TARGETS, 0.7, **settings)
        return log_probs_and_entropies(head.logits(hidden), TARGETS, 0.7, **settings)

    (logps, without), (same_logps, entropies) = both(), both(entropy_grad=True)
    assert not without.requires_grad
    assert entropies.requires_grad
    assert torch.equal(without, entropies)
    gradients = [torch.autograd.grad(values.sum(), hidden, retain_graph=True)[0] for values in (logps, same_logps)]
    torch.testing.assert_close(*gradients, **EXACT)  # the log-probs' is the same, asked or not
    assert torch.autograd.grad(entropies.sum(), hidden)[0].abs().max() > 0.01
    with torch.no_grad():
        assert not both(entropy_grad=True)[1].requires_grad


def test_a_gradient_without_the_entropy_itself_would_show() -> None:
    """The twin: dH/dz = -p (log p + H). Without + H it would not sum to 0 over the vocabulary."""
    logits = random(N, VOCABULARY, seed=0).requires_grad_()
    logps = logits.log_softmax(-1)
    entropies = log_probs_and_entropies(logits, TARGETS, 1.0, entropy_grad=True)[1]
    (gradient,) = torch.autograd.grad(entropies.sum(), logits)
    by_hand = -logps.exp() * (logps + entropies.unsqueeze(1))
    torch.testing.assert_close(gradient, by_hand.detach(), **EXACT)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(N).double(), **EXACT)
    assert (logps.exp() * logps).sum(1).abs().min() > 0.1


@pytest.mark.parametrize("is_chunked", [True, False])
def test_a_token_that_cannot_come_is_as_if_it_were_not_there(is_chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias of -inf: p is 0, and 0 * log 0 is 0, in the entropy and in its gradient, however steep the loss."""
    monkeypatch.setattr(lm_head, "CHUNK", 2 * VOCABULARY)
    hidden, weight, bias = inputs(True)
    assert bias is not None
    possible = [token for token in range(VOCABULARY) if token != 5]
    impossible = bias.detach().clone()
    impossible[5] = -torch.inf
    targets_among = torch.tensor([possible.index(target) for target in TARGETS.tolist()])

    def found(bias: Tensor, tokens: list[int], targets: Tensor) -> list[Tensor]:
        leaves = [hidden, weight.detach()[tokens].requires_grad_(), bias[tokens].detach().requires_grad_()]
        head = Head(*leaves[1:])
        both = (
            head.log_probs(hidden, targets, 0.7, entropy_grad=True)
            if is_chunked
            else log_probs_and_entropies(head.logits(hidden), targets, 0.7, entropy_grad=True)
        )
        return [*both, *torch.autograd.grad(bonus(*both), leaves)]

    ours = found(impossible, list(range(VOCABULARY)), TARGETS)
    expected = found(impossible, possible, targets_among)
    names = ("logps", "entropies", "hidden", "weight", "bias")
    for name, our_values, values in zip(names, ours, expected, strict=True):
        kept = our_values[possible] if name in ("weight", "bias") else our_values
        torch.testing.assert_close(kept, values, **EXACT)
    assert not ours[3][5].any()
    assert not ours[4][5].any()


def test_a_distribution_that_is_certain_or_uniform_has_slope_0() -> None:
    """The two ends: nothing to gain at log V, and p log p is flat at 0."""
    for logits in (torch.zeros(2, 4).double(), torch.tensor([[800.0, 0.0, 0.0, 0.0]] * 2).double()):
        weight = torch.eye(4, dtype=torch.float64)
        leaf = logits.clone().requires_grad_()
        for _, entropies in (
            Head(weight, None).log_probs(leaf, torch.tensor([0, 0]), 1.0, entropy_grad=True),
            log_probs_and_entropies(leaf, torch.tensor([0, 0]), 1.0, entropy_grad=True),
        ):
            (gradient,) = torch.autograd.grad(entropies.sum(), leaf)
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), **EXACT)


# In a model


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("settings", [{}, {"group_size": 4, "shared_prefix": "always"}], ids=str)
def test_in_a_model_it_is_the_gradient_of_its_logits_softmax(
    settings: dict[str, Any], is_tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_head, "CHUNK", 3 * 40)
    model = make_model("Llama", {"tie_word_embeddings": is_tied}).double()
    prompt_ids, prompt_mask, ids, mask = ragged_batch()
    entropies = compute_logprobs(
        model, prompt_ids, prompt_mask, ids, mask, temperature=0.8, entropy_grad=True, **settings
    )[1]
    inputs = torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, mask], 1).long()
    positions = (inputs[1].cumsum(1) - 1).clamp(min=0)
    logits = model(inputs[0], attention_mask=inputs[1], position_ids=positions).logits[:, 5:-1] / 0.8
    expected = torch.distributions.Categorical(logits=logits).entropy() * mask
    torch.testing.assert_close(entropies, expected, rtol=0, atol=1e-6)  # rotary embeddings are float32
    weights = list(model.parameters())
    found, wanted = (torch.autograd.grad(values.square().sum(), weights) for values in (entropies, expected))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert min(gradient.abs().max() for gradient in wanted) > 1e-3


@pytest.mark.parametrize("is_head_known", [True, False])
def test_a_step_along_the_bonus_raises_the_entropy(is_head_known: bool) -> None:
    """As the loop puts it: a loss of minus the entropy, minimised."""
    model, tokens = make_tiny_model("llama"), ragged_batch()
    scored: Any = model if is_head_known else model.forward
    weights = loss_weights(tokens[3], "token", max_completion_length=6)

    def entropy(**settings: Any) -> Tensor:
        return (compute_logprobs(scored, *tokens, **settings)[1] * weights).sum()

    before = entropy(entropy_grad=True)
    (-0.5 * before).backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight -= 0.01 * weight.grad
        assert entropy() > before + 1e-3


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_bonus_of_a_step_reaches_the_logits_as_the_chain_rule_says(
    score: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, aggregation: str
) -> None:
    """dH / d logit_v = -p_v (log p_v + H) / temperature, in plain Python; `score` is patched to ask for a gradient."""
    coefficient, policy = 0.3, random_logits(0)
    lengths = [len(completion) for completion in COMPLETIONS]
    expected_loss, expected = 0.0, torch.zeros_like(policy)
    for i, completion in enumerate(COMPLETIONS):
        weight = oracle.oracle_weight(lengths[i], lengths, oracle.Setting(aggregation))
        for t in range(len(completion)):
            logps, probs, entropy = oracle.oracle_distribution(policy[predicting(i, t)].tolist(), TEMPERATURE)
            expected_loss -= coefficient * weight * entropy
            for v, (p, logp) in enumerate(zip(probs, logps, strict=True)):
                expected[predicting(i, t)][v] += coefficient * weight * p * (logp + entropy) / TEMPERATURE

    def asking(*args: Any, **settings: Any) -> Any:
        return compute_logprobs(*args, **settings, entropy_grad=True)

    monkeypatch.setattr(oracle, "compute_logprobs", asking)
    model = Lookup(policy)
    _, entropies = score(model)
    _, mask = padded(COMPLETIONS, is_left=False)
    weights = loss_weights(mask, aggregation, max_completion_length=9, dtype=torch.float64)
    loss = -coefficient * (entropies * weights).sum()
    (gradient,) = torch.autograd.grad(loss, model.lm_head.weight)
    assert loss.item() == pytest.approx(expected_loss, abs=1e-12)
    torch.testing.assert_close(gradient.T.view_as(expected), expected, rtol=0, atol=1e-12)
    assert expected.abs().max() > 1e-3


# In the loop


NO_SIGNAL = """
def nothing(prompts, completions, **_):
    return [0.5 for _ in prompts]
"""


def test_in_a_run_without_any_signal_the_bonus_alone_raises_the_entropy(
    train_tiny: Callable[..., tuple[dict[str, Any], Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No group is left out for having no signal; the second pass over the rollout finds a higher entropy."""
    (tmp_path / "no_signal.py").write_text(NO_SIGNAL)
    monkeypatch.syspath_prepend(tmp_path)
    found: list[Tensor] = []

    def recorded(*args: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        logps, entropies = compute_logprobs(*args, **settings)
        if torch.is_grad_enabled():
            found.append(entropies)
        return logps, entropies

    patch_loop(monkeypatch, "compute_logprobs", recorded)
    settings = {"rewards": "[no_signal:nothing]", "kl_coeff": 0, "learning_rate": 1e-3, "micro_batch_size": 16}
    row, _ = train_tiny("llama", entropy_coeff=0.1, num_iterations=2, **settings)
    assert row["grad_norm"] > 1e-3
    first, second = found
    assert len(first) == 16
    assert second.sum() > 1.001 * first.sum()
    assert row["loss"] == pytest.approx(-0.1 * row["entropy"], rel=1e-5)  # every token weighs the same
