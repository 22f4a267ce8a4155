"""Two processes that train together, each on half of a batch, and one that has all of it: for tests/test_processes.py.

Starting a process takes seconds, so one pair walks through all cases and leaves what it found in files.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from kdtoolkit import Distiller
from kdtoolkit.adapters import torchvision
from kdtoolkit.compatibility import why_refused
from kdtoolkit.libraries import adapt
from kdtoolkit.methods import BCKD, CWD, FGD, LD, PKD, CrossKD, DeFeat, FitNet, LogitKD, Mimic, ObjectKD
from kdtoolkit.teacher_cache import TeacherCache
from tests.conftest import tiny_atss, tiny_fcos, tiny_gfl, tiny_retinanet

NATIVE = {"GFL": tiny_gfl, "ATSS": tiny_atss, "FCOS": tiny_fcos, "RetinaNet": tiny_retinanet}
TORCHVISION = {name: build for cls in torchvision.ADAPTERS for name, build in cls.examples().items()}


# Further methods and settings that divide by what the batch has.
OTHERS = "GFL, other methods"


def other_methods():
    ld = LD(valuable_weight=0.25, cls_weight=1.0)
    return [ld, Mimic(), BCKD(), LogitKD(), ObjectKD(), FitNet(region="boxes"), DeFeat(), CWD()]


def detectors(family):
    """A teacher, and a student of other channels where the family has an option for them."""
    if family == OTHERS:
        return NATIVE["GFL"](seed=1), NATIVE["GFL"](seed=2)
    if family in NATIVE:
        return NATIVE[family](seed=1), NATIVE[family](seed=2, head_channels=8)
    pair = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        pair.append(TORCHVISION[family](3))
    return tuple(pair)


def distiller_of(family, methods=None):
    teacher, student = detectors(family)
    if family == OTHERS and methods is None:
        methods = other_methods()
    if methods is None:
        specs = adapt(student).spec, adapt(teacher).spec
        methods = [method for method in (CrossKD(), PKD(), FGD(), LD()) if why_refused(method, *specs) is None]
    torch.manual_seed(3)  # what the methods learn
    distiller = Distiller(teacher, student, methods)
    distiller.train()
    for module in student.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()  # its statistics are those of one process's images
    return distiller


def halves(device="cpu"):
    """The parts of a batch of four images, whose canvases are of one size; there are more objects in the second."""
    generator = torch.Generator().manual_seed(0)
    boxes = [
        [[4.0, 6.0, 30.0, 40.0]],
        [[10.0, 10.0, 40.0, 45.0]],
        [[2.0, 3.0, 20.0, 25.0], [24.0, 20.0, 60.0, 62.0], [8.0, 30.0, 40.0, 60.0]],
        [[5.0, 5.0, 45.0, 40.0], [20.0, 15.0, 50.0, 48.0]],
    ]
    batch = [
        (
            torch.rand(3, *((64, 64), (50, 60))[i % 2], generator=generator).to(device),
            {"boxes": torch.tensor(own, device=device), "labels": torch.arange(len(own), device=device) % 3},
        )
        for i, own in enumerate(boxes)
    ]
    return [tuple(zip(*part, strict=True)) for part in (batch[:2], batch[2:])]


def whole(device="cpu"):
    (images, targets), (more_images, more_targets) = halves(device)
    return images + more_images, targets + more_targets


def gradients(distiller):
    return {name: p.grad.cpu() for name, p in distiller.named_parameters() if p.grad is not None}


def together(family, rank, device):
    """Gradients of a step with all losses, and of the methods' alone, averaged over both processes."""
    distiller = distiller_of(family).to(device)
    model = DistributedDataParallel(distiller)
    torch.manual_seed(4)
    model(*halves(device)[rank]).total.backward()
    found = {"all": gradients(distiller)}
    distiller.zero_grad()
    torch.manual_seed(4)
    methods_alone(distiller(*halves(device)[rank])).backward()
    for p in distiller.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= 2
    found["methods"] = gradients(distiller)
    return found


def unlabelled(rank=None):
    """Gradients of a step without labels, whose objects are the teacher's detections; of a process, or of one alone."""
    distiller = distiller_of(OTHERS, [CrossKD(), *other_methods()])
    distiller.score = 0.01
    distiller.teacher_adapter.model.score_threshold = 0.005
    model = distiller if rank is None else DistributedDataParallel(distiller)
    torch.manual_seed(4)
    images, _ = whole() if rank is None else halves()[rank]
    model(images, None).total.backward()
    return gradients(distiller)


def cached(rank, folder):
    """Gradients of a step that fills a cache on disk, and of one that finds what the other process kept; the cache."""
    cache = TeacherCache.on_disk(Path(folder, "teacher_cache"))
    found = []
    for half in (rank, 1 - rank):
        distiller = distiller_of("GFL", [CrossKD(), PKD()])
        distiller.teacher_cache = cache
        model = DistributedDataParallel(distiller)
        model(*halves()[half]).total.backward()
        found.append(gradients(distiller))
        dist.barrier()
    return {"cold": found[0], "warm": found[1], "hits": cache.hits, "misses": cache.misses}


def methods_alone(losses):
    return torch.stack([loss for name, loss in losses.items() if not name.startswith("task/")]).sum()


def alone(family, device="cpu"):
    """The same of one process that has the whole batch."""
    found = {}
    for name, chosen in (("all", lambda losses: losses.total), ("methods", methods_alone)):
        distiller = distiller_of(family).to(device)
        torch.manual_seed(4)
        chosen(distiller(*whole(device))).backward()
        found[name] = gradients(distiller)
    return found


# Methods that leave parameters without gradient: a projection whose terms have weight 0, and one that has stopped.
UNUSED = {
    "weights of 0": lambda: [CrossKD(cls_weight=0.0, distribution_weight=0.0), PKD()],
    "stopped": lambda: [CrossKD().scheduled(stop=1), PKD()],
}


def trained(family, methods, batch, wrap=lambda distiller: distiller):
    """The student's weights after three steps."""
    distiller = distiller_of(family, methods)
    model = wrap(distiller)
    optimizer = torch.optim.SGD(distiller.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(*batch).total.backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in distiller.named_parameters()}


def held(batch, wrap=lambda distiller: distiller):
    """Factor and share of each method whose share is held, after three steps."""
    distiller = distiller_of("GFL", [CrossKD().held_at(share=0.2), PKD().held_at(share=0.1)])
    model = wrap(distiller)
    optimizer = torch.optim.SGD(distiller.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(*batch).total.backward()
        optimizer.step()
    return {name: held.metrics for name, held in distiller.held.items()}


def uneven(rank):
    """Gradients where one process has one small image without objects, the other the usual two."""
    images, targets = halves()[0]
    if rank:
        images = [torch.rand(3, 32, 40, generator=torch.Generator().manual_seed(5))]
        targets = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]
    distiller = distiller_of("FCOS")
    model = DistributedDataParallel(distiller)
    model(images, targets).total.backward()
    return gradients(distiller)


def _work(rank, folder, families, with_ways, kind):
    torch.set_num_threads(1)
    device, backend = (f"cuda:{rank}", "nccl") if kind == "cuda" else ("cpu", "gloo")
    if kind == "cuda":
        torch.cuda.set_device(rank)
        torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {family: together(family, rank, device) for family in families}
    if with_ways:
        for name, methods in UNUSED.items():
            for static in (False, True):
                found[name, static] = trained(
                    "GFL",
                    methods(),
                    halves()[rank],
                    lambda distiller, static=static: DistributedDataParallel(distiller, static_graph=static),
                )
        found["held"] = held(halves()[rank], DistributedDataParallel)
        found["uneven"] = uneven(rank)
        found["unlabelled"] = unlabelled(rank)
        found["cached"] = cached(rank, folder)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run(folder: Path, families, *, with_ways=False, kind="cpu"):
    """What each of the two processes found, on a CPU or on a GPU each; `with_ways` on a CPU alone."""
    torch.multiprocessing.spawn(_work, (str(folder), list(families), with_ways, kind), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
