"""What other libraries call our settings: TRL, verl, OpenRLHF, and plain common sense.

An unknown name is looked up here first. Spelling distance comes second, because it misleads: the name nearest to
`max_steps` is not the setting that limits the steps.
"""

from collections.abc import Collection

from grpo.errors import did_you_mean

SYNONYMS: dict[str, tuple[str, ...]] = {
    # Algorithm
    "algo": ("algorithm",),
    "adv_estimator": ("algorithm", "advantage_baseline"),
    "advantage_estimator": ("algorithm", "advantage_baseline"),
    "estimator": ("algorithm", "advantage_baseline"),
    "loss_type": ("loss_aggregation", "algorithm"),
    "loss_agg_mode": ("loss_aggregation",),
    "policy_loss": ("surrogate",),
    "policy_loss_type": ("surrogate",),
    "importance_sampling_level": ("surrogate",),
    "scale_rewards": ("advantage_scale",),
    "norm_adv_by_std_in_grpo": ("advantage_scale",),
    "normalize_advantages": ("advantage_scale",),
    "epsilon": ("clip_range",),
    "eps": ("clip_range",),
    "eps_clip": ("clip_range",),
    "cliprange": ("clip_range",),
    "clip_eps": ("clip_range",),
    "clip_ratio": ("clip_range",),
    "clip_ratio_low": ("clip_range",),
    "epsilon_low": ("clip_range",),
    "eps_clip_low": ("clip_range",),
    "epsilon_high": ("clip_range_high",),
    "eps_clip_high": ("clip_range_high",),
    "clip_ratio_high": ("clip_range_high",),
    "delta": ("dual_clip",),
    "clip_ratio_c": ("dual_clip",),
    "dynamic_sampling": ("max_resample_rounds",),
    "max_num_gen_batches": ("max_resample_rounds",),
    # The KL penalty
    "beta": ("kl_coeff",),
    "kl": ("kl_coeff",),
    "kl_beta": ("kl_coeff",),
    "kl_coef": ("kl_coeff",),
    "kl_penalty_coef": ("kl_coeff",),
    "kl_loss_coef": ("kl_coeff",),
    "kl_weight": ("kl_coeff",),
    "init_kl_coef": ("kl_coeff",),
    "use_kl_loss": ("kl_in", "kl_coeff"),
    "use_kl_in_reward": ("kl_in", "kl_coeff"),
    "kl_loss_type": ("kl_estimator",),
    "kl_penalty": ("kl_estimator", "kl_coeff"),
    "sync_ref_model": ("ref_update_every",),
    "ref_model_sync_steps": ("ref_update_every",),
    "entropy_coef": ("entropy_coeff",),
    "ent_coef": ("entropy_coeff",),
    "entropy_bonus": ("entropy_coeff",),
    # Prompts, model and rollout
    "model": ("model_name",),
    "model_name_or_path": ("model_name",),
    "model_path": ("model_name",),
    "pretrain": ("model_name",),
    "base_model": ("model_name",),
    "dataset": ("train_file",),
    "dataset_name": ("train_file",),
    "data": ("train_file",),
    "data_file": ("train_file",),
    "train_files": ("train_file",),
    "train_data": ("train_file",),
    "train_dataset": ("train_file",),
    "prompt_data": ("train_file",),
    "val_file": ("eval_file",),
    "val_files": ("eval_file",),
    "eval_data": ("eval_file",),
    "eval_dataset": ("eval_file",),
    "test_file": ("eval_file",),
    "input_key": ("prompt_column",),
    "prompt_key": ("prompt_column",),
    "label_key": ("answer_column",),
    "answer_key": ("answer_column",),
    "prompt_max_len": ("max_prompt_length",),
    "max_input_length": ("max_prompt_length",),
    "train_batch_size": ("batch_size",),
    "rollout_batch_size": ("batch_size",),
    "num_rollouts": ("batch_size",),
    "num_prompts": ("batch_size",),
    "prompts_per_step": ("batch_size",),
    "num_generations": ("group_size",),
    "num_completions": ("group_size",),
    "num_samples": ("group_size",),
    "n_samples_per_prompt": ("group_size",),
    "samples_per_prompt": ("group_size",),
    "rollout_n": ("group_size",),
    "rloo_k": ("group_size",),
    "max_length": ("max_completion_length",),
    "max_tokens": ("max_completion_length",),
    "max_new_tokens": ("max_completion_length",),
    "max_response_length": ("max_completion_length",),
    "response_length": ("max_completion_length",),
    "generate_max_len": ("max_completion_length",),
    "stop": ("stop_strings",),
    "stop_sequences": ("stop_strings",),
    "temp": ("temperature",),
    # Rewards
    "reward_funcs": ("rewards",),
    "reward_func": ("rewards",),
    "reward_functions": ("rewards",),
    "reward_function": ("rewards",),
    "reward_model": ("rewards",),
    "reward_weights": ("rewards",),
    # Update
    "lr": ("learning_rate",),
    "actor_learning_rate": ("learning_rate",),
    "critic_lr": ("critic_learning_rate",),
    "lr_scheduler": ("lr_schedule",),
    "lr_scheduler_type": ("lr_schedule",),
    "warmup": ("warmup_steps",),
    "warmup_ratio": ("warmup_steps",),
    "lr_warmup_ratio": ("warmup_steps",),
    "lr_warmup_steps": ("warmup_steps",),
    "wd": ("weight_decay",),
    "max_norm": ("max_grad_norm",),
    "grad_clip": ("max_grad_norm",),
    "clip_grad": ("max_grad_norm",),
    "beta1": ("adam_beta1",),
    "beta2": ("adam_beta2",),
    "mu": ("num_iterations",),
    "ppo_epochs": ("num_iterations",),
    "num_ppo_epochs": ("num_iterations",),
    "mini_batch_size": ("num_minibatches",),
    "ppo_mini_batch_size": ("num_minibatches",),
    "num_mini_batches": ("num_minibatches",),
    "micro_train_batch_size": ("micro_batch_size",),
    "ppo_micro_batch_size_per_gpu": ("micro_batch_size",),
    "per_device_train_batch_size": ("micro_batch_size",),
    "gradient_accumulation_steps": ("micro_batch_size", "num_minibatches"),
    "grad_accum": ("micro_batch_size", "num_minibatches"),
    "vf_clip": ("value_clip_range",),
    "cliprange_value": ("value_clip_range",),
    "value_clip": ("value_clip_range",),
    "lam": ("gae_lambda",),
    "lambd": ("gae_lambda",),
    # Length and record of the run
    "steps": ("num_train_steps",),
    "num_steps": ("num_train_steps",),
    "max_steps": ("num_train_steps",),
    "train_steps": ("num_train_steps",),
    "total_steps": ("num_train_steps",),
    "total_training_steps": ("num_train_steps",),
    "iterations": ("num_train_steps",),
    "epochs": ("num_train_epochs",),
    "num_epochs": ("num_train_epochs",),
    "max_epochs": ("num_train_epochs",),
    "num_episodes": ("num_train_epochs",),
    "total_epochs": ("num_train_epochs",),
    "out": ("output_dir",),
    "output": ("output_dir",),
    "out_dir": ("output_dir",),
    "output_path": ("output_dir",),
    "save_dir": ("output_dir",),
    "save_path": ("output_dir",),
    "log_dir": ("output_dir",),
    "default_local_dir": ("output_dir",),
    "eval_steps": ("eval_every",),
    "eval_freq": ("eval_every",),
    "test_freq": ("eval_every",),
    "save_freq": ("save_every",),
    "save_interval": ("save_every",),
    "save_total_limit": ("keep_checkpoints",),
    "metric_for_best_model": ("eval_metric",),
    "random_seed": ("seed",),
    # Larger models, memory and speed
    "lora_r": ("lora_rank",),
    "target_modules": ("lora_target_modules",),
    "load_in_4bit": ("quantization",),
    "load_in_8bit": ("quantization",),
    "attn_impl": ("attn_implementation",),
    "flash_attn": ("attn_implementation",),
    "torch_compile": ("compile",),
    "bf16": ("dtype",),
    "fp16": ("dtype",),
    "precision": ("dtype",),
    "torch_dtype": ("dtype",),
}

# One sentence where the setting is not simply another name for the same thing.
DIFFERENCES: dict[str, str] = {
    "gradient_accumulation_steps": (
        "Gradients are always accumulated over the micro-batches of an optimizer step: micro_batch_size sets the "
        "completions per pass, num_minibatches the optimizer steps per rollout."
    ),
    "loss_type": "loss_aggregation averages the token losses; algorithm picks a whole method, such as dapo.",
    "warmup_ratio": "warmup_steps is a number of optimizer steps, not a fraction.",
    "lr_warmup_ratio": "warmup_steps is a number of optimizer steps, not a fraction.",
    "mini_batch_size": "num_minibatches is how many parts the prompts of a step are split into.",
    "ppo_mini_batch_size": "num_minibatches is how many parts the prompts of a step are split into.",
    "reward_weights": "A weight belongs to its reward: {name: math, weight: 0.5}.",
}


def suggestion(name: str, names: Collection[str], *, prefix: str = "") -> str:
    """The end of an error message about an unknown setting: what it is called here, or else the nearest spelling.

    >>> suggestion("max_steps", ["num_train_steps", "base_steps"])
    '; did you mean num_train_steps?'
    >>> suggestion("base-step", ["num_train_steps", "base_steps"])
    '; did you mean base_steps?'
    """
    plain = name.replace("-", "_").lower()
    found = [key for key in SYNONYMS.get(plain, ()) if key in names]
    if not found:
        return did_you_mean(plain, names, prefix=prefix)
    difference = DIFFERENCES.get(plain)
    question = f"; did you mean {' or '.join(prefix + key for key in found)}?"
    return question if difference is None else f"{question} {difference}"
