"""Sampling: groups, rows that siblings share, the cache, texts, micro-batches, noise, one token by hand, stop ids,
wrong input. Agreement with others: fidelity/."""

import random
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import DynamicLayer

from grpo.batch import micro_batches, without_zero_variance
from grpo.errors import InputError
from grpo.fast.cache import RoomyLayer
from grpo.fast.noise import philox, sampling_noise, step_seed
from grpo.rollout import Rollout, _decode_texts, _unpadded, generate_completions, sample_tokens, stop_token_ids
from tests.conftest import (
    BROAD,
    EOS_ID,
    INITIALIZER_RANGE,
    PROMPTS,
    STOP_IDS,
    VOCABULARY,
    assert_same_rows,
    assert_same_samples,
    naive_loop,
    rows_of,
    sample,
)

INF = float("inf")


# Groups


def test_row_p_times_g_plus_g_belongs_to_prompt_p(
    scripted: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    # Prompts with different answers; tiled groups would be 10 20 30 10 20 30.
    scripts = [[10, EOS_ID], [20, EOS_ID], [30, EOS_ID]]
    rollout = generate_completions(scripted(scripts), tokenizer, PROMPTS, group_size=2, max_completion_length=2)
    assert rollout.token_lists() == [[10, EOS_ID]] * 2 + [[20, EOS_ID]] * 2 + [[30, EOS_ID]] * 2
    prompts = [ids[kept].tolist() for ids, kept in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    assert prompts == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2 + [PROMPTS[2]] * 2


def test_the_same_prompt_twice_stays_two_groups(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    rollout = sample(llama, tokenizer, ["1+2=", "1+2="])
    assert rollout.prompt_ids.shape == (8, 4)
    assert len(rollout.completions) == 8
    assert rollout.completions[:4] != rollout.completions[4:]  # eight draws, not four shown twice
    assert_same_samples(sample(llama, tokenizer, ["1+2="]), rollout, range(4))
    assert_same_samples(sample(llama, tokenizer, ["1+2="], completion_indices=[4, 5, 6, 7]), rollout, range(4, 8))


# Rows that siblings share

Samples = Sequence[tuple[list[int], list[float], bool]]
FOUR_PROMPTS = [*PROMPTS, PROMPTS[1]]  # ragged, and one of them twice


def peaked(model: PreTrainedModel, factor: float = 3.0) -> PreTrainedModel:
    """The same model, surer of itself: siblings often write the same."""
    model.generation_config.eos_token_id = STOP_IDS
    with torch.no_grad():
        model.get_output_embeddings().weight *= factor
    return model.eval()


def rows_per_call(model: PreTrainedModel) -> list[int]:
    """To be filled: with how many rows the model is called, call by call."""
    calls: list[int] = []
    model.register_forward_pre_hook(lambda _, __, inputs: calls.append(len(inputs["input_ids"])), with_kwargs=True)
    return calls


def distinct_prefixes(samples: Samples, group_size: int) -> list[int]:
    """Before each token, how many different (prompt, what was written so far) are still to go on."""
    return [
        len({(row // group_size, *ids[:t]) for row, (ids, _, _) in enumerate(samples) if len(ids) > t})
        for t in range(max(len(ids) for ids, _, _ in samples))
    ]


def test_siblings_share_a_row_until_they_part(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row for each distinct (prompt, completion so far), and yet every sample is the one that a row alone draws."""
    monkeypatch.setitem(BROAD, "group_size", 16)
    expected = naive_loop(peaked(model), FOUR_PROMPTS, STOP_IDS)
    calls = rows_per_call(model)
    ours = rows_of(sample(model, tokenizer, FOUR_PROMPTS))
    assert_same_rows(ours, expected)
    assert calls == distinct_prefixes(expected, 16)
    # Some stay together and some part, and the same prompt twice is never merged.
    unfinished = sum(len(ids) for ids, _, _ in expected)
    assert 2 * len(FOUR_PROMPTS) < max(calls)
    assert sum(calls) < 0.6 * unfinished
    assert calls[0] == len(FOUR_PROMPTS)
    assert [row[0] for row in ours[16:32]] != [row[0] for row in ours[48:]]


def test_greedy_siblings_stay_together_to_the_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    expected = naive_loop(peaked(model, 1.0), FOUR_PROMPTS, STOP_IDS, temperature=0)
    calls = rows_per_call(model)
    assert_same_rows(rows_of(sample(model, tokenizer, FOUR_PROMPTS, temperature=0)), expected)
    assert calls == [
        sum(len(ids) > t for ids, _, _ in expected[:: BROAD["group_size"]]) for t in range(len(calls))
    ]  # one for each prompt that still goes on
    assert sum(calls) > len(FOUR_PROMPTS)


def test_siblings_that_part_take_their_own_mask_and_positions(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """What the model is given: columns of one row are one sequence, its padding in front and its positions counted."""
    seen: list[dict[str, Tensor]] = []
    peaked(llama).register_forward_pre_hook(lambda _, __, inputs: seen.append(dict(inputs)), with_kwargs=True)
    rollout = sample(llama, tokenizer, FOUR_PROMPTS, group_size=8)
    written = {
        (row // 8, *ids[:t]) for row, ids in enumerate(rollout.token_lists()) for t in range(1, len(ids))
    }  # by whom a row of a later call can have been written
    for t, inputs in enumerate(seen[1:], start=1):
        lengths = inputs["attention_mask"].sum(1)
        assert inputs["attention_mask"].shape == (len(lengths), rollout.prompt_ids.shape[1] + t)
        assert (inputs["position_ids"].squeeze(1) == lengths - 1).all()
        # As many rows of every prompt length, and as many of every last token, as there are distinct prefixes.
        prefixes = [prefix for prefix in written if len(prefix) == t + 1]
        wanted = sorted((len(FOUR_PROMPTS[p]) + t, ids[-1]) for p, *ids in prefixes)
        assert sorted(zip(lengths.tolist(), inputs["input_ids"].squeeze(1).tolist(), strict=True)) == wanted


def test_filters_are_those_of_a_row_alone(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """top-k and top-p of a row that several completions draw from, each with its own random number."""
    settings: dict[str, Any] = {"top_k": 6, "top_p": 0.9, "temperature": 1.3}
    together = sample(peaked(llama, 1.0), tokenizer, FOUR_PROMPTS, group_size=8, **settings)
    copies = [prompt for prompt in FOUR_PROMPTS for _ in range(8)]
    assert_same_samples(sample(llama, tokenizer, copies, group_size=1, **settings), together)
    assert len(set(map(tuple, together.token_lists()))) > 20
    unfiltered = sample(llama, tokenizer, FOUR_PROMPTS, group_size=8, temperature=1.3)
    assert unfiltered.token_lists() != together.token_lists()


def sliding(kind: str, window: int) -> PreTrainedModel:
    """Two layers; those of Mistral see `window` tokens, of Gemma 2 every other layer does."""
    common: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": INITIALIZER_RANGE,
        "sliding_window": window,
        "bos_token_id": None,
        "eos_token_id": EOS_ID,
        "pad_token_id": None,
        "attn_implementation": "eager",
    }
    torch.manual_seed(0)
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**common))
    return Gemma2ForCausalLM(Gemma2Config(query_pre_attn_scalar=8, **common))


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_a_sliding_window_changes_no_sample(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Completions grow beyond a window of 4, after prompts that are shorter and longer than it."""
    monkeypatch.setitem(BROAD, "group_size", 8)
    model = peaked(sliding(kind, window=4), 2.0)
    expected = naive_loop(model, PROMPTS, STOP_IDS)
    calls = rows_per_call(model)
    assert_same_rows(rows_of(sample(model, tokenizer)), expected)
    assert calls == distinct_prefixes(expected, 8)
    assert len(calls) > 5
    assert sum(calls) < sum(len(ids) for ids, _, _ in expected)
    # The window does something.
    assert naive_loop(peaked(sliding(kind, window=64), 2.0), PROMPTS, STOP_IDS) != expected


# The cache


def states(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape), torch.randn(*shape)


@pytest.mark.parametrize("seed", range(8))
def test_a_roomy_layer_is_a_dynamic_layer(seed: int) -> None:
    """The same keys and values after any updates and selections, and what was returned before stays as it was."""
    torch.manual_seed(seed)
    chance = random.Random(seed)
    theirs = DynamicLayer()
    theirs.update(*states(3, 2, 5, 4))
    ours = RoomyLayer(theirs)
    returned: list[tuple[Tensor, Tensor]] = [(theirs.keys, theirs.keys.clone()), (theirs.values, theirs.values.clone())]
    for _ in range(80):
        if chance.random() < 0.2:
            num_rows = len(ours.keys)
            indices = torch.tensor([chance.randrange(num_rows) for _ in range(chance.randint(1, 6))])
            for layer in (ours, theirs):
                layer.batch_select_indices(indices)
        else:
            num_tokens = chance.choice([1, 1, 1, 1, 1, 3, RoomyLayer.ROOM + 1])
            new = states(len(ours.keys), 2, num_tokens, 4)
            for layer in (ours, theirs):
                for given_back, kept in zip(layer.update(*new), (layer.keys, layer.values), strict=True):
                    assert torch.equal(given_back, kept)
                    returned.append((given_back, given_back.clone()))
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
    for given_back, as_it_was in returned:
        assert torch.equal(given_back, as_it_was)


def test_a_roomy_layer_moves_once_in_many_tokens() -> None:
    filled = DynamicLayer()
    filled.update(*states(2, 2, 5, 4))
    layer = RoomyLayer(filled)
    places = [layer.update(*states(2, 2, 1, 4))[0].data_ptr() for _ in range(1 + RoomyLayer.ROOM)]
    assert len(set(places)) == 1  # the token it moved for, and as many as there is room for
    assert layer.update(*states(2, 2, 1, 4))[0].data_ptr() != places[0]
    # The room goes with the rows that are selected.
    layer.batch_select_indices(torch.tensor([1, 1, 0]))
    assert len({layer.update(*states(3, 2, 1, 4))[1].data_ptr() for _ in range(RoomyLayer.ROOM)}) == 1


@pytest.mark.parametrize("kind", ["mamba", "lfm2"])
def test_a_model_that_keeps_a_state_is_refused(tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    """transformers' caches of states take no selection of rows."""
    common: dict[str, Any] = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    model = (
        MambaForCausalLM(MambaConfig(state_size=8, **common))
        if kind == "mamba"
        else Lfm2ForCausalLM(Lfm2Config(full_attn_idxs=[1], **heads, **common))
    )
    with pytest.raises(InputError, match=r"^model_name: a model of this kind cannot be sampled from"):
        sample(model, tokenizer)
    assert model.training  # put back


# Texts


def test_texts_are_decoded_once_each_and_stand_in_order(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = [[5, 6], [], [7], [5, 6], [6, 5], [], [7, EOS_ID]]
    expected = [tokenizer.decode(ids, skip_special_tokens=True) for ids in sequences]
    asked: list[list[int]] = []
    batch_decode = tokenizer.batch_decode

    def spy(ids: list[list[int]], **settings: Any) -> list[str]:
        asked.extend(ids)
        return batch_decode(ids, **settings)

    monkeypatch.setattr(tokenizer, "batch_decode", spy)
    assert _decode_texts(tokenizer, sequences) == expected == ["23", "", "4", "23", "32", "", "4"]
    assert sorted(asked) == [[], [5, 6], [6, 5], [7], [7, EOS_ID]]


def test_unpadded_rows_are_as_long_as_their_masks() -> None:
    ids = torch.tensor([[4, 5, 6], [7, 0, 0], [0, 0, 0], [0, 0, 8]])  # an id may be 0
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]]).bool()
    assert _unpadded(ids, mask) == [[4, 5, 6], [7], [], [0, 0]]


# Micro-batches


def rollout_of(lengths: Sequence[int], prompt_length: int) -> Rollout:
    """Completions of these lengths behind prompts of one padded length; nothing else counts."""
    num_rows, most = len(lengths), max(lengths)
    completion_mask = torch.arange(most) < torch.tensor(lengths).unsqueeze(1)  # (B, C)
    prompts = torch.ones(num_rows, prompt_length, dtype=torch.long)
    return Rollout(
        prompts,
        prompts.bool(),
        completion_mask.long(),
        completion_mask,
        torch.zeros(num_rows, most),
        torch.zeros(num_rows).bool(),
        [""] * num_rows,
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_micro_batches_take_every_row_once_within_their_bounds(data: st.DataObject) -> None:
    num_groups, group_size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    count = num_groups * group_size
    rollout = rollout_of(data.draw(st.lists(st.integers(1, 12), min_size=count, max_size=count)), prompt_length=3)
    order = data.draw(st.permutations(range(num_groups)))[: data.draw(st.integers(1, num_groups))]
    groups = torch.arange(count).view(num_groups, group_size)[torch.tensor(order)]  # (q, G)
    max_rows, max_tokens = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 70))

    batches = micro_batches(rollout, groups, max_rows=max_rows, max_tokens=max_tokens)
    rows = [row for batch in batches for row in batch.tolist()]
    assert sorted(rows) == sorted(groups.flatten().tolist())  # every row exactly once, and no other
    width = {row: 3 + int(rollout.completion_mask[row].sum()) for row in rows}
    for batch in batches:
        assert 1 <= len(batch) <= max_rows
        padded = len(batch) * max(width[row] for row in batch.tolist())
        assert padded <= max_tokens or len(batch) == 1  # a row that is too long stands alone
    for group in groups.tolist():
        if group_size <= max_rows and group_size * max(width[row] for row in group) <= max_tokens:
            assert any(set(group) <= set(batch.tolist()) for batch in batches)  # siblings are not parted without need
    members = [row // group_size for row in rows]
    assert [p for p, _ in groupby(members)] == list(dict.fromkeys(members))  # siblings side by side
    longest = [max(width[row] for row in rows if row // group_size == p) for p in dict.fromkeys(members)]
    assert longest == sorted(longest, reverse=True)  # the groups with the longest rows come first
    assert width[rows[0]] == max(width.values())
    again = micro_batches(rollout, groups, max_rows=max_rows, max_tokens=max_tokens)
    assert [batch.tolist() for batch in again] == [batch.tolist() for batch in batches]


def test_micro_batches_by_hand() -> None:
    # Two groups of three, prompts of 2 tokens: rows of 2 + lengths tokens.
    rollout = rollout_of([1, 2, 3, 9, 1, 4], prompt_length=2)
    groups = torch.tensor([[0, 1, 2], [3, 4, 5]])

    def batches(max_rows: int, max_tokens: int) -> list[list[int]]:
        return [batch.tolist() for batch in micro_batches(rollout, groups, max_rows=max_rows, max_tokens=max_tokens)]

    assert batches(6, 1000) == [[3, 5, 4, 2, 1, 0]]
    assert batches(6, 66) == [[3, 5, 4, 2, 1, 0]]  # 6 rows of 11 tokens, padding included
    assert batches(6, 65) == [[3, 5, 4], [2, 1, 0]]  # one row less would fit, but siblings stay together
    assert batches(5, 1000) == [[3, 5, 4], [2, 1, 0]]
    assert batches(2, 1000) == [[3, 5], [4], [2, 1], [0]]  # where they must be parted
    assert batches(6, 10) == [[3], [5], [4], [2, 1], [0]]  # the row of 11 alone; 2 rows of 5
    assert batches(1, 1) == [[3], [5], [4], [2], [1], [0]]
    assert [batch.tolist() for batch in micro_batches(rollout, groups[:1], max_rows=2, max_tokens=99)] == [[2, 1], [0]]
    # A group parted leaves a batch of short rows behind, which longer siblings may join only at their own width.
    rollout, groups = rollout_of([5, 1, 1, 1, 1, 2], prompt_length=1), torch.arange(6).view(3, 2)
    assert batches(9, 11) == [[0], [1, 5, 4], [2, 3]]


def test_idle_groups_are_known_by_their_rows() -> None:
    """Minibatches hold the row numbers of the rollout; a group's number is not its place among them."""
    groups, is_idle = torch.arange(12).view(4, 3), torch.tensor([False, True, True, False])
    assert without_zero_variance(groups, is_idle).tolist() == [[0, 1, 2], [9, 10, 11]]
    assert without_zero_variance(groups[2:], is_idle).tolist() == [[9, 10, 11]]
    assert without_zero_variance(groups[1:3], is_idle).tolist() == [[3]]  # one row all the same


# Noise


KNOWN_ANSWERS = [  # kat_vectors of Random123: counter, key, words, lowest word first
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
@pytest.mark.filterwarnings("error")
def test_philox_gives_the_known_answers_of_its_authors(counter: list[int], key: list[int], words: list[int]) -> None:
    output = philox([np.array([word], dtype=np.uint64) for word in counter], key[0] + key[1] * 2**32)
    assert [int(word[0]) for word in output] == words


def test_noise_is_24_bits_of_philox_words() -> None:
    # Tokens 4 to 7 of completion 2**32 + 3 under seed 5: counter (1, 3, 1, 0), key (5, 0).
    words = philox([np.array([word], dtype=np.uint64) for word in (1, 3, 1, 0)], 5)
    expected = [(int(word[0]) >> 8) / 2**24 for word in words]
    assert sampling_noise(5, [2**32 + 3], 8)[0, 4:].tolist() == expected


@pytest.mark.filterwarnings("error")
def test_noise_differs_in_every_bit_of_seed_and_index() -> None:
    numbers = [0, 1, 2**31, 2**32, 2**32 + 1, 2**33, 2**63, 2**63 + 1, 2**64 - 1]
    by_seed = torch.cat([sampling_noise(seed, [7], 8) for seed in numbers])
    by_index = sampling_noise(7, numbers, 8)
    for noise in (by_seed, by_index):
        assert len(set(noise.flatten().tolist())) == 8 * len(numbers)
        assert 0 <= noise.min() <= noise.max() < 1


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 31])
def test_noise_goes_on_as_it_began(length: int) -> None:
    assert torch.equal(sampling_noise(3, [4, 9], length), sampling_noise(3, [9, 4], 32)[[1, 0], :length])
    assert sampling_noise(3, [4, 9], length).shape == (2, length)


def test_the_largest_noise_is_below_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """All bits set: a division by 2**32 in float32 would round to 1."""
    monkeypatch.setattr("grpo.fast.noise.philox", lambda counter, key: [0 * word + 0xFFFFFFFF for word in counter])
    assert sampling_noise(0, [0], 4).tolist() == [[1 - 2**-24] * 4]


def test_noise_is_a_function_of_seed_completion_and_token() -> None:
    noise = sampling_noise(5, [0, 1, 7], 6)
    assert noise.dtype == torch.float32
    assert 0 <= noise.min() <= noise.max() < 1
    assert torch.equal(sampling_noise(5, [7], 6)[0], noise[2])  # whichever rows stand beside it
    assert torch.equal(sampling_noise(5, [7, 0, 1], 6), noise[[2, 0, 1]])
    assert torch.equal(sampling_noise(5, [0, 1, 7], 40)[:, :6], noise)  # however long it goes on
    assert len(set(noise.flatten().tolist())) == 18  # another number for every completion and every token
    assert not (sampling_noise(6, [0, 1, 7], 6) == noise).any()  # and for every seed


def test_noise_is_uniform_and_its_streams_are_uncorrelated() -> None:
    noise = sampling_noise(0, range(400), 200)
    counts = torch.histc(noise, bins=10, min=0, max=1)
    # 80,000 draws, 9 degrees of freedom: 27.88 is the 99.9 % quantile of chi-square
    assert ((counts - 8000) ** 2 / 8000).sum() < 27.88
    correlations = torch.corrcoef(noise) - torch.eye(400)
    assert correlations.abs().max() < 6 / 200**0.5  # 80,000 pairs of standard error 0.07


def test_step_seeds_differ_by_seed_step_and_round() -> None:
    seeds = {step_seed(seed, step, round) for seed in range(6) for step in range(6) for round in range(6)}
    assert len(seeds) == 216
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert step_seed(1, 2) == step_seed(1, 2, 0) != step_seed(2, 1)
    # Neighbouring steps draw unrelated noise for the same completion.
    assert not (sampling_noise(step_seed(0, 1), [0], 50) == sampling_noise(step_seed(0, 2), [0], 50)).any()


def test_batching_changes_no_sample(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    llama.generation_config.eos_token_id = STOP_IDS
    whole = sample(llama, tokenizer)
    # The same rows in another order, and in pieces of one prompt.
    shuffled = sample(llama, tokenizer, [PROMPTS[2], PROMPTS[0]], completion_indices=[8, 9, 10, 11, 0, 1, 2, 3])
    assert_same_samples(shuffled, whole, [8, 9, 10, 11, 0, 1, 2, 3])
    half = sample(llama, tokenizer, [PROMPTS[1]], group_size=2, completion_indices=[6, 7])
    assert_same_samples(half, whole, [6, 7])
    # Indices choose the noise: without them the same prompt draws other completions.
    assert sample(llama, tokenizer, [PROMPTS[1]], group_size=2).token_lists() != half.token_lists()


def test_the_seed_decides_everything(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    first = sample(llama, tokenizer)
    torch.manual_seed(999)
    state = torch.get_rng_state()
    assert_same_samples(sample(llama, tokenizer), first)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is neither read nor moved
    assert sample(llama, tokenizer, seed=4).token_lists() != first.token_lists()


# One token


def test_the_inverse_cdf_by_hand() -> None:
    # probabilities 0.5 0.25 0.125 0.125, exact in binary: token k starts at 0, 0.5, 0.75, 0.875
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    uniforms = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 0.87, 0.88, 0.999])
    tokens, logps = sample_tokens(logits.expand(8, -1), uniforms, temperature=1.0)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    ln2 = 0.6931471805599453
    expected = [-ln2, -ln2, -2 * ln2, -2 * ln2, -3 * ln2, -3 * ln2, -3 * ln2, -3 * ln2]
    torch.testing.assert_close(logps, torch.tensor(expected))


@pytest.mark.parametrize("num_impossible", [1, 3, 5])
@pytest.mark.parametrize("uniform", [0.0, 1e-45, 0.3, 0.5, 1 - 2**-24, 1.0])
def test_no_draw_returns_a_token_of_probability_0(uniform: float, num_impossible: int) -> None:
    # -inf at the start, at the end, in between, and everywhere but in one place
    possible = [0.0, -1.0, 0.5]
    impossible = [-INF] * num_impossible
    for row in (
        impossible + possible,
        possible + impossible,
        impossible + possible + impossible,
        [0.0, *impossible, -1.0, *impossible, 0.5],
        [*impossible, 0.0, *impossible],
        [-1e30, *possible, -1e30],  # underflows to 0
    ):
        for temperature in (0.5, 1.0, 2.0):
            tokens, logps = sample_tokens(torch.tensor([row]), torch.tensor([uniform]), temperature=temperature)
            assert row[int(tokens)] > -1e29
            assert logps.isfinite().all()


def test_u_0_and_u_1_over_a_large_vocabulary() -> None:
    logits = 3 * torch.randn(16, 50_000, generator=torch.Generator().manual_seed(0))
    logits[:, :1000] = logits[:, -1000:] = -INF
    for uniform in (0.0, 1 - 2**-24, 1.0):
        tokens, logps = sample_tokens(logits, torch.full((16,), uniform), temperature=1.0)
        assert ((tokens >= 1000) & (tokens < 49_000)).all()
        assert logps.isfinite().all()


def test_logps_are_those_of_the_softmax() -> None:
    logits = torch.randn(200, 7, generator=torch.Generator().manual_seed(0))
    tokens, logps = sample_tokens(logits, sampling_noise(0, [0], 200)[0], temperature=0.7)
    expected = (logits / 0.7).log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logps, expected)
    assert logps.dtype == torch.float32
    assert sample_tokens(logits.bfloat16(), torch.zeros(200), temperature=0.7)[1].dtype == torch.float32


TEN = torch.tensor([0.05, 0.40, 0.10, 0.30, 0.15])  # the likeliest first: tokens 1 3 4 2 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": 1}, {1: 1.0}),
        ({"top_k": 2}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_k": 3}, {1: 0.40 / 0.85, 3: 0.30 / 0.85, 4: 0.15 / 0.85}),
        ({"top_k": 5}, {0: 0.05, 1: 0.40, 2: 0.10, 3: 0.30, 4: 0.15}),
        ({"top_k": 99}, {0: 0.05, 1: 0.40, 2: 0.10, 3: 0.30, 4: 0.15}),
        ({"top_k": 0}, {0: 0.05, 1: 0.40, 2: 0.10, 3: 0.30, 4: 0.15}),
        ({"top_p": 0.01}, {1: 1.0}),  # never empty
        ({"top_p": 0.39}, {1: 1.0}),
        ({"top_p": 0.41}, {1: 4 / 7, 3: 3 / 7}),  # the token that crosses the line is kept
        ({"top_p": 0.71}, {1: 0.40 / 0.85, 3: 0.30 / 0.85, 4: 0.15 / 0.85}),
        ({"top_p": 0.99}, {0: 0.05, 1: 0.40, 2: 0.10, 3: 0.30, 4: 0.15}),
        # top_k first: of 4/7 and 3/7 the first alone has mass >= 0.5; of 0.40 and 0.30 it would not
        ({"top_k": 2, "top_p": 0.5}, {1: 1.0}),
    ],
)
def test_top_k_and_top_p_supports_and_renormalised_logps(settings: dict[str, Any], expected: dict[int, float]) -> None:
    num_draws = 4000
    uniforms = (torch.arange(num_draws) + 0.5) / num_draws  # an even grid: shares are exact to one draw
    tokens, logps = sample_tokens(TEN.log().expand(num_draws, -1), uniforms, temperature=1.0, **settings)
    assert set(tokens.tolist()) == set(expected)
    for token, probability in expected.items():
        assert (tokens == token).double().mean().item() == pytest.approx(probability, abs=1.01 / num_draws)
        assert logps[tokens == token].exp().tolist() == pytest.approx([probability] * int((tokens == token).sum()))


def test_temperature_comes_before_top_p() -> None:
    # At T = 0.5 the squares are 0.0025 0.16 0.01 0.09 0.0225, sum 0.285: the first has 0.561, enough for top_p 0.5.
    tokens, _ = sample_tokens(TEN.log().expand(100, -1), torch.arange(100) / 100, temperature=0.5, top_p=0.5)
    assert set(tokens.tolist()) == {1}
    tokens, _ = sample_tokens(TEN.log().expand(100, -1), torch.arange(100) / 100, temperature=1.0, top_p=0.5)
    assert set(tokens.tolist()) == {1, 3}


def test_greedy_takes_the_likeliest_token(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    tokens, logps = sample_tokens(TEN.log().expand(3, -1), torch.tensor([0.0, 0.5, 1.0]), temperature=0)
    assert tokens.tolist() == [1, 1, 1]
    assert logps.tolist() == [0, 0, 0]
    rollout = sample(llama, tokenizer, temperature=0)
    for ids, prompt in zip(rollout.token_lists()[::4], PROMPTS, strict=True):
        for t, token in enumerate(ids):
            assert llama(torch.tensor([prompt + ids[:t]])).logits[0, -1].argmax() == token
    assert rollout.token_lists() == [ids for ids in rollout.token_lists()[::4] for _ in range(4)]  # all alike


# Stop ids, rows


def test_stop_ids_are_those_of_tokenizer_and_generation_config(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    for configured, expected in [([5, 6], {EOS_ID, 5, 6}), (7, {EOS_ID, 7}), (None, {EOS_ID}), (EOS_ID, {EOS_ID})]:
        llama.generation_config.eos_token_id = configured
        assert stop_token_ids(llama, tokenizer) == expected
    llama.generation_config = None
    assert stop_token_ids(llama, tokenizer) == {EOS_ID}


def test_mean_length_counts_the_stop_token_and_no_padding(
    scripted: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    # "22" and its stop token, and a stop token alone: (3 + 1) / 2. Without them it would be 1, with the padding 3.
    model = scripted([[5, 5, EOS_ID, 5], [EOS_ID, 5, 5, 5]])
    rollout = generate_completions(model, tokenizer, ["1", "2"], group_size=1, max_completion_length=4)
    assert rollout.completions == ["22", ""]
    assert rollout.completion_ids.shape == (2, 3)
    assert rollout.metrics() == {"completions/mean_length": 2.0, "completions/clipped_ratio": 0.0}


def test_select_takes_rows_and_tokens_takes_slices(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    rollout = sample(llama, tokenizer)
    some = rollout.select(torch.tensor([7, 2]))
    assert some.token_lists() == [rollout.token_lists()[row] for row in (7, 2)]
    assert some.completions == [rollout.completions[row] for row in (7, 2)]
    assert torch.equal(some.sampling_logps, rollout.sampling_logps[[7, 2]])
    assert torch.equal(some.is_truncated, rollout.is_truncated[[7, 2]])
    for ours, whole in zip(rollout.tokens(slice(3, 5)), rollout.tokens(), strict=True):
        assert torch.equal(ours, whole[3:5])


# Wrong input


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("group_size", 0),
        ("max_completion_length", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
    ],
)
def test_bad_settings_are_refused_by_name(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str, value: float
) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got {value}"):
        sample(llama, tokenizer, **{name: value})


def test_no_prompts_and_empty_prompts_are_refused_by_name(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=r"^prompts: got 0"):
        sample(llama, tokenizer, [])
    with pytest.raises(ValueError, match=r"^prompts\[1\]"):
        sample(llama, tokenizer, ["1+2=", ""])
    with pytest.raises(ValueError, match=r"^prompts\[0\]"):
        sample(llama, tokenizer, [[], [5]])


@pytest.mark.filterwarnings("error")
def test_neighbouring_64_bit_seeds_draw_different_noise() -> None:
    """NumPy makes floats of large Python ints, which would lose the low bits of half of all step seeds."""
    for seed in (2**63, 2**64 - 2):
        assert not torch.equal(sampling_noise(seed, [0], 4), sampling_noise(seed + 1, [0], 4))


@pytest.mark.parametrize("indices", [[0], [0, 1, 2], [0, 1, 2, 3, 4, 5], [-1, 0, 1, 2]])
def test_completion_indices_are_checked(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, indices: list[int]
) -> None:
    with pytest.raises(ValueError, match="completion_indices"):
        generate_completions(
            llama,
            tokenizer,
            [[5], [6]],
            group_size=2,
            max_completion_length=3,
            completion_indices=indices,
        )


def test_a_negative_seed_is_refused(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="seed: got -1"):
        generate_completions(llama, tokenizer, [[5]], group_size=2, max_completion_length=3, seed=-1)
