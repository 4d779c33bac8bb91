"""A tiny tokenizer, four tiny models of real architectures, and one that follows a script. Nothing is downloaded."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
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

import grpo.run.run
import grpo.run.setup
import train_grpo
from grpo.data import Dataset
from grpo.fast.noise import sampling_noise
from grpo.models.saving import save_model
from grpo.rollout import Rollout, generate_completions, sample_tokens
from grpo.settings.config import load_config

# One thread, here and in the commands that tests start: models this small gain nothing by a second one, and where the
# machine has other work they wait for it, for half a minute instead of a second.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

PAD_ID, EOS_ID = 0, 1
VOCABULARY = ["<pad>", "<eos>", "<unk>", *"0123456789+-*/=,. ?()abcdefghijklmnopqrstuvw"]  # 47 tokens, one a character
ARCHITECTURES = ("llama", "qwen3", "gpt2", "gpt_neox")
PROMPTS = [[5], [7, 12, 30, 9, 41, 6, 22], [15, 3, 28, 28]]  # ragged: 1, 7 and 4 tokens
STOP_IDS = [EOS_ID, 8, 17, 25, 33, 42]  # enough of them that completions end at different places
BROAD: dict[str, Any] = {"group_size": 4, "max_completion_length": 10, "seed": 3}
INITIALIZER_RANGE = 0.3  # far from uniform distributions: a wrong position or temperature must show


LOOP_MODULES = (train_grpo, grpo.run.setup, grpo.run.run)  # the loop, and what it calls by methods


def loop_function(name: str) -> Any:
    """A function of grpo/ that the loop uses, itself or in `Setup` and `Run`."""
    return next(getattr(module, name) for module in LOOP_MODULES if hasattr(module, name))


def patch_loop(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    """Put `value` in the place of such a function wherever the loop finds it."""
    modules = [module for module in LOOP_MODULES if hasattr(module, name)]
    assert modules, name
    for module in modules:
        monkeypatch.setattr(module, name, value)


def later_slow(cases: Iterable[Any], num_fast: int) -> list[Any]:
    """The cases of a test; those behind the first `num_fast` show more of the same and are slow."""
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=[pytest.mark.slow] * (n >= num_fast)) for n, case in enumerate(values)]


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


def numbered(size: int) -> Dataset:
    """Samples "0", "1", ..."""
    return Dataset("numbers", [(f"number {index}", {"prompt": str(index)}) for index in range(size)])


class ScriptedCache:
    """A KV cache that remembers only which prompt a row continues."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.num_written = 0  # tokens fed since the prefill

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


def sample(
    model: Any, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Any] = PROMPTS, **settings: Any
) -> Rollout:
    """`generate_completions` with the settings of BROAD unless others are given."""
    return generate_completions(model, tokenizer, list(prompts), **(BROAD | settings))


def rows_of(rollout: Rollout) -> list[tuple[list[int], list[float], bool]]:
    """What was sampled, without padding: ids, log-probs, whether it was cut off."""
    lists = rollout.token_lists()
    logps = [row[: len(ids)].tolist() for row, ids in zip(rollout.sampling_logps, lists, strict=True)]
    return list(zip(lists, logps, rollout.is_truncated.tolist(), strict=True))


def assert_same_rows(
    ours: Sequence[tuple[list[int], list[float], bool]], expected: Sequence[tuple[list[int], list[float], bool]]
) -> None:
    """The same tokens, and log-probs to 1e-5."""
    assert [row[0] for row in ours] == [row[0] for row in expected]
    assert [row[2] for row in ours] == [row[2] for row in expected]
    for (_, logps, _), (_, wanted, _) in zip(ours, expected, strict=True):
        assert logps == pytest.approx(wanted, rel=0, abs=1e-5)


def assert_same_samples(ours: Rollout, expected: Rollout, rows: Sequence[int] | None = None) -> None:
    """All rows of `ours` are these rows of `expected`."""
    wanted = rows_of(expected)
    assert_same_rows(rows_of(ours), wanted if rows is None else [wanted[row] for row in rows])


@torch.no_grad()
def naive_loop(
    model: PreTrainedModel, prompts: Sequence[list[int]], stop_ids: Sequence[int], *, temperature: float = 1.0
) -> list[tuple[list[int], list[float], bool]]:
    """Every row alone, the whole sequence anew for every token: no padding, no cache, no batch, no row that leaves."""
    group_size, max_length = BROAD["group_size"], BROAD["max_completion_length"]
    noise = sampling_noise(BROAD["seed"], range(len(prompts) * group_size), max_length)
    rows = []
    for index in range(len(prompts) * group_size):
        prompt, completion, logps = prompts[index // group_size], list[int](), list[float]()
        while len(completion) < max_length and not (completion and completion[-1] in stop_ids):
            logits = model(torch.tensor([prompt + completion])).logits[:, -1]
            token, logp = sample_tokens(logits, noise[index, len(completion)].view(1), temperature=temperature)
            completion.append(int(token))
            logps.append(float(logp))
        rows.append((completion, logps, completion[-1] not in stop_ids))
    return rows


def ragged_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts of 3, 6, 1 and 5 tokens, completions of 4, 2, 5 and 1: the four arguments of compute_logprobs."""
    generator = torch.Generator().manual_seed(seed)
    prompt_ids, completion_ids = torch.randint(3, 40, (2, 4, 6), generator=generator)
    prompt_mask = torch.tensor([[t >= 6 - n for t in range(6)] for n in (3, 6, 1, 5)])
    completion_mask = torch.tensor([[t < n for t in range(6)] for n in (4, 2, 5, 1)])
    return prompt_ids, prompt_mask, completion_ids, completion_mask


@pytest.fixture
def train_tiny(tmp_path: Path) -> Callable[..., tuple[dict[str, Any], Path]]:
    """train_tiny(architecture, key=value, ...): one step of train_grpo.py; its row of metrics.jsonl, its folder."""

    def run(architecture: str, **changes: Any) -> tuple[dict[str, Any], Path]:
        model = make_tiny_model(architecture, dropout=0.1)
        model.generation_config.eos_token_id = STOP_IDS
        save_model(model, make_tokenizer(), tmp_path / architecture)
        data, folder = tmp_path / "data.jsonl", tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("1+2=", "abc", "12-7+3=", "x?")))
        settings = {
            "model_name": tmp_path / architecture,
            "train_file": data,
            "eval_file": data,
            "eval_metric": "eval/reward",
            "rewards": "[tests.toy_rewards:even_digits]",
            "batch_size": 4,
            "group_size": 4,
            "max_completion_length": 8,
            "num_train_steps": 1,
            "warmup_steps": 0,
            "device": "cpu",
            "dtype": "float32",
            "output_dir": folder,
        }
        train_grpo.main(load_config(None, [f"{key}={value}" for key, value in (settings | changes).items()]))
        return json.loads((folder / "metrics.jsonl").read_text().splitlines()[1]), folder

    return run


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
