"""Spoil data sets in each format for some minutes, and count what the readers say.

    python benchmarks/reliability/fuzz_readers.py --seconds 120

Words and bytes of good files are replaced at random (`tests/data/_fuzz.py`). A reader must read what is left, with
boxes inside of their images, or refuse it by KDError. Anything else ends the script with the files that led to it.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.data import _fuzz

EXAMPLES = 500  # at a time


def fuzz(form: str, seconds: float) -> Counter[str]:
    """Run one format; how many data sets were spoilt, and how many of their splits were read or refused."""
    write, texts = _fuzz.FORMS[form]
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        root = write(Path(folder))
        end, number = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            number += 1

            @seed(number)
            @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(changes=_fuzz.changes(form), on_bad=st.sampled_from(["error", "skip"]))
            def run(changes: tuple[list, list], on_bad: str) -> None:
                counts["spoilt"] += 1
                counts.update(_fuzz.check(form, root, _fuzz.spoilt(texts, changes), on_bad))

            run()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120, help="for each format")
    seconds = parser.parse_args().seconds
    logging.disable()
    print("| format | data sets spoilt | splits read | splits refused by KDError | any other exception |")
    print("|---|---|---|---|---|")
    for form in _fuzz.FORMS:
        found = fuzz(form, seconds)
        print(f"| {form} | {found['spoilt']} | {found['read']} | {found['refused']} | 0 |", flush=True)


if __name__ == "__main__":
    main()
