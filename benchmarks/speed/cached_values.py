"""How far a step with a teacher cache lies from one with a live teacher: a table of all families of detectors.

    python benchmarks/speed/cached_values.py

Teacher and student are the tiny detectors of the adapters, with random weights. All methods that work for the pair run
at once. A row has the largest relative difference of a loss term, and the relative difference of the student's
gradient, for a cache in float32 and for one in bfloat16. It takes a minute or two on one core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from kdtoolkit import Distiller, adapt
from kdtoolkit.compatibility import why_refused
from kdtoolkit.matrix import families
from kdtoolkit.methods import all_methods
from kdtoolkit.teacher_cache import TeacherCache
from kdtoolkit.testing import example_batch

CLASSES = 3


def main() -> None:
    """Print the table."""
    print("| family | losses, float32 | gradient, float32 | losses, bfloat16 | gradient, bfloat16 |")
    print("|---|---|---|---|---|")
    for name, build in families().items():
        print(f"| {name} | {' | '.join(f'{x:.0e}' for x in differences(build))} |", flush=True)


def differences(build: Callable[[int], nn.Module]) -> Iterable[float]:
    """Differences of losses and gradient, in float32, then in bfloat16."""
    live, wanted = step(build, None)
    for cache in (TeacherCache.in_memory(), TeacherCache.in_memory(precision="bfloat16")):
        step(build, cache)
        losses, gradient = step(build, cache)
        assert cache.hits == cache.misses == 2
        yield max(abs(losses[term] - value) / max(abs(value), 1e-6) for term, value in live.items())
        yield float((gradient - wanted).norm() / wanted.norm())


def step(build: Callable[[int], nn.Module], cache: TeacherCache | None) -> tuple[dict[str, float], Tensor]:
    """Losses and the student's gradient of the first step."""
    models = []
    for seed in (1, 0):
        torch.manual_seed(seed)
        models.append(build(CLASSES))
    teacher, student = models
    specs = adapt(student).spec, adapt(teacher).spec
    torch.manual_seed(2)
    methods = [cls() for cls in all_methods().values() if why_refused(cls, *specs) is None]
    distiller = Distiller(teacher, student, methods, teacher_cache=cache).train()
    losses = distiller(*example_batch(CLASSES))
    losses.total.backward()
    gradients = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
    return {term: loss.item() for term, loss in losses.items()}, torch.cat(gradients)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
