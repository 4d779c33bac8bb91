"""Every measurement of speed and memory, and the READMEs that show them.

    python -m benchmarks            22 minutes on two cores; goes on where it stopped

What is measured with the code as it is stays as it is. Times want a machine that does nothing else. The measurement of
learning, python -m benchmarks.toy, takes a quarter of an hour and is not among these; its results must be there for
the READMEs. benchmarks.gpu needs a CUDA device. TRL is needed: pip install -r requirements-dev.txt
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
    for script in SCRIPTS:  # each in a process of its own
        print(f"== python -m benchmarks.{script}", flush=True)
        status = subprocess.run([sys.executable, "-m", f"benchmarks.{script}"], cwd=ROOT).returncode
        if status:  # it has said why
            sys.exit(status)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
