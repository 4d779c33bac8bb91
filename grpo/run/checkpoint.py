"""Save and resume a run exactly. A folder or file written here is whole or absent, whenever the process is killed.

    step-000100/  model.safetensors, config.json, tokenizer …   an ordinary Hugging Face folder
                  optimizer.pt                                  AdamW's moments, loaded with weights_only=True
                  reference.safetensors, critic.safetensors     further models, where training moves them
                  state.json                                    step, bytes of samples.jsonl, what was counted so far
                  checksums.json                                sha256 of every other file

There is no random state to save: data order and sampling noise are functions of (seed, step), and dropout is off.
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

COUNTS = ("num_tokens", "num_completions")  # of the whole run so far
STATE = ("step", "samples_size", *COUNTS)  # what state.json holds


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
    """`run_folder`/step-N with all that step N + 1 depends on; then all but the newest `keep_checkpoints` are deleted.

    `modules` are the other models that training moves, each saved as NAME.safetensors; `counts` are those of `COUNTS`.
    The size of samples.jsonl says which of its lines belong to this checkpoint.
    """
    assert set(counts) == set(COUNTS)
    if (run_folder / f"step-{step:06d}").is_dir():
        return  # a run has one state after a step
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
    with suppress(OSError):  # the checkpoint itself is safe
        for folder in checkpoints(run_folder)[:-keep_checkpoints]:
            remove_folder(folder)


def load_checkpoint(
    folder: Path,
    policy: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    modules: Mapping[str, nn.Module],
    base_sha256: str,
) -> dict[str, int]:
    """Put everything back as it was after the checkpoint's step; returns what state.json says: the keys of `STATE`.

    `policy` comes in as the base, whose weights must still be those the run started from: the KL would silently be
    measured against another reference. `modules` as in `save_checkpoint`.

    Raises:
        InputError: the base is another one; a module's file is missing; a file is not what `save_checkpoint` writes,
            though its checksum is right.
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
    """Files that somebody else may have written are read by foreign code, which may raise anything, pages long."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except pickle.UnpicklingError as error:  # its own message explains how to run the code all the same
        raise InputError(
            f"--resume: {folder / 'optimizer.pt'} holds something else than tensors; it was not loaded"
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--resume: {folder} cannot be loaded: {reason}") from error


def check_integrity(run_folder: Path, resume_command: str, restart_command: str) -> None:
    """The newest checkpoint must be as it was written; if not, an InputError says how to go on without it."""
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
    """What is wrong with a checkpoint; None if it is whole."""
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
    """The step-... folders, oldest first."""
    folders = [path for path in run_folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which it was saved: step-000100 -> 100."""
    return int(checkpoint.name.removeprefix("step-"))
