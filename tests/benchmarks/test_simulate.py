"""The simulation behind docs/results/statistics.md, in small."""

import numpy as np

from benchmarks.statistics import simulate


def test_each_part_is_a_whole_table():
    parts = (simulate.with_differences, simulate.gap, simulate.improvement, simulate.images)
    for part in parts:
        lines = "\n".join(part(np.random.default_rng(0), 5)).splitlines()
        table = [line for line in lines if line.startswith("|")]
        assert len(table) > 3
        assert {line.count("|") for line in table} == {table[0].count("|")}


def test_two_detectors_of_equal_quality_are_equally_good():
    rng = np.random.default_rng(0)
    differences = []
    for _ in range(12):
        truth, one, two = simulate.detections(rng, 60)
        aps = [simulate.resampled_aps(truth, found, np.ones((1, 60), np.int64))[0] for found in (one, two)]
        differences.append(aps[0] - aps[1])
    assert abs(np.mean(differences)) < 4 * np.std(differences) / 12**0.5
    assert np.std(differences) > 0.5
