"""uncompiled: keeps a function out of compiled code, without an import of torch's compiler beforehand."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function run as plain Python where its caller is compiled, as `torch.compiler.disable` does.

    That decorator imports the compiler where the function is defined, which doubles the time of `import kdtoolkit`.
    This one does so at the first call.
    """
    made: list[Any] = []

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if not made:
            made.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        found: T = made[0](*args, **kwargs)
        return found

    return run
