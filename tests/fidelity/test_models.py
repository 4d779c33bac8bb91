"""Four architectures with dropout in their configs, saved and loaded as a run does it: sampler, scorer, padding, cache,
prefill, dropout, tied embeddings, bfloat16 files."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from grpo.logprobs import compute_logprobs
from grpo.models.loading import load_policy
from grpo.models.saving import save_model
from tests.conftest import (
    ARCHITECTURES,
    PROMPTS,
    STOP_IDS,
    assert_same_rows,
    assert_same_samples,
    make_tiny_model,
    make_tokenizer,
    naive_loop,
    ragged_batch,
    rows_of,
    sample,
)

CPU = torch.device("cpu")


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.generation_config.eos_token_id = STOP_IDS
    save_model(model, make_tokenizer(), folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    return load_policy(str(folder), base_seed=0, device=CPU)[0].train()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model whose config asks for dropout."""
    return save(make_tiny_model(request.param, dropout=0.1), tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def policy(folder: Path) -> PreTrainedModel:
    """The same as a run loads it, in train mode; not to be changed."""
    return load(folder)


def largest(difference: Tensor) -> float:
    return difference.abs().max().item()


# The sampler


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_is_scorer_so_no_temperature_is_missing_when_scoring(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, temperature: float
) -> None:
    rollout = sample(policy, tokenizer, temperature=temperature)
    mask = rollout.completion_mask
    assert len(set(mask.sum(1).tolist())) > 2  # ragged on both sides
    assert len(set(rollout.prompt_mask.sum(1).tolist())) == 3
    with torch.no_grad():
        logps, _ = compute_logprobs(policy, *rollout.tokens(), temperature=temperature)
        other_logps, _ = compute_logprobs(policy, *rollout.tokens(), temperature=1.7 - temperature)
    torch.testing.assert_close(rollout.sampling_logps, logps, rtol=0, atol=1e-5)
    assert largest((rollout.sampling_logps - other_logps)[mask]) > 0.05  # a forgotten temperature would show


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_cached_sampling_is_recomputing_the_whole_prefix_at_every_token(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, temperature: float
) -> None:
    expected = naive_loop(policy, PROMPTS, STOP_IDS, temperature=temperature)
    assert_same_rows(rows_of(sample(policy, tokenizer, temperature=temperature)), expected)
    lengths = [len(row[0]) for row in expected]
    assert min(lengths) < 4 < max(lengths)  # rows left the batch early
    assert len({tuple(row[0]) for row in expected}) > 6  # and differ, also within a group


def test_padded_prompts_sample_what_each_samples_alone(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    together = sample(policy, tokenizer)
    for p, prompt in enumerate(PROMPTS):
        rows = range(4 * p, 4 * p + 4)
        assert_same_samples(sample(policy, tokenizer, [prompt], completion_indices=list(rows)), together, rows)


def test_prefilling_a_prompt_once_is_prefilling_g_copies(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    copies = [prompt for prompt in PROMPTS for _ in range(4)]
    assert_same_samples(sample(policy, tokenizer, copies, group_size=1), sample(policy, tokenizer))


# The scorer


def test_scoring_a_padded_batch_is_scoring_each_row_alone(policy: PreTrainedModel) -> None:
    batch = prompt_ids, prompt_mask, completion_ids, completion_mask = ragged_batch()
    logps, entropies = compute_logprobs(policy, *batch, temperature=0.7)
    for row in range(4):
        prompt = prompt_ids[row][prompt_mask[row]].unsqueeze(0)
        completion = completion_ids[row][completion_mask[row]].unsqueeze(0)
        # Alone, without padding and without our function: plain forward, plain arange positions.
        logits = policy(torch.cat([prompt, completion], 1)).logits[0] / 0.7
        all_logps = logits.log_softmax(-1)[prompt.shape[1] - 1 : -1]
        expected = all_logps.gather(1, completion.T).squeeze(1)
        length = completion.shape[1]
        torch.testing.assert_close(logps[row, :length], expected, rtol=0, atol=1e-5)
        expected_entropies = torch.distributions.Categorical(logits=all_logps).entropy()
        torch.testing.assert_close(entropies[row, :length], expected_entropies, rtol=0, atol=1e-5)
        assert (logps[row, length:] == 0).all()
        assert (entropies[row, length:] == 0).all()


def test_more_padding_on_either_side_changes_no_score(policy: PreTrainedModel) -> None:
    batch = ragged_batch()
    wider = [torch.nn.functional.pad(x, (4, 0)) for x in batch[:2]]
    wider += [torch.nn.functional.pad(x, (0, 3)) for x in batch[2:]]
    for result, expected in zip(compute_logprobs(policy, *wider), compute_logprobs(policy, *batch), strict=True):
        torch.testing.assert_close(result[:, :6], expected, rtol=0, atol=1e-5)
        assert (result[:, 6:] == 0).all()


# Dropout


def test_dropout_left_on_while_scoring_would_move_the_ratio_from_1(folder: Path, policy: PreTrainedModel) -> None:
    batch = ragged_batch()
    mask = batch[3]
    with torch.no_grad():
        old_logps, _ = compute_logprobs(policy, *batch)
    logps, _ = compute_logprobs(policy, *batch)
    assert policy.training
    assert torch.equal((logps - old_logps).exp()[mask], torch.ones(int(mask.sum())))
    # The file's config still asks for dropout; in a Llama it is a plain float of the attention, no module.
    as_stored = AutoModelForCausalLM.from_pretrained(folder).train()
    first, second = (compute_logprobs(as_stored, *batch)[0] for _ in range(2))
    assert largest(((first - second).exp() - 1)[mask]) > 0.01


def test_dropout_stays_off_after_the_policy_is_saved_and_loaded(policy: PreTrainedModel, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    batch = ragged_batch()
    assert torch.equal(compute_logprobs(loaded, *batch)[0], compute_logprobs(policy, *batch)[0])


# Files


@pytest.mark.parametrize("is_tied", [True, False])
def test_embeddings_are_saved_and_loaded_tied_or_untied_as_they_were(
    architecture: str, tmp_path: Path, is_tied: bool
) -> None:
    config = make_tiny_model(architecture).config
    config.tie_word_embeddings = is_tied
    model = AutoModelForCausalLM.from_config(config).eval()
    loaded = load(save(model, tmp_path / "model"))
    prompt = torch.tensor([PROMPTS[1]])
    assert torch.equal(loaded(prompt).logits, model(prompt).logits)
    assert loaded.num_parameters() == model.num_parameters()
    embedding, head = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
    assert (embedding is head) == is_tied
    assert len(list(loaded.parameters())) == len(list(model.parameters()))  # what the optimizer will hold
    with torch.no_grad():
        embedding += 1.0
    assert torch.equal(embedding, head) == is_tied


def test_a_bf16_checkpoint_is_loaded_in_the_files_dtype_unless_float32_is_asked_for(
    architecture: str, tmp_path: Path
) -> None:
    model = make_tiny_model(architecture).eval()
    save(copy.deepcopy(model).to(torch.bfloat16), tmp_path / "model")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.bfloat16  # what happens unless told
    loaded = load(tmp_path / "model")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    for (name, weight), expected in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(weight, expected), name
    # The weights alone are rounded: rotary frequencies are computed anew in float32.
    prompt = torch.tensor([PROMPTS[1]])
    assert torch.equal(loaded(prompt).logits, model(prompt).logits)
