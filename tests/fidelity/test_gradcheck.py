"""torch.autograd.gradcheck in float64: every gradient against finite differences of the value it belongs to."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM

import grpo.fast.lm_head
from grpo.fast.capabilities import can_share_prefix, find_head
from grpo.logprobs import compute_logprobs
from grpo.loss import AGGREGATIONS, KL_ESTIMATORS, clipped_surrogate, kl_divergence, loss_weights
from tests.conftest import later_slow

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
PROMPT_MASK = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]], dtype=torch.bool)
VOCABULARY = 5


def random(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_tokens(vocabulary: int, *, is_one_prompt: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four arguments of compute_logprobs."""
    generator = torch.Generator().manual_seed(0)
    prompt_ids, completion_ids = (torch.randint(vocabulary, (3, length), generator=generator) for length in (3, 4))
    prompt_of = [0, 0, 0] if is_one_prompt else [0, 1, 2]
    return prompt_ids[prompt_of], PROMPT_MASK[prompt_of], completion_ids, MASK


# Log-probs


class AveragingModel(nn.Module):
    """Logits from the average of everything up to here: gradients reach a token from all that follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(random(VOCABULARY, 2, seed=1))
        self.positions = nn.Parameter(random(7, 2, seed=2))
        self.head = nn.Parameter(random(2, VOCABULARY, seed=3))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **_: Any) -> SimpleNamespace:
        hidden = (self.embedding[input_ids] + self.positions[position_ids]) * attention_mask.unsqueeze(-1)
        average = hidden.cumsum(1) / attention_mask.cumsum(1).clamp(min=1).unsqueeze(-1)
        return SimpleNamespace(logits=average.tanh() @ self.head)


@pytest.mark.parametrize("temperature", [0.4, 1.7])
def test_logps_of_a_model_that_looks_at_its_whole_past(temperature: float) -> None:
    model, tokens = AveragingModel(), random_tokens(VOCABULARY)
    names = [name for name, _ in model.named_parameters()]

    def logps(*weights: Tensor) -> Tensor:
        def call(**inputs: Any) -> SimpleNamespace:
            return functional_call(model, dict(zip(names, weights, strict=True)), kwargs=inputs)

        return compute_logprobs(call, *tokens, temperature=temperature)[0]

    weights = tuple(model.parameters())
    assert gradcheck(logps, weights)
    gradients = torch.autograd.grad(logps(*weights).sum(), weights)
    assert min(gradient.abs().max() for gradient in gradients) > 0.01


# Surrogate


AWAY_FROM_KINKS = torch.tensor([0.1, -0.1, 0.5, -0.5], dtype=torch.float64)  # 1.11 0.90 inside, 1.65 0.61 outside


@pytest.mark.parametrize("clip_range_high", [None, 0.28, 1.0])
def test_the_surrogate_in_logps_and_advantages(clip_range_high: float | None) -> None:
    old = random(3, 4, seed=1)
    logps, advantages = (old + AWAY_FROM_KINKS).requires_grad_(), random(3, 4, seed=2).requires_grad_()

    def loss(logps: Tensor, advantages: Tensor) -> Tensor:
        return clipped_surrogate(logps, old, advantages, MASK, clip_range=0.2, clip_range_high=clip_range_high)

    assert gradcheck(loss, (logps, advantages))


# KL


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_the_kl_with_old_logps_fixed(estimator: str) -> None:
    """Also of k3_corrected, whose gradient is written by hand: d(r * k3) = -r * D."""
    logps, ref, old = random(3, 4, seed=0).requires_grad_(), random(3, 4, seed=1), random(3, 4, seed=2)

    def kl(logps: Tensor) -> Tensor:
        return kl_divergence(logps, ref, estimator=estimator, old_logps=old, completion_mask=MASK)

    assert gradcheck(kl, (logps,))


def test_the_gradient_of_k3_corrected_is_that_of_ratio_times_k3() -> None:
    """Central differences of the formula itself, apart from the value the function returns."""
    logps, ref, old = (random(3, 4, seed=seed) for seed in range(3))

    def ratio_times_k3(logps: Tensor) -> Tensor:
        difference = ref - logps
        return (logps - old).exp() * (difference.exp() - difference - 1)

    leaf = logps.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(kl_divergence(leaf, ref, estimator="k3_corrected", old_logps=old).sum(), leaf)
    numeric = (ratio_times_k3(logps + 1e-5) - ratio_times_k3(logps - 1e-5)) / 2e-5
    torch.testing.assert_close(gradient, numeric, rtol=1e-7, atol=1e-8)
    fixed_ratio = (logps - old).exp() * (1 - (ref - logps).exp())
    assert (fixed_ratio - numeric).abs().max() > 0.1


def test_on_policy_the_gradient_of_k3_corrected_is_not_that_of_its_value() -> None:
    """With r held at 1 the value is k3's and the gradient is not: that is the correction, and gradcheck can fail."""
    logps, ref = random(3, 4, seed=0).requires_grad_(), random(3, 4, seed=1)
    with pytest.raises(GradcheckError):
        gradcheck(lambda x: kl_divergence(x, ref, estimator="k3_corrected"), (logps,))


# The weighted sum, down to the weights


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """In float64 throughout: transformers' own norm casts to float32, which finite differences would see."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=7, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, initializer_range=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = nn.RMSNorm(8), nn.RMSNorm(8)
    model.model.norm = nn.RMSNorm(8)
    return model.double()


WEIGHTS = ["model.norm.weight", "model.layers.0.self_attn.k_proj.weight", "model.layers.1.input_layernorm.weight"]
WEIGHTS.append("lm_head.weight")


class Scorer(nn.Module):
    """compute_logprobs as a module, so that functional_call swaps whatever it reads of the model, the head included."""

    def __init__(self, scored: LlamaForCausalLM) -> None:
        super().__init__()
        self.scored = scored

    def forward(self, *tokens: Tensor, **settings: Any) -> Tensor:
        return compute_logprobs(self.scored, *tokens, **settings)[0]


def score_with(llama: LlamaForCausalLM, names: list[str], values: tuple[Tensor, ...], *tokens: Tensor) -> Tensor:
    """(B, C) log-probs with these values of the weights; completions of one prompt stand behind one copy of it."""
    swapped = {f"scored.{name}": value for name, value in zip(names, values, strict=True)}
    settings = {"temperature": 0.7, "group_size": 3, "shared_prefix": "always"}
    return functional_call(Scorer(llama), swapped, tokens, settings)


@pytest.fixture
def _tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens at a time through the head, of nine."""
    monkeypatch.setattr(grpo.fast.lm_head, "CHUNK", 2 * 7)


def loss_of(
    llama: LlamaForCausalLM, aggregation: str, estimator: str, *, is_one_prompt: bool = False
) -> Callable[..., Tensor]:
    """The loss of one optimizer step as a function of four of the weights."""
    tokens = random_tokens(7, is_one_prompt=is_one_prompt)
    with torch.no_grad():
        start = compute_logprobs(llama, *tokens, temperature=0.7)[0]
    old, ref = start - AWAY_FROM_KINKS, start + random(3, 4, seed=3, size=0.5)
    advantages = random(3, 1, seed=4)
    weights = loss_weights(MASK, aggregation, max_completion_length=6, dtype=torch.float64)

    def loss(*values: Tensor) -> Tensor:
        logps = score_with(llama, WEIGHTS, values, *tokens)
        surrogate = clipped_surrogate(logps, old, advantages, MASK, clip_range=0.2)
        kl = kl_divergence(logps, ref, estimator=estimator, old_logps=old, completion_mask=MASK)
        return ((surrogate + 0.3 * kl) * weights).sum()

    return loss


@pytest.mark.usefixtures("_tiny_chunks")
@pytest.mark.parametrize(
    ("aggregation", "estimator", "is_one_prompt"),
    later_slow(
        [
            ("token", "k3_corrected", True),  # three completions in one row
            *((aggregation, "k3_corrected", False) for aggregation in AGGREGATIONS),
            ("token", "k3", False),
        ],
        2,
    ),
)
def test_the_loss_of_a_step_in_weights_of_a_tiny_llama(
    llama: LlamaForCausalLM, aggregation: str, estimator: str, is_one_prompt: bool
) -> None:
    """Through the chunked head, whose gradient is written by hand."""
    assert find_head(llama) is not None
    assert can_share_prefix(llama, 7)
    loss = loss_of(llama, aggregation, estimator, is_one_prompt=is_one_prompt)
    values = tuple(llama.get_parameter(name).detach().clone().requires_grad_() for name in WEIGHTS)
    assert gradcheck(loss, values)
    gradients = torch.autograd.grad(loss(*values), values)
    assert min(gradient.abs().max() for gradient in gradients) > 1e-3


def test_old_logps_that_follow_the_policy_have_another_gradient(llama: LlamaForCausalLM) -> None:
    """The twin: a ratio recomputed at every evaluation is 1, so finite differences see no surrogate at all."""
    tokens, advantages = random_tokens(7), random(3, 1, seed=4)

    def loss(weight: Tensor) -> Tensor:
        logps = score_with(llama, WEIGHTS[:1], (weight,), *tokens)
        return clipped_surrogate(logps, logps.detach(), advantages, MASK, clip_range=0.2).sum()

    with pytest.raises(GradcheckError):
        gradcheck(loss, (llama.get_parameter(WEIGHTS[0]).detach().clone().requires_grad_(),))
