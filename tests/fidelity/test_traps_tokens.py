"""Tokens, masks, positions: where GRPO code goes wrong without an error. Each test is named after its trap.

Traps that every architecture must pass are in test_models.py, the dtypes in test_bfloat16.py.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import grpo.batch
from grpo.logprobs import compute_logprobs
from grpo.loss import clipped_surrogate, kl_divergence, loss_weights
from grpo.rollout import Rollout, generate_completions, sample_tokens
from tests.conftest import (
    EOS_ID,
    PAD_ID,
    PROMPTS,
    STOP_IDS,
    assert_same_samples,
    make_tiny_model,
    naive_loop,
    patch_loop,
    ragged_batch,
    rows_of,
    sample,
)

NAN, INF = float("nan"), float("inf")


def weight_gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    """Of this loss alone."""
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


# Pad == eos, masks from ids


def run_script(
    scripted: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast,
    script: list[int],
    eos_token_id: int | list[int] | None = EOS_ID,
) -> Rollout:
    model = scripted([script], eos_token_id)
    return generate_completions(model, tokenizer, ["1+2="], group_size=2, max_completion_length=len(script))


@pytest.mark.parametrize(
    ("script", "kept", "text", "is_truncated"),
    [
        ([5, 6, EOS_ID, 7, 8], [5, 6, EOS_ID], "23", False),
        ([EOS_ID, 6, 7, 8, 9], [EOS_ID], "", False),  # EOS first
        ([5, EOS_ID, EOS_ID, 6, EOS_ID], [5, EOS_ID], "2", False),  # two EOS: the first ends it
        ([5, 6, 7, 8, EOS_ID], [5, 6, 7, 8, EOS_ID], "2345", False),  # EOS in the last place: not truncated
        ([5, 6, 7, 8, 9], [5, 6, 7, 8, 9], "23456", True),  # no EOS
        ([5, PAD_ID, PAD_ID, EOS_ID, 6], [5, PAD_ID, PAD_ID, EOS_ID], "2", False),  # a pad that was sampled is a token
    ],
)
def test_eos_left_out_of_the_mask_or_what_follows_it_kept(
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


def test_mask_built_from_ids_cannot_tell_eos_from_pad_when_pad_is_eos(
    scripted: Callable[..., Any], tokenizer_pad_is_eos: PreTrainedTokenizerFast
) -> None:
    assert tokenizer_pad_is_eos.pad_token_id == tokenizer_pad_is_eos.eos_token_id == EOS_ID
    scripts = [[5, 6, EOS_ID, 7], [EOS_ID, 5, 6, 7], [5, 6, 7, 8], [5, 6, 7, EOS_ID]]
    prompts = [[9], [9, 10], [9, 10, 11], [9, 10, 11, 12]]
    rollout = generate_completions(
        scripted(scripts), tokenizer_pad_is_eos, prompts, group_size=1, max_completion_length=4
    )
    mask = [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert rollout.completion_mask.int().tolist() == mask
    # 5 6 EOS PAD is 5 6 1 1: `ids != pad` drops the EOS.
    assert rollout.completion_ids.tolist() == [[5, 6, 1, 1], [1, 1, 1, 1], [5, 6, 7, 8], [5, 6, 7, 1]]
    assert (rollout.completion_ids != EOS_ID).int().tolist() != mask
    assert rollout.completions == ["23", "", "2345", "234"]
    assert rollout.is_truncated.tolist() == [False, False, True, False]
    assert rollout.prompt_mask.int().tolist() == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]


def test_mask_built_from_ids_never_trains_eos_when_pad_is_eos(
    llama: PreTrainedModel, tokenizer_pad_is_eos: PreTrainedTokenizerFast
) -> None:
    hot = 5.0  # nearly uniform, so that EOS comes now and then
    rollout = sample(llama, tokenizer_pad_is_eos, group_size=16, temperature=hot)
    is_eos = (rollout.completion_ids == EOS_ID) & rollout.completion_mask
    assert is_eos.sum() == (~rollout.is_truncated).sum() > 3

    def gradient(mask: Tensor) -> Tensor:
        """With respect to the log-probs."""
        logps, _ = compute_logprobs(llama, *rollout.tokens(), temperature=hot)
        loss = clipped_surrogate(logps, logps.detach(), torch.ones(48, 1), mask, clip_range=0.2)
        weighted = (loss * loss_weights(mask, "token", max_completion_length=10)).sum()
        return torch.autograd.grad(weighted, logps)[0]

    ours = gradient(rollout.completion_mask)
    assert (ours[is_eos] != 0).all()
    assert torch.equal(ours != 0, rollout.completion_mask)
    assert (gradient(rollout.completion_ids != EOS_ID)[is_eos] == 0).all()


def test_attention_mask_built_from_ids_blanks_separators_inside_chat_prompts(
    llama: PreTrainedModel, tokenizer_pad_is_eos: PreTrainedTokenizerFast
) -> None:
    prompts = [[9, EOS_ID, 12, EOS_ID], [EOS_ID, 7]]
    rollout = sample(llama, tokenizer_pad_is_eos, prompts)
    assert rollout.prompt_mask[::4].int().tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert rollout.token_lists() == [row[0] for row in naive_loop(llama, prompts, [EOS_ID])]
    prompt_ids, _, completion_ids, mask = rollout.tokens()
    blanked, _ = compute_logprobs(llama, prompt_ids, prompt_ids != EOS_ID, completion_ids, mask)
    assert (blanked - rollout.sampling_logps)[mask].abs().max() > 0.1


def test_mask_dropped_so_that_padding_is_trained(llama: PreTrainedModel) -> None:
    """Nothing that stands after a completion may reach the loss, its gradient or the scores of real tokens."""
    prompt_ids, prompt_mask, completion_ids, mask = ragged_batch()

    def loss_and_gradients(filler: int, used: Tensor) -> tuple[float, dict[str, Tensor]]:
        filled = torch.where(mask, completion_ids, filler)
        logps, entropies = compute_logprobs(llama, prompt_ids, prompt_mask, filled, used)
        assert ((logps == 0) == ~used).all()
        assert ((entropies == 0) == ~used).all()
        # Old and reference log-probs of 1: were padding kept, its ratio and KL would not be 0.
        old, ref = torch.where(used, logps.detach(), 1.0), torch.where(used, logps.detach() - 1, 1.0)
        loss = clipped_surrogate(logps, old, torch.ones(4, 1), used, clip_range=0.2)
        loss = loss + kl_divergence(logps, ref, estimator="k3", old_logps=old, completion_mask=used)
        weights = loss_weights(used, "token", max_completion_length=6)
        assert ((loss == 0) == ~used).all()
        assert ((weights == 0) == ~used).all()
        total = (loss * weights).sum()
        return total.item(), weight_gradients(llama, total)

    expected, gradients = loss_and_gradients(0, mask)
    for filler in (1, 45):
        loss, others = loss_and_gradients(filler, mask)
        assert loss == pytest.approx(expected, abs=1e-5)
        for name, gradient in others.items():
            torch.testing.assert_close(gradient, gradients[name], rtol=0, atol=1e-5)
    # Without a mask what stands there is trained.
    first, second = (loss_and_gradients(filler, torch.ones_like(mask))[1] for filler in (0, 45))
    assert max((first[name] - second[name]).abs().max() for name in first) > 0.1


# Several stop ids


def test_several_stop_ids_stopped_on_one_and_masked_by_another(
    scripted: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    # 20 is the second stop id; it is no special token, so decoding alone would print it
    stopped = run_script(scripted, tokenizer, [5, 20, 6, EOS_ID, 7], eos_token_id=[EOS_ID, 20])
    assert stopped.token_lists() == [[5, 20]] * 2
    assert stopped.completions == ["2", "2"]
    assert stopped.is_truncated.tolist() == [False, False]
    # Without it the same tokens go on to EOS.
    assert run_script(scripted, tokenizer, [5, 20, 6, EOS_ID, 7]).token_lists() == [[5, 20, 6, EOS_ID]] * 2
    # The tokenizer's eos counts also where the model's generation_config names others, or nothing.
    for configured in ([20], 20, None):
        rollout = run_script(scripted, tokenizer, [5, EOS_ID, 6, 20], eos_token_id=configured)
        assert rollout.token_lists() == [[5, EOS_ID]] * 2


# Positions and the shift


def test_position_ids_missing_under_left_padding_move_a_model_with_learned_positions(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = make_tiny_model("gpt2").eval()
    batch = ragged_batch()
    is_padded = batch[1].sum(1) < 6
    with torch.no_grad():
        right, _ = compute_logprobs(model, *batch)
        wrong, _ = compute_logprobs(lambda position_ids=None, **rest: model(**rest), *batch)
        for row in is_padded.nonzero().flatten().tolist():
            kept = batch[1][row]
            alone, _ = compute_logprobs(
                model, batch[0][[row]][:, kept], kept[kept].unsqueeze(0), *(x[[row]] for x in batch[2:])
            )
            torch.testing.assert_close(right[[row]], alone, rtol=0, atol=1e-5)
            assert (wrong[[row]] - alone).abs().max() > 0.1
    torch.testing.assert_close(right[~is_padded], wrong[~is_padded], rtol=0, atol=1e-5)
    # The sampler too: padded prompts sample what an unpadded row samples.
    ours = rows_of(sample(model, tokenizer))
    assert [row[0] for row in ours] == [row[0] for row in naive_loop(model, PROMPTS, [EOS_ID])]


def test_shift_off_by_one_scores_the_token_before_or_after(llama: PreTrainedModel) -> None:
    prompt, completion = [7, 12, 30], [9, 41, 6, 22]
    arguments = [torch.tensor([row]) for row in (prompt, [1] * 3, completion, [1] * 4)]
    with torch.no_grad():
        ours = compute_logprobs(llama, *arguments)[0][0].tolist()
        # Token t alone is known to the model that has read everything before it, and nothing else.
        expected = [
            llama(torch.tensor([prompt + completion[:t]])).logits[0, -1].log_softmax(-1)[token].item()
            for t, token in enumerate(completion)
        ]
        all_logps = llama(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    assert ours == pytest.approx(expected, rel=0, abs=1e-5)
    for shift in (-1, 1):
        wrong = [all_logps[2 + t + shift, token].item() for t, token in enumerate(completion)]
        assert max(abs(a - b) for a, b in zip(wrong, expected, strict=True)) > 0.1


# Token in, token out


def test_double_bos_of_a_chat_template_that_is_rendered_and_then_tokenized_again(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    bos = tokenizer.convert_tokens_to_ids("b")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="b $A", special_tokens=[("b", bos)]
    )
    rendered = [bos, 4, 13, 5, 17]  # what apply_chat_template gives: its own BOS, then 1+2=
    assert tokenizer(tokenizer.decode(rendered))["input_ids"] == [bos, *rendered]
    rollout = sample(llama, tokenizer, [rendered], group_size=1)
    assert rollout.prompt_ids.tolist() == [rendered]
    assert sample(llama, tokenizer, ["1+2="], group_size=1).prompt_ids.tolist() == [rendered]  # a text gets it once


def test_prompts_as_texts_and_as_ids_are_the_same_tokens(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = ["1+2=", "abc", "9"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert ids[0] == [4, 13, 5, 17]  # no BOS, nothing added
    from_texts, from_ids = sample(llama, tokenizer, texts), sample(llama, tokenizer, ids)
    assert torch.equal(from_texts.prompt_ids, from_ids.prompt_ids)
    assert torch.equal(from_texts.completion_ids, from_ids.completion_ids)


def test_retokenizing_decoded_text_gives_other_ids_than_were_sampled(scripted: Callable[..., Any]) -> None:
    backend = Tokenizer(models.BPE({"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, "ab": 4}, [("a", "b")]))
    backend.decoder = decoders.Fuse()
    merging = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    rollout = generate_completions(scripted([[2, 3, 4, EOS_ID]]), merging, [[2]], group_size=1, max_completion_length=4)
    assert rollout.token_lists() == [[2, 3, 4, EOS_ID]]
    assert rollout.completions == ["abab"]
    assert merging(rollout.completions)["input_ids"] == [[4, 4]]  # two tokens that the policy never sampled


def test_the_update_scores_the_very_ids_that_were_sampled(
    train_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts included: scoring another prompt than the sampled one is the same trap."""
    rollouts, scored, pieces = list[Rollout](), list[tuple[Tensor, ...]](), list[Tensor]()
    micro_batches = grpo.batch.micro_batches

    def watched_sampler(*arguments: Any, **settings: Any) -> Rollout:
        rollouts.append(generate_completions(*arguments, **settings))
        return rollouts[-1]

    def watched_scorer(model: PreTrainedModel, *tokens: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        scored.append(tokens)
        return compute_logprobs(model, *tokens, **settings)

    def watched_cut(*arguments: Any, **settings: Any) -> list[Tensor]:
        pieces.extend(micro_batches(*arguments, **settings))
        return pieces

    patch_loop(monkeypatch, "generate_completions", watched_sampler)
    patch_loop(monkeypatch, "compute_logprobs", watched_scorer)
    monkeypatch.setattr(grpo.batch, "micro_batches", watched_cut)
    train_tiny("llama", micro_batch_size=6)
    rollout = rollouts[-1]  # the first one is the pre-flight's
    assert rollout.completion_ids.shape[0] == 16
    assert len(scored) == 2 * len(pieces)  # reference and policy
    assert len(pieces) > 2
    assert max(len(rows) for rows in pieces) <= 6
    assert sorted(torch.cat(pieces).tolist()) == list(range(16))  # each once
    for call, rows in zip(scored, pieces * 2, strict=True):
        assert all(torch.equal(ours, sampled[rows]) for ours, sampled in zip(call, rollout.tokens(), strict=True))


def test_in_place_writes_of_the_scorer_would_change_its_inputs(model: PreTrainedModel) -> None:
    batch = ragged_batch()
    before = [tensor.clone() for tensor in batch]
    for is_training in (True, False):
        model.train(is_training)
        compute_logprobs(model, *batch)
        assert model.training is is_training
    assert all(torch.equal(now, then) for now, then in zip(batch, before, strict=True))


def test_in_place_writes_of_the_sampler_would_change_its_inputs(
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


# NaN and inf in padding


@pytest.mark.parametrize("poison", [NAN, INF, -INF, 1e4])
def test_nan_or_inf_times_0_leaks_from_padded_positions_into_the_weights(llama: PreTrainedModel, poison: float) -> None:
    """1e4 overflows in the exp of the ratio. test_loss.py has the same for each function alone."""
    batch = ragged_batch()
    mask = batch[3]
    weights = loss_weights(mask, "token", max_completion_length=6)

    def gradients(filler: float, *, masked_after: bool = False) -> dict[str, Tensor]:
        # Scored as by a scorer without a mask: the loss alone stands between padding and weights.
        logps, _ = compute_logprobs(llama, *batch[:3], torch.ones_like(mask))
        old, ref = (torch.where(mask, logps.detach() - drift, -filler) for drift in (0.1, -0.1))
        if masked_after:
            return weight_gradients(llama, (torch.where(mask, -(logps - old).exp(), 0.0) * weights).sum())
        loss = clipped_surrogate(logps, old, torch.ones(4, 1), mask, clip_range=0.2)
        loss = loss + kl_divergence(logps, ref, estimator="k3_corrected", old_logps=old, completion_mask=mask)
        return weight_gradients(llama, (loss * weights).sum())

    clean = gradients(0.0)
    assert max(gradient.abs().max() for gradient in clean.values()) > 1e-3
    for name, gradient in gradients(poison).items():
        assert torch.equal(gradient, clean[name]), name
    if poison != -INF:  # whose exp is 0
        assert any(gradient.isnan().any() for gradient in gradients(poison, masked_after=True).values())


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_nan_or_inf_logits_after_a_completion_leave_its_scores_alone(poison: float) -> None:
    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    tokens = torch.tensor([[1, 2, 3, 3], [2, 3, 3, 3]])
    results = []
    for filler in (0.0, poison):
        filled = table.clone()
        filled[3] = filler  # what the model says after token 3, which stands in padding alone
        filled.requires_grad_()
        one = torch.ones(2, 1, dtype=torch.long)
        logps, entropies = compute_logprobs(
            lambda input_ids, logits=filled, **_: SimpleNamespace(logits=logits[input_ids]), one, one, tokens, mask
        )
        (gradient,) = torch.autograd.grad(logps.sum(), filled)
        results.append((logps.detach(), entropies, gradient[:3]))
    for ours, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(ours, expected)
    assert results[0][2].abs().max() > 0.1


def test_what_stands_in_the_padding_reaches_no_score(model: PreTrainedModel) -> None:
    model.eval()
    prompt_ids, prompt_mask, completion_ids, completion_mask = ragged_batch()
    expected, _ = compute_logprobs(model, prompt_ids, prompt_mask, completion_ids, completion_mask)
    for filler in (0, 1, 45):
        filled = torch.where(prompt_mask, prompt_ids, filler), torch.where(completion_mask, completion_ids, filler)
        logps, _ = compute_logprobs(model, filled[0], prompt_mask, filled[1], completion_mask)
        torch.testing.assert_close(logps, expected, rtol=0, atol=1e-6)
    # A token that is one does matter.
    changed = prompt_ids.clone()
    changed[:, -1] = 45
    assert (
        compute_logprobs(model, changed, prompt_mask, completion_ids, completion_mask)[0] - expected
    ).abs().max() > 0.1


def test_nan_gradients_from_rows_of_left_padding_or_without_any_token(model: PreTrainedModel) -> None:
    prompt_ids, prompt_mask, completion_ids, completion_mask = ragged_batch()
    completion_mask[3] = False
    logps, _ = compute_logprobs(model, prompt_ids, prompt_mask, completion_ids, completion_mask)
    weights = loss_weights(completion_mask, "sequence", max_completion_length=6)
    loss = clipped_surrogate(logps, logps.detach(), torch.ones(4, 1), completion_mask, clip_range=0.2)
    gradients = weight_gradients(model, (loss * weights).sum()).values()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert max(gradient.abs().max() for gradient in gradients) > 1e-3


def test_padding_of_the_rollout_is_exactly_zero_logp_and_pad(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    llama.generation_config.eos_token_id = STOP_IDS
    rollout = sample(llama, tokenizer)
    padding = ~rollout.completion_mask
    assert padding.any()
    assert (rollout.sampling_logps[padding] == 0).all()
    assert (rollout.completion_ids[padding] == PAD_ID).all()
    assert (rollout.sampling_logps[~padding] < 0).all()
    assert rollout.completion_mask.dtype == rollout.prompt_mask.dtype == rollout.is_truncated.dtype == torch.bool


# What must not reach the sampler


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_in_train_mode_would_switch_the_cache_off(
    architecture: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = sample(make_tiny_model(architecture).eval(), tokenizer)
    model = make_tiny_model(architecture, dropout=0.5).train()
    model.gradient_checkpointing_enable()
    widths = list[int]()
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, output: widths.append(inputs[0].shape[1])
    )
    rollout = sample(model, tokenizer)
    handle.remove()
    assert widths == [7] + [1] * 9  # the prompts once, then token after token
    assert_same_samples(rollout, expected)  # and the dropout did not reach it
    assert model.training
    assert all(weight.grad is None for weight in model.parameters())


def test_eval_mode_left_behind_by_the_sampler_would_switch_checkpointing_off(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mode is restored, also after an exception."""
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


def test_generation_config_with_top_k_1_is_silently_inherited_by_generate_and_not_by_our_sampler(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    expected = sample(llama, tokenizer)
    published = {"top_k": 1, "top_p": 0.1, "temperature": 0.01, "repetition_penalty": 5.0, "max_new_tokens": 1}
    for name, value in published.items():
        setattr(llama.generation_config, name, value)
    assert_same_samples(sample(llama, tokenizer), expected)
    assert len(set(expected.completions)) > 6  # and they are samples, not one greedy answer a prompt
    # transformers' own: one token, always the likeliest.
    prompt = torch.tensor([PROMPTS[1]] * 8)
    inherited = llama.eval().generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, pad_token_id=PAD_ID
    )
    assert inherited.shape == (8, 8)
    assert len(set(inherited[:, -1].tolist())) == 1


# Another distribution than the scorer's


def test_top_k_makes_the_samplers_distribution_differ_from_the_scorers(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    rollout = sample(llama, tokenizer, top_k=2)
    logps, _ = compute_logprobs(llama.eval(), *rollout.tokens())
    differences = (rollout.sampling_logps - logps)[rollout.completion_mask]
    assert (differences > -1e-5).all()  # renormalised over fewer tokens: likelier
    assert differences.max() > 0.1


@pytest.mark.slow
def test_top_k_shows_in_the_logged_difference_of_sampler_and_scorer(train_tiny: Callable[..., Any]) -> None:
    full, _ = train_tiny("llama")
    assert full["sampling/logp_difference/mean"] <= full["sampling/logp_difference/max"] < 1e-5
    for narrowed in ({"top_k": 2}, {"top_p": 0.8}):
        row, _ = train_tiny("llama", **narrowed)
        assert row["sampling/logp_difference/max"] > row["sampling/logp_difference/mean"] > 0.05


def test_temperature_missing_when_scoring_shows_in_the_logged_difference(
    train_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_tiny("llama", temperature=0.7)[0]["sampling/logp_difference/max"] < 1e-5

    def at_temperature_1(*tokens: Any, temperature: float, **settings: Any) -> tuple[Tensor, Tensor]:
        return compute_logprobs(*tokens, **settings)

    patch_loop(monkeypatch, "compute_logprobs", at_temperature_1)
    assert train_tiny("llama", temperature=0.7)[0]["sampling/logp_difference/mean"] > 0.05


# Noise


def test_same_noise_for_every_completion_of_a_group(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    rollout = sample(llama, tokenizer, [PROMPTS[0]], group_size=8)
    assert len({tuple(ids) for ids in rollout.token_lists()}) == 8
    # With one index for all of them a group is one completion, eight times: no advantage, nothing to learn.
    shared = sample(llama, tokenizer, [PROMPTS[0]], group_size=8, completion_indices=[0] * 8)
    assert len({tuple(ids) for ids in shared.token_lists()}) == 1
