"""Completions kept in a file as they come, so that an evaluation of hours that was stopped goes on where it was.

A line is one call of the sampler: a key, made of the model's weights and of all that the call was asked for, and what
came back. Whoever asks the same again is answered from the file, anything else is sampled: there is nothing to be told,
and nothing stale can be taken for fresh.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.files import append_jsonl, read_jsonl, to_jsonl, write_atomically
from grpo.models.saving import weights_sha256
from grpo.rollout import Rollout, generate_completions, stop_token_ids


class KeptRollouts:
    """What was sampled so far, in a file that `forget` deletes."""

    def __init__(self, path: Path, **circumstances: Any) -> None:
        """`circumstances`: what else the answers depend on, such as the dtype."""
        self.path, self.circumstances = path, circumstances
        self.used: set[str] = set()
        self.rows: dict[str, dict[str, Any]] = {}
        if path.is_file():
            self.rows = {row["key"]: row for row in read_jsonl(path)}
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # half a line, where the process was killed

    def of(self, model: PreTrainedModel) -> Callable[..., Rollout]:
        """`generate_completions` of this model, with a memory."""
        weights = weights_sha256(model)

        def generate(
            model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], **settings: Any
        ) -> Rollout:
            asked = {name: list(value) if isinstance(value, range) else value for name, value in settings.items()}
            stop_ids = sorted(stop_token_ids(model, tokenizer))
            text = json.dumps([weights, self.circumstances, stop_ids, list(prompts), asked], sort_keys=True)
            key = hashlib.sha256(text.encode()).hexdigest()
            self.used.add(key)
            if key in self.rows:
                return _rollout(self.rows[key])
            rollout = generate_completions(model, tokenizer, prompts, **settings)
            ids, is_truncated = rollout.token_lists(), rollout.is_truncated.tolist()
            append_jsonl(
                self.path, [{"key": key, "ids": ids, "texts": rollout.completions, "is_truncated": is_truncated}]
            )
            return rollout

        return generate

    def forget(self) -> None:
        """What was of use is done with; what somebody else's evaluation left stays."""
        others = [row for key, row in self.rows.items() if key not in self.used]
        if others:
            write_atomically(self.path, to_jsonl(others))
        else:
            self.path.unlink(missing_ok=True)


def _rollout(row: dict[str, Any]) -> Rollout:
    """What is needed to judge completions: no prompts, and log-probs of 0."""
    completions = [torch.tensor(ids) for ids in row["ids"]]
    mask = pad_sequence([torch.ones_like(ids, dtype=torch.bool) for ids in completions], batch_first=True)
    nothing = torch.zeros(len(completions), 0, dtype=torch.long)
    return Rollout(
        prompt_ids=nothing,
        prompt_mask=nothing.bool(),
        completion_ids=pad_sequence(completions, batch_first=True),
        completion_mask=mask,
        sampling_logps=torch.zeros(mask.shape),
        is_truncated=torch.tensor(row["is_truncated"]),
        completions=row["texts"],
    )
