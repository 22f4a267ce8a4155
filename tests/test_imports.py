"""What importing kdtoolkit brings with it: times are measured in benchmarks/speed/import_time.py, not here."""

import subprocess
import sys

import pytest

CORE = "from kdtoolkit import Distiller"
ALL = "import kdtoolkit, kdtoolkit.methods, kdtoolkit.models, kdtoolkit.cli, kdtoolkit.testing"

# Runs `kd` with each line of stdin, and stops at the first one that imports torch, breaks or prints nothing.
COMMANDS = """
import contextlib, io, sys
from kdtoolkit.cli import main
for line in sys.stdin.read().splitlines():
    sys.argv = ["kd", *line.split()]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), contextlib.suppress(SystemExit):
        main()
    if "torch" in sys.modules or not printed.getvalue():
        sys.exit(f"{line}: {printed.getvalue()}")
"""


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import kdtoolkit; kdtoolkit.KDError", ("torch", "rich", "typer")),
        # `kd --help` takes a quarter of a second, most of it for pydantic's models of the options.
        ("import kdtoolkit.cli", ("torch", "numpy", "rich", "PIL", "multiprocessing", "scipy")),
        # torchvision brings torch's compiler (torch._dynamo, sympy): together they take as long as torch.
        (CORE, ("torchvision", "torch._dynamo", "sympy", "timm", "transformers", "ultralytics", "scipy", "pydantic")),
        (ALL, ("transformers", "ultralytics", "scipy", "optuna", "ray")),
        # It imports kdtoolkit.engine.train too.
        ("import kdtoolkit.benchmark.runner", ("ray", "scipy.stats", "scipy.optimize", "accelerate", "tensorboard")),
        ("import kdtoolkit.benchmark.cell_server", ("torch", "pydantic", "rich")),
    ],
)
def test_importing_brings_no_library_that_is_not_needed(code, absent):
    check = f"{code}; import sys; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_lists_and_wrong_calls_do_without_torch(tmp_path):
    commands = [
        "",
        "--help",
        "--version",
        "methods",
        "methods CrossKD",
        "methods --help",
        "adapters --help",
        "inspect --help",
        "train --help",
        "distill --help",
        "probe --help",
        "tune --help",
        "tune --data birds --budget soon",
        "probe --teacher runs/train-birds --share 2",
        "train --data birds --image-size 8",
        "distill --data birds --teachr runs/train-birds",
        "distill none.yaml",
        "benchmark",
        "benchmark --help",
        "benchmark suites",
        "benchmark suites --help",
        "benchmark run --help",
        "benchmark report --help",
        "bench",
        "--verbose",
        "methods CrosKD",
        "adapters --family GFL",
        "adapters --matrix --method CrosKD",
        f"adapters --matrix --markdown {tmp_path}/none/matrix.md",
        "inspect",
        f"inspect kdtoolkit/gfl --weights {tmp_path}/none.pth",
        f"inspect kdtoolkit/gfl --teacher-weights {tmp_path}",
        "data",
        "data --help",
        "data check --help",
        "data convert --help",
        "data show --help",
        f"data check {tmp_path}/none",
        f"data convert {tmp_path} x --to csv",
        "eval --help",
        "predict --help",
        "pseudo-label --help",
        f"eval model --data {tmp_path}/none",
        f"eval model --data {tmp_path} --class-map red",
        f"predict model {tmp_path}/none",
        f"pseudo-label model {tmp_path} --data {tmp_path}/none",
        "benchmark run qick",
        "benchmark run none.yaml",
        "benchmark run --device gpu",
        f"benchmark run --data {tmp_path}/none",
        f"benchmark report {tmp_path}/none",
    ]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS], input="\n".join(commands), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_names_that_are_imported_late_are_what_they_are():
    import kdtoolkit
    from kdtoolkit import distiller, libraries

    assert kdtoolkit.Distiller is distiller.Distiller
    assert kdtoolkit.Losses is distiller.Losses
    assert kdtoolkit.adapt is libraries.adapt
    assert set(kdtoolkit.__all__) <= set(dir(kdtoolkit))
    with pytest.raises(AttributeError, match="no attribute 'Distillery'"):
        kdtoolkit.Distillery  # noqa: B018
