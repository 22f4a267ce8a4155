import time

import pytest

from kdtoolkit.engine.stopwatch import Stopwatch


def busy(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_pauses_do_not_count_and_sleep_is_no_cpu_time():
    begun = time.perf_counter()
    watch = Stopwatch(10.0, 5.0)
    busy(0.05)
    with watch.paused():
        busy(0.2)
        time.sleep(0.1)
    time.sleep(0.1)
    seconds, cpu_seconds = watch.read()
    taken = time.perf_counter() - begun
    assert 0.15 <= seconds - 10 <= taken - 0.3
    assert cpu_seconds - 5 == pytest.approx(0.05, abs=0.04)
