"""A tiny tokenizer, four tiny models of real architectures, and one that follows a script. Nothing is downloaded."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

PAD_ID, EOS_ID = 0, 1
VOCABULARY = ["<pad>", "<eos>", "<unk>", *"0123456789+-*/=,. ?()abcdefghijklmnopqrstuvw"]  # 47 tokens, one a character
ARCHITECTURES = ("llama", "qwen3", "gpt2", "gpt_neox")
INITIALIZER_RANGE = 0.3  # far from uniform distributions: a wrong position or temperature must show


def make_tokenizer(pad_token: str = "<pad>") -> PreTrainedTokenizerFast:
    """One token a character."""
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad_token, eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )


def make_tiny_model(architecture: str, seed: int = 0, dropout: float = 0.0) -> PreTrainedModel:
    """Random float32 weights, 2 layers of width 32, in train mode as a fresh module is."""
    common: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "initializer_range": INITIALIZER_RANGE,
        "bos_token_id": None,
        "eos_token_id": EOS_ID,
        "pad_token_id": None,
    }
    wide: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "attention_dropout": dropout,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **wide, **common)).train()
    if architecture == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(num_key_value_heads=2, head_dim=8, **wide, **common)).train()
    if architecture == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(hidden_dropout=dropout, **wide, **common)).train()
    assert architecture == "gpt2"
    pdrop = {"attn_pdrop": dropout, "embd_pdrop": dropout, "resid_pdrop": dropout}
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **pdrop, **common)).train()


class ScriptedCache:
    """A KV cache that remembers only which prompt a row continues."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.num_written = 0  # tokens fed since the prefill

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.rows = self.rows.repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.rows = self.rows[indices]


class ScriptedModel(nn.Module):
    """Continues prompt p with scripts[p], certain of every token, whatever it is fed."""

    def __init__(self, scripts: list[list[int]], eos_token_id: int | list[int] | None = EOS_ID) -> None:
        super().__init__()
        self.scripts = torch.tensor(scripts)
        self.device = torch.device("cpu")
        self.generation_config = SimpleNamespace(eos_token_id=eos_token_id)

    def forward(self, input_ids: Tensor, past_key_values: ScriptedCache | None = None, **_: Any) -> SimpleNamespace:
        if past_key_values is None:
            cache = ScriptedCache(torch.arange(len(input_ids)))
        else:
            cache = past_key_values
            cache.num_written += 1
        tokens = self.scripts[cache.rows, cache.num_written]
        logits = 100.0 * nn.functional.one_hot(tokens, len(VOCABULARY)).float()  # p = 1 in float32
        return SimpleNamespace(logits=logits.unsqueeze(1), past_key_values=cache)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def tokenizer_pad_is_eos() -> PreTrainedTokenizerFast:
    return make_tokenizer(pad_token="<eos>")


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """make_model(architecture, seed=0, dropout=0.0)."""
    return make_tiny_model


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(architecture: str) -> PreTrainedModel:
    return make_tiny_model(architecture)


@pytest.fixture
def llama() -> PreTrainedModel:
    return make_tiny_model("llama")


@pytest.fixture
def scripted() -> Callable[..., ScriptedModel]:
    """scripted(scripts, eos_token_id=EOS): one list of ids a prompt, all of one length."""
    return ScriptedModel
