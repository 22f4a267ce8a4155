"""Time imports and the lists of `kd`, each in a new process, in turn. Prints medians of wall-clock and CPU time."""

import platform
import resource
import statistics
import subprocess
import sys
import time

RUNS = 5
IMPORTS = ("torch", "torch, torchvision", "kdtoolkit", "kdtoolkit.distiller", "kdtoolkit.benchmark.runner")
STATEMENTS = {
    **{f"import {names}": ["-c", f"import {names}"] for names in IMPORTS},
    "kd --help": ["-m", "kdtoolkit", "--help"],
    "kd --version": ["-m", "kdtoolkit", "--version"],
    "kd methods": ["-m", "kdtoolkit", "methods"],
    "kd methods CrossKD": ["-m", "kdtoolkit", "methods", "CrossKD"],
    "kd benchmark suites": ["-m", "kdtoolkit", "benchmark", "suites"],
    "kd benchmark run --help": ["-m", "kdtoolkit", "benchmark", "run", "--help"],
    "kd benchmark run qick": ["-m", "kdtoolkit", "benchmark", "run", "qick"],
}


def seconds(arguments: list[str]) -> tuple[float, float]:
    """What a process takes: on the clock, and of the processor, which other programs disturb less."""
    begun, before = time.perf_counter(), processor_time()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if "Traceback" in done.stderr:
        raise RuntimeError(done.stderr)
    return time.perf_counter() - begun, processor_time() - before


def processor_time() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


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
        clock, used = (statistics.median(times[i][kind] for times in rounds) for kind in (0, 1))
        ratio = statistics.median(times[i][1] / times[0][1] for times in rounds)
        print(f"{name:48s} {clock:6.2f} s, {used:6.2f} s of the processor, {100 * ratio:5.1f} % of the first")


if __name__ == "__main__":
    main()
