"""Every measurement of speed and memory, and the READMEs that show them.

    python -m benchmarks            about 20 minutes on two cores; goes on where it stopped

What is measured with the code as it is stays as it is. Times want a machine that does nothing else. The measurement of
learning, python -m benchmarks.toy, takes as long again and is not among these; benchmarks.gpu needs a CUDA device.
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
        subprocess.run([sys.executable, "-m", f"benchmarks.{script}"], cwd=ROOT, check=True)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
