"""Two processes of transformers' Trainer, for test_transformers.py: torchrun ... _two_trainers.py FOLDER."""

import os
import sys
from pathlib import Path

import torch
from transformers import RTDetrImageProcessor

from kdtoolkit.methods import PKD
from tests.conftest import tiny_gfl
from tests.integrations.test_transformers import examples, trainer

folder = Path(sys.argv[1])
pictures = torch.load(folder / "pictures.pt", weights_only=True)
boxes = torch.load(folder / "boxes.pt", weights_only=True)
processor = RTDetrImageProcessor(do_resize=False)
data = examples(processor, boxes, [picture.numpy() for picture in pictures])
run = trainer(folder, data, processor, [PKD()], tiny_gfl(seed=1, num_classes=2), ddp_backend="gloo")
run.train()
torch.save(run.model.state_dict(), folder / f"{os.environ['RANK']}.pt")
torch.distributed.destroy_process_group()
