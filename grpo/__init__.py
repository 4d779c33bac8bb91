"""GRPO by hand. This is the map: one line per file and wing. Start with train_grpo.py, which uses them all.

The algorithm, in the order of its steps:
    data.py         [1] which samples a training step sees
    rollout.py      [2] the sampler: prompts -> groups of completions
    batch.py        [3] samples + rollout + scores; dynamic sampling; the plan of micro-batches
    logprobs.py     [4] tokens -> log-probs and entropies
    advantages.py   [5] rewards -> advantages
    loss.py         [6] surrogates, the KL, token weights
    algorithms.py   GRPO and its relatives as rows of one table

Everything else:
    rewards/        what a completion is worth: the library, reading answers, scoring, the sandbox
    fast/           the same numbers with less work: KV cache, noise, LM head, row layout
    models/         loading, the tiny base model, LoRA, saving, optimizer, device
    datasets/       file formats, chat templates, mixtures
    settings/       config.yaml, files and flags -> Config
    evaluation/     greedy accuracy, statistics, the pre-flight check, reports
    run/            set-up, run folder, checkpoints, metrics, records, plots, the dry run
    ppo/            what PPO needs and GRPO does without: the critic, its advantages
    config.py       `from grpo.config import load_config`: an import path that users' code has
    files.py        files and folders that are whole or absent; JSON lines
    errors.py       errors in one line, and exit statuses
"""
