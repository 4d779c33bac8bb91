"""The folder of a run: who may write into it, what becomes of an earlier run, what run.json says."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import grpo.run.folder
import grpo.run.plots
import grpo.run.process
import train_grpo
from grpo.errors import InputError, RunError
from grpo.models.saving import weights_sha256
from grpo.run.folder import RunFolder, open_folder
from grpo.settings.config import Config, Options, load_config, resumed_config
from tests.conftest import loop_function, patch_loop
from tests.run import test_train as helpers
from tests.run.test_train import ROOT, read

small = helpers.small  # the fixture

HOLD = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(str(os.getpid()))
file.flush()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than these runs."""
    monkeypatch.setattr(grpo.run.plots, "_save", lambda figure, path: None)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of tmp_path/run."""
    (tmp_path / "run").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run" / ".lock")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def settings_of(folder: Path, **changes: object) -> Config:
    return load_config(None, [f"output_dir={folder}"] + [f"{key}={value}" for key, value in changes.items()])


def start(settings: dict[str, Any], folder: Path, *, overwrite: bool = False, **changes: object) -> None:
    """One step in this process."""
    config = settings_of(folder, **(settings | {"num_train_steps": 1} | changes))
    train_grpo.main(config, Options(overwrite=overwrite))


def fail(config: Config, error: Exception) -> None:
    """A run that raises as soon as it has begun."""
    with open_folder(config, Options()) as run:
        run.begin(base_sha256="", examples=[])
        raise error


def facts_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def interrupt(folder: Path) -> None:
    """As if the finished run had been killed before its end."""
    (folder / "run.json").write_text(json.dumps(facts_of(folder) | {"finished": None}))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# The lock


def test_a_folder_that_another_process_holds_is_refused_with_its_number(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(InputError) as raised, open_folder(settings_of(tmp_path / "run"), Options()):
        pytest.fail("two runs in one folder")
    assert str(raised.value) == f"output_dir: {tmp_path / 'run'} is in use by another run (process {holder.pid})"


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    lock = tmp_path / "run" / ".lock"
    assert lock.read_text() == str(holder.pid)
    with open_folder(settings_of(tmp_path / "run"), Options()):
        assert lock.read_text() == str(os.getpid())


def test_a_leftover_lock_file_locks_nothing(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("999999999 and more digits than the next one will write")
    with open_folder(settings_of(tmp_path / "run"), Options()):
        assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())


def test_the_lock_is_let_go_at_the_end_and_after_an_error(small: dict[str, Any], tmp_path: Path) -> None:
    config = settings_of(tmp_path / "run", **small)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fail(config, ZeroDivisionError())
    with open_folder(config, Options()) as run:
        assert run.facts["settings"]["group_size"] == 4


def test_a_second_run_is_refused_while_the_first_one_lasts_also_after_it_moved_an_earlier_one_aside(
    small: dict[str, Any], tmp_path: Path
) -> None:
    """The lock file moves away with the earlier run, so the new folder needs one of its own."""
    start(small, tmp_path / "run")
    config = settings_of(tmp_path / "run", **small)
    with open_folder(config, Options()) as run:
        for _ in range(2):
            with pytest.raises(InputError, match="in use by another run"), open_folder(config, Options()):
                pytest.fail("two runs in one folder")
            if not run.is_training:
                run.begin(base_sha256="", examples=[])
    assert len(names_in(tmp_path)) == 2


@pytest.mark.slow
def test_a_second_command_is_refused_in_one_line(small: dict[str, Any], tmp_path: Path) -> None:
    with open_folder(settings_of(tmp_path / "run", **small), Options()):
        result = helpers.run(small, tmp_path / "run")
    assert result.returncode == 2
    assert result.stderr == f"error: output_dir: {tmp_path / 'run'} is in use by another run (process {os.getpid()})\n"


# An earlier run


def test_a_finished_run_is_moved_aside_under_the_time_it_began(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    start(small, folder)
    before = facts_of(folder)
    (folder / "notes.txt").write_text("my own")
    capsys.readouterr()
    start(small, folder, seed=1)
    name = "run-" + before["started"].replace(":", "-")
    assert names_in(tmp_path) == {"run", name}
    assert facts_of(tmp_path / name) == before
    assert (tmp_path / name / "notes.txt").read_text() == "my own"
    assert facts_of(folder)["settings"]["seed"] == 1
    assert f"The earlier run in {folder} now lies in {name} beside it" in capsys.readouterr().out


def test_runs_within_one_second_all_survive(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpo.run.folder, "_now", lambda: "2024-01-02T03:04:05")
    for seed in (1, 2, 3):
        start(small, tmp_path / "run", seed=seed)
    seeds = {path.name: facts_of(path)["settings"]["seed"] for path in tmp_path.iterdir()}
    assert seeds == {"run-2024-01-02T03-04-05": 1, "run-2024-01-02T03-04-05+": 2, "run": 3}


def test_an_unfinished_run_is_refused_with_the_ways_out(small: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    start(small, folder)
    interrupt(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(InputError) as raised:
        start(small, folder)
    for text in (str(folder), "unfinished run", "--resume", "--overwrite", "--output_dir"):
        assert text in str(raised.value)
    assert before == {path: path.read_bytes() for path in before}
    assert names_in(tmp_path) == {"run"}


def test_one_completion_is_enough_for_a_run_to_be_missed(small: dict[str, Any], tmp_path: Path) -> None:
    """Also without a checkpoint: the samples of two hundred steps may be all that somebody wanted."""
    config = settings_of(tmp_path / "run", **small)
    with open_folder(config, Options()) as run:
        run.begin(base_sha256="", examples=[])
        run.append({"step": 1}, [{"step": 1}])
    with pytest.raises(InputError, match="unfinished run"), open_folder(config, Options()):
        pytest.fail("deleted or moved")


def test_a_run_stopped_before_its_first_step_is_replaced_without_a_word(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    config = settings_of(folder, **small)
    with open_folder(config, Options()) as run:
        run.begin(base_sha256="", examples=[])
        run.append({"step": 0, "eval/accuracy": 0.0})
    (folder / "best").mkdir()
    (folder / "best" / "about.json").write_text('{"value": 99}')
    capsys.readouterr()
    start(small, folder, seed=5)
    assert "earlier run" not in capsys.readouterr().out
    assert names_in(tmp_path) == {"run"}
    assert facts_of(folder)["settings"]["seed"] == 5
    assert [row["step"] for row in read(folder / "metrics.jsonl")] == [0, 1]
    assert json.loads((folder / "best" / "about.json").read_text())["value"] != 99


def test_overwrite_deletes_what_a_run_leaves_and_nothing_else(small: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    start(small, folder, num_train_steps=2, save_every=1)
    interrupt(folder)
    (folder / "thesis.txt").write_text("chapter one")
    (folder / "data").mkdir()
    (folder / "data" / "mine.jsonl").write_text("{}")
    (folder / "failed-000002.jsonl").write_text("{}")
    (folder / ".step-000003.1.unfinished").mkdir()
    start(small, folder, overwrite=True)
    assert names_in(tmp_path) == {"run"}
    assert (folder / "thesis.txt").read_text() == "chapter one"
    assert (folder / "data" / "mine.jsonl").read_text() == "{}"
    assert names_in(folder) - {"thesis.txt", "data"} == {
        ".lock", "run.json", "metrics.jsonl", "samples.jsonl", "best", "final", "step-000001",
    }  # fmt: skip
    assert [row["step"] for row in read(folder / "metrics.jsonl")] == [0, 1]


def test_overwrite_of_a_finished_run_does_not_move_it_aside(small: dict[str, Any], tmp_path: Path) -> None:
    start(small, tmp_path / "run")
    start(small, tmp_path / "run", overwrite=True)
    assert names_in(tmp_path) == {"run"}


def test_a_folder_that_holds_something_else_is_refused_and_kept(small: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("measured by hand for a year")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="is not empty and holds no run"):
            start(small, folder, overwrite=overwrite)
    assert (folder / "metrics.jsonl").read_text() == "measured by hand for a year"
    assert {name for name in names_in(folder) if not name.startswith(".")} == {"metrics.jsonl"}


def test_an_empty_folder_is_used(small: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".DS_Store").write_text("")
    start(small, tmp_path / "run")
    assert (tmp_path / "run" / "final").is_dir()


def test_a_missing_parent_is_made(small: dict[str, Any], tmp_path: Path) -> None:
    start(small, tmp_path / "a" / "b" / "run")
    assert (tmp_path / "a" / "b" / "run" / "run.json").is_file()


# What cannot work


@pytest.mark.parametrize("below", ["file/run", "file"])
def test_an_output_dir_that_cannot_be_is_named(small: dict[str, Any], tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("I am no folder")
    with pytest.raises(InputError) as raised:
        start(small, tmp_path / below)
    assert str(raised.value).startswith(f"output_dir: {tmp_path / below} cannot be used: ")
    assert (tmp_path / "file").read_text() == "I am no folder"


@pytest.mark.parametrize(
    "changes",
    [
        {"model_name": "/nowhere/at/all"},
        {"train_file": "missing.jsonl"},
        {"rewards": "[maths]"},
        {"max_completion_length": 10_000},
        {"rewards": "[tests.toy_rewards:nothing_applies]", "eval_file": "missing.jsonl"},
    ],
    ids=str,
)
def test_a_command_that_fails_leaves_the_earlier_run_where_it_was(
    small: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = tmp_path / "run"
    start(small, folder)
    before = (folder / "run.json").read_bytes()
    for overwrite in (False, True):
        with pytest.raises(InputError):
            start(small, folder, overwrite=overwrite, **changes)
    assert names_in(tmp_path) == {"run"}
    assert (folder / "run.json").read_bytes() == before
    assert (folder / "final" / "model.safetensors").is_file()


def test_rewards_that_apply_to_nothing_are_found_before_anything_is_moved(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "silent.py").write_text("def fn(prompts, completions, **_):\n    return [None] * len(prompts)\n")
    monkeypatch.syspath_prepend(tmp_path)
    start(small, tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(InputError, match="rewards: none of them applies"):
        start(small, tmp_path / "run", rewards="[silent:fn]")
    with pytest.raises(InputError, match="rewards: none of them applies"):
        start(small, tmp_path / "new", rewards="[silent:fn]")
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["{oops", "", "[]", "{}", '{"settings": 3, "finished": null}', "\xff"])
@pytest.mark.parametrize("options", [Options(), Options(overwrite=True)], ids=["plain", "overwrite"])
def test_a_damaged_run_json_is_an_error_that_names_it(
    small: dict[str, Any], tmp_path: Path, text: str, options: Options
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError) as raised, open_folder(settings_of(tmp_path / "run", **small), options):
        pytest.fail("a run began")
    assert str(tmp_path / "run" / "run.json") in str(raised.value)
    assert (tmp_path / "run" / "run.json").read_text(encoding="latin-1") == text


def test_a_damaged_run_json_ends_the_command_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{oops")
    result = helpers.run({}, tmp_path, "--resume")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {tmp_path / 'run.json'}: not JSON: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("options", [Options(dry_run=True), Options(preflight=True)], ids=["dry_run", "preflight"])
def test_a_look_ahead_touches_no_folder_and_needs_no_lock(
    small: dict[str, Any], tmp_path: Path, options: Options
) -> None:
    with (
        open_folder(settings_of(tmp_path / "run"), Options()),
        open_folder(settings_of(tmp_path / "run", **small), options) as run,
    ):
        assert run.lock is None
    assert not (tmp_path / "run").exists()


# What run.json and the last words say


def test_run_json_says_by_what_the_run_was_made(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/where/train_grpo.py", "--seed", "3"])
    before = datetime.now().replace(microsecond=0)
    start(small, tmp_path / "run", seed=3)
    facts = facts_of(tmp_path / "run")
    assert set(facts) == {
        "started", "finished", "command", "commit", "versions", "base_sha256", "data_sha256", "examples", "resumed",
        "settings",
    }  # fmt: skip
    started, finished = datetime.fromisoformat(facts["started"]), datetime.fromisoformat(facts["finished"])
    assert before <= started <= finished <= datetime.now()
    assert facts["command"] == ["train_grpo.py", "--seed", "3"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert facts["commit"] == (head.stdout.strip() if head.returncode == 0 else None)
    assert facts["versions"] == {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(small["model_name"], dtype=torch.float32)
    assert facts["base_sha256"] == weights_sha256(base)
    assert facts["resumed"] == []
    assert [example["index"] for example in facts["examples"]] == [0, 1, 2]
    assert load_config(recorded=facts["settings"]) == settings_of(
        tmp_path / "run", **(small | {"num_train_steps": 1, "seed": 3})
    )


def test_a_run_without_git_has_no_commit(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    start(small, tmp_path / "run")
    assert facts_of(tmp_path / "run")["commit"] is None


def test_run_json_is_unfinished_until_the_end(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    save = loop_function("save_model")

    def spy(policy: Any, tokenizer: Any, folder: Path, **rest: Any) -> None:
        save(policy, tokenizer, folder, **rest)
        seen.append((folder.name, facts_of(tmp_path / "run")["finished"]))

    patch_loop(monkeypatch, "save_model", spy)
    start(small, tmp_path / "run")
    assert seen == [("final", None)]
    assert facts_of(tmp_path / "run")["finished"]


def test_the_last_words_name_files_that_are_there(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(small, tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    holds = next(line for line in lines if line.startswith(f"{tmp_path / 'run'} holds "))
    assert holds.partition(" holds ")[2].split(", ") == [
        "best/", "final/", "metrics.jsonl", "run.json", "samples.jsonl", "step-000001/",
    ]  # fmt: skip
    assert lines[-1] == f"Next: python evaluate.py {tmp_path / 'run' / 'final'} --compare {small['model_name']}"


def test_a_failed_run_says_how_to_go_on(small: dict[str, Any], tmp_path: Path) -> None:
    config = settings_of(tmp_path / "my run", **small)
    command = f"python train_grpo.py --resume --output_dir '{tmp_path / 'my run'}'"
    with pytest.raises(RunError) as raised:
        fail(config, RunError("the reward is broken"))
    assert str(raised.value) == f"the reward is broken; no step is saved yet; to begin again: {command}"
    for step in (900, 1000000, 20):
        (tmp_path / "my run" / f"step-{step:06d}").mkdir()
    assert RunFolder(config).how_to_go_on() == f"step 1000000 is saved; to go on: {command}"
    assert RunFolder(settings_of(Path("checkpoints"))).how_to_go_on().endswith("python train_grpo.py --resume")


def test_the_bar_shows_the_newest_numbers(tmp_path: Path) -> None:
    run = RunFolder(settings_of(tmp_path))
    assert run.status() == {}
    run.append({"step": 0, "eval/accuracy": 0.25})
    run.append({"step": 1, "reward": 0.5, "completions/mean_length": 6.04}, [{"step": 1, "completion": "a"}])
    run.append({"step": 2, "reward": 0.126, "completions/mean_length": 7.0}, [{"step": 2, "completion": "b"}])
    assert run.status() == {"reward": "0.13", "accuracy": "0.250", "length": "7.0"}
    assert read(tmp_path / "metrics.jsonl") == run.rows
    assert [row["completion"] for row in read(tmp_path / "samples.jsonl")] == ["a", "b"]


def test_a_linked_output_dir_is_moved_aside_behind_its_link(small: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "scratch" / "real")
    for _ in range(2):
        start(small, tmp_path / "link")
    assert (tmp_path / "link" / "final").is_dir()
    assert len(list((tmp_path / "scratch").glob("real*/final"))) == 2


def test_the_current_folder_is_no_output_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for folder in (".", "..", tmp_path):
        with pytest.raises(InputError, match=r"output_dir: got .*, expected a folder that can be moved aside"):
            fail(settings_of(folder), ValueError())


@pytest.mark.parametrize("exists", [True, False])
def test_no_lock_is_left_where_no_run_began(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "run"
    if exists:
        folder.mkdir()
    with pytest.raises(InputError, match="wrong"), open_folder(settings_of(folder), Options()):
        raise InputError("wrong")
    assert folder.exists() == exists
    assert not exists or not list(folder.iterdir())


def test_no_lock_is_left_in_somebody_elses_folder(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="holds no run"):
        fail(settings_of(tmp_path), ValueError())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_parent_that_another_run_uses_by_now_stays(tmp_path: Path) -> None:
    def wrong_input_beside_another_run() -> None:
        with open_folder(settings_of(tmp_path / "sweep" / "a"), Options()):
            (tmp_path / "sweep" / "b").mkdir()
            raise InputError("wrong")

    with pytest.raises(InputError, match="wrong"):
        wrong_input_beside_another_run()
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["b"]


def test_a_finished_run_of_no_steps_is_moved_aside_too(small: dict[str, Any], tmp_path: Path) -> None:
    for _ in range(2):
        start(small, tmp_path / "run", num_train_steps=0)
    assert len(list(tmp_path.glob("run*/final"))) == 2


def test_overwrite_spares_files_that_only_look_like_a_runs(small: dict[str, Any], tmp_path: Path) -> None:
    start(small, tmp_path / "run")
    mine = ["step-by-step.md", "failed-ideas.txt", "best-of.txt", "step-1.txt"]
    for name in mine:
        (tmp_path / "run" / name).write_text("precious")
    start(small, tmp_path / "run", overwrite=True)
    assert [name for name in mine if not (tmp_path / "run" / name).exists()] == []


def test_ctrl_c_while_a_resumed_run_is_loading_says_what_is_saved(small: dict[str, Any], tmp_path: Path) -> None:
    start(small, tmp_path / "run")
    config = settings_of(tmp_path / "run", **(small | {"num_train_steps": 2}))
    with pytest.raises(KeyboardInterrupt, match="stopped; step 1 is saved"), open_folder(config, Options(resume=True)):
        raise KeyboardInterrupt


def test_an_infinite_setting_survives_in_json(small: dict[str, Any], tmp_path: Path) -> None:
    start(small, tmp_path / "run", max_grad_norm=".inf")
    text = (tmp_path / "run" / "run.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["settings"]["max_grad_norm"] == ".inf"
    assert resumed_config(None, [f"output_dir={tmp_path / 'run'}"]).max_grad_norm == float("inf")


def test_a_full_device_says_what_to_turn_down(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the device is out of memory: turn down micro_batch_tokens"):
        fail(settings_of(tmp_path / "run"), torch.OutOfMemoryError())


def test_an_overwrite_that_is_killed_leaves_a_run_that_can_be_named(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(small, tmp_path / "run")
    monkeypatch.setattr(grpo.run.folder, "write_atomically", lambda path, text: (_ for _ in ()).throw(SystemExit))
    with pytest.raises(SystemExit):
        start(small, tmp_path / "run", overwrite=True)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name[0] != "."] == ["run.json"]
    start(small, tmp_path / "run", overwrite=True)


def test_where_locks_do_not_exist_a_run_goes_without(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpo.run.process, "fcntl", None)
    for _ in range(2):
        start(small, tmp_path / "run")
    assert not (tmp_path / "run" / ".lock").exists()
