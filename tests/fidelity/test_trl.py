"""Hugging Face TRL as an oracle: its own scoring, advantages and loss against ours, on the same model and tokens.

TRL's trainer gets our completions in place of its generation and then does all of its own work: it tokenises, pads,
masks, scores policy and reference, turns rewards into advantages, and computes the loss. Two things are replaced, both
to leave float32: its scoring kernel, which casts to float32, and the float32 table of rewards. What is left must agree
to 1e-10. The kernel itself is compared apart, in float32. Where TRL differs on purpose, a test says so and why.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from grpo.advantages import group_advantages
from grpo.logprobs import compute_logprobs
from grpo.loss import clipped_surrogate, clipped_tokens, kl_divergence, loss_weights
from grpo.rollout import generate_completions
from grpo.run.metrics import TokenMeans
from tests.conftest import EOS_ID, ScriptedModel, make_tiny_model, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own, about transformers 6

LOSS_TYPES = {"sequence": "grpo", "token": "dapo", "constant": "dr_grpo"}  # ours -> TRL's name
MAX_LENGTH, GROUP_SIZE, NUM_GROUPS = 6, 4, 3
PROMPTS = ["1+1=", "what is 23 * 7?", "7"]  # ragged: left padding matters
# Ragged completions, two of them cut off at MAX_LENGTH; the last group gets equal rewards, so no signal.
LENGTHS = [1, 6, 3, 2, 6, 4, 6, 5, 6, 3, 5, 6]
TRUNCATED = [1, 4]
REWARDS = [1.0, 0.0, 0.5, 0.0, None, 1.0, 0.25, 0.0, 0.5, 0.5, 0.5, 0.5]  # None = no reward applies


@dataclass(frozen=True)
class Setting:
    """What both sides are told, in our names."""

    aggregation: str = "token"
    advantage_scale: str = "group"
    clip_range: float = 0.2
    clip_range_high: float = 0.28
    kl_coeff: float = 0.0
    kl_estimator: str = "k3_corrected"
    num_iterations: int = 1
    mask_truncated: bool = False

    def __str__(self) -> str:
        kl = f"{self.kl_coeff} {self.kl_estimator}" if self.kl_coeff else "no KL"
        return f"{self.aggregation}, {kl}, mu {self.num_iterations}{', truncated masked' * self.mask_truncated}"


def completion_ids(seed: int = 0) -> list[list[int]]:
    """Random ids of the lengths above; all but the truncated ones end with EOS."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 47, (length,), generator=generator).tolist() for length in LENGTHS]
    return [ids if row in TRUNCATED else [*ids[:-1], EOS_ID] for row, ids in enumerate(rows)]


def make_trainer(
    model: PreTrainedModel,
    folder: Path,
    setting: Setting,
    scorer: Callable[..., Any] | None = None,
    rewards: Sequence[float | None] = REWARDS,
    **changes: Any,
) -> Any:
    """TRL's trainer as its users build it, but with our completions, and another `scorer` than its kernel if asked.

    `changes` are more of TRL's own settings.
    """
    arguments: dict[str, Any] = dict(
        output_dir=str(folder),
        per_device_train_batch_size=len(LENGTHS),
        num_generations=GROUP_SIZE,
        max_completion_length=MAX_LENGTH,
        loss_type=LOSS_TYPES[setting.aggregation],
        scale_rewards=setting.advantage_scale,
        epsilon=setting.clip_range,
        epsilon_high=setting.clip_range_high,
        beta=setting.kl_coeff,
        use_bias_correction_kl=setting.kl_estimator == "k3_corrected",
        num_iterations=setting.num_iterations,
        mask_truncated_completions=setting.mask_truncated,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer: Any = GRPOTrainer(
        model=policy_of(model, folder, has_reference=setting.kl_coeff > 0),
        reward_funcs=lambda **_: rewards,
        args=GRPOConfig(**arguments | changes),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=make_tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer._generate_single_turn = lambda *_: (completion_ids(), None)
    if scorer is not None:
        trainer._get_per_token_logps_and_entropies = scorer
    return trainer


def policy_of(model: PreTrainedModel, folder: Path, *, has_reference: bool) -> PreTrainedModel:
    """A copy. TRL loads the reference by the policy's name: here it is another model."""
    policy = copy.deepcopy(model)
    if has_reference:
        make_tiny_model("llama", seed=1).save_pretrained(folder / "reference")
        policy.config._name_or_path = str(folder / "reference")
    return policy


def float64_scorer(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, None]:
    """In place of TRL's kernel: a log-softmax that stays in float64.

    With position ids, which TRL does not pass: rotary embeddings are relative, but a Llama computes them in float32.
    """
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions)
    logits = output.logits[:, -logits_to_keep - 1 : -1]
    logps = logits.log_softmax(-1)
    entropies = -(logps.exp() * logps).sum(-1)
    return logps.gather(-1, input_ids[:, -logits_to_keep:, None]).squeeze(-1), entropies, None


def trl_inputs(trainer: Any) -> dict[str, Tensor]:
    """What TRL makes of the completions: masks, old and reference log-probs, advantages."""
    return trainer._generate_and_score_completions(
        [{"prompt": prompt} for prompt in PROMPTS for _ in range(GROUP_SIZE)]
    )


def trl_logps(trainer: Any, batch: "Batch") -> tuple[Tensor, Tensor]:
    """TRL's kernel as it is: log-probs and entropies."""
    prompt_ids, prompt_mask, ids, mask = batch.tokens
    input_ids, attention_mask = torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, mask], 1).long()
    score = trainer._get_per_token_logps_and_entropies
    return score(trainer.model, input_ids, attention_mask, ids.shape[1], compute_entropy=True)[:2]


@dataclass
class Batch:
    """The same batch as it comes out of our sampler, fed by a model that is certain of these completions."""

    tokens: tuple[Tensor, Tensor, Tensor, Tensor]
    mask: Tensor  # (B, C) of the loss
    rewards: Tensor  # (P, G)

    @classmethod
    def of(cls, setting: Setting) -> "Batch":
        scripts = [ids + [EOS_ID] * (MAX_LENGTH - len(ids)) for ids in completion_ids()]  # never asked past its end
        prompts = [prompt for prompt in PROMPTS for _ in range(GROUP_SIZE)]
        rollout = generate_completions(
            ScriptedModel(scripts), make_tokenizer(), prompts, group_size=1, max_completion_length=MAX_LENGTH
        )
        mask = rollout.completion_mask
        if setting.mask_truncated:
            mask = mask & ~rollout.is_truncated.unsqueeze(1)
        values = [float("nan") if value is None else value for value in REWARDS]
        return cls(rollout.tokens(), mask, torch.tensor(values, dtype=torch.float64).view(NUM_GROUPS, GROUP_SIZE))


def our_loss(
    model: PreTrainedModel, setting: Setting, batch: Batch, old_logps: Tensor | None, ref_logps: Tensor | None
) -> tuple[Tensor, dict[str, float]]:
    """Steps [5] and [6] of train_grpo.py: the loss and the metrics of the update."""
    advantages = group_advantages(batch.rewards, scale=setting.advantage_scale).view(-1, 1)
    weights = loss_weights(batch.mask, setting.aggregation, max_completion_length=MAX_LENGTH, dtype=torch.float64)
    clip: dict[str, Any] = {"clip_range": setting.clip_range, "clip_range_high": setting.clip_range_high}
    means = TokenMeans()
    logps, entropies = compute_logprobs(model, *batch.tokens)
    old_logps = logps.detach() if old_logps is None else old_logps
    per_token_loss = clipped_surrogate(logps, old_logps, advantages, batch.mask, **clip)
    if ref_logps is not None:
        kl = kl_divergence(
            logps, ref_logps, estimator=setting.kl_estimator, old_logps=old_logps, completion_mask=batch.mask
        )
        per_token_loss = per_token_loss + setting.kl_coeff * kl
        means.add(batch.mask, {"kl": kl})
    low, high = clipped_tokens(logps, old_logps, advantages, batch.mask, **clip)
    means.add(batch.mask, {"entropy": entropies, "clip_ratio/low_mean": low, "clip_ratio/high_mean": high})
    return (per_token_loss * weights).sum(), means.metrics()


def shake(model: PreTrainedModel) -> None:
    """An optimizer step's worth of change, the same for every copy: ratios on both sides of the clip range."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_gradients(ours: PreTrainedModel, theirs: PreTrainedModel, tolerance: float = 1e-10) -> None:
    assert gradients(ours).keys() == gradients(theirs).keys()
    for name, gradient in gradients(ours).items():
        torch.testing.assert_close(gradient, gradients(theirs)[name], rtol=0, atol=tolerance, msg=name)


SETTINGS = [
    Setting(aggregation, kl_coeff=kl_coeff, kl_estimator=estimator, num_iterations=iterations, mask_truncated=masked)
    for aggregation in LOSS_TYPES
    for kl_coeff, estimator in [(0.0, "k3"), (0.04, "k3"), (0.04, "k3_corrected")]
    for iterations in (1, 2)
    for masked in (False, True)
]


@pytest.fixture
def llama64() -> Iterator[PreTrainedModel]:
    """RoPE, since TRL passes no position ids. The default dtype is that of TRL's table of rewards, and of Bessel's
    correction n / (n - 1), a quotient of integers."""
    torch.set_default_dtype(torch.float64)
    try:
        yield make_tiny_model("llama")
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_loss_gradients_and_metrics_are_trls(llama64: PreTrainedModel, tmp_path: Path, setting: Setting) -> None:
    trainer = make_trainer(llama64, tmp_path, setting, scorer=float64_scorer)
    inputs = trl_inputs(trainer)
    batch, ours = Batch.of(setting), copy.deepcopy(llama64)
    assert torch.equal(inputs["prompt_ids"], batch.tokens[0])
    assert torch.equal(inputs["prompt_mask"].bool(), batch.tokens[1])
    assert torch.equal(inputs["completion_ids"], batch.tokens[2])
    assert torch.equal(inputs["completion_mask"].bool(), batch.mask)
    with torch.no_grad():
        old_logps = compute_logprobs(ours, *batch.tokens)[0] if setting.num_iterations > 1 else None
        ref_logps = compute_logprobs(trainer.ref_model, *batch.tokens)[0] if setting.kl_coeff > 0 else None
    if setting.num_iterations > 1:  # TRL has stored old log-probs; the second optimizer step sees other weights
        assert old_logps is not None
        torch.testing.assert_close(inputs["old_per_token_logps"][batch.mask], old_logps[batch.mask], rtol=0, atol=1e-10)
        shake(trainer.model)
        shake(ours)
    theirs = trainer._compute_loss(trainer.model, inputs)
    loss, metrics = our_loss(ours, setting, batch, old_logps, ref_logps)

    assert loss.dtype == theirs.dtype == torch.float64
    assert loss.item() == pytest.approx(theirs.item(), rel=0, abs=1e-10)
    theirs.backward()
    loss.backward()
    assert_same_gradients(ours, trainer.model)
    assert sum(gradient.abs().sum() for gradient in gradients(ours).values()) > 1
    for name, value in metrics.items():
        assert value == pytest.approx(trainer._metrics["train"][name][-1], rel=1e-5, abs=1e-6), name
    is_clipped = metrics["clip_ratio/low_mean"] > 0 and metrics["clip_ratio/high_mean"] > 0
    assert is_clipped == (setting.num_iterations > 1)  # both sides bind once old and new differ


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trls(llama64: PreTrainedModel, tmp_path: Path, scale: str) -> None:
    setting = Setting(advantage_scale=scale)
    theirs = trl_inputs(make_trainer(llama64, tmp_path, setting, scorer=float64_scorer))["advantages"]
    ours = group_advantages(Batch.of(setting).rewards, scale=scale).flatten()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert ours[:4].unique().numel() == 3
    assert ours[[4, 8, 9, 10, 11]].eq(0).all()


@pytest.mark.parametrize("aggregation", LOSS_TYPES)
def test_gradient_accumulation_is_trls(llama64: PreTrainedModel, tmp_path: Path, aggregation: str) -> None:
    """Three micro-batches of four rows: gradients just add up, as TRL's do when all micro-batches are of one size."""
    setting = Setting(aggregation, kl_coeff=0.04)
    trainer = make_trainer(llama64, tmp_path, setting, scorer=float64_scorer)
    inputs = trl_inputs(trainer)
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 3
    for start in range(0, 12, 4):
        rows = {name: value[start : start + 4] if value.dim() else value for name, value in inputs.items()}
        trainer._compute_loss(trainer.model, rows).backward()
    batch, ours = Batch.of(setting), copy.deepcopy(llama64)
    with torch.no_grad():
        ref_logps = compute_logprobs(trainer.ref_model, *batch.tokens)[0]
    our_loss(ours, setting, batch, None, ref_logps)[0].backward()
    assert_same_gradients(ours, trainer.model)


def test_trls_own_scoring_kernel_agrees_in_float32(tmp_path: Path) -> None:
    model, batch = make_tiny_model("llama"), Batch.of(Setting())
    theirs = trl_logps(make_trainer(model, tmp_path, Setting()), batch)
    ours = compute_logprobs(model, *batch.tokens)
    for our_values, their_values in zip(ours, theirs, strict=True):
        assert our_values.dtype == their_values.dtype == torch.float32
        torch.testing.assert_close(our_values[batch.mask], their_values[batch.mask], rtol=0, atol=1e-5)


# Where TRL differs on purpose


def test_trl_calls_rounding_noise_a_signal_and_we_do_not(tmp_path: Path) -> None:
    """In float32 the mean of three rewards of 0.9 is none of them. TRL divides what is left by std + 1e-4, we say 0."""
    rewards = [0.9, 0.9, 0.9, None] * NUM_GROUPS
    trainer = make_trainer(make_tiny_model("llama"), tmp_path, Setting(), rewards=rewards)
    assert trl_inputs(trainer)["advantages"].abs().max() > 1e-4
    assert group_advantages(torch.tensor([[0.9, 0.9, 0.9, torch.nan]] * NUM_GROUPS)).eq(0).all()


def test_trls_token_mean_is_of_the_rollout_and_ours_of_the_optimizer_step(
    llama64: PreTrainedModel, tmp_path: Path
) -> None:
    """Two optimizer steps a rollout. TRL divides each by half of the rollout's tokens; we divide by the step's own, so
    that its tokens weigh what DAPO's formula says, whatever the lengths in the other step."""
    trainer = make_trainer(llama64, tmp_path, Setting("token"), scorer=float64_scorer)
    inputs = trl_inputs(trainer)
    trainer.args.steps_per_generation = 2
    theirs = trainer._compute_loss(trainer.model, {name: v[:6] if v.dim() else v for name, v in inputs.items()}).item()

    batch = Batch.of(Setting())
    batch.mask[6:] = False  # leaves the first optimizer step of six rows
    ours = our_loss(llama64, Setting("token"), batch, None, None)[0].item()
    tokens = sum(LENGTHS[:6]), sum(LENGTHS) / 2
    assert ours * tokens[0] == pytest.approx(theirs * tokens[1], abs=1e-10)
    assert abs(ours) > 0.01
    assert tokens == (22, 26.5)


def test_trl_passes_no_positions_so_left_padding_moves_a_model_with_learned_ones(tmp_path: Path) -> None:
    """The second prompt is the longest: its rows have no padding, and there both agree. Of the others, only ours are
    what each row is alone."""
    model, batch = make_tiny_model("gpt2"), Batch.of(Setting())
    theirs, ours = (
        trl_logps(make_trainer(model, tmp_path, Setting()), batch)[0],
        compute_logprobs(model, *batch.tokens)[0],
    )
    prompt_ids, prompt_mask, ids, mask = (tensor[:1] for tensor in batch.tokens)
    alone = compute_logprobs(model, prompt_ids[:, prompt_mask[0]], prompt_mask[:, prompt_mask[0]], ids, mask)[0]
    assert (ours - theirs)[4:8][batch.mask[4:8]].abs().max() < 1e-5
    assert (ours[:1] - alone)[mask].abs().max() < 1e-5
    assert (theirs[:1] - alone)[mask].abs().max() > 0.01


def test_trls_kl_overflows_where_ours_stays_finite(llama64: PreTrainedModel, tmp_path: Path) -> None:
    """A token that the policy has all but dropped: exp(ref - new) is inf in float32. We clamp the difference at 20 in
    the value and take the gradient, -r * difference, from the form that cannot overflow."""
    setting = Setting(kl_coeff=0.04)
    trainer = make_trainer(llama64, tmp_path, setting, scorer=float64_scorer)
    inputs = trl_inputs(trainer)
    inputs["ref_per_token_logps"] = inputs["ref_per_token_logps"] + 800
    assert not trainer._compute_loss(trainer.model, inputs).isfinite()
    batch, ours = Batch.of(setting), copy.deepcopy(llama64)
    loss, _ = our_loss(ours, setting, batch, None, inputs["ref_per_token_logps"])
    loss.backward()
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(ours).values())
