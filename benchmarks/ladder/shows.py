"""What each row of the ladder shows: one sentence per row, written by hand after measuring.

A test checks that every measured row has a sentence.
"""

SHOWS: dict[str, str] = {
    # From REINFORCE to GRPO
    "reinforce": "Rewards of 0 and 1 alone are enough here: what is right is made likelier, and what is wrong gives way.",
    "batch_baseline": "No gain: with 256 completions a step the variance that a baseline takes away is not what limits.",
    "group_baseline": "Nor does it matter whether the mean is the batch's or the group's.",
    "leave_one_out": "The same as the group's mean, as it should be under Adam: a factor of 16/15 on the gradient cancels.",
    "group_std": "No faster. Its 0.006 less at the end comes with a higher rate, which the grid prefers by 0.003: the std itself does nothing that is seen.",
    "two_minibatches": "The first rung that is seen: twice the optimizer steps on the same completions learn faster, +0.017 over the run against `group_baseline`, whose rate is the same.",
    "clip": "A little better over the run than without a clip, +0.003, though it takes the gradient from one token in 2,500 only.",
    # KL
    "kl_k1": "No different from the right estimator, where the weight is 0.005: as a loss k1 has no direction on average, and here it makes little noise.",
    "kl_k2": "At 0.005 a KL changes nothing that is seen, in accuracy or in the distance from the base.",
    "kl_k3": "Another estimator, and another gradient, of a KL that is too weak to be seen.",
    "kl_k3_corrected": "The default's estimator: no better than no KL, and no worse, at the price of a reference model and 40 % more time.",
    "unscaled": "The clip without the std is as good as with it; the next row builds on it.",
    "kl_reward": "In the reward the KL does what it does in the loss: nothing that is seen at 0.005.",
    "kl_reward_scaled": "The trap of a KL that is divided by the std of rewards that agree does no harm here either.",
    # Aggregation
    "sequence": "Slower, 0.929 over the run against 0.965 of `clip`: a token of a long worked answer weighs less than one of a quick guess, and it is worked answers that must become likelier.",
    "constant": "As fast as the mean over tokens: Adam does not mind the scale.",
    # Algorithms
    "grpo": "Nearly every problem. The rate that the grid prefers by 0.003 is three times the default's and dips on the way; the next row has the default's.",
    "grpo_lower_rate": "The default run: steadier than the row at the higher rate, and within the noise of five seeds as good.",
    "dr_grpo": "Mean only and a constant denominator: as good, at the lower rate.",
    "dapo": "Fuller batches, fewer of them: over the run a little better than without resampling, +0.003; at the end no different.",
    "dapo_without_resampling": "With one update a rollout its clip does nothing, and this is `group_std` once more: GRPO without a KL.",
    "rloo": "As good as any; its KL costs a pass before the update.",
    "reinforce_alone": "The simplest row of all is as good as any.",
    "reinforce_pp": "Whitened over all tokens instead of within groups: no better, and at the end 0.011 lower than `reinforce_alone`.",
    "gspo": "Less steady, one seed of five ends at 0.924: the mean over an answer's tokens counts as in `sequence`, and with one update its ratio is 1 and does nothing.",
    "cispo": "With one update a rollout the same gradient as the clipped surrogate, and the same curve.",
    "ppo": "Learns, but less steadily, one seed of five ends at 0.928, and takes three times as long as `reinforce_pp`, which is the same without a critic.",
    # Two updates a rollout
    "grpo_two_updates": "0.95 after 2,600 completions instead of the 5,100 of `grpo_lower_rate`, +0.017 over the run: the cheapest gain of all.",
    "dapo_two_updates": "A tenth fewer completions; no better than `grpo_two_updates`.",
    "gspo_two_updates": "Slower, -0.043 over the run against `grpo_two_updates`; its narrow clip takes the gradient from a quarter of the second update's tokens.",
    "cispo_two_updates": "As fast as the clipped surrogate: no ratio exceeds its cap.",
    "ppo_two_updates": "Two updates help PPO, too; 0.013 over the run less than `grpo_two_updates`.",
    # Group size
    "group_size_2": "Two siblings are enough where there are 128 prompts: more problems a step make up for poorer baselines, but prompts cost time.",
    "group_size_4": "The best of the group sizes over the run, 0.967, in two thirds of the time of groups of 2; at a rate that groups of 16 do not take as well.",
    "group_size_8": "A little faster than groups of 16 at the same rate (`grpo_lower_rate`), +0.007 over the run.",
    "group_size_32": "Eight prompts a step: no different from sixteen.",
    # Temperature
    "temperature_0.7": "Still varied enough to find the worked style.",
    "temperature_1.3": "No different: more of the samples are noise, and the groups sort that out.",
    # Mistakes
    "shuffled": "The control: with rewards dealt at random nothing is learned, and in four of five seeds what the base could do is slowly lost.",
    "eos_masked": "No harm that is seen, on answers that end by themselves: the base knows when to stop, and nothing here unteaches it.",
    "max_for_min": "Only 0.003 over the run, since few ratios leave the range; at three times the rate it does harm: 0.801 instead of 0.913 on the tuning seeds.",
    "max_for_min_one_update": "With one update a rollout the ratio is 1, and the bug changes nothing at all.",
}
