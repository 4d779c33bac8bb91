"""Minimal GRPO: one completion at a time, without padding, masks, KV cache, micro-batches or checkpoints.

    python examples/grpo_from_scratch.py --steps 20      a tiny model learns arithmetic, and the reward rises

Read this first. A test checks that train_grpo.py, which works in batches, computes the same rewards, advantages, losses
and updated model from the same samples. Differences: constant learning rate, sampling with torch.multinomial.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that Python finds grpo/

from grpo.data import samples_for_step
from grpo.datasets.rows import JSONLinesDataset
from grpo.models.loading import load_policy
from grpo.models.tiny import TRAIN_FILE
from reward_model import MathRewardModel

NUM_PROMPTS, GROUP_SIZE, MAX_TOKENS = 8, 8, 28  # P, G and the maximum completion length
LEARNING_RATE, CLIP_RANGE, KL_COEFF, SEED = 5e-4, 0.2, 0.005, 0


def log_probs(model, prompt, completion):
    """(T,) log-probs of the T completion tokens. The logits at position t - 1 predict token t."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]  # (T, V)
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def sample(model, prompt, eos):
    """Sample a completion token by token. The final EOS token is part of the completion and is trained on."""
    completion = []
    while len(completion) < MAX_TOKENS and completion[-1:] != [eos]:
        logits = model(torch.tensor([prompt + completion])).logits[0, -1]  # (V,)
        completion.append(torch.multinomial(logits.softmax(-1), num_samples=1).item())
    return completion


def train_step(policy, reference, optimizer, tokenizer, problems):
    """One GRPO step. Returns the rewards, the advantages and the loss."""
    reward_model, rows, rewards = MathRewardModel(), [], []
    for problem in problems:  # [1] prompts
        prompt = tokenizer(problem["prompt"])["input_ids"]
        group = [sample(policy, prompt, tokenizer.eos_token_id) for _ in range(GROUP_SIZE)]  # [2] rollout
        texts = [tokenizer.decode(completion, skip_special_tokens=True) for completion in group]
        r = torch.tensor([reward_model.compute_reward(problem, text) for text in texts])  # [3] rewards, (G,)
        a = (r - r.mean()) / (r.std() + 1e-4)  # [5] advantages: how much better than the group's mean? (G,)
        rewards += r.tolist()
        rows += [(prompt, completion, advantage) for completion, advantage in zip(group, a.tolist(), strict=True)]

    num_tokens, total_loss = sum(len(completion) for _, completion, _ in rows), 0.0
    for prompt, completion, advantage in rows:  # [6] update
        new = log_probs(policy, prompt, completion)  # (T,)
        old = new.detach()  # [4] fixed terms: with one update per rollout, old and new log-probs are equal
        with torch.no_grad():
            ref = log_probs(reference, prompt, completion)  # (T,)
        ratio = (new - old).exp()  # its value is 1 here, so nothing is clipped; its gradient is that of new
        policy_loss = -torch.min(ratio * advantage, ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE) * advantage)
        kl = ratio * ((ref - new).exp() - (ref - new) - 1)  # an estimate of KL(policy || reference): k3 times the ratio
        loss = (policy_loss + KL_COEFF * kl).sum() / num_tokens  # mean over all tokens of the step
        loss.backward()  # sums the gradients of all rows
        total_loss += loss.item()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return rewards, [advantage for _, _, advantage in rows], total_loss


def main(num_steps):
    """Train the tiny model and print the mean reward of each step."""
    torch.manual_seed(SEED)
    policy, tokenizer = load_policy("tiny", base_seed=SEED, device=torch.device("cpu"))
    reference = copy.deepcopy(policy).requires_grad_(False)  # the frozen base model
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    dataset = JSONLinesDataset(TRAIN_FILE)
    for step in range(1, num_steps + 1):
        problems = samples_for_step(dataset, step=step, batch_size=NUM_PROMPTS, seed=SEED)
        rewards, _, loss = train_step(policy, reference, optimizer, tokenizer, problems)
        print(f"step {step:3d}  reward {sum(rewards) / len(rewards):.2f}  loss {loss:+.3f}", flush=True)  # [7] record


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="training steps (default: 60)")
    main(parser.parse_args().steps)
