"""The LM head a chunk of tokens at a time: log-probs, entropies and gradients of the plain way, which keeps all logits;
with scales, caps, biases, frozen and tied weights; and without the memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from grpo.fast import capabilities, lm_head, scorer
from grpo.fast.capabilities import find_head
from grpo.fast.lm_head import Head, log_probs_and_entropies
from grpo.logprobs import compute_logprobs
from tests.conftest import make_tiny_model, ragged_batch
from tests.fidelity.test_shared_prefix import (
    BATCH,
    GROUP_SIZE,
    Widths,
    assert_shared,
    largest_difference,
    make_model,
    score,
    score_alone,
)

N, HIDDEN, VOCABULARY = 5, 3, 7
TARGETS = torch.tensor([0, 6, 3, 3, 1])
# scale, cap, temperature, bias
KINDS = {
    "plain": (1.0, None, 1.0, False),
    "bias": (1.0, None, 1.0, True),
    "temperature": (1.0, None, 0.6, False),
    "scale": (0.25, None, 1.0, False),
    "cap": (1.0, 1.5, 1.0, False),
    "all": (1.7, 2.0, 0.6, True),
}


@pytest.fixture(params=[1, 2, 3, 100], ids=lambda rows: f"{rows} a chunk")
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 tokens in chunks of 1; 2, 2, 1; 3, 2; or all at once."""
    monkeypatch.setattr(lm_head, "CHUNK", request.param * VOCABULARY + 1)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(has_bias: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight, bias: leaves that ask for gradients."""
    hidden, weight = random(N, HIDDEN, seed=0, dtype=dtype), random(VOCABULARY, HIDDEN, seed=1, dtype=dtype)
    bias = random(VOCABULARY, seed=2, dtype=dtype).requires_grad_() if has_bias else None
    return hidden.requires_grad_(), weight.requires_grad_(), bias


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None, temperature: float
) -> Any:
    """What autograd makes of all logits at once."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = (logits if logits.dtype == torch.float64 else logits.float()) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    return distribution.log_prob(TARGETS), distribution.entropy()


def gradients(logps: Tensor, leaves: tuple[Tensor | None, ...]) -> list[Tensor]:
    weights = random(N, seed=3, dtype=logps.dtype)
    return list(torch.autograd.grad((logps * weights).sum(), [leaf for leaf in leaves if leaf is not None]))


# The function


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    scale, cap, temperature, has_bias = KINDS[kind]

    def logps(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return Head(weight, bias, scale, cap).log_probs(hidden, TARGETS, temperature)[0]

    assert gradcheck(logps, tuple(leaf for leaf in inputs(has_bias) if leaf is not None))


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_plain_way(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    scale, cap, temperature, has_bias = KINDS[kind]
    leaves = inputs(has_bias, dtype)
    logps, entropies = Head(*leaves[1:], scale, cap).log_probs(leaves[0], TARGETS, temperature)
    expected, expected_entropies = plain(*leaves, scale, cap, temperature)
    assert logps.dtype == entropies.dtype == dtype
    exact = {"rtol": 0, "atol": tolerance}
    torch.testing.assert_close(logps, expected, **exact)
    torch.testing.assert_close(entropies, expected_entropies.detach(), **exact)
    for ours, wanted in zip(gradients(logps, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(ours, wanted, **exact)
        assert wanted.abs().max() > 0.01


def test_a_forgotten_scale_cap_or_bias_would_show() -> None:
    """The twin: each of them moves the log-probs by much more than the tolerances here."""
    leaves = inputs(True)
    whole = Head(*leaves[1:], 1.7, 2.0)
    for other in (whole._replace(scale=1.0), whole._replace(cap=None), whole._replace(bias=None)):
        difference = other.log_probs(leaves[0], TARGETS, 0.6)[0] - whole.log_probs(leaves[0], TARGETS, 0.6)[0]
        assert difference.abs().max() > 0.1


def test_entropies_have_no_gradient_and_there_is_no_second_derivative() -> None:
    hidden, weight, _ = inputs(False)
    logps, entropies = Head(weight, None).log_probs(hidden, TARGETS, 1.0)
    assert logps.requires_grad
    assert not entropies.requires_grad
    (gradient,) = torch.autograd.grad(logps.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("frozen", ["weight", "bias", "hidden"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen: str) -> None:
    leaves = dict(zip(("hidden", "weight", "bias"), inputs(True), strict=True))
    logps, _ = Head(leaves["weight"], leaves["bias"]).log_probs(leaves["hidden"], TARGETS, 1.0)
    expected = dict(zip(leaves, gradients(logps, tuple(leaves.values())), strict=True))
    leaves[frozen].requires_grad_(False)
    with made() as sizes:
        logps, _ = Head(leaves["weight"], leaves["bias"]).log_probs(leaves["hidden"], TARGETS, 1.0)
        (logps * random(N, seed=3)).sum().backward()
    assert leaves[frozen].grad is None
    for name in leaves:
        if name != frozen:
            torch.testing.assert_close(leaves[name].grad, expected[name], rtol=0, atol=1e-12)
    assert (VOCABULARY, HIDDEN) in sizes or frozen == "weight"  # not even for a moment
    assert (VOCABULARY, HIDDEN) not in sizes or frozen != "weight"


@contextmanager
def made() -> Iterator[set[tuple[int, ...]]]:
    """The shapes of the tensors that any operation makes in here; what is there already does not count."""

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            known = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
            for value in result if isinstance(result, tuple | list) else (result,):
                if isinstance(value, Tensor) and value.untyped_storage()._cdata not in known:
                    sizes.add(tuple(value.shape))
            return result

    sizes: set[tuple[int, ...]] = set()
    with Watch():
        yield sizes


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("where", ["another token", "the target"])
def test_impossible_tokens_leave_no_nan(where: str) -> None:
    leaves = inputs(True)
    bias = leaves[2].detach().clone()
    bias[5 if where == "another token" else 3] = -torch.inf  # 3 was sampled twice, 5 never
    bias.requires_grad_()
    logps, entropies = Head(leaves[1], bias).log_probs(leaves[0], TARGETS, 0.7)
    assert entropies.isfinite().all()
    assert logps.isneginf().tolist() == [where == "the target" and target == 3 for target in TARGETS.tolist()]
    for gradient in torch.autograd.grad(logps[logps.isfinite()].sum(), [*leaves[:2], bias]):
        assert gradient.isfinite().all()


def test_no_tokens_at_all() -> None:
    hidden, weight, bias = inputs(True)
    logps, entropies = Head(weight, bias).log_probs(hidden[:0], TARGETS[:0], 1.0)
    assert logps.shape == entropies.shape == (0,)
    logps.sum().backward()
    assert all((leaf.grad == 0).all() for leaf in (hidden, weight, bias))


@pytest.mark.parametrize("kind", ["plain", "all"])
def test_under_bfloat16_autocast_it_is_the_plain_way_under_autocast(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "CHUNK", 2 * VOCABULARY)
    scale, cap, temperature, has_bias = KINDS[kind]
    leaves = inputs(has_bias, torch.float32)
    exact = plain(*leaves, scale, cap, temperature)[0]
    with torch.autocast("cpu", torch.bfloat16):
        logps, entropies = Head(*leaves[1:], scale, cap).log_probs(leaves[0], TARGETS, temperature)
        expected, expected_entropies = plain(*leaves, scale, cap, temperature)
    assert logps.dtype == entropies.dtype == torch.float32
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)  # the same products, rounded the same way
    torch.testing.assert_close(entropies, expected_entropies.detach(), rtol=0, atol=1e-5)
    assert (logps - exact).abs().max() > 1e-4  # rounded they are
    for ours, wanted in zip(gradients(logps, leaves), gradients(expected, leaves), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - wanted).abs().max() < 0.02 * wanted.abs().max()


# In a model


def test_a_tied_head_gets_the_embeddings_gradient_and_its_own() -> None:
    tied = make_model("Llama", {"tie_word_embeddings": True})
    untied = make_model("Llama", {"tie_word_embeddings": False})
    untied.load_state_dict(tied.state_dict(), strict=False)
    untied.lm_head.weight.data.copy_(tied.lm_head.weight)
    for model in (tied, untied):
        compute_logprobs(model, *BATCH, group_size=GROUP_SIZE)[0].sum().backward()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    parts = untied.lm_head.weight.grad, untied.model.embed_tokens.weight.grad
    torch.testing.assert_close(tied.lm_head.weight.grad, parts[0] + parts[1], rtol=1e-5, atol=1e-5)
    assert min(part.abs().max() for part in parts) > 0.1


def test_a_frozen_head_in_a_model() -> None:
    model = make_model("Llama", {"tie_word_embeddings": False})
    expected = score(model)[2][: -model.lm_head.weight.numel()]
    model.lm_head.requires_grad_(False)
    assert (score(model)[2] - expected).abs().max() < 1e-5 * expected.abs().max()
    compute_logprobs(model, *BATCH)[0].sum().backward()
    assert model.lm_head.weight.grad is None


def test_the_size_of_the_chunks_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("Qwen3", {})
    expected = score(model)
    for chunk in (1, 40, 100, 40 * 7 + 3):
        monkeypatch.setattr(lm_head, "CHUNK", chunk)
        assert largest_difference(score(model), expected) < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_batch_without_a_single_token_has_loss_0_and_gradient_0(architecture: str) -> None:
    model = make_tiny_model(architecture)
    prompt_ids, prompt_mask, completion_ids, completion_mask = ragged_batch()
    for settings in ({}, {"group_size": 2, "shared_prefix": "always"}):
        nothing = torch.zeros_like(completion_mask)
        logps, entropies = compute_logprobs(model, prompt_ids, prompt_mask, completion_ids, nothing, **settings)
        assert logps.shape == entropies.shape == completion_ids.shape
        assert (logps == 0).all()
        assert (entropies == 0).all()
        model.zero_grad()
        logps.sum().backward()
        assert all(weight.grad is None or (weight.grad == 0).all() for weight in model.parameters())
        assert any(weight.grad is not None for weight in model.parameters())


SCALED = {
    "Cohere": ({"logit_scale": 0.25}, Head(None, None, 0.25)),
    "Cohere2": ({"logit_scale": 3.0}, Head(None, None, 3.0)),
    "Granite": ({"logits_scaling": 4.0}, Head(None, None, 0.25)),
    "Gemma2": ({"final_logit_softcapping": 2.0}, Head(None, None, 1.0, 2.0)),
    "Gemma3": ({"final_logit_softcapping": 2.0}, Head(None, None, 1.0, 2.0)),
    "Llama": ({}, Head(None, None)),
}


@pytest.mark.parametrize("family", SCALED)
def test_what_a_family_does_to_its_logits_is_known(family: str) -> None:
    settings, expected = SCALED[family]
    model = make_model(family, settings)
    head = find_head(model)
    assert head is not None
    assert (head.scale, head.cap) == (expected.scale, expected.cap)
    reference = score_alone(model)
    assert largest_difference(score(model), reference) < 1e-5
    with pytest.MonkeyPatch.context() as patch:  # the twin: as if it did nothing
        patch.setattr(scorer, "find_head", lambda model: head._replace(scale=1.0, cap=None))
        assert (largest_difference(score(model), reference) > 0.1) == (family != "Llama")


def test_a_bias_of_the_head_is_known() -> None:
    model = make_model("Phi", {})
    head = find_head(model)
    assert head is not None
    assert head.bias is model.lm_head.bias
    assert head.bias.abs().max() > 0.01


class TwiceTheLogits(LlamaForCausalLM):
    """Does to its logits what no config says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


class AHeadOfItsOwn(LlamaForCausalLM):
    """Its last layer is not the linear layer it was."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.lm_head = torch.nn.Sequential(torch.nn.Tanh(), self.lm_head)

    def get_output_embeddings(self) -> Any:
        return self.lm_head


def llama_config(**settings: Any) -> LlamaConfig:
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaConfig(
        **sizes | settings, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        tie_word_embeddings=False, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip


@pytest.mark.parametrize("cls", [TwiceTheLogits, AHeadOfItsOwn])
def test_a_model_that_does_something_else_is_asked_for_its_own_logits(
    cls: type[PreTrainedModel], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capabilities, "_SAID", set())
    torch.manual_seed(0)
    model = cls(llama_config())
    assert find_head(model) is None
    expected, widths = score_alone(model), Widths(model)
    assert largest_difference(score(model), expected) < 1e-5
    assert largest_difference(score(model, group_size=GROUP_SIZE, shared_prefix="always"), expected) < 1e-5
    assert_shared(widths.shapes[-1])  # what it does to its logits does not keep it from sharing
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert cls.__name__ in said[0]


# Memory


def test_no_logits_of_all_tokens_are_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, rows, length = 50_000, 4, 6
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        llama_config(vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    )
    prompts, completions = torch.randint(vocabulary, (2, rows, length))
    ones = torch.ones_like(prompts)
    monkeypatch.setattr(lm_head, "CHUNK", 3 * vocabulary)
    num_tokens = rows * length  # N
    find_head(model)  # tries six tokens
    asked: list[tuple[int, ...]] = []
    logits_of = Head.logits

    def spy(head: Head, hidden: Tensor) -> Tensor:
        logits = logits_of(head, hidden)
        asked.append(tuple(logits.shape))
        return logits

    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    monkeypatch.setattr(Head, "logits", spy)
    with made() as sizes, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logps, _ = compute_logprobs(model, prompts, ones, completions, ones)
        logps.sum().backward()
    assert asked == [(3, vocabulary)] * (2 * num_tokens // 3)  # forward, and once more backward
    assert max(saved) == vocabulary * 8  # the head's weight
    # Of tensors with a vocabulary, only pieces of three tokens and the gradients of the weights.
    assert {size for size in sizes if vocabulary in size} <= {
        (3, vocabulary),
        (vocabulary, 3),
        (vocabulary, 8),
        (8, vocabulary),
    }
    # The twin: the plain way makes, and keeps, all of them.
    monkeypatch.setattr(scorer, "find_head", lambda model: None)
    saved.clear()
    with made() as sizes, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute_logprobs(model, prompts, ones, completions, ones)
    assert (num_tokens, vocabulary) in sizes
    assert max(saved) >= num_tokens * vocabulary


def test_the_head_is_asked_about_sampled_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("Llama", {})
    find_head(model)
    asked: list[int] = []
    logits_of = Head.logits
    monkeypatch.setattr(Head, "logits", lambda head, hidden: (asked.append(len(hidden)), logits_of(head, hidden))[1])
    with torch.no_grad():
        compute_logprobs(model, *BATCH)
        compute_logprobs(model, *BATCH, group_size=GROUP_SIZE)
    num_tokens = int(BATCH[3].sum())
    assert asked == [num_tokens, num_tokens - 4]  # the copies said 3 tokens and 1


def test_entropy_of_the_uniform_distribution_is_log_v_and_of_a_certain_one_0() -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[1, 4] = 1e4
    logps, entropies = log_probs_and_entropies(logits, torch.tensor([2, 4]), 1.0)
    torch.testing.assert_close(entropies, torch.tensor([math.log(VOCABULARY), 0.0]))
    torch.testing.assert_close(logps, torch.tensor([-math.log(VOCABULARY), 0.0]))
