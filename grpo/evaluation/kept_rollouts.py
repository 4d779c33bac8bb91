"""Completions kept in a file, so that a long evaluation that was stopped can continue where it stopped.

Each line of the file is one call of `generate_completions`: its completions, and a key. The key is a hash of the
model's weights and of all arguments of the call. A call with the same key is answered from the file; any other call
samples. So completions of other weights or other settings are never reused.
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
    """The completions sampled so far, in a file."""

    def __init__(self, path: Path, **circumstances: Any) -> None:
        """`circumstances`: everything else that completions depend on, such as the dtype."""
        self.path, self.circumstances = path, circumstances
        self.used: set[str] = set()  # the keys of all calls so far
        self.rows: dict[str, dict[str, Any]] = {}  # key -> line of the file
        if path.is_file():
            self.rows = {row["key"]: row for row in read_jsonl(path)}
            os.truncate(
                path, path.read_bytes().rfind(b"\n") + 1
            )  # drops an incomplete last line, left by a process that was killed

    def of(self, model: PreTrainedModel) -> Callable[..., Rollout]:
        """A function like `generate_completions`, for this model, that answers from the file if it can."""
        weights = weights_sha256(model)

        def generate(
            model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], **settings: Any
        ) -> Rollout:
            plain = {name: list(value) if isinstance(value, range) else value for name, value in settings.items()}
            stop_ids = sorted(stop_token_ids(model, tokenizer))
            text = json.dumps([weights, self.circumstances, stop_ids, list(prompts), plain], sort_keys=True)
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
        """Delete the lines that this evaluation used. Lines of other evaluations stay in the file."""
        others = [row for key, row in self.rows.items() if key not in self.used]
        if others:
            write_atomically(self.path, to_jsonl(others))
        else:
            self.path.unlink(missing_ok=True)


def _rollout(row: dict[str, Any]) -> Rollout:
    """A rollout with everything that scoring needs. Its prompts are empty and its log-probs are 0."""
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
