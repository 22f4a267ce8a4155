"""What is trained and how fast: parameter groups, frozen parts, the learning rate at each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdtoolkit.distiller import Distiller
from kdtoolkit.engine.config import TrainConfig
from kdtoolkit.errors import KDError

_NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def lr_factor(step: int, config: TrainConfig) -> float:
    """The factor of the learning rate at a step counted from 0: warm-up times schedule."""
    warmup = 1.0
    if step < config.warmup_steps:
        share = (step + 1) / (config.warmup_steps + 1) if config.warmup == "linear" else 0.0
        warmup = config.warmup_factor + (1 - config.warmup_factor) * share
    if config.schedule == "cosine":
        return warmup * 0.5 * (1 + math.cos(math.pi * step / config.steps))
    if config.schedule == "step":
        return warmup * 0.1 ** sum(step >= share * config.steps for share in config.milestones)
    return warmup


def build_optimizer(distiller: Distiller, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of all trainable parameters, with a group for each pair of learning rate and weight decay.

    Each group keeps its peak rate as `peak`. Parameters of methods have the plain rate and decay. Raises KDError if
    the config names a part that the student does not have.
    """
    student = distiller.student
    factors = {part: _parameters(student, part) for part in config.lr_factors}
    undecayed = set[int]().union(*(_parameters(student, part) for part in config.no_decay))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in distiller.parameters():
        if parameter.requires_grad:
            parts = [part for part, members in factors.items() if id(parameter) in members]
            factor = math.prod(config.lr_factors[part] for part in parts)
            decay = 0.0 if id(parameter) in undecayed else config.weight_decay
            groups.setdefault((config.lr * factor, decay), []).append(parameter)
    described = [
        {"params": members, "lr": lr, "peak": lr, "weight_decay": decay} for (lr, decay), members in groups.items()
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(described, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(described, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, step: int, config: TrainConfig) -> float:
    """Set each group's learning rate for a step. Returns the rate without the factors of parts."""
    factor = lr_factor(step, config)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return config.lr * factor


@contextmanager
def frozen(student: nn.Module, config: TrainConfig) -> Iterator[Callable[[Distiller], None]]:
    """Freeze the parts that the config names; they are trainable again when the block ends.

    Gives the function that sets a distiller to training mode, except the batch norms that keep their statistics. Raises
    KDError if the student has no such part, or if a part of `frozen_statistics` has no batch norm.
    """
    members = set[int]().union(*(_parameters(student, part) for part in config.frozen))
    still = [module for part in config.frozen_statistics for module in _batch_norms(student, part)]
    for name, module in student.named_modules():
        if isinstance(module, _BatchNorm):
            own = {id(p) for p in module.parameters()}
            # A batch norm without parameters is frozen with the module around it.
            if own <= members if own else any(_covers(part, name) for part in config.frozen):
                still.append(module)
    thawed = [p for p in student.parameters() if id(p) in members and p.requires_grad]

    def training(distiller: Distiller) -> None:
        distiller.train()
        for module in still:
            module.eval()

    try:
        for parameter in thawed:
            parameter.requires_grad_(False)
        yield training
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)


def _batch_norms(student: nn.Module, part: str) -> list[_BatchNorm]:
    """The batch norms of a part. Raises KDError if there are none."""
    found = [m for name, m in student.named_modules() if isinstance(m, _BatchNorm) and _covers(part, name)]
    if not found or not part.strip():
        raise KDError(f"{_missing(student, part, 'batch norms')}, the modules below them, and the word norms")
    return found


def _covers(part: str, norm: str) -> bool:
    """Whether the normalisation layer with the dotted name `norm` belongs to a part."""
    return all(word == "norms" or _is_in(norm, word) for word in part.split())


def _parameters(student: nn.Module, part: str) -> set[int]:
    """The parameters of a part, by id. Raises KDError if there are none."""
    norms = {id(p) for m in student.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)}
    found = {id(p) for p in student.parameters()}
    for word in part.split():
        if word == "norms":
            found &= norms
        elif word == "biases":
            found &= {id(p) for name, p in student.named_parameters() if name.endswith("bias")} - norms
        else:
            found &= {id(p) for name, p in student.named_parameters() if _is_in(name, word)}
    if not found or not part.strip():
        raise KDError(
            f"{_missing(student, part, 'parameters')}, the modules below them, as in backbone.layer1, the words norms "
            "and biases, and both together, as in 'backbone norms'"
        )
    return found


def _missing(student: nn.Module, part: str, what: str) -> str:
    parts = ", ".join(name for name, _ in student.named_children())
    return f"the student ({type(student).__name__}) has no {what} in the part {part!r}. Its parts are {parts}"


def _is_in(name: str, part: str) -> bool:
    """Whether a dotted name lies in a module of the dotted name `part`: model.backbone.conv1 lies in backbone."""
    return f".{part}." in f".{name}."


def named_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, torch.Tensor]:
    """The optimiser's state, by the parameter's name and the kind of value: `student.head.weight/exp_avg`.

    `names` are the names of parameters by their id.
    """
    return {
        f"{names[id(parameter)]}/{kind}": value
        for group in optimizer.param_groups
        for parameter in group["params"]
        for kind, value in optimizer.state.get(parameter, {}).items()
        if value is not None  # SGD's momentum before the first gradient
    }


def load_named_state(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], state: Mapping[str, torch.Tensor]
) -> None:
    """Give an optimiser the state that `named_state` returned."""
    by_name = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    for key, value in state.items():
        name, _, kind = key.rpartition("/")
        parameter = by_name[name]
        like = parameter if value.shape == parameter.shape else value
        # In the memory format of the parameter, as the optimiser itself makes it.
        kept = torch.empty_like(like, dtype=value.dtype, device=parameter.device, requires_grad=False)
        optimizer.state[parameter][kind] = kept.copy_(value)
