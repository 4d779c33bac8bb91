"""Sampling: the sampler agrees with the scorer and with a naive loop; noise, stop tokens, groups, top-k, top-p."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import grpo.rollout as rollout_module
from grpo.logprobs import compute_logprobs
from grpo.loss import clipped_surrogate, loss_weights
from grpo.rollout import (
    Rollout,
    generate_completions,
    sample_tokens,
    sampling_noise,
    step_seed,
    stop_token_ids,
)

PAD, EOS = 0, 1
INF = float("inf")
PROMPTS = [[5], [7, 12, 30, 9, 41, 6, 22], [15, 3, 28, 28]]  # ragged: 1, 7 and 4 tokens
STOPS = [EOS, 8, 17, 25, 33, 42]  # enough of them that completions end at different places
BROAD = {"group_size": 4, "max_completion_length": 10, "seed": 3}


def sample(
    model: Any, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Any] = PROMPTS, **settings: Any
) -> Rollout:
    return generate_completions(model, tokenizer, list(prompts), **(BROAD | settings))


def rows_of(rollout: Rollout) -> list[tuple[list[int], list[float], bool]]:
    """What was sampled, without padding."""
    lists = rollout.token_lists()
    logps = [row[: len(ids)].tolist() for row, ids in zip(rollout.sampling_logps, lists, strict=True)]
    return list(zip(lists, logps, rollout.is_truncated.tolist(), strict=True))


def assert_same_samples(ours: Rollout, expected: Rollout, rows: Sequence[int] | None = None) -> None:
    """The same tokens, and log-probs to 1e-5, in all rows of `ours` and these rows of `expected`."""
    mine, theirs = rows_of(ours), rows_of(expected)
    theirs = theirs if rows is None else [theirs[row] for row in rows]
    assert [row[0] for row in mine] == [row[0] for row in theirs]
    assert [row[2] for row in mine] == [row[2] for row in theirs]
    for (_, logps, _), (_, wanted, _) in zip(mine, theirs, strict=True):
        assert logps == pytest.approx(wanted, abs=1e-5)


@torch.no_grad()
def naive_loop(
    model: PreTrainedModel, prompts: Sequence[list[int]], stop_ids: Sequence[int], *, temperature: float, seed: int
) -> list[tuple[list[int], list[float], bool]]:
    """Every row alone, the whole sequence anew for every token: no padding, no cache, no batch, no row that leaves."""
    model.eval()
    group_size, max_length = BROAD["group_size"], BROAD["max_completion_length"]
    noise = sampling_noise(seed, range(len(prompts) * group_size), max_length)
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


# ---------------------------------------------------------------- against the scorer and the naive loop


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_logps_are_scorer_logps(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, temperature: float
) -> None:
    model.generation_config.eos_token_id = STOPS
    rollout = sample(model, tokenizer, temperature=temperature)
    mask = rollout.completion_mask
    assert len(set(mask.sum(1).tolist())) > 2  # ragged on both sides
    assert len(set(rollout.prompt_mask.sum(1).tolist())) == 3
    model.eval()
    with torch.no_grad():
        logps, _ = compute_logprobs(model, *rollout.tokens(), temperature=temperature)
        other_logps, _ = compute_logprobs(model, *rollout.tokens(), temperature=1.7 - temperature)
    torch.testing.assert_close(rollout.sampling_logps, logps, rtol=0, atol=1e-5)
    assert (rollout.sampling_logps - other_logps)[mask].abs().max() > 0.05  # a forgotten temperature would show


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_finished_rows_leaving_the_batch_changes_nothing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, temperature: float
) -> None:
    model.generation_config.eos_token_id = STOPS
    expected = naive_loop(model, PROMPTS, STOPS, temperature=temperature, seed=3)
    ours = rows_of(sample(model, tokenizer, temperature=temperature))
    assert [row[0] for row in ours] == [row[0] for row in expected]
    assert [row[2] for row in ours] == [row[2] for row in expected]
    for (_, logps, _), (_, wanted, _) in zip(ours, expected, strict=True):
        assert logps == pytest.approx(wanted, abs=1e-5)
    lengths = [len(row[0]) for row in expected]
    assert min(lengths) < 4 < max(lengths)  # rows did leave early
    assert len({tuple(row[0]) for row in expected}) > 6  # and differ, also within a group


def test_padded_prompts_sample_what_each_samples_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    together = sample(model, tokenizer)
    for p, prompt in enumerate(PROMPTS):
        rows = range(4 * p, 4 * p + 4)
        assert_same_samples(sample(model, tokenizer, [prompt], completion_indices=list(rows)), together, rows)


def test_prefilling_a_prompt_once_is_prefilling_g_copies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    copies = [prompt for prompt in PROMPTS for _ in range(4)]
    assert_same_samples(sample(model, tokenizer, copies, group_size=1), sample(model, tokenizer))


def test_top_k_makes_the_samplers_distribution_another_than_the_scorers(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    rollout = sample(llama, tokenizer, top_k=2)
    logps, _ = compute_logprobs(llama.eval(), *rollout.tokens())
    differences = (rollout.sampling_logps - logps)[rollout.completion_mask]
    assert (differences > -1e-5).all()  # renormalised over fewer tokens: likelier
    assert differences.max() > 0.1


# ---------------------------------------------------------------- groups


def test_row_p_times_g_plus_g_belongs_to_prompt_p(
    scripted: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    # Prompts with different answers; tiled groups would be 10 20 30 10 20 30.
    scripts = [[10, EOS], [20, EOS], [30, EOS]]
    rollout = generate_completions(scripted(scripts), tokenizer, PROMPTS, group_size=2, max_completion_length=2)
    assert rollout.token_lists() == [[10, EOS]] * 2 + [[20, EOS]] * 2 + [[30, EOS]] * 2
    prompts = [ids[kept].tolist() for ids, kept in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    assert prompts == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2 + [PROMPTS[2]] * 2


def test_the_same_prompt_twice_stays_two_groups(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    rollout = sample(llama, tokenizer, ["1+2=", "1+2="])
    assert rollout.prompt_ids.shape == (8, 4)
    assert len(rollout.completions) == 8
    assert rollout.completions[:4] != rollout.completions[4:]  # eight draws, not four shown twice
    assert_same_samples(sample(llama, tokenizer, ["1+2="]), rollout, range(4))
    assert_same_samples(sample(llama, tokenizer, ["1+2="], completion_indices=[4, 5, 6, 7]), rollout, range(4, 8))


# ---------------------------------------------------------------- noise


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
    llama.generation_config.eos_token_id = STOPS
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


def test_every_completion_of_a_group_draws_its_own_noise(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    rollout = sample(llama, tokenizer, [PROMPTS[0]], group_size=8)
    assert len({tuple(ids) for ids in rollout.token_lists()}) == 8


# ---------------------------------------------------------------- one token


def softmax_counts(logits: Tensor, num_draws: int, **settings: Any) -> Tensor:
    uniforms = sampling_noise(11, range(1), num_draws)[0]
    tokens, _ = sample_tokens(logits.expand(num_draws, -1), uniforms, **settings)
    return torch.bincount(tokens, minlength=logits.shape[-1]).double()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax_at_the_temperature(temperature: float) -> None:
    logits, num_draws = torch.tensor([0.3, -0.7, 1.2, 0.0, -1.5, 0.8]), 20_000
    counts = softmax_counts(logits, num_draws, temperature=temperature)

    def chi_square(at: float) -> float:
        expected = num_draws * (logits.double() / at).softmax(0)
        return ((counts - expected) ** 2 / expected).sum().item()

    # 5 degrees of freedom: 20.52 is the 99.9 % quantile
    assert chi_square(temperature) < 20.52
    assert all(chi_square(other) > 100 for other in (0.5, 1.0, 2.0) if other != temperature)


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


# ---------------------------------------------------------------- stop tokens, masks, texts


def run_script(
    scripted: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast,
    script: list[int],
    eos_token_id: int | list[int] | None = EOS,
) -> Rollout:
    model = scripted([script], eos_token_id)
    return generate_completions(model, tokenizer, ["1+2="], group_size=2, max_completion_length=len(script))


@pytest.mark.parametrize(
    ("script", "kept", "text", "is_truncated"),
    [
        ([5, 6, EOS, 7, 8], [5, 6, EOS], "23", False),
        ([EOS, 6, 7, 8, 9], [EOS], "", False),  # EOS first
        ([5, EOS, EOS, 6, EOS], [5, EOS], "2", False),  # two EOS: the first ends it
        ([5, 6, 7, 8, EOS], [5, 6, 7, 8, EOS], "2345", False),  # EOS in the last place: not truncated
        ([5, 6, 7, 8, 9], [5, 6, 7, 8, 9], "23456", True),  # no EOS
        ([5, PAD, PAD, EOS, 6], [5, PAD, PAD, EOS], "2", False),  # a pad that was sampled is a token
    ],
)
def test_the_mask_ends_with_the_first_stop_token(
    scripted: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast,
    script: list[int],
    kept: list[int],
    text: str,
    is_truncated: bool,
) -> None:
    rollout = run_script(scripted, tokenizer, script)
    assert rollout.token_lists() == [kept] * 2
    assert rollout.completion_mask.tolist() == [[True] * len(kept)] * 2  # no wider than the longest completion
    assert rollout.completions == [text] * 2
    assert rollout.is_truncated.tolist() == [is_truncated] * 2
    torch.testing.assert_close(rollout.sampling_logps, torch.zeros(2, len(kept)))  # the script is certain


def test_eos_is_in_the_mask_when_pad_equals_eos(
    scripted: Callable[..., Any], tokenizer_pad_is_eos: PreTrainedTokenizerFast
) -> None:
    assert tokenizer_pad_is_eos.pad_token_id == tokenizer_pad_is_eos.eos_token_id == EOS
    scripts = [[5, 6, EOS, 7], [EOS, 5, 6, 7], [5, 6, 7, 8], [5, 6, 7, EOS]]
    prompts = [[9], [9, 10], [9, 10, 11], [9, 10, 11, 12]]
    rollout = generate_completions(
        scripted(scripts), tokenizer_pad_is_eos, prompts, group_size=1, max_completion_length=4
    )
    mask = [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert rollout.completion_mask.int().tolist() == mask
    # A mask from the ids could not tell: 5 6 EOS PAD is 5 6 1 1, and `ids != pad` drops the EOS.
    assert rollout.completion_ids.tolist() == [[5, 6, 1, 1], [1, 1, 1, 1], [5, 6, 7, 8], [5, 6, 7, 1]]
    assert (rollout.completion_ids != EOS).int().tolist() != mask
    assert rollout.completions == ["23", "", "2345", "234"]
    assert rollout.is_truncated.tolist() == [False, False, True, False]
    assert rollout.prompt_mask.int().tolist() == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]


def test_eos_is_trained_when_pad_equals_eos(
    llama: PreTrainedModel, tokenizer_pad_is_eos: PreTrainedTokenizerFast
) -> None:
    hot = 5.0  # nearly uniform, so that EOS comes now and then
    rollout = sample(llama, tokenizer_pad_is_eos, group_size=16, temperature=hot)
    is_eos = (rollout.completion_ids == EOS) & rollout.completion_mask
    assert is_eos.sum() == (~rollout.is_truncated).sum() > 3
    logps, _ = compute_logprobs(llama, *rollout.tokens(), temperature=hot)
    logps.retain_grad()
    mask = rollout.completion_mask
    loss = clipped_surrogate(logps, logps.detach(), torch.ones(48, 1), mask, clip_range=0.2)
    (loss * loss_weights(mask, "token", max_completion_length=10)).sum().backward()
    assert logps.grad is not None
    assert (logps.grad[is_eos] != 0).all()
    assert torch.equal(logps.grad != 0, mask)


def test_separators_inside_a_prompt_stay_attended_when_they_equal_pad(
    llama: PreTrainedModel, tokenizer_pad_is_eos: PreTrainedTokenizerFast
) -> None:
    prompts = [[9, EOS, 12, EOS], [EOS, 7]]
    rollout = sample(llama, tokenizer_pad_is_eos, prompts)
    assert rollout.prompt_mask[::4].int().tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    expected = naive_loop(llama, prompts, [EOS], temperature=1.0, seed=3)
    assert rollout.token_lists() == [row[0] for row in expected]


def test_several_stop_ids_are_one_set_for_sampling_masks_and_text(
    scripted: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    # 20 is the second stop id; it is no special token, so decoding alone would print it
    stopped = run_script(scripted, tokenizer, [5, 20, 6, EOS, 7], eos_token_id=[EOS, 20])
    assert stopped.token_lists() == [[5, 20]] * 2
    assert stopped.completions == ["2", "2"]
    assert stopped.is_truncated.tolist() == [False, False]
    # Without it the same tokens go on to EOS.
    assert run_script(scripted, tokenizer, [5, 20, 6, EOS, 7]).token_lists() == [[5, 20, 6, EOS]] * 2
    # The tokenizer's eos counts also where the model's generation_config names others, or nothing.
    for configured in ([20], 20, None):
        rollout = run_script(scripted, tokenizer, [5, EOS, 6, 20], eos_token_id=configured)
        assert rollout.token_lists() == [[5, EOS]] * 2


def test_stop_ids_are_those_of_tokenizer_and_generation_config(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    for configured, expected in [([5, 6], {EOS, 5, 6}), (7, {EOS, 7}), (None, {EOS}), (EOS, {EOS})]:
        llama.generation_config.eos_token_id = configured
        assert stop_token_ids(llama, tokenizer) == expected
    llama.generation_config = None
    assert stop_token_ids(llama, tokenizer) == {EOS}


def test_token_in_token_out(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["1+2=", "abc", "9"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert ids[0] == [4, 13, 5, 17]  # no BOS, nothing added
    from_texts, from_ids = sample(llama, tokenizer, texts), sample(llama, tokenizer, ids)
    assert torch.equal(from_texts.prompt_ids, from_ids.prompt_ids)
    assert torch.equal(from_texts.completion_ids, from_ids.completion_ids)


def test_padding_is_exactly_zero_logp_and_pad(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    llama.generation_config.eos_token_id = STOPS
    rollout = sample(llama, tokenizer)
    padding = ~rollout.completion_mask
    assert padding.any()
    assert (rollout.sampling_logps[padding] == 0).all()
    assert (rollout.completion_ids[padding] == PAD).all()
    assert (rollout.sampling_logps[~padding] < 0).all()
    assert rollout.completion_mask.dtype == rollout.prompt_mask.dtype == rollout.is_truncated.dtype == torch.bool


def test_select_takes_rows_and_tokens_takes_slices(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    rollout = sample(llama, tokenizer)
    some = rollout.select(torch.tensor([7, 2]))
    assert some.token_lists() == [rollout.token_lists()[row] for row in (7, 2)]
    assert some.completions == [rollout.completions[row] for row in (7, 2)]
    assert torch.equal(some.sampling_logps, rollout.sampling_logps[[7, 2]])
    assert torch.equal(some.is_truncated, rollout.is_truncated[[7, 2]])
    for ours, whole in zip(rollout.tokens(slice(3, 5)), rollout.tokens(), strict=True):
        assert torch.equal(ours, whole[3:5])


# ---------------------------------------------------------------- what must not interfere


def test_generation_config_with_top_k_1_is_ignored(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    expected = sample(llama, tokenizer)
    for name, value in {
        "top_k": 1,
        "top_p": 0.1,
        "temperature": 0.01,
        "repetition_penalty": 5.0,
        "do_sample": False,
        "max_new_tokens": 1,
    }.items():
        setattr(llama.generation_config, name, value)
    assert_same_samples(sample(llama, tokenizer), expected)
    assert len(set(expected.completions)) > 6  # and they are samples, not one greedy answer a prompt


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_dropout_and_gradient_checkpointing_do_not_reach_the_sampler(
    architecture: str, make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = sample(make_model(architecture).eval(), tokenizer)
    model = make_model(architecture, dropout=0.5).train()
    model.gradient_checkpointing_enable()
    assert_same_samples(sample(model, tokenizer), expected)
    assert all(weight.grad is None for weight in model.parameters())


def test_the_models_mode_is_restored_also_after_an_exception(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    forward = llama.forward

    def watched(*arguments: Any, **settings: Any) -> Any:
        seen.append(llama.training)
        return forward(*arguments, **settings)

    monkeypatch.setattr(llama, "forward", watched)
    for is_training in (True, False):
        llama.train(is_training)
        sample(llama, tokenizer)
        assert llama.training is is_training
        assert llama.model.layers[0].training is is_training
    assert seen
    assert not any(seen)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(llama, "forward", broken)
    for is_training in (True, False):
        llama.train(is_training)
        with pytest.raises(RuntimeError, match="out of memory"):
            sample(llama, tokenizer)
        assert llama.training is is_training


def test_inputs_are_unchanged_and_nothing_is_attached_to_a_graph(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = [list(ids) for ids in PROMPTS]
    before = [weight.clone() for weight in llama.parameters()]
    rollout = sample(llama, tokenizer, prompts)
    assert prompts == PROMPTS
    assert all(torch.equal(now, then) for now, then in zip(llama.parameters(), before, strict=True))
    assert not rollout.sampling_logps.requires_grad
    logits, uniforms = torch.randn(4, 6), torch.rand(4)
    copies = logits.clone(), uniforms.clone()
    for settings in ({"temperature": 0.5}, {"temperature": 1.0, "top_k": 2}, {"temperature": 1.0, "top_p": 0.5}):
        sample_tokens(logits, uniforms, **settings)
    assert torch.equal(logits, copies[0])
    assert torch.equal(uniforms, copies[1])


# ---------------------------------------------------------------- wrong input


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
    llama.generation_config.eos_token_id = STOPS

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
