"""What larger models need: activations computed again, another attention, quantized weights. On small models."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import grpo.run.plots
from grpo.errors import InputError
from grpo.logprobs import compute_logprobs
from grpo.models.loading import _quantized, load_policy, make_trainable
from grpo.models.saving import save_model
from grpo.settings.config import load_config
from tests.conftest import make_tokenizer, ragged_batch, sample
from tests.run import test_train as helpers
from tests.run.test_train import read, train, weights_of

small = helpers.small  # the fixture
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo.run.plots, "_save", lambda figure, path: None)


# Gradient checkpointing


def checkpointed(model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    overrides = [f"{key}={value}" for key, value in ({"gradient_checkpointing": "true"} | changes).items()]
    make_trainable(model, make_tokenizer(), load_config(None, overrides))
    return model


def deep_llama(num_layers: int = 12) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=47, hidden_size=32, intermediate_size=96, num_hidden_layers=num_layers, num_attention_heads=4
        )
    ).train()


def kept_bytes(model: PreTrainedModel) -> int:
    """What a forward pass of the update keeps for its backward pass, weights apart."""
    weights = {weight.data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute_logprobs(model, *ragged_batch())[0].sum().backward()
    return sum(kept.values())


def test_gradient_checkpointing_keeps_less_and_changes_no_gradient() -> None:
    plain, recomputing = deep_llama(), checkpointed(deep_llama())
    sizes = [kept_bytes(model) for model in (plain, recomputing)]
    assert sizes[1] < 0.4 * sizes[0], sizes
    for (name, ours), theirs in zip(recomputing.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


@pytest.mark.parametrize("rank", [0, 4])
def test_gradient_checkpointing_is_active_in_updates_and_not_in_rollouts(
    rank: int, architecture: str, make_model: Callable[..., PreTrainedModel]
) -> None:
    model = checkpointed(make_model(architecture), lora_rank=rank)
    calls = {"n": 0}
    name, module = next(pair for pair in model.named_modules() if type(pair[1]).__name__.endswith("MLP"))
    module.register_forward_pre_hook(lambda *_: calls.update(n=calls["n"] + 1))
    batch = ragged_batch()
    with torch.no_grad():
        compute_logprobs(model, *batch)  # what the model can do is found out once
    calls["n"] = 0
    compute_logprobs(model, *batch)[0].sum().backward()
    assert calls["n"] == 2, name  # once forward, once more on the way back
    plain = make_model(architecture)
    assert torch.equal(sample(model, make_tokenizer()).completion_ids, sample(plain, make_tokenizer()).completion_ids)
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: lengths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    sample(model, make_tokenizer())
    hook.remove()
    assert set(lengths[1:]) == {1}  # the cache works: one new token a call
    assert model.training


def test_a_run_with_gradient_checkpointing_is_the_same_run(small: dict[str, Any], tmp_path: Path) -> None:
    for value in (True, False):
        train(small, tmp_path / str(value), gradient_checkpointing=value, learning_rate=0.01)
    samples = [read(tmp_path / name / "samples.jsonl") for name in ("True", "False")]
    assert [row["completion"] for row in samples[0]] == [row["completion"] for row in samples[1]]
    for name, weight in weights_of(tmp_path / "True").items():
        torch.testing.assert_close(weight, weights_of(tmp_path / "False")[name], msg=name)


# How models are loaded


@pytest.fixture
def folder(tmp_path: Path, llama: PreTrainedModel) -> str:
    save_model(llama, make_tokenizer(), tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_attention_that_was_asked_for(name: str, folder: str) -> None:
    model, _ = load_policy(folder, base_seed=0, device=CPU, attn_implementation=name)
    assert model.config._attn_implementation == name


def test_an_attention_that_is_none_ends_in_one_line(folder: str) -> None:
    with pytest.raises(InputError, match=r"cannot be loaded: .*fast"):
        load_policy(folder, base_seed=0, device=CPU, attn_implementation="fast")


def test_how_quantized_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="quantized weights need the package bitsandbytes: pip install bitsandbytes"):
        _quantized("4bit", cuda)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    four, eight = (_quantized(name, cuda)["quantization_config"] for name in ("4bit", "8bit"))
    assert (four.load_in_4bit, four.bnb_4bit_quant_type, four.bnb_4bit_compute_dtype) == (True, "nf4", torch.bfloat16)
    assert eight.load_in_8bit
    assert not eight.load_in_4bit
    assert _quantized("4bit", cuda)["device_map"] == {"": cuda}
    assert _quantized("none", CPU) == {}
