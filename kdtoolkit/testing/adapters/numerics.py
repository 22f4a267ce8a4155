"""Whether the numbers are the same in each run, and sound in bfloat16."""

from __future__ import annotations

from functools import partial

import torch

from kdtoolkit.testing._expect import (
    expect_backward,
    expect_float32,
    expect_losses,
    expect_same,
    outputs,
    without_onednn,
)
from kdtoolkit.testing.adapters._case import Case, mode
from kdtoolkit.testing.report import SEED, by_name


@without_onednn()
def _bfloat16(case: Case) -> None:
    """Under bfloat16 autocast predictions and losses are finite and in float32."""
    adapter = case.fresh(train=True)
    autocast = partial(torch.autocast, case.images[0].device.type, torch.bfloat16)
    with autocast():
        losses = case.losses(adapter)
    expect_losses(losses, "task losses")
    expect_backward(losses, adapter.model, "task losses", reaches=True)
    adapter.model.eval()
    with torch.no_grad(), autocast():
        view = case.show(adapter)
        expect_float32(outputs(view.head.predictions), "head")
        for i, state in enumerate(view.head.states):
            expect_float32(outputs(adapter.resume(state, i, view.head)), f"resumed from stage {i}")
        adapter.detections(view.head, view.batch)


def _deterministic(case: Case) -> None:
    """Two runs with the same seed are equal to the bit, in train and in eval mode."""
    for train in (True, False):
        runs = []
        for adapter in (case.fresh(train=train), case.fresh(train=train)):
            torch.manual_seed(SEED)
            with torch.set_grad_enabled(train):
                view = case.show(adapter)
                losses = adapter.task_losses(view.head, view.batch)[0] if train else {}
                runs.append(outputs(view.head.predictions) | losses)
        expect_same(runs[1], runs[0], f"the second run in {mode(train)}")


CHECKS = by_name(_bfloat16, _deterministic)
