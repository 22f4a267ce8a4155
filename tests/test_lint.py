"""What `make check` looks at: an exclusion matches any part of a path, so a name too short leaves whole folders out."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_every_python_file_is_linted_once():
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--show-files", "."]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [str(Path(line).relative_to(ROOT)) for line in shown if line.endswith(".py")]
    folders = ("kdtoolkit", "tests", "benchmarks", "docs", "examples")
    expected = [str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert sorted(found) == sorted(path for path in expected if "build" not in Path(path).parts)
