"""Checkpoints and --resume: what is saved, what may change, what is said and what is refused.

That a resumed run is, bit for bit, the one that was never interrupted is shown in tests/fidelity/test_exact_resume.py.
"""

import dataclasses
import errno
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo.files
import grpo.run.checkpoint
import grpo.run.plots
from grpo.errors import InputError, RunError
from grpo.files import complete_folder, remove_folder, sha256, write_atomically
from grpo.models.saving import save_model, weights_sha256
from grpo.run.checkpoint import check_integrity, checkpoints, save_checkpoint, step_of
from grpo.settings.config import TYPES, resumed_config
from grpo.settings.rules import MAY_CHANGE_ON_RESUME
from tests.conftest import later_slow, loop_function, patch_loop
from tests.run import test_train as helpers
from tests.run.test_train import read, resume, train

small = helpers.small  # the fixture

FOUR = {"num_train_steps": 4, "save_every": 2, "eval_every": 2, "warmup_steps": 1}  # changes to `small`
CLOCKS = ("step_time", "rollout_time", "reward_time", "update_time", "eval/time")

FLAKY = """
broken = True
num_batches = 0

def fn(prompts, completions, **_):
    global num_batches
    num_batches += (is_batch := len(set(prompts)) < len(prompts))  # groups, no evaluation; first the pre-flight's
    if broken and is_batch and num_batches == {batch}:
        raise ValueError("no such luck")
    return [sum(letter in "02468" for letter in text) / max(len(text), 1) for text in completions]
"""


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than these runs."""
    monkeypatch.setattr(grpo.run.plots, "_save", lambda figure, path: None)


@pytest.fixture(scope="module")
def whole(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps with checkpoints after the second and the fourth; not to be touched."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo.run.plots, "_save", lambda figure, path: None)
        train(small, folder, **FOUR)
    return folder


def interrupted(whole: Path, folder: Path, *, after: int = 2) -> Path:
    """A copy of a finished run as a power cut leaves it: killed while it worked at what comes after step `after`."""
    shutil.copytree(whole, folder)
    for step in checkpoints(folder):
        if step_of(step) > after:
            shutil.rmtree(step)
    shutil.rmtree(folder / "final")
    facts = json.loads((folder / "run.json").read_text())
    facts["settings"]["output_dir"] = str(folder)
    (folder / "run.json").write_text(json.dumps(facts | {"finished": None}))
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 99, "reward": 1e9}\n{"step": 100, "rew')
    return folder


def undisturbed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what a clock says."""
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]


def assert_same_run(first: Path, second: Path) -> None:
    """Samples, metrics, weights, optimizer: every bit."""
    assert (first / "samples.jsonl").read_bytes() == (second / "samples.jsonl").read_bytes()
    rows = [read(folder / "metrics.jsonl") for folder in (first, second)]
    assert undisturbed(rows[0]) == undisturbed(rows[1])
    last = checkpoints(first)[-1].name
    for name in ("final", "best", last):
        file = next((first / name).glob("*model.safetensors")).name  # an adapter's is called adapter_model.safetensors
        assert (first / name / file).read_bytes() == (second / name / file).read_bytes()
    states = [torch.load(folder / last / "optimizer.pt", weights_only=True) for folder in (first, second)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    assert len(states[0]["state"]) > 10
    for weight, moments in states[0]["state"].items():
        assert set(moments) == {"step", "exp_avg", "exp_avg_sq"}
        for name, value in moments.items():
            assert torch.equal(value, states[1]["state"][weight][name])
    for name in ("state.json", "reference.safetensors", "critic.safetensors"):
        contents = [
            path.read_bytes() if path.is_file() else None for path in (first / last / name, second / last / name)
        ]
        assert contents[0] == contents[1]


# What is saved, and how often


def test_a_reference_that_moved_is_saved_with_its_weights(small: dict[str, Any], tmp_path: Path) -> None:
    train(small, tmp_path / "run", **FOUR, ref_update_every=3)
    base = AutoModelForCausalLM.from_pretrained(small["model_name"]).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    saved = [load_file(tmp_path / "run" / f"step-00000{step}" / "reference.safetensors")[name] for step in (2, 4)]
    assert torch.equal(saved[0], base[name])
    assert not torch.equal(saved[1], base[name])
    assert not torch.equal(saved[1], load_file(tmp_path / "run" / "step-000004" / "model.safetensors")[name])


def test_a_reference_that_should_be_there_and_is_not_is_refused(small: dict[str, Any], tmp_path: Path) -> None:
    """Its absence is no sign that it never moved. The checksums are in order: somebody took it out of them too."""
    train(small, tmp_path / "run", **FOUR, ref_update_every=3)
    folder = tmp_path / "run" / "step-000004"
    (folder / "reference.safetensors").unlink()
    sums = json.loads((folder / "checksums.json").read_text())
    del sums["reference.safetensors"]
    (folder / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(InputError) as raised:
        resume(tmp_path / "run", num_train_steps=5)
    assert str(raised.value) == f"--resume: {folder} cannot be loaded: reference.safetensors is missing"


def test_a_reference_that_never_moves_is_not_saved(whole: Path) -> None:
    assert not list(whole.glob("step-*/reference.safetensors"))


def test_a_run_that_only_lacks_its_end_gets_it(whole: Path, tmp_path: Path) -> None:
    """Killed between the last checkpoint and final/: nothing is left to train."""
    folder = interrupted(whole, tmp_path / "run", after=4)
    resume(folder)
    assert_same_run(whole, folder)
    assert json.loads((folder / "run.json").read_text())["finished"]


def test_run_json_remembers_every_resume(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train_grpo.py", "--resume"])
    folder = interrupted(whole, tmp_path / "run")
    resume(folder)
    resume(folder, num_train_steps=5)
    before, after = (json.loads((path / "run.json").read_text()) for path in (whole, folder))
    assert [entry["after_step"] for entry in after["resumed"]] == [2, 4]
    assert set(after["resumed"][0]) == {"after_step", "at", "command", "commit", "versions"}
    assert after["resumed"][0]["command"] == ["train_grpo.py", "--resume"]
    for key in ("started", "command", "base_sha256", "examples"):
        assert after[key] == before[key]
    assert (before["settings"]["num_train_steps"], after["settings"]["num_train_steps"]) == (4, 5)


def test_without_a_checkpoint_the_run_begins_again(whole: Path, tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path / "run", after=0)
    resume(folder)
    assert_same_run(whole, folder)
    assert json.loads((folder / "run.json").read_text())["resumed"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # nothing was moved aside


def test_only_the_newest_checkpoints_are_kept(small: dict[str, Any], tmp_path: Path) -> None:
    train(small, tmp_path / "run", num_train_steps=5, save_every=1, keep_checkpoints=3)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-000003", "step-000004", "step-000005"]
    resume(tmp_path / "run", num_train_steps=6, keep_checkpoints=1)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-000006"]


def test_what_a_killed_process_left_half_written_is_removed(whole: Path, tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path / "run")
    (folder / ".step-000004.123.unfinished").mkdir()
    (folder / ".step-000004.123.unfinished" / "model.safetensors").write_text("half of it")
    (folder / ".run.json.123.unfinished").write_text("{")
    resume(folder)
    assert not list(folder.glob(".*unfinished*"))
    assert_same_run(whole, folder)


# A finished run, and more steps


def test_a_finished_run_says_so_and_is_left_alone(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    for changes in ({}, {"num_train_steps": 3}):
        with pytest.raises(SystemExit) as raised:
            resume(tmp_path / "run", **changes)
        assert raised.value.code == 0
        said = capsys.readouterr().out
        assert f"already at step 4; --num_train_steps {changes.get('num_train_steps', 4)} asks for no more" in said
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_more_steps_go_on_and_the_jump_of_the_learning_rate_is_said(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    rows = resume(tmp_path / "run", num_train_steps=6)
    assert [row["step"] for row in rows] == list(range(7))
    said = capsys.readouterr().out
    assert "Going on after step 4 of 6" in said
    # after 1 step of warm-up a cosine over 3 has come to 0, one over 5 is at cos^2(3/5 * pi/2) = 0.3455 of 5e-4
    assert "jumps from 0 to 0.000173" in said
    assert rows[5]["learning_rate"] == pytest.approx(0.345491503 * 5e-4)
    assert undisturbed(rows[:5]) == undisturbed(read(whole / "metrics.jsonl"))


def test_a_constant_learning_rate_does_not_jump(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that N steps and N more are those of one run of 2N."""
    constant = FOUR | {"lr_schedule": "constant", "eval_every": 4}
    train(small, tmp_path / "whole", **constant)
    train(small, tmp_path / "run", **(constant | {"num_train_steps": 2}))
    capsys.readouterr()
    resume(tmp_path / "run", num_train_steps=4)
    assert "jump" not in capsys.readouterr().out
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()
    finals = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("run", "whole")]
    assert finals[0] == finals[1]


# What may not change


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_name", "tiny"), ("base_seed", 1), ("train_file", "data/math_tasks_train.jsonl"),
        ("eval_file", "data/math_tasks_eval.jsonl"), ("rewards", "[math]"), ("batch_size", 8), ("group_size", 8),
        ("max_completion_length", 7), ("temperature", 0.5), ("kl_coeff", 0), ("ref_update_every", 1),
        ("learning_rate", 1e-3), ("lr_schedule", "constant"), ("num_iterations", 2), ("num_minibatches", 2),
        ("seed", 1), ("eval_metric", "eval/reward"), ("dtype", "bfloat16"),
    ],
)  # fmt: skip
def test_a_setting_that_would_make_it_another_run_is_refused(whole: Path, key: str, value: object) -> None:
    with pytest.raises(InputError) as raised:
        resumed_config(None, [f"output_dir={whole}", f"{key}={value}"])
    assert str(raised.value).startswith(f"--resume: {key}: ")
    assert all(name in str(raised.value) for name in MAY_CHANGE_ON_RESUME)


def test_a_settings_file_may_change_no_more_than_a_flag(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text(f"num_train_steps: 9\noutput_dir: {whole}\n")
    assert resumed_config(tmp_path / "more.yaml").num_train_steps == 9
    (tmp_path / "more.yaml").write_text(f"seed: 9\noutput_dir: {whole}\n")
    with pytest.raises(InputError, match=r"^--resume: seed: 9, but the run in .* has 0"):
        resumed_config(tmp_path / "more.yaml")


def test_what_may_change_changes_and_everything_else_is_the_runs_own(whole: Path) -> None:
    changes = {
        "num_train_steps": 9, "eval_every": 3, "save_every": 5, "keep_checkpoints": 7, "micro_batch_size": 2,
        "micro_batch_tokens": 100, "shared_prefix": "never", "compile": True,
    }  # fmt: skip
    config = resumed_config(None, [f"output_dir={whole}"] + [f"{key}={value}" for key, value in changes.items()])
    recorded = json.loads((whole / "run.json").read_text())["settings"]
    assert set(changes) | {"device", "num_train_epochs"} == set(MAY_CHANGE_ON_RESUME)
    for key in TYPES:
        assert getattr(config, key) == changes.get(key, recorded[key]), key


def test_other_micro_batches_go_on_with_the_same_run(whole: Path, tmp_path: Path) -> None:
    """Up to rounding: what a device has room for, or how the prompts are laid out, is no part of the experiment."""
    folder = interrupted(whole, tmp_path / "run")
    rows = resume(folder, micro_batch_size=3, micro_batch_tokens=90, shared_prefix="always")
    settings = json.loads((folder / "run.json").read_text())["settings"]
    assert (settings["micro_batch_tokens"], settings["shared_prefix"]) == (90, "always")
    assert (folder / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    for ours, expected in zip(undisturbed(rows), undisturbed(read(whole / "metrics.jsonl")), strict=True):
        assert ours == pytest.approx(expected, rel=1e-3, abs=1e-5)
    weights = [load_file(path / "final" / "model.safetensors") for path in (folder, whole)]
    assert all((weights[0][name] - weights[1][name]).abs().max() < 1e-5 for name in weights[1])


def test_a_run_may_be_copied_elsewhere_before_it_goes_on(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "elsewhere")
    resume(tmp_path / "elsewhere", num_train_steps=5)
    settings = json.loads((tmp_path / "elsewhere" / "run.json").read_text())["settings"]
    assert settings["output_dir"] == str(tmp_path / "elsewhere")
    assert len(read(whole / "metrics.jsonl")) == 5


def test_another_base_under_the_same_name_is_no_new_anchor(small: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path / "run")
    shutil.copytree(small["model_name"], tmp_path / "model")
    facts = json.loads((folder / "run.json").read_text())
    facts["settings"]["model_name"] = str(tmp_path / "model")
    (folder / "run.json").write_text(json.dumps(facts))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1e-3
    model.save_pretrained(tmp_path / "model")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(InputError) as raised:
        resume(folder)
    assert "--resume: model_name no longer has the weights that this run started from" in str(raised.value)
    assert facts["base_sha256"][:12] in str(raised.value)
    assert before == {path: path.read_bytes() for path in before}  # not even the half lines were cut off


# Damage


def truncate(folder: Path) -> str:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return "model.safetensors differs from its checksum"


def flip_a_bit(folder: Path) -> str:
    content = bytearray((folder / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "optimizer.pt").write_bytes(content)
    return "optimizer.pt differs from its checksum"


def lose_a_file(folder: Path) -> str:
    (folder / "optimizer.pt").unlink()
    return "optimizer.pt is missing"


def lose_the_sums(folder: Path) -> str:
    (folder / "checksums.json").unlink()
    return "checksums.json cannot be read"


def garble_the_sums(folder: Path) -> str:
    (folder / "checksums.json").write_text('{"optimizer.pt": "12')
    return "checksums.json cannot be read"


def list_the_sums(folder: Path) -> str:
    (folder / "checksums.json").write_text("[1, 2]")
    return "checksums.json cannot be read"


def forget_a_sum(folder: Path) -> str:
    (folder / "checksums.json").write_text("{}")
    return "checksums.json does not name model.safetensors"


def change_the_state(folder: Path) -> str:
    path = folder / "state.json"
    path.write_text(path.read_text().replace('"step": 4', '"step": 3'))
    return "state.json differs from its checksum"


def empty_the_folder(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.mkdir()
    return "checksums.json cannot be read"


DAMAGES = [
    truncate, flip_a_bit, lose_a_file, lose_the_sums, garble_the_sums, list_the_sums, forget_a_sum, change_the_state,
    empty_the_folder,
]  # fmt: skip


@pytest.mark.parametrize("damage", later_slow(DAMAGES, 3), ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_named_with_a_way_on_that_works(
    whole: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    folder = interrupted(whole, tmp_path / "run", after=4)
    problem = damage(folder / "step-000004")
    before = (folder / "samples.jsonl").read_bytes()
    with pytest.raises(InputError) as raised:
        resume(folder)
    newest = folder / "step-000004"
    assert str(raised.value) == (
        f"--resume: {newest} is damaged: {problem}; to go on without it: "
        f"rm -r {newest} && python train_grpo.py --resume --output_dir {folder}"
    )
    assert (folder / "samples.jsonl").read_bytes() == before
    shutil.rmtree(newest)
    resume(folder)
    assert_same_run(whole, folder)


def test_an_older_checkpoint_that_is_damaged_does_not_matter(whole: Path, tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path / "run", after=4)
    truncate(folder / "step-000002")
    resume(folder, num_train_steps=5)
    assert [row["step"] for row in read(folder / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]


def test_with_no_good_checkpoint_left_the_run_begins_again_with_its_own_settings(whole: Path, tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path / "run", after=4)
    truncate(folder / "step-000002")
    problem = lose_a_file(folder / "step-000004")
    with pytest.raises(InputError) as raised:
        resume(folder)
    command = re.search(r"rm -r (.*) && (.*)", str(raised.value))
    assert command is not None
    assert problem in str(raised.value)
    assert set(command[1].split()) == {str(folder / "step-000004"), str(folder / "step-000002")}
    assert command[2] == f"python train_grpo.py --resume --output_dir {folder}"
    for path in command[1].split():
        shutil.rmtree(path)
    resume(folder)
    assert_same_run(whole, folder)


def test_with_no_good_checkpoint_of_a_finished_run_overwrite_is_named(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for path in checkpoints(tmp_path / "run"):
        truncate(path)
    with pytest.raises(InputError, match=r"&& python train_grpo\.py --overwrite"):
        resume(tmp_path / "run", num_train_steps=9)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_rows_that_the_checkpoint_counts_on_must_be_there(whole: Path, tmp_path: Path, name: str) -> None:
    folder = interrupted(whole, tmp_path / "run")
    (folder / name).write_bytes((folder / name).read_bytes()[:200])
    with pytest.raises(InputError, match=rf"--resume: .*{name} is damaged: it (should have|is shorter)"):
        resume(folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match=rf"--resume: .*{name}"):
        resume(folder)


# Failures on the way


def flaky(folder: Path, name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward module of the user's that raises at this batch of groups, until it is mended."""
    (folder / f"{name}.py").write_text(FLAKY.format(batch=batch))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_reward_that_raises_costs_no_step(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky(tmp_path, "flaky_at_3", 4, monkeypatch)
    settings = small | FOUR | {"rewards": "[flaky_at_3:fn]", "save_every": 50}
    folder = tmp_path / "run"
    with pytest.raises(RunError) as raised:
        train(settings, folder)
    assert str(raised.value) == (
        "reward flaky_at_3:fn raised ValueError: no such luck (flaky_at_3.py, line 9); step 2 is saved; "
        f"to go on: python train_grpo.py --resume --output_dir {folder}"
    )
    assert [path.name for path in checkpoints(folder)] == ["step-000002"]
    assert [row["step"] for row in read(folder / "metrics.jsonl")] == [0, 1, 2]
    sys.modules["flaky_at_3"].broken = False  # type: ignore[attr-defined]
    resume(folder)
    train(settings, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", folder)


def test_a_reward_that_raises_at_once_leaves_nothing_in_the_way(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of going on nor of the same command again, once the reward is mended."""
    flaky(tmp_path, "flaky_at_1", 2, monkeypatch)
    settings = small | FOUR | {"rewards": "[flaky_at_1:fn]"}
    with pytest.raises(RunError, match=r"no such luck .*; no step is saved yet; to begin again: .* --resume"):
        train(settings, tmp_path / "run")
    sys.modules["flaky_at_1"].broken = False  # type: ignore[attr-defined]
    for again in (lambda: resume(tmp_path / "run"), lambda: train(settings, tmp_path / "run")):
        assert [row["step"] for row in again()] == [0, 1, 2, 3, 4]


def test_a_reward_that_raises_on_the_held_out_problems_costs_no_step(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, calls = loop_function("evaluate_greedy"), []

    def failing(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:  # the first one is the base's
            raise RunError("the judge is away")
        return evaluate(*arguments, **settings)

    patch_loop(monkeypatch, "evaluate_greedy", failing)
    folder = tmp_path / "run"
    with pytest.raises(RunError, match="the judge is away; step 3 is saved"):
        train(small | FOUR, folder, eval_every=3, save_every=50)
    assert [row["step"] for row in resume(folder)] == [0, 1, 2, 3, 4]
    train(small | FOUR, tmp_path / "whole", eval_every=3, save_every=50)
    assert (tmp_path / "whole/final/model.safetensors").read_bytes() == (
        folder / "final/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "error",
    [RuntimeError("PytorchStreamWriter failed writing file"), OSError(errno.ENOSPC, "No space left on device")],
    ids=["torch", "system"],
)
def test_a_full_disk_costs_only_the_checkpoint_that_did_not_fit(
    small: dict[str, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    folder = tmp_path / "run"
    save = torch.save

    def save_once(content: object, path: Path) -> None:
        if "step-000004" in str(path):
            path.write_bytes(b"half of it")
            raise error
        save(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(grpo.run.checkpoint.torch, "save", save_once)
        with pytest.raises(RunError) as raised:
            train(small, folder, **FOUR)
    reason = error.strerror if isinstance(error, OSError) else str(error)
    assert str(raised.value).startswith(f"{folder / 'step-000004'} cannot be written: {reason}; step 2 is saved; ")
    assert [path.name for path in checkpoints(folder)] == ["step-000002"]
    assert not list(folder.glob(".*unfinished*"))
    resume(folder)
    assert_same_run(whole, folder)


def test_a_loss_that_is_not_finite_leaves_its_batch(small: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(RunError) as raised:
        train(small, folder, **(FOUR | {"learning_rate": 1e30, "save_every": 1}))
    path = next(folder.glob("failed-*.jsonl"))
    step = int(path.stem.removeprefix("failed-"))
    assert re.match(rf"step {step}: loss \S+, gradient norm nan; the batch lies in {path}; ", str(raised.value))
    assert f"start anew with a lower learning_rate, from the base or with --model_name {folder}" in str(raised.value)
    rows, tensors = read(path), load_file(path.with_suffix(".safetensors"))
    assert [row["step"] for row in rows] == [step] * 16
    assert rows[0].keys() == read(folder / "samples.jsonl")[0].keys()
    assert set(tensors) == {
        "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "sampling_logps", "is_truncated",
        "advantages",
    }  # fmt: skip
    assert {len(tensor) for tensor in tensors.values()} == {16}
    assert tensors["advantages"].flatten().tolist() == pytest.approx([row["advantage"] for row in rows])
    assert read(folder / "metrics.jsonl")[-1]["step"] == step - 1


# best/


def test_best_is_the_best_and_the_first_of_equals(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.1, 0.5, 0.3, 0.5, 0.4])  # of steps 0 ... 4
    evaluate = loop_function("evaluate_greedy")

    def scripted(*arguments: Any, **settings: Any) -> Any:
        return dataclasses.replace(evaluate(*arguments, **settings), reward=next(values))

    patch_loop(monkeypatch, "evaluate_greedy", scripted)
    changes = FOUR | {"eval_every": 1, "save_every": 1, "keep_checkpoints": 9, "eval_metric": "eval/reward"}
    rows = train(small, tmp_path / "run", **changes)
    assert [row["eval/reward"] for row in rows] == [0.1, 0.5, 0.3, 0.5, 0.4]
    best = tmp_path / "run" / "best"
    assert json.loads((best / "about.json").read_text()) == {"step": 1, "metric": "eval/reward", "value": 0.5}
    weights = [(folder / "model.safetensors").read_bytes() for folder in checkpoints(tmp_path / "run")]
    assert [(best / "model.safetensors").read_bytes() == bits for bits in weights] == [True, False, False, False]


def test_a_resumed_run_keeps_a_better_best(whole: Path, tmp_path: Path) -> None:
    folder = interrupted(whole, tmp_path / "run")
    best_before(folder, step=2, value=0.99)
    resume(folder)
    assert json.loads((folder / "best" / "about.json").read_text())["value"] == 0.99


def best_before(folder: Path, *, step: int, value: float) -> None:
    about = {"step": step, "metric": "eval/accuracy", "value": value}
    (folder / "best" / "about.json").write_text(json.dumps(about))


def test_a_best_from_steps_that_were_lost_is_forgotten(whole: Path, tmp_path: Path) -> None:
    """They are made again; with changed settings they may lead elsewhere, and no row would have its value."""
    folder = interrupted(whole, tmp_path / "run")
    best_before(folder, step=4, value=0.99)
    values = [row["eval/accuracy"] for row in resume(folder) if "eval/accuracy" in row]
    assert json.loads((folder / "best" / "about.json").read_text())["value"] in values


@pytest.mark.parametrize("text", [None, "", "[]", '{"step": 2}'])
def test_a_best_that_does_not_say_what_it_is_is_made_anew(whole: Path, tmp_path: Path, text: str | None) -> None:
    folder = interrupted(whole, tmp_path / "run")
    about = folder / "best" / "about.json"
    about.unlink() if text is None else about.write_text(text)
    resume(folder)
    assert json.loads(about.read_text())["step"] == 4


@pytest.mark.parametrize("key", ["base_sha256", "resumed", "examples"])
def test_a_run_json_that_lacks_something_is_no_traceback(whole: Path, tmp_path: Path, key: str) -> None:
    folder = interrupted(whole, tmp_path / "run")
    run = json.loads((folder / "run.json").read_text())
    del run[key]
    (folder / "run.json").write_text(json.dumps(run))
    if key == "base_sha256":
        with pytest.raises(InputError, match=r'run\.json has no "base_sha256": damaged'):
            resume(folder)
    else:
        assert resume(folder)[-1]["step"] == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [("data_sha256", []), ("resumed", 5), ("examples", 5), ("examples", [1]), ("examples", [{"index": "0"}])],
)
def test_a_run_json_with_something_of_another_kind_is_named(
    whole: Path, tmp_path: Path, key: str, value: object
) -> None:
    folder = interrupted(whole, tmp_path / "run")
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {key: value}))
    with pytest.raises(InputError, match=rf'run\.json: "{key}": .* (is not a|lacks an index)'):
        resume(folder)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x", r"metrics\.jsonl, line 1: not JSON: "),
        ("[" * 100_000, r"metrics\.jsonl, line 1: not JSON: "),
        ("1" * 5000, r"metrics\.jsonl, line 1: not JSON: "),
        ("5", r"--resume: .*metrics\.jsonl or .* is damaged"),
    ],
    ids=["no JSON", "deep", "long", "no row"],
)
def test_a_damaged_row_of_metrics_is_named(whole: Path, tmp_path: Path, row: str, message: str) -> None:
    folder = interrupted(whole, tmp_path / "run")
    path = folder / "metrics.jsonl"
    path.write_text(f"{row}\n{path.read_text()}")
    with pytest.raises(InputError, match=message):
        resume(folder)


def test_the_way_on_quotes_a_folder_with_a_space(whole: Path, tmp_path: Path) -> None:
    """Unquoted, `rm -r` would delete something else."""
    folder = interrupted(whole, tmp_path / "my run", after=4)
    truncate(folder / "step-000004")
    with pytest.raises(InputError, match=re.escape(f"rm -r '{folder}/step-000004' && ")):
        resume(folder)


# Whole or absent


def test_a_folder_appears_whole_and_replaces_the_earlier_one(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for text in ("one", "two"):
        with complete_folder(folder) as unfinished:
            (unfinished / text).write_text(text)
            assert not (folder / text).exists()
        assert [path.name for path in folder.iterdir()] == [text]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), RunError),
        (RuntimeError("file write failed"), RunError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (TypeError("a bug of ours"), TypeError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_a_folder_that_could_not_be_written_leaves_the_earlier_one(
    tmp_path: Path, error: BaseException, expected: type[BaseException]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "earlier").write_text("safe")

    def write() -> None:
        with complete_folder(folder) as unfinished:
            (unfinished / "half").write_text("hal")
            raise error

    with pytest.raises(expected) as raised:
        write()
    if expected is RunError:
        assert str(raised.value).startswith(f"{folder} cannot be written: ")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert [path.name for path in folder.iterdir()] == ["earlier"]


def test_the_faster_process_keeps_its_folder_where_nothing_is_to_be_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with complete_folder(folder, replace=False) as unfinished:
        (unfinished / "mine").write_text("")
        folder.mkdir()
        (folder / "theirs").write_text("")
    assert [path.name for path in folder.iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_without_a_parent_is_a_run_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot be written: No such file"), complete_folder(tmp_path / "a" / "b"):
        pytest.fail("there is nowhere to write to")


def test_a_text_is_replaced_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    write_atomically(path, "größer\n")
    write_atomically(path, "two\n")
    assert path.read_text(encoding="utf-8") == "two\n"

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match=r"run\.json cannot be written: No space left on device"):
        write_atomically(path, "three\n")
    assert path.read_text(encoding="utf-8") == "two\n"


def test_a_removed_folder_is_gone_and_its_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "step-000001"
    folder.mkdir()
    (folder / "model.safetensors").write_text("")
    seen = []
    delete = shutil.rmtree

    def spy(path: Path, **_: Any) -> None:
        seen.append((folder.exists(), path.name.startswith("."), path.name.endswith(".unfinished")))
        delete(path)

    monkeypatch.setattr(grpo.files.shutil, "rmtree", spy)
    remove_folder(folder)
    assert seen == [(False, True, True)]
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_sorted_by_number_and_nothing_else_counts(tmp_path: Path) -> None:
    for name in ("step-1000000", "step-999999", "step-000002", "step-notes", ".step-000003.1.unfinished", "best"):
        (tmp_path / name).mkdir()
    assert [step_of(path) for path in checkpoints(tmp_path)] == [2, 999999, 1000000]


def test_a_checkpoint_lists_all_its_files(whole: Path) -> None:
    folder = whole / "step-000002"
    state, sums = (json.loads((folder / name).read_text()) for name in ("state.json", "checksums.json"))
    assert state["step"] == 2
    for count in ("num_tokens", "num_completions"):
        assert state[count] == read(whole / "metrics.jsonl")[2][count]
    assert set(sums) == {path.name for path in folder.iterdir()} - {"checksums.json"}
    assert sums["optimizer.pt"] == sha256(folder / "optimizer.pt")
    samples = (whole / "samples.jsonl").read_bytes()[: state["samples_size"]]
    assert samples.count(b"\n") == 32
    assert samples.endswith(b"\n")


def test_a_tokenizer_with_several_chat_templates_can_be_saved(whole: Path, tmp_path: Path) -> None:
    """Its save_pretrained makes a folder within the folder, and a hash of a folder fails."""
    folder = interrupted(whole, tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(folder / "step-000002")
    tokenizer = AutoTokenizer.from_pretrained(folder / "step-000002")
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(
        folder,
        3,
        policy=model,
        tokenizer=tokenizer,
        optimizer=optimizer,
        modules={},
        counts={"num_tokens": 0, "num_completions": 0},
        keep_checkpoints=2,
    )
    sums = json.loads((folder / "step-000003" / "checksums.json").read_text())
    assert any("/" in name for name in sums)
    check_integrity(folder, "", "")


@pytest.mark.parametrize("key", ["train_file", "eval_file"])
def test_other_data_under_the_same_name_is_refused(small: dict[str, Any], tmp_path: Path, key: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(Path(small[key]).read_bytes())
    train(small | FOUR | {key: data}, tmp_path / "run")
    data.write_text(data.read_text() + '{"prompt": "What is 1 + 1?", "answer": "2"}\n')
    with pytest.raises(InputError, match=r"--resume: .*data\.jsonl is no longer the file that this run started with"):
        resume(tmp_path / "run", num_train_steps=5)


def test_a_new_last_step_is_evaluated_like_any_other(small: dict[str, Any], tmp_path: Path) -> None:
    """A run that was stopped at step 2 and is now to end there."""
    train(small | FOUR | {"eval_every": 3}, tmp_path / "long")
    folder = interrupted(tmp_path / "long", tmp_path / "run")
    rows = resume(folder, num_train_steps=2)
    short = train(small | FOUR | {"eval_every": 3, "num_train_steps": 2, "lr_schedule": "cosine"}, tmp_path / "short")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert set(rows[-1]) == set(short[-1])
    assert "eval/reward" in rows[-1]


def test_the_sum_of_the_weights_knows_names_shapes_and_values(small: dict[str, Any], tmp_path: Path) -> None:
    base = torch.nn.Linear(2, 3)
    same, turned, other = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2), torch.nn.Linear(2, 3)
    with torch.no_grad():
        for model in (base, same, other):
            model.weight.copy_(torch.arange(6.0).view(3, 2))
            model.bias.fill_(1.0)
        turned.weight.copy_(torch.arange(6.0).view(2, 3))
        other.weight[2, 1] = 5.0000005
    sums = [weights_sha256(model) for model in (base, same, turned, other, torch.nn.Sequential(base))]  # type: ignore[arg-type]
    assert sums[0] == sums[1]
    assert len(set(sums)) == 4
    model = AutoModelForCausalLM.from_pretrained(small["model_name"])
    save_model(model, AutoTokenizer.from_pretrained(small["model_name"]), tmp_path / "copy")
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert weights_sha256(copy) == weights_sha256(model)
