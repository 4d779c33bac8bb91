"""Sampling: groups, noise, one token by hand, top-k, top-p, stop ids, wrong input. Agreement with others: fidelity/."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import grpo.rollout as rollout_module
from grpo.rollout import (
    Rollout,
    generate_completions,
    sample_tokens,
    sampling_noise,
    step_seed,
    stop_token_ids,
)
from tests.conftest import EOS_ID, PROMPTS, STOP_IDS, assert_same_samples, sample

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


# Noise


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


def test_looking_rarely_which_rows_have_finished_changes_nothing(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does: finished rows go on for up to 16 tokens, and nothing of that may be seen."""
    llama.generation_config.eos_token_id = STOP_IDS

    def sample() -> Rollout:
        return generate_completions(llama, tokenizer, [[5, 6], [7]], group_size=8, max_completion_length=40, seed=3)

    at_every_token = sample()
    monkeypatch.setitem(rollout_module.CHECK_EVERY, "cpu", 16)
    rarely = sample()
    assert not at_every_token.is_truncated.all()
    assert at_every_token.completion_mask.sum(1).unique().numel() > 3  # rows do finish at different times
    for name in ("completion_ids", "completion_mask", "is_truncated"):
        assert torch.equal(getattr(rarely, name), getattr(at_every_token, name)), name
    assert rarely.completions == at_every_token.completions
    torch.testing.assert_close(rarely.sampling_logps, at_every_token.sampling_logps, atol=1e-5, rtol=0)
