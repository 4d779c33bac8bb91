"""Save and resume a run exactly. Checkpoints are written atomically: a killed process leaves no partial checkpoint.

    step-000100/  model.safetensors, config.json, tokenizer …   a standard Hugging Face folder
                  optimizer.pt                                  AdamW's moments, loaded with weights_only=True
                  reference.safetensors, critic.safetensors     other models that training changes
                  state.json                                    step, size of samples.jsonl in bytes, counts so far
                  checksums.json                                sha256 of every other file

No random state is saved: data order and sampling noise are functions of (seed, step), and dropout is disabled.
"""

import json
import pickle
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import load_model as load_safetensors
from safetensors.torch import save_model as save_safetensors
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from grpo.errors import InputError
from grpo.files import complete_folder, files_in, remove_folder, sha256, sync
from grpo.models.lora import ADAPTER_FILE, has_adapter, load_adapter, save_base
from grpo.models.saving import weights_sha256

COUNTS = ("num_tokens", "num_completions")  # totals of the run so far
STATE = ("step", "samples_size", *COUNTS)  # keys of state.json


def save_checkpoint(
    run_folder: Path,
    step: int,
    *,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    modules: Mapping[str, nn.Module],
    counts: Mapping[str, int],
    keep_checkpoints: int,
) -> None:
    """Write `run_folder`/step-N with everything that step N + 1 needs. Then delete old checkpoints.

    `modules`: other models that training changes, each saved as NAME.safetensors. `counts`: totals named in `COUNTS`.
    `keep_checkpoints`: how many of the newest checkpoints to keep. The stored size of samples.jsonl tells which of its
    lines belong to this checkpoint.
    """
    assert set(counts) == set(COUNTS)
    if (run_folder / f"step-{step:06d}").is_dir():
        return  # already saved: a run has only one state after a step
    with complete_folder(run_folder / f"step-{step:06d}") as unfinished:
        policy.save_pretrained(unfinished)
        save_base(policy, unfinished)
        tokenizer.save_pretrained(unfinished)
        torch.save(optimizer.state_dict(), unfinished / "optimizer.pt")
        for name, module in modules.items():
            save_safetensors(module, str(unfinished / f"{name}.safetensors"))
        for name in ("metrics.jsonl", "samples.jsonl"):
            sync(run_folder / name)
        state = {"step": step, "samples_size": (run_folder / "samples.jsonl").stat().st_size, **counts}
        (unfinished / "state.json").write_text(json.dumps(state) + "\n")
        hashes = {str(path.relative_to(unfinished)): sha256(path) for path in files_in(unfinished)}
        (unfinished / "checksums.json").write_text(json.dumps(hashes, indent=2) + "\n")
    with suppress(OSError):  # the new checkpoint is already on disk
        for folder in checkpoints(run_folder)[:-keep_checkpoints]:
            remove_folder(folder)


def load_checkpoint(
    folder: Path,
    policy: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    modules: Mapping[str, nn.Module],
    base_sha256: str,
) -> dict[str, int]:
    """Restore policy, optimizer and modules as they were after the checkpoint's step. Returns the data of state.json.

    `policy` must be the base model with the weights that the run started from. With other weights, the KL would
    silently be measured against a different reference. `modules`: as in `save_checkpoint`.

    Raises:
        InputError: the base model has changed; the file of a module is missing; a file with a correct checksum does not
            have the format that `save_checkpoint` writes.
    """
    if weights_sha256(policy) != base_sha256:
        raise InputError(
            "--resume: model_name no longer has the weights that this run started from "
            f"(run.json: sha256 {base_sha256[:12]}…), so it cannot be the reference of the KL"
        )
    with _loading(folder):
        if has_adapter(policy):
            load_adapter(policy, folder)
        else:
            how = {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": False}
            policy.load_state_dict(AutoModelForCausalLM.from_pretrained(folder, **how).state_dict())
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
        for name, module in modules.items():
            if not (folder / f"{name}.safetensors").is_file():
                raise ValueError(f"{name}.safetensors is missing")
            load_safetensors(module, folder / f"{name}.safetensors")
        state = json.loads((folder / "state.json").read_text())
        is_state = isinstance(state, dict) and all(type(state.get(key)) is int for key in STATE)
        if not is_state or state["step"] != step_of(folder):
            names = ", ".join(STATE)
            raise ValueError(f"state.json: expected whole numbers for {names}, and the folder's step")
        return state


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Turn any exception from reading a checkpoint into one line. The libraries raise many kinds, often pages long."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except pickle.UnpicklingError as error:  # its message tells how to run untrusted code
        raise InputError(
            f"--resume: {folder / 'optimizer.pt'} holds something else than tensors; it was not loaded"
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--resume: {folder} cannot be loaded: {reason}") from error


def check_integrity(run_folder: Path, resume_command: str, restart_command: str) -> None:
    """Check the checksums of the newest checkpoint. If it is damaged, an InputError says how to go on without it."""
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(checkpoints(run_folder)):
        problem = _damage(folder)
        if problem is None:
            break
        damaged.append((folder, problem))
    if damaged:
        command = resume_command if len(damaged) < len(checkpoints(run_folder)) else restart_command
        remove = " ".join(shlex.quote(str(folder)) for folder, _ in damaged)
        newest, problem = damaged[0]
        raise InputError(f"--resume: {newest} is damaged: {problem}; to go on without it: rm -r {remove} && {command}")


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint. None if it is intact."""
    try:
        hashes = dict(json.loads((folder / "checksums.json").read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return "checksums.json cannot be read"
    weights = ADAPTER_FILE if ADAPTER_FILE in hashes else "model.safetensors"
    if missing := {"state.json", "optimizer.pt", weights} - set(hashes):
        return f"checksums.json does not name {sorted(missing)[0]}"
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != expected:
            return f"{name} differs from its checksum"
    return None


def checkpoints(run_folder: Path) -> list[Path]:
    """The step-N folders, oldest first."""
    folders = [path for path in run_folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which the checkpoint was saved: step-000100 -> 100."""
    return int(checkpoint.name.removeprefix("step-"))
