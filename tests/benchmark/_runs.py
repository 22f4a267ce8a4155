"""Runs of made-up results that say which data and teacher they are of."""

import json

from kdtoolkit.benchmark.store import Store, write_atomic
from kdtoolkit.benchmark.suite import BASELINE, TEACHER
from tests.benchmark._suite import made_up, store_result, tiny

FINGERPRINTS = {"train_data": "trained", "val_data": "measured"}


def of(entry, seed, ap, *, teacher="weights", detector=None, methods="", **changes):
    """A result with fingerprints. `teacher`: the digest of the weights of the teacher that it had or is."""
    has_teacher = entry not in (BASELINE,)
    parts = {
        "detector": json.dumps((detector or tiny().student).model_dump(mode="json"), sort_keys=True),
        "methods": methods or entry,
        "seed": str(seed),
        "teacher": "key" if has_teacher and entry != TEACHER else "none",
    }
    fields = {
        "key": "key" if entry == TEACHER else f"{entry} {seed}",
        "key_parts": parts,
        "fingerprints": {**FINGERPRINTS, **({"teacher": teacher} if has_teacher else {})},
        "format": 2,
        "suite": "tiny",
    }
    return made_up(entry, seed, ap, **{**fields, **changes})


def store_run(root, *results, suite=None):
    """A run's folder with these results, each with a file for its weights."""
    store = Store(root)
    write_atomic(store.suite_path, (suite or tiny()).to_yaml().encode())
    for result in results:
        path = store.teacher_copy if result.entry == TEACHER else store.result_path(result.entry, result.seed)
        store_result(path, result)
        path.with_suffix(".pt").write_bytes(f"{result.name} {root}".encode())
    return root
