"""What each row of the ladder shows: one sentence, written by hand after measuring.

A test holds the sentences against the results: every row measured has one.
"""

SHOWS: dict[str, str] = {
    # From REINFORCE to GRPO
    "reinforce": "Rewards of 0 and 1 alone are enough here: what is right is made likelier, and what is wrong gives way.",
    "batch_baseline": "No gain: with 256 completions a step the variance that a baseline takes away is not what limits.",
    "group_baseline": "Nor does it matter whether the mean is the batch's or the group's: problems are about equally hard.",
    "leave_one_out": "The same as the group's mean, as it should be under Adam: a factor of 16/15 on the loss cancels.",
    "group_std": "Dividing by the std changes nothing measurable: groups with signal have similar stds.",
    "two_minibatches": "The first rung that is seen: twice the optimizer steps on the same completions learn faster.",
    "clip": "A little faster than without a clip, and no more than that: two updates at this rate move few ratios far.",
    # KL
    "kl_k1": "No harm at this weight and in 150 steps: as a loss k1 is noise without a direction, and there is little of it.",
    "kl_k2": "At 0.005 a KL changes nothing that is seen, in accuracy or in the distance from the base.",
    "kl_k3": "The other direction of the KL, and no difference either at this weight.",
    "kl_k3_corrected": "The default's estimator: as good as no KL, at the price of a reference model and a third of the time.",
    "unscaled": "The clip without the std: the twin of the next row.",
    "kl_reward": "In the reward the KL does what it does in the loss: nothing that is seen at 0.005.",
    "kl_reward_scaled": "The trap of a KL that is divided by the std of rewards that agree does no harm here either.",
    # Aggregation
    "sequence": "Slower: a token of a worked answer counts a third of one of a quick guess, so guesses are unlearned first.",
    "constant": "As fast as the mean over tokens: Adam does not mind the scale, and lengths matter no more than there.",
    # Algorithms
    "grpo": "Nearly every problem; which of its rates is best is within noise, and the higher one is the less steady.",
    "dr_grpo": "Mean only and a constant denominator: no difference on answers that are all short.",
    "dapo": "Fewer steps of fuller batches: as good with the same completions, not better.",
    "dapo_without_resampling": "With one update a rollout its clip does nothing, and this is GRPO without a KL.",
    "rloo": "As good as any; its KL costs a pass before the update.",
    "reinforce_alone": "The simplest row of all is among the fastest.",
    "reinforce_pp": "Whitened over all tokens instead of within groups: no difference here.",
    "gspo": "Slower: its sequence aggregation is, and with one update a rollout its ratio is 1 and does nothing.",
    "cispo": "With one update a rollout the same gradient as the clipped surrogate, and the same curve.",
    "ppo": "Learns, but later and less steadily, and a step takes three times as long: the critic must be learned first.",
    # Two updates a rollout
    "grpo_two_updates": "Half the completions of one update a rollout: the cheapest gain of the whole table.",
    "dapo_two_updates": "Fast at first; its fewer steps end a little lower.",
    "gspo_two_updates": "Its narrow clip binds for most answers, so the second update adds little.",
    "cispo_two_updates": "As fast as the clipped surrogate: no ratio comes near its cap.",
    "ppo_two_updates": "Two updates help PPO most: its critic, too, learns twice as often.",
    # Group size
    "group_size_2": "Two siblings are enough if there are 128 prompts: more problems a step make up for poorer baselines.",
    "group_size_4": "The best of the group sizes, by little.",
    "group_size_8": "No different from 16.",
    "group_size_32": "Eight prompts a step: a little slower, many answers to few problems.",
    # Temperature
    "temperature_0.7": "Still varied enough to find the worked style.",
    "temperature_1.3": "A little slower: more of the samples are noise.",
    # Mistakes
    "shuffled": "The control: with rewards dealt at random nothing is learned.",
    "eos_masked": "No harm on answers that end by themselves: the base knows when to stop, and nothing here unteaches it.",
    "max_for_min": "Harmless at this rate, since few ratios leave the range; at three times the rate the grid shows the harm.",
    "max_for_min_one_update": "With one update a rollout the ratio is 1, and the bug changes nothing at all.",
}
