"""A suite whose cells take a second, in the text that a user would write."""

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
