"""What each row of the ladder shows: one sentence per row, written by hand after measuring.

A test checks that every measured row has a sentence.
"""

SHOWS: dict[str, str] = {
    # From REINFORCE to GRPO
    "reinforce": "Rewards of 0 and 1 are enough here, without a baseline: correct answers become more likely, and wrong ones less likely.",
    "batch_baseline": "No gain. A baseline reduces variance, but with 256 completions per step variance is not the bottleneck.",
    "group_baseline": "It makes no difference whether the mean is that of the batch or of the group.",
    "leave_one_out": "The same as the group mean, as expected with Adam: a factor of 16/15 on the gradient cancels.",
    "group_std": "No faster. It is 0.006 lower at the end, but at a higher rate, which the grid prefers by 0.003. The std itself has no visible effect.",
    "two_minibatches": "The first idea with a visible effect: twice the optimizer steps on the same completions learn faster, +0.017 over the run against `group_baseline`, which has the same rate.",
    "clip": "A little better over the run than without a clip, +0.003, although it removes the gradient of only one token in 2,500.",
    # KL
    "kl_k1": "No different from the correct estimator at a weight of 0.005. As a loss, k1 has an expected gradient of 0, and here it adds little noise.",
    "kl_k2": "At 0.005 a KL penalty has no visible effect, neither on accuracy nor on the distance from the base model.",
    "kl_k3": "Another estimator with another gradient, but the KL penalty is too weak to have a visible effect.",
    "kl_k3_corrected": "The default estimator: as good as no KL penalty. It costs a reference model and 40 % more time.",
    "unscaled": "The clip without the std is as good as with it. The next row builds on this row.",
    "kl_reward": "A KL penalty in the reward has the same effect as in the loss: none that is visible at 0.005.",
    "kl_reward_scaled": "The known trap, a KL penalty divided by the std of nearly equal rewards, does no harm here.",
    # Aggregation
    "sequence": "Slower: 0.929 over the run against 0.965 of `clip`. A token of a long worked answer counts less than a token of a quick guess, but the worked answers are the ones that must become more likely.",
    "constant": "As fast as the mean over tokens: Adam ignores the scale of the gradient.",
    # Algorithms
    "grpo": "Solves nearly every problem. The grid prefers this rate by 0.003. It is three times the default's rate, and accuracy dips during the run. The next row has the default's rate.",
    "grpo_lower_rate": "The default run: steadier than the row at the higher rate, and equally good within the noise of five seeds.",
    "dr_grpo": "Only the mean is subtracted, and the denominator is constant: equally good, at the lower rate.",
    "dapo": "Fuller batches, but fewer of them: a little better over the run than without resampling, +0.003, and equal at the end.",
    "dapo_without_resampling": "With one update per rollout its clip has no effect. This row is the same as `group_std`: GRPO without a KL penalty.",
    "rloo": "As good as any other row. Its KL penalty costs an extra pass before the update.",
    "reinforce_alone": "The simplest row is as good as any other.",
    "reinforce_pp": "Whitened over all tokens instead of within groups: no better, and 0.011 lower at the end than `reinforce_alone`.",
    "gspo": "Less steady: one seed of five ends at 0.924. Tokens are averaged per answer as in `sequence`. With one update its ratio is 1 and has no effect.",
    "cispo": "With one update per rollout, the same gradient as the clipped surrogate and the same curve.",
    "ppo": "Learns less steadily: one seed of five ends at 0.928. It takes three times as long as `reinforce_pp`, which is the same without a critic.",
    # Two updates a rollout
    "grpo_two_updates": "Reaches 0.95 after 2,600 completions instead of the 5,100 of `grpo_lower_rate`, +0.017 over the run. This is the cheapest gain of all.",
    "dapo_two_updates": "A tenth fewer completions; no better than `grpo_two_updates`.",
    "gspo_two_updates": "Slower: -0.043 over the run against `grpo_two_updates`. Its narrow clip removes the gradient of a quarter of the second update's tokens.",
    "cispo_two_updates": "As fast as the clipped surrogate: no ratio exceeds its cap.",
    "ppo_two_updates": "Two updates help PPO too. It is 0.013 below `grpo_two_updates` over the run.",
    # Group size
    "group_size_2": "Two siblings are enough with 128 prompts per step: more problems per step make up for poorer baselines, but prompts cost time.",
    "group_size_4": "The best group size over the run, 0.967, in two thirds of the time of groups of 2. Groups of 16 do less well at this rate.",
    "group_size_8": "A little faster than groups of 16 at the same rate (`grpo_lower_rate`), +0.007 over the run.",
    "group_size_32": "Eight prompts per step are no different from sixteen.",
    # Temperature
    "temperature_0.7": "The samples are still varied enough to find the worked style.",
    "temperature_1.3": "No different: more samples are noise, but the comparison within groups filters it out.",
    # Mistakes
    "shuffled": "The control: with randomly dealt rewards nothing is learned. In four of five seeds the base model's ability is slowly lost.",
    "eos_masked": "No visible harm on answers that end on their own: the base model knows when to stop, and nothing here trains that away.",
    "max_for_min": "Only 0.003 lower over the run, because few ratios leave the clip range. At three times the rate it does harm: 0.801 instead of 0.913 on the tuning seeds.",
    "max_for_min_one_update": "With one update per rollout the ratio is 1, and the bug changes nothing at all.",
}
