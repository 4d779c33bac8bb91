"""Run every measurement of speed and memory, and write the results into the READMEs.

    python -m benchmarks            22 minutes on two cores; continues where it stopped

Results that were measured with the current code are kept. Run this on an otherwise idle machine. The measurement of
learning, python -m benchmarks.toy, takes 15 minutes and is not included, but the READMEs need its results.
benchmarks.gpu needs a CUDA device. TRL is required: pip install -r requirements-dev.txt
"""

import argparse
import subprocess
import sys
import time

from benchmarks.common import ROOT

SCRIPTS = ("floor", "vs_trl", "sampler", "logprobs", "scaling", "readme")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    start = time.perf_counter()
    for script in SCRIPTS:  # each in a separate process
        print(f"== python -m benchmarks.{script}", flush=True)
        status = subprocess.run([sys.executable, "-m", f"benchmarks.{script}"], cwd=ROOT).returncode
        if status:  # the script has printed why it failed
            sys.exit(status)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
