"""Time of `import kdtoolkit` against `import torch, torchvision`: fresh processes in turn, medians."""

import statistics
import subprocess
import sys
import time

RUNS = 11
STATEMENTS = ("import torch, torchvision", "import torch, torchvision, kdtoolkit", "import kdtoolkit")


def seconds(statement: str) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - begun


def main() -> None:
    for statement in STATEMENTS:
        seconds(statement)  # fills the disk cache
    rounds = [[seconds(statement) for statement in STATEMENTS] for _ in range(RUNS)]
    for i, statement in enumerate(STATEMENTS):
        ratio = statistics.median(times[i] / times[0] for times in rounds)
        median = statistics.median(times[i] for times in rounds)
        print(f"{statement:40s} {median:6.2f} s   {100 * ratio:5.1f} % of the first")


if __name__ == "__main__":
    main()
