"""Check that runs are still bit-identical, by hashes of short runs before and after a change of the code.

    python -m benchmarks.same_runs store          make the runs and store their hashes in .same_runs.json
    python -m benchmarks.same_runs check          make them again and compare; exit status 1 if a hash differs
    python -m benchmarks.same_runs check dapo     only the runs whose name contains "dapo"

Each run is a separate command, as a user would type it. The hashes cover samples.jsonl, the weights in final/, and
metrics.jsonl without its time columns. They are valid only for one processor and one version of torch, so they are not
in git. Store them on the commit before your change.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STORE = ROOT / ".same_runs.json"
CLOCK = ("step_time", "rollout_time", "reward_time", "update_time", "eval/time")  # columns that differ from run to run
STOP_AT = 7  # the step of the run that is killed and resumed

SMALL = ["batch_size=8", "group_size=8", "num_train_steps=6", "eval_every=3", "save_every=3"]
MIXTURE = [
    {"path": "data/math_tasks_train.jsonl", "eval_path": "data/math_tasks_eval.jsonl", "name": "a", "weight": 3},
    {"path": "data/math_tasks_test.jsonl", "eval_path": "data/math_tasks_eval.jsonl", "name": "b", "weight": 1},
]
RUNS: dict[str, list[str]] = {
    "default": ["num_train_steps=30"],
    "dapo": [*SMALL, "algorithm=dapo"],
    "rloo": [*SMALL, "algorithm=rloo"],
    "reinforce_pp": [*SMALL, "algorithm=reinforce_pp"],
    "gspo": [*SMALL, "algorithm=gspo", "num_minibatches=2"],
    "cispo": [*SMALL, "algorithm=cispo", "num_minibatches=2"],
    "entropy": [*SMALL, "entropy_coeff=0.01", "num_iterations=2"],
    "lora": [*SMALL, "lora_rank=4", "lora_alpha=8"],
    "mixture": [*SMALL, f"datasets={json.dumps(MIXTURE)}"],
    "mask_truncated": [*SMALL, "mask_truncated_completions=true", "max_completion_length=6"],
    "stopped_and_resumed": [*SMALL, "num_train_steps=15", f"save_every={STOP_AT}"],
    "ppo": [*SMALL, "algorithm=ppo"],
    "ppo_three_passes": [*SMALL, "algorithm=ppo", "num_iterations=3", "num_minibatches=2", "entropy_coeff=0.01"],
    "reference_moves": [*SMALL, "ref_update_every=2", "micro_batch_size=24"],
}


def hashes_of(name: str) -> dict[str, str]:
    """Make one run. Returns the sha256 of each compared item, by its name."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "run"
        settings = [f"--{setting.replace('=', ' ', 1)}" for setting in RUNS[name]]
        script = "examples/train_ppo.py" if name.startswith("ppo") else "train_grpo.py"
        command = [sys.executable, script, "--output_dir", str(folder), "--device", "cpu", "--dtype", "float32"]
        for setting in settings:
            command += setting.split(" ", 1)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        how: dict[str, Any] = {"cwd": ROOT, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        if name == "stopped_and_resumed":
            with subprocess.Popen(command, **how) as process:
                while not (folder / f"step-{STOP_AT:06d}").is_dir() and process.poll() is None:
                    time.sleep(0.02)
                process.send_signal(signal.SIGKILL)
            command.append("--resume")
        finished = subprocess.run(command, check=False, **how)
        if finished.returncode != 0:
            raise SystemExit(f"{name}: exit status {finished.returncode}: {finished.stderr.decode()[-2000:]}")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        metrics = [{key: row[key] for key in sorted(row) if key not in CLOCK} for row in rows]
        (weights,) = (folder / "final").glob("*.safetensors")
        return {
            "samples.jsonl": _sha256((folder / "samples.jsonl").read_bytes()),
            "final": _sha256(weights.read_bytes()),
            "metrics.jsonl": _sha256(json.dumps(metrics).encode()),
        }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Store the hashes or compare them. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("store", "check"))
    parser.add_argument("names", nargs="*", help="only runs whose name contains one of these")
    options = parser.parse_args(arguments)
    names = [name for name in RUNS if not options.names or any(part in name for part in options.names)]
    stored = json.loads(STORE.read_text()) if STORE.is_file() else {}
    differing = 0
    with ThreadPoolExecutor(max_workers=2) as pool:
        for name, hashes in zip(names, pool.map(hashes_of, names), strict=True):
            if options.action == "store":
                stored[name] = hashes
                print(f"stored   {name}", flush=True)
                continue
            wrong = [part for part, value in hashes.items() if stored.get(name, {}).get(part) != value]
            differing += bool(wrong)
            print(f"DIFFERS  {name}: {', '.join(wrong)}" if wrong else f"same     {name}", flush=True)
    if options.action == "store":
        STORE.write_text(json.dumps(stored, indent=2) + "\n")
    else:
        print(f"{len(names) - differing} of {len(names)} runs are the same to the bit")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
