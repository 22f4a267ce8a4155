"""What importing kdtoolkit brings with it: measured in benchmarks/speed/import_time.py, not here."""

import subprocess
import sys

import pytest

CORE = "import kdtoolkit"
ALL = "import kdtoolkit, kdtoolkit.methods, kdtoolkit.models, kdtoolkit.cli, kdtoolkit.testing"


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        (CORE, ("timm", "transformers", "ultralytics", "pydantic", "pycocotools")),
        (ALL, ("transformers", "ultralytics")),
    ],
)
def test_importing_brings_no_library_that_is_not_needed(code, absent):
    check = f"{code}; import sys; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
