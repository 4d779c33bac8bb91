"""The well-known bugs of GRPO code, each as one replacement in this code and the tests that must notice it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`pattern` stands exactly once in `file`; with `replacement` in its place one of `tests` must fail."""

    name: str
    file: str
    pattern: str
    replacement: str
    tests: tuple[str, ...]


LOOP, LOSS, ADVANTAGES, LOGPROBS, ROLLOUT, POLICY, CHECKPOINT = (
    "train_grpo.py", "grpo/loss.py", "grpo/advantages.py", "grpo/logprobs.py", "grpo/rollout.py", "grpo/policy.py",
    "grpo/checkpoint.py",
)  # fmt: skip
TOKENS = "tests/fidelity/test_traps_tokens.py::"
REWARDS = "tests/fidelity/test_traps_rewards.py::"
OF_LOSS = "tests/fidelity/test_traps_loss.py::"
ORACLE = "tests/fidelity/test_oracle.py::"
TWO_STEPS = "tests/test_train.py::test_two_steps_of_the_loop_worked_by_hand"

MUTANTS = [
    # Tokens, masks, positions
    Mutant(
        "mask dropped",
        LOSS,
        "mask = completion_mask.to(dtype)",
        "mask = torch.ones_like(completion_mask, dtype=dtype)",
        (f"{OF_LOSS}test_mask_dropped_in_the_weights",),
    ),
    Mutant(
        "mask from ids != pad, where pad is eos",
        ROLLOUT,
        "mask = is_stop.int().cumsum(1) - is_stop.int() == 0",
        "mask = sampled_ids != pad_id",
        (f"{TOKENS}test_mask_built_from_ids_cannot_tell_eos_from_pad_when_pad_is_eos",),
    ),
    Mutant(
        "attention mask of prompts from ids != pad",
        ROLLOUT,
        "mask = [[False] * (width - len(sequence)) + [True] * len(sequence) for sequence in sequences]",
        "mask = [[token != pad_id for token in row] for row in ids]",
        (f"{TOKENS}test_attention_mask_built_from_ids_blanks_separators_inside_chat_prompts",),
    ),
    Mutant(
        "EOS left out of the mask",
        ROLLOUT,
        "is_stop.int().cumsum(1) - is_stop.int() == 0",
        "is_stop.int().cumsum(1) == 0",
        (f"{TOKENS}test_eos_left_out_of_the_mask_or_what_follows_it_kept",),
    ),
    Mutant(
        "stop on one id, mask by several",
        ROLLOUT,
        "for token_id in [tokenizer.eos_token_id, *ids]",
        "for token_id in [tokenizer.eos_token_id]",
        (f"{TOKENS}test_several_stop_ids_stopped_on_one_and_masked_by_another",),
    ),
    Mutant(
        "shift off by one",
        LOGPROBS,
        "output.logits[:, -(length + 1) : -1]",
        "output.logits[:, -length:]",
        (f"{TOKENS}test_shift_off_by_one_scores_the_token_before_or_after",),
    ),
    Mutant(
        "position_ids missing in scoring",
        LOGPROBS,
        "        position_ids=positions_from_mask(attention_mask),\n",
        "",
        (f"{TOKENS}test_position_ids_missing_under_left_padding_move_a_model_with_learned_positions",),
    ),
    Mutant(
        "position_ids missing in sampling",
        ROLLOUT,
        "        position_ids=positions_from_mask(prompt_mask),\n",
        "",
        ("tests/fidelity/test_models.py::test_padded_prompts_sample_what_each_samples_alone",),
    ),
    Mutant(
        "temperature missing in scoring",
        LOGPROBS,
        "torch.promote_types(logits.dtype, torch.float32)) / temperature",
        "torch.promote_types(logits.dtype, torch.float32))",
        ("tests/fidelity/test_models.py::test_sampler_is_scorer_so_no_temperature_is_missing_when_scoring",),
    ),
    Mutant(
        "temperature missing in sampling",
        ROLLOUT,
        "torch.log_softmax(logits / temperature, dim=-1)",
        "torch.log_softmax(logits, dim=-1)",
        ("tests/fidelity/test_sampling.py::test_tokens_follow_the_softmax_and_not_what_is_easily_sampled_instead",),
    ),
    Mutant(
        "same noise for every completion",
        ROLLOUT,
        "np.array([seed, index], dtype=np.uint64)",
        "np.array([seed, 0], dtype=np.uint64)",
        (f"{TOKENS}test_same_noise_for_every_completion_of_a_group",),
    ),
    Mutant(
        "same noise in every step",
        LOOP,
        "seed=step_seed(config.seed, step)",
        "seed=step_seed(config.seed, 0)",
        (TWO_STEPS,),
    ),
    Mutant(
        "a token of probability 0 drawn",
        ROLLOUT,
        "tokens = torch.where(is_possible, tokens, probs.argmax(-1, keepdim=True))",
        "tokens = tokens",
        ("tests/test_rollout.py::test_no_draw_returns_a_token_of_probability_0",),
    ),
    Mutant(
        "the sampler in train mode",
        ROLLOUT,
        "    model.eval()  # training mode",
        "    # training mode",
        (f"{TOKENS}test_eval_mode_left_behind_by_the_sampler_would_switch_checkpointing_off",),
    ),
    Mutant(
        "dropout left on",
        POLICY,
        "    disable_dropout(model)\n",
        "",
        ("tests/fidelity/test_models.py::test_dropout_left_on_while_scoring_would_move_the_ratio_from_1",),
    ),
    Mutant(
        "weights in the file's bfloat16",
        POLICY,
        "AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **_options(source))",
        "AutoModelForCausalLM.from_pretrained(source, **_options(source))",
        (
            "tests/fidelity/test_models.py::"
            "test_a_bf16_checkpoint_is_loaded_in_the_files_dtype_unless_float32_is_asked_for",
        ),
    ),
    Mutant(
        "log-softmax in bfloat16",
        LOGPROBS,
        "logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature",
        "logits / temperature",
        ("tests/fidelity/test_bfloat16.py::test_bf16_log_softmax_errs_so_logits_are_cast_to_float32_first",),
    ),
    Mutant(
        "sampled -log p called entropy",
        LOGPROBS,
        "entropies = torch.special.entr(all_logps.exp()).sum(-1)",
        "entropies = -logps",
        ("tests/test_logprobs.py::test_entropy_is_of_the_full_distribution_and_has_no_gradient",),
    ),
    # Rewards and advantages
    Mutant(
        "groups tiled, rewards",
        LOOP,
        "for sample in samples for _ in range(config.group_size)]",
        "for _ in range(config.group_size) for sample in samples]",
        (f"{REWARDS}test_groups_tiled_instead_of_repeated_in_the_loop",),
    ),
    Mutant(
        "groups tiled, prompts",
        ROLLOUT,
        "prompt_ids=prompt_ids.repeat_interleave(group_size, dim=0)",
        "prompt_ids=prompt_ids.repeat(group_size, 1)",
        ("tests/test_rollout.py::test_row_p_times_g_plus_g_belongs_to_prompt_p",),
    ),
    Mutant(
        "population std",
        ADVANTAGES,
        "(num_valid - 1).clamp(min=1)).sqrt()",
        "num_valid.clamp(min=1)).sqrt()",
        (f"{REWARDS}test_population_std_instead_of_unbiased",),
    ),
    Mutant(
        "rounding noise taken for a signal",
        ADVANTAGES,
        "(highest - lowest <= 1e-6 * values.abs().amax(-1, keepdim=True).clamp(min=1))",
        "(highest == lowest)",
        (f"{REWARDS}test_seven_times_0_95_gives_no_advantage",),
    ),
    Mutant(
        "reward NaN -> 0",
        ADVANTAGES,
        "    group = _statistics(rewards)  # each (P, 1)",
        "    rewards = rewards.nan_to_num()\n    group = _statistics(rewards)  # each (P, 1)",
        (f"{REWARDS}test_nan_reward_counted_as_zero",),
    ),
    Mutant(
        "a completion that no reward applies to gets 0",
        "reward_model.py",
        "combined=combined.masked_fill(~applies.any(0), torch.nan)",
        "combined=combined",
        ("tests/test_rewards.py::test_rewards_combine_by_weight_over_those_that_apply",),
    ),
    Mutant(
        "the first number of the text, not the last",
        "reward_model.py",
        "last = numbers_found[-1]",
        "last = numbers_found[0]",
        (f"{REWARDS}test_first_number_instead_of_the_last",),
    ),
    Mutant(
        "advantages (B,)",
        LOSS,
        "if advantages.shape not in ((rows, 1), (rows, length)):",
        "if advantages.shape not in ((rows, 1), (rows, length), (rows,)):",
        (f"{REWARDS}test_advantages_of_shape_b_broadcast_along_the_wrong_axis",),
    ),
    # Loss
    Mutant(
        "clip: min -> max",
        LOSS,
        "-torch.min(ratio * advantages, clipped_ratio * advantages)",
        "-torch.max(ratio * advantages, clipped_ratio * advantages)",
        (f"{OF_LOSS}test_max_instead_of_min_for_negative_advantages",),
    ),
    Mutant(
        "the upper clip range ignored",
        LOSS,
        "1 + (clip_range if clip_range_high is None else clip_range_high)",
        "1 + clip_range",
        (f"{ORACLE}test_loss_gradient_and_metrics_equal_the_loops",),
    ),
    Mutant(
        "clip share counts clips that do not bind",
        LOSS,
        "(advantages < 0) & (ratio < 1 - clip_range)",
        "(ratio < 1 - clip_range)",
        (f"{OF_LOSS}test_clip_share_counts_non_binding_clips",),
    ),
    Mutant(
        "NaN masked after the exp",
        LOSS,
        "torch.where(is_token, logps - old_logps, 0.0).clamp(max=80)",
        "logps - old_logps",
        (f"{OF_LOSS}test_nan_masked_after_the_exp_in_the_surrogate",),
    ),
    Mutant(
        "mask dropped from the KL",
        LOSS,
        "torch.where(is_token, ref_logps - logps, 0.0)",
        "ref_logps - logps",
        (f"{OF_LOSS}test_mask_dropped_in_the_kl",),
    ),
    Mutant(
        "k1 as the loss",
        LOSS,
        "return (ratio * k3).detach() + (gradient - gradient.detach())",
        "return -difference",
        ("tests/fidelity/test_enumeration.py::test_the_expected_gradient_of_every_estimator",),
    ),
    Mutant(
        "KL ratio flipped",
        LOSS,
        "difference = torch.where(is_token, ref_logps - logps, 0.0)",
        "difference = torch.where(is_token, logps - ref_logps, 0.0)",
        ("tests/fidelity/test_enumeration.py::test_the_expected_value_is_the_kl",),
    ),
    Mutant(
        "the corrected KL's importance ratio flipped",
        LOSS,
        "_log_ratio(logps, old_logps, is_token).exp().detach()",
        "_log_ratio(old_logps, logps, is_token).exp().detach()",
        (f"{OF_LOSS}test_kl_ratio_flipped",),
    ),
    Mutant(
        "k3 corrected in its value alone",
        LOSS,
        "gradient = ratio * k2",
        "gradient = ratio * k3",
        ("tests/fidelity/test_enumeration.py::test_the_expected_gradient_of_every_estimator",),
    ),
    Mutant(
        "the exp of the KL clamped, not its argument",
        LOSS,
        "k3 = clamped.exp() - clamped - 1",
        "k3 = clamped.exp() - difference - 1",
        (f"{OF_LOSS}test_kl_exp_clamped_alone",),
    ),
    Mutant(
        "KL sign flipped",
        LOOP,
        "per_token_loss = per_token_loss + config.kl_coeff * kl",
        "per_token_loss = per_token_loss - config.kl_coeff * kl",
        (f"{OF_LOSS}test_kl_sign_flipped", TWO_STEPS),
    ),
    Mutant(
        "all completions masked: 0 / 0",
        LOSS,
        "completion_mask.sum().clamp(min=1) if num_tokens is None",
        "completion_mask.sum() if num_tokens is None",
        (f"{OF_LOSS}test_all_completions_masked_gives_zero_over_zero",),
    ),
    Mutant(
        "padded length instead of max_completion_length",
        LOSS,
        "return mask / (rows * max_completion_length)",
        "return mask / (rows * mask.shape[1])",
        ("tests/test_loss.py::test_loss_weights_by_hand",),
    ),
    Mutant(
        "mean per micro-batch",
        LOOP,
        "loss = (per_token_loss * weights[rows]).sum()",
        "loss = (per_token_loss * mask[rows]).sum() / mask[rows].sum().clamp(min=1) * len(logps) / num_rows",
        (f"{OF_LOSS}test_loss_weights_per_micro_batch_in_the_loop",),
    ),
    Mutant(
        "loss weights per micro-batch",
        LOOP,
        "loss = (per_token_loss * weights[rows]).sum()",
        "loss = (per_token_loss * loss_weights(mask[rows], config.loss_aggregation, "
        "max_completion_length=config.max_completion_length)).sum()",
        (f"{OF_LOSS}test_loss_weights_per_micro_batch_in_the_loop",),
    ),
    Mutant(
        "the last micro-batch's loss reported",
        LOOP,
        "loss_sum += loss.detach()",
        "loss_sum = loss.detach()",
        (f"{OF_LOSS}test_last_micro_batch_loss_reported",),
    ),
    Mutant(
        "metrics averaged per micro-batch",
        "grpo/records.py",
        "self.sums.get(name, 0) + kept.sum()\n            self.counts[name] = self.counts.get(name, 0) + mask.sum()",
        "self.sums.get(name, 0) + kept.sum() / mask.sum().clamp(min=1)\n"
        "            self.counts[name] = self.counts.get(name, 0) + torch.ones(())",
        (f"{OF_LOSS}test_last_micro_batch_loss_reported",),
    ),
    Mutant(
        "metrics of padding",
        "grpo/records.py",
        "torch.where(mask, value.detach().float(), 0.0)",
        "value.detach().float()",
        (f"{ORACLE}test_loss_gradient_and_metrics_equal_the_loops",),
    ),
    Mutant(
        "old log-probs not detached",
        LOOP,
        "old_logps = logps.detach() if all_old_logps is None",
        "old_logps = logps if all_old_logps is None",
        (f"{OF_LOSS}test_old_logps_attached_to_the_graph_in_the_loop",),
    ),
    Mutant(
        "old log-probs computed anew after an update",
        LOOP,
        "logps.detach() if all_old_logps is None else all_old_logps[rows]",
        "logps.detach()",
        (f"{OF_LOSS}test_old_logps_recomputed_after_an_update_in_the_loop",),
    ),
    Mutant(
        "reference trained",
        POLICY,
        "return copy.deepcopy(model).eval().requires_grad_(False)",
        "return model",
        (f"{OF_LOSS}test_reference_trained",),
    ),
    Mutant(
        "truncated completions trained on although they are to be masked",
        LOOP,
        "mask = mask & ~rollout.is_truncated.unsqueeze(1)",
        "mask = mask & True",
        ("tests/test_train.py::test_masked_truncated_completions_are_not_trained_on",),
    ),
    Mutant(
        "learning-rate schedule counted in rollouts",
        POLICY,
        "last = config.num_train_steps * config.num_iterations * config.num_minibatches",
        "last = config.num_train_steps",
        ("tests/test_policy.py::test_the_schedule_counts_optimizer_steps_not_rollouts",),
    ),
    Mutant(
        "the ratio against the sampler's log-probs",
        LOOP,
        "per_token_loss = clipped_surrogate(logps, old_logps, ",
        "per_token_loss = clipped_surrogate(logps, rollout.sampling_logps[rows], ",
        ("tests/fidelity/test_wiring.py::test_the_ratio_is_against_the_scorer_not_the_sampler",),
    ),
    Mutant(
        "clip_range_high that nobody reads",
        LOOP,
        '"clip_range_high": config.clip_range_high}',
        '"clip_range_high": None}',
        (TWO_STEPS,),
    ),
    Mutant(
        "advantage_baseline and advantage_scale that nobody reads",
        LOOP,
        "grouped_rewards, baseline=config.advantage_baseline, scale=config.advantage_scale",
        "grouped_rewards",
        (TWO_STEPS,),
    ),
    Mutant(
        "loss_aggregation that nobody reads",
        LOOP,
        "loss_weights(mask[rows], config.loss_aggregation,",
        'loss_weights(mask[rows], "token",',
        (TWO_STEPS,),
    ),
    Mutant(
        "grad norm read after zero_grad",
        LOOP,
        '"grad_norm": grad_norm.item(),',
        '"grad_norm": sum(float(w.grad.norm()) for w in policy.parameters() if w.grad is not None),',
        (f"{OF_LOSS}test_grad_norm_read_after_zero_grad", TWO_STEPS),
    ),
    Mutant(
        "gradients never zeroed",
        LOOP,
        "            optimizer.step()\n            optimizer.zero_grad()\n",
        "            optimizer.step()\n",
        (TWO_STEPS,),
    ),
    # Runs
    Mutant(
        "evaluation on training prompts",
        LOOP,
        "policy, tokenizer, eval_set, score, max_completion_length=length",
        "policy, tokenizer, train_set, score, max_completion_length=length",
        ("tests/test_train.py::test_the_evaluation_is_of_held_out_problems_and_greedy",),
    ),
    Mutant(
        "reference moved on resume",
        CHECKPOINT,
        "policy.load_state_dict(saved.state_dict())",
        "[model.load_state_dict(saved.state_dict()) for model in (policy, reference) if model is not None]",
        ("tests/fidelity/test_exact_resume.py::test_after_a_power_cut_a_run_goes_on_as_if_nothing_had_happened",),
    ),
    Mutant(
        "optimizer state lost on resume",
        CHECKPOINT,
        'optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))',
        "pass",
        ("tests/fidelity/test_exact_resume.py::test_after_a_power_cut_a_run_goes_on_as_if_nothing_had_happened",),
    ),
    Mutant(
        "rows written after the checkpoint kept on resume",
        "grpo/run_folder.py",
        'os.truncate(samples, state["samples_size"])',
        "pass",
        ("tests/fidelity/test_exact_resume.py::test_after_a_power_cut_a_run_goes_on_as_if_nothing_had_happened",),
    ),
    Mutant(
        "another base taken for the anchor of the KL",
        CHECKPOINT,
        "if weights_sha256(policy) != base_sha256:",
        "if False:",
        ("tests/test_resume.py::test_another_base_under_the_same_name_is_no_new_anchor",),
    ),
    Mutant(
        "a damaged checkpoint loaded",
        CHECKPOINT,
        "if sha256(folder / name) != expected:",
        "if False:",
        ("tests/test_resume.py::test_a_damaged_checkpoint_is_named_with_a_way_on_that_works",),
    ),
    Mutant(
        "a checkpoint that can execute code",
        CHECKPOINT,
        'map_location="cpu", weights_only=True',
        'map_location="cpu", weights_only=False',
        ("tests/fidelity/test_exact_resume.py::test_an_optimizer_that_would_run_code_is_refused",),
    ),
]
