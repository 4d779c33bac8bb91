"""Completions that stand behind one copy of their prompt get the scores and the gradients of rows of their own: every
family of transformers that is quick to build, tiny and random; and the families that must keep rows of their own do."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.fast import capabilities, layout, scorer
from grpo.fast.capabilities import find_head
from grpo.logprobs import compute_logprobs

VOCABULARY = 40
HEADS = {"GPT2": "GPT2LMHeadModel"}  # others: FamilyForCausalLM
# What families call their sizes; each config takes the names it knows.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "d_model": 32, "n_layers": 2, "n_heads": 4,
    "num_layers": 2, "num_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_seq_len": 64, "rotary_dim": 4,
    "state_size": 8, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "initializer_range": 0.2, "init_std": 0.2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    "attention_dropout": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "hidden_dropout": 0.0,
    "dropout": 0.0, "embed_dropout": 0.0, "resid_dropout": 0.0, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0,
}  # fmt: skip
SHARING: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Qwen2": {},
    "Qwen3": {},
    "Qwen3Moe": {},
    "Mistral": {"sliding_window": 13},  # as long as the longest prompt with its completion
    "Mixtral": {},
    "Gemma": {},
    "Gemma2": {"sliding_window": 13},
    "Gemma3": {"sliding_window": 13, "final_logit_softcapping": 5.0},
    "Phi": {},
    "Phi3": {},
    "Cohere": {},
    "Cohere2": {},
    "Granite": {"logits_scaling": 3.0},
    "Olmo2": {},
    "StableLm": {},
    "Glm4": {},
    "SmolLM3": {},  # every fourth layer has no positions
    "GptOss": {},  # attention sinks
    "GPT2": {},
    "GPTBigCode": {},
    "GPTNeoX": {},
    "GPTJ": {},
    "CodeGen": {},
    "OPT": {},
    "BioGpt": {},
    "Falcon": {"alibi": False, "num_kv_heads": 2},
}
NOT_SHARING: dict[str, dict[str, Any]] = {
    "Bloom": {},  # ALiBi
    "Mpt": {},  # ALiBi
    "Mamba": {},  # a state, no attention
    "Lfm2": {"layer_types": ["conv", "full_attention"]},  # a convolution
    "GPTNeo": {"attention_types": [[["global", "local"], 1]], "window_size": 12},  # counts places in the row
    "Mistral": {"sliding_window": 11},  # too short for the last token of the longest row
    "Gemma2": {"sliding_window": 6},
    "Gemma3": {"sliding_window": 6},
}
GROUP_SIZE = 4
PROMPT_LENGTH, LENGTH = 9, 4
PROMPT_LENGTHS = (9, 3, 6)
# (prompt, length of the completion): a group cut in the middle, whole ones, one prompt twice in the batch.
ROWS = [(0, 4), (0, 2), (1, 1), (1, 3), (1, 4), (1, 3), (2, 2), (2, 0), (2, 4), (0, 3), (0, 4), (0, 1), (0, 1)]
COPIES = [(5, 3), (12, 11)]  # siblings that said the same
DISTINCT = (6 - 1, 4 - 1, 3)  # completions of each prompt


def make_model(family: str, settings: dict[str, Any]) -> PreTrainedModel:
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    known = set(inspect.signature(config_class).parameters) - ({"head_dim"} if family == "Falcon" else set())
    sizes = {key: value for key, value in SIZES.items() if key in known}
    torch.manual_seed(0)
    model = getattr(transformers, HEADS.get(family, f"{family}ForCausalLM"))(config_class(**sizes | settings)).train()
    for parameter in model.parameters():  # biases and norms as well: zeros and ones would hide a mistake
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def make_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four arguments of compute_logprobs. What stands in the padding differs from row to row."""
    generator = torch.Generator().manual_seed(0)

    def random_ids(*shape: int) -> Tensor:
        return torch.randint(VOCABULARY, shape, generator=generator)

    prompt_mask = torch.tensor(
        [[t >= PROMPT_LENGTH - PROMPT_LENGTHS[p] for t in range(PROMPT_LENGTH)] for p, _ in ROWS]
    )
    prompts = random_ids(len(PROMPT_LENGTHS), PROMPT_LENGTH)[[p for p, _ in ROWS]]
    prompt_ids = torch.where(prompt_mask, prompts, random_ids(*prompts.shape))
    completion_mask = torch.tensor([[t < length for t in range(LENGTH)] for _, length in ROWS])
    completion_ids = random_ids(len(ROWS), LENGTH)
    for copy, row in COPIES:
        completion_ids[copy] = torch.where(completion_mask[row], completion_ids[row], completion_ids[copy])
    return prompt_ids, prompt_mask, completion_ids, completion_mask


BATCH = make_batch()
WEIGHTS = torch.randn(len(ROWS), LENGTH, generator=torch.Generator().manual_seed(1))
Scores = tuple[Tensor, Tensor, Tensor]  # (B, C) log-probs, (B, C) entropies, all gradients in one vector


def with_gradients(model: PreTrainedModel, logps: Tensor, entropies: Tensor) -> Scores:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad((logps * WEIGHTS).sum(), parameters, allow_unused=True, materialize_grads=True)
    return logps.detach(), entropies.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def score(model: PreTrainedModel, **settings: Any) -> Scores:
    return with_gradients(model, *compute_logprobs(model, *BATCH, temperature=0.7, **settings))


def score_alone(model: PreTrainedModel) -> Scores:
    """Every row by itself: no padding, no mask, no positions, and none of our code."""
    logps, entropies = (torch.zeros(len(ROWS), LENGTH, dtype=model.dtype) for _ in range(2))
    for row, (prompt_ids, prompt_mask, completion_ids, completion_mask) in enumerate(zip(*BATCH, strict=True)):
        prompt, completion = prompt_ids[prompt_mask], completion_ids[completion_mask]
        if len(completion) == 0:
            continue
        logits = model(torch.cat([prompt, completion]).unsqueeze(0), use_cache=False).logits[0] / 0.7
        distribution = torch.distributions.Categorical(logits=logits[len(prompt) - 1 : -1])
        logps[row, : len(completion)] = distribution.log_prob(completion)
        entropies[row, : len(completion)] = distribution.entropy().detach()
    return with_gradients(model, logps, entropies)


def largest_difference(ours: Scores, expected: Scores) -> float:
    """Of log-probs, of entropies, and of gradients relative to their largest entry."""
    sizes = (1.0, 1.0, expected[2].abs().max())
    return max(float((x - y).abs().max() / size) for x, y, size in zip(ours, expected, sizes, strict=True))


class Widths:
    """The shapes of the batches a model's trunk is given."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.shapes: list[tuple[int, int]] = []
        model.base_model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        self.shapes.append(tuple(ids.shape))


APART = (sum(DISTINCT), PROMPT_LENGTH + LENGTH)


def assert_shared(shape: tuple[int, int]) -> None:
    """Several completions stood in a row, and there were no more rows than that takes."""
    k = (shape[1] - PROMPT_LENGTH) // LENGTH
    assert 1 < k <= GROUP_SIZE
    assert shape == (sum(-(-count // k) for count in DISTINCT), PROMPT_LENGTH + k * LENGTH)


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "_SAID", set())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Families that share


def implementations() -> list[tuple[str, str]]:
    """eager, which adds the mask by itself, and sdpa where a family has it."""
    classes = {family: getattr(transformers, HEADS.get(family, f"{family}ForCausalLM")) for family in SHARING}
    return [
        (family, way)
        for family in SHARING
        for way in ("eager", "sdpa")
        if way == "eager" or classes[family]._supports_sdpa
    ]


@pytest.mark.parametrize(("family", "implementation"), implementations())
def test_completions_behind_one_prompt_score_as_rows_of_their_own(
    family: str, implementation: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(family, SHARING[family] | {"attn_implementation": implementation})
    assert model.config._attn_implementation == implementation
    expected = score_alone(model)
    assert expected[0].std() > 0.3  # far from uniform
    widths = Widths(model)
    assert largest_difference(score(model), expected) < 1e-5
    assert widths.shapes[-1] == (len(ROWS), PROMPT_LENGTH + LENGTH)
    assert largest_difference(score(model, group_size=GROUP_SIZE, shared_prefix="never"), expected) < 1e-5
    assert widths.shapes[-1] == APART
    for shared_prefix in ("always", "auto"):
        assert largest_difference(score(model, group_size=GROUP_SIZE, shared_prefix=shared_prefix), expected) < 1e-5
        assert_shared(widths.shapes[-1])
    assert model.training
    assert find_head(model) is not None
    assert capsys.readouterr().err == ""


# Not Llama's eager attention: it casts the lowest float64 to float32, -inf, and padding that sees nothing is NaN.
@pytest.mark.parametrize(("family", "implementation"), [("Llama", "sdpa"), ("GPT2", "sdpa"), ("GPT2", "eager")])
def test_in_float64_to_1e_10(family: str, implementation: str) -> None:
    model = make_model(family, {"attn_implementation": implementation}).double()
    if family == "Llama":  # transformers' own norm casts to float32
        norms = [name for name, module in model.named_modules() if type(module).__name__ == "LlamaRMSNorm"]
        for name in norms:
            model.set_submodule(name, nn.RMSNorm(32, eps=1e-6, dtype=torch.float64))
    expected, widths = score_alone(model), Widths(model)
    for settings in ({}, {"shared_prefix": "never"}, {"shared_prefix": "always"}, {"shared_prefix": "auto"}):
        ours = score(model, group_size=GROUP_SIZE if settings else None, **settings)
        assert ours[0].dtype == ours[1].dtype == torch.float64
        assert largest_difference(ours, expected) < 1e-10
    assert_shared(widths.shapes[-1])


def test_sharing_with_gradient_checkpointing_and_a_frozen_trunk() -> None:
    model = make_model("Llama", {"tie_word_embeddings": False})
    expected = score(model)
    model.gradient_checkpointing_enable()
    assert largest_difference(score(model, group_size=GROUP_SIZE, shared_prefix="always"), expected) < 1e-5
    model.base_model.requires_grad_(False)
    ours = score(model, group_size=GROUP_SIZE, shared_prefix="always")
    assert len(ours[2]) == VOCABULARY * 32  # the head's alone; the last parameter of all
    assert (ours[2] - expected[2][-len(ours[2]) :]).abs().max() < 1e-5 * expected[2].abs().max()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_sharing_under_bfloat16_autocast_is_as_close_as_bfloat16_allows(implementation: str) -> None:
    """The mask's lowest float32 rounds to -inf there: no row may see nothing."""
    model = make_model("Llama", {"attn_implementation": implementation})
    expected, widths = score(model), Widths(model)
    with torch.autocast("cpu", torch.bfloat16):
        apart = score(model)
        ours = score(model, group_size=GROUP_SIZE, shared_prefix="always")
    assert_shared(widths.shapes[-1])
    assert all(value.isfinite().all() for value in ours)
    assert largest_difference(ours, expected) < 2 * largest_difference(apart, expected) + 0.01


# Families that do not


@pytest.mark.parametrize(("family", "settings"), NOT_SHARING.items(), ids=list(NOT_SHARING))
def test_a_family_that_cannot_share_keeps_rows_of_its_own_and_says_so_once(
    family: str, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(family, settings)
    expected, widths = score_alone(model), Widths(model)
    for shared_prefix in ("never", "always", "auto"):
        ours = score(model, group_size=GROUP_SIZE, shared_prefix=shared_prefix)
        assert widths.shapes[-1] == APART
        assert largest_difference(ours, expected) < 1e-5
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert type(model).__name__ in said[0]
    # To share all the same would be wrong: the fallback is needed, and the comparison can fail.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "can_share_prefix", lambda model, length: True)
        try:
            ours = score(model, group_size=GROUP_SIZE, shared_prefix="always")
        except Exception:
            return
        assert_shared(widths.shapes[-1])
        assert largest_difference(ours, expected) > 1e-3


def test_scoring_without_groups_neither_asks_nor_says_anything(capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model("Bloom", {})
    score(model)
    score(model, group_size=GROUP_SIZE, shared_prefix="never")
    assert capsys.readouterr().err == ""


# Wrong twins


def causal_alone(is_token: Tensor, prompt_length: int, k: int, dtype: torch.dtype) -> Tensor:
    """Wrong: a completion sees the siblings before it."""
    num_places = is_token.shape[1]
    is_seen = torch.ones(num_places, num_places, dtype=torch.bool).tril() & is_token.unsqueeze(1)
    is_seen = is_seen | torch.eye(num_places, dtype=torch.bool)
    return torch.zeros(is_seen.shape, dtype=dtype).masked_fill(~is_seen, torch.finfo(dtype).min).unsqueeze(1)


def padding_seen(is_token: Tensor, prompt_length: int, k: int, dtype: torch.dtype) -> Tensor:
    """Wrong: everything looks at the padding before the prompt."""
    return BLOCK_MASK(torch.ones_like(is_token), prompt_length, k, dtype)


BLOCK_MASK, LAY_OUT = layout.block_mask, layout.lay_out


def positions_that_go_on(*arguments: Any) -> Any:
    """Wrong: the second completion begins where the first ended."""
    rows = LAY_OUT(*arguments)
    start = rows.inputs["position_ids"][:, PROMPT_LENGTH:][:, :1]
    places = torch.arange(rows.inputs["input_ids"].shape[1] - PROMPT_LENGTH)
    positions = torch.cat([rows.inputs["position_ids"][:, :PROMPT_LENGTH], start + places], dim=1)
    return rows._replace(inputs=rows.inputs | {"position_ids": positions})


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
@pytest.mark.parametrize(
    ("place", "name", "wrong"),
    [
        (layout, "block_mask", causal_alone),
        (layout, "block_mask", padding_seen),
        (scorer, "lay_out", positions_that_go_on),
    ],
    ids=["siblings seen", "padding seen", "positions go on"],
)
def test_a_wrong_layout_scores_far_away(
    family: str, place: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family, {})
    settings = {"group_size": GROUP_SIZE, "shared_prefix": "always"}
    expected, right = score(model), score(model, **settings)  # what the model can take has been found out by now
    widths = Widths(model)
    monkeypatch.setattr(place, name, wrong)
    ours = score(model, **settings)
    assert_shared(widths.shapes[-1])
    for k in range(2):  # log-probs and entropies, each by itself
        assert (right[k] - expected[k]).abs().max() < 1e-5
        assert (ours[k] - expected[k]).abs().max() > 0.01
    assert (ours[2] - expected[2]).abs().max() > 0.01 * expected[2].abs().max()


def test_a_model_that_misreads_the_mask_is_found_out_by_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("Llama", {})
    monkeypatch.setattr(capabilities, "block_mask", causal_alone)
    assert not capabilities.can_share_prefix(model, PROMPT_LENGTH + LENGTH)


# Found while these tests were written


def long_and_short() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts of 6 and 1 tokens with completions of 1 and 6: no sequence is longer than 7."""
    ids = torch.randint(VOCABULARY, (2, 2, 6), generator=torch.Generator().manual_seed(0))
    prompt_mask = torch.tensor([[True] * 6, [False] * 5 + [True]])
    return ids[0], prompt_mask, ids[1], prompt_mask.flip(0).flip(1)


def test_padding_needs_no_positions_that_a_model_may_not_have() -> None:
    model, (prompt_ids, prompt_mask, *completions) = make_model("GPT2", {"n_positions": 8}), long_and_short()
    logps, _ = compute_logprobs(model, prompt_ids, prompt_mask, *completions)
    alone, _ = compute_logprobs(model, prompt_ids[1:, 5:], prompt_mask[1:, 5:], *(x[1:] for x in completions))
    torch.testing.assert_close(logps[1:], alone, rtol=0, atol=1e-5)


def test_padding_does_not_switch_phi_3_to_its_frequencies_for_long_texts() -> None:
    """longrope takes other frequencies once a position of the batch exceeds original_max_position_embeddings."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    settings = {
        "rope_parameters": rope | {"original_max_position_embeddings": 8},
        "original_max_position_embeddings": 8,
    }
    model, (prompt_ids, prompt_mask, *completions) = make_model("Phi3", settings), long_and_short()
    logps, _ = compute_logprobs(model, prompt_ids, prompt_mask, *completions)
    alone, _ = compute_logprobs(model, prompt_ids[1:, 5:], prompt_mask[1:, 5:], *(x[1:] for x in completions))
    torch.testing.assert_close(logps[1:], alone, rtol=0, atol=1e-5)
