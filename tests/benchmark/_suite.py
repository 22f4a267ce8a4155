"""A suite whose cells take a second, in the text that a user would write, and results as its cells would store them."""

from kdtoolkit.benchmark.store import CellResult, write_atomic
from kdtoolkit.benchmark.suite_file import parse_suite

TINY = """\
name: tiny
description: a few steps on a few images
expected_minutes: 1
seeds: 2
data:
  image_size: 64
  teacher_images: 8
  student_images: 4
  val_images: 4
teacher:
  model: kdtoolkit/gfl
  args: &detector
    backbone: resnet10t
    backbone_args: {channels: [8, 8, 16, 16], stem_width: 4}
    strides: [8, 16, 32]
    neck_channels: 16
    head_channels: 16
    head_blocks: 2
    head_groups: 4
    bins: 5
  train: {steps: 3, batch_size: 2, warmup_steps: 0}
student:
  model: kdtoolkit/gfl
  args: *detector
  train: {steps: 2, batch_size: 2, warmup_steps: 0}
entries:
  PKD: [PKD]
  CrossKD+PKD: [CrossKD, {PKD: {weight: 3.0}}]
"""


def tiny(*changes):
    """The suite, with texts of its file replaced."""
    text = TINY
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    return parse_suite(text, "tiny.yaml")


def made_up(entry, seed, ap, **changes):
    """A result that nothing has measured, to test what is made of results."""
    fields = {
        "entry": entry,
        "seed": seed,
        "key": "0123456789abcdef",
        "key_parts": {},
        "data": "made-up images",
        "evaluation": {"ap": ap, "ap50": 2 * ap, "ap75": ap / 2, "ap_small": None, "ap_medium": ap, "ap_large": ap},
        "per_class": {"cat": ap, "dog": ap},
        "steps": 100,
        "train_seconds": 20.0,
        "cpu_seconds": 0.2 * changes.get("steps", 100),
        "step_ms": 200.0,
        "peak_memory_mb": 512.0,
        "parameters": 12345,
        "history": [{"step": 100.0, "lr": 0.0, "task/cls": 0.5}],
        "warnings": [],
        "versions": {"kdtoolkit": "0.0", "python": "3.0"},
        "machine": "a machine",
        "device": "cpu",
        "threads": 1,
        "date": "2020-01-01T00:00:00+00:00",
    }
    return CellResult(**{**fields, **changes})


def store_result(path, result):
    write_atomic(path, result.model_dump_json().encode())
