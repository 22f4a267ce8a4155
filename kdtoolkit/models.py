"""Detectors by name, for suites and the command line."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from urllib.parse import parse_qsl

import yaml
from torch import nn

from kdtoolkit.errors import KDError
from kdtoolkit.libraries import LIBRARIES, library_of_name
from kdtoolkit.options import did_you_mean


def build_model(name: str, num_classes: int, args: Mapping[str, object] | None = None) -> nn.Module:
    """Build a detector.

    Args:
        name: library/model, with arguments after a question mark if there are any, as in
            "kdtoolkit/gfl?backbone=resnet18&strides=[8, 16, 32]"; or "package.module:callable" (a class or function
            that returns a detector; modules in the working directory are found).
        num_classes: without background; handed on as the keyword argument of that name.
        args: further keyword arguments; they override those in the name.

    Raises:
        KDError: there is no such detector, it takes no such arguments, or its library is not installed.
    """
    path, _, query = name.partition("?")
    args = {**_arguments(name, query), **(args or {})}
    library, (_, slash, model) = library_of_name(path), path.partition("/")
    if library is not None and slash:
        try:
            builder = importlib.import_module(library.adapters)
        except ImportError as error:
            if not library.optional:
                raise
            raise KDError(
                f"model {name!r} needs {library.package}: pip install 'kdtoolkit[{library.package}]' (importing it "
                f"failed: {error})"
            ) from error
        built: nn.Module = builder.build_model(model, num_classes, args)
        return built
    return construct(_imported(path), name, num_classes, args)


def construct(factory: Callable[..., object], name: str, num_classes: int, args: Mapping[str, object]) -> nn.Module:
    """Call `factory` with `num_classes` and `args`. Raises KDError where it takes no such arguments, or values."""
    signature = inspect.signature(factory)
    try:
        signature.bind(num_classes=num_classes, **args)
    except TypeError as error:
        known = list(signature.parameters)
        unknown = next((each for each in args if each not in known), "")
        hint = did_you_mean(unknown, known)
        raise KDError(f"model {name!r}: {error}{hint}. Its arguments are {', '.join(known) or 'none'}") from error
    try:
        model = factory(num_classes=num_classes, **args)
    except KDError:
        raise
    except (Exception, SystemExit) as error:  # whatever a library, or code of the user's own, makes of the arguments
        given = ", ".join(f"{key}={value!r}" for key, value in args.items())
        raise KDError(f"model {name!r} cannot be built from {given or 'its defaults'}: {_said(error)}") from error
    if not isinstance(model, nn.Module):
        raise KDError(f"model {name!r} must return a torch.nn.Module; it returned {type(model).__name__}")
    return model


def content_of(name: str) -> str:
    """Digest of the files that a name such as `hf/FOLDER` stands for; empty for names that stand for none.

    A folder's content may change while its name stays. What lies on the hub is known by its name alone.
    """
    library, _, place = name.partition("?")[0].partition("/")
    if library != "hf" or not Path(place).is_dir():
        return ""
    digest = hashlib.sha256()
    for path in sorted(Path(place).iterdir()):
        if path.suffix in (".json", ".safetensors"):
            about = path.stat()
            digest.update(path.name.encode() + b"\0" + _digest_of(path.resolve(), about.st_size, about.st_mtime_ns))
    return digest.hexdigest()[:16]


@cache  # a plan asks for each of its cells
def _digest_of(path: Path, size: int, modified: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _arguments(name: str, query: str) -> dict[str, object]:
    if not query:
        return {}
    try:
        return {key: yaml.safe_load(value) for key, value in parse_qsl(query, strict_parsing=True)}
    except (ValueError, yaml.YAMLError) as error:
        raise KDError(f"model {name!r}: write arguments as ?name=value&name=value ({error})") from error


def _imported(name: str) -> Callable[..., object]:
    module_name, _, attribute = name.partition(":")
    if not attribute:
        hint = did_you_mean(name.partition("/")[0], [library.prefix for library in LIBRARIES])
        examples = ", ".join([*(library.example for library in LIBRARIES), "package.module:callable"])
        raise KDError(f"unknown model {name!r}{hint}: write a name such as {examples}")
    if (here := str(Path.cwd())) not in sys.path:  # as `python -m` has it, and console scripts have not
        sys.path.append(here)
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        raise KDError(f"model {name!r} cannot be imported: {_said(error)}") from error
    if not callable(factory):
        raise KDError(f"model {name!r} is not callable: name a class or a function that returns a detector")
    found: Callable[..., object] = factory
    return found
