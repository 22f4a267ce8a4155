"""Times of imports and of `kd`'s lists, in fresh processes in turn: medians, and medians of each round's ratios."""

import platform
import statistics
import subprocess
import sys
import time

RUNS = 11
TORCH = "import torch, torchvision"
STATEMENTS = {
    TORCH: ["-c", TORCH],
    "import torch, torchvision, kdtoolkit.distiller": ["-c", f"{TORCH}, kdtoolkit.distiller"],
    "import kdtoolkit": ["-c", "import kdtoolkit"],
    "kd --help": ["-m", "kdtoolkit", "--help"],
    "kd --version": ["-m", "kdtoolkit", "--version"],
    "kd methods": ["-m", "kdtoolkit", "methods"],
    "kd methods CrossKD": ["-m", "kdtoolkit", "methods", "CrossKD"],
    "kd benchmark suites": ["-m", "kdtoolkit", "benchmark", "suites"],
    "kd benchmark run --help": ["-m", "kdtoolkit", "benchmark", "run", "--help"],
    "kd benchmark run qick": ["-m", "kdtoolkit", "benchmark", "run", "qick"],
}


def seconds(arguments: list[str]) -> float:
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if "Traceback" in done.stderr:
        raise RuntimeError(done.stderr)
    return time.perf_counter() - begun


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    for arguments in STATEMENTS.values():
        seconds(arguments)  # fills the disk cache
    rounds = [[seconds(arguments) for arguments in STATEMENTS.values()] for _ in range(RUNS)]
    print(f"{processor()}, Python {platform.python_version()}, {RUNS} rounds")
    for i, name in enumerate(STATEMENTS):
        ratio = statistics.median(times[i] / times[0] for times in rounds)
        median = statistics.median(times[i] for times in rounds)
        print(f"{name:48s} {median:6.2f} s   {100 * ratio:5.1f} % of the first")


if __name__ == "__main__":
    main()
