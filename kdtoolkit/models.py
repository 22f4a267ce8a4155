"""Detectors by name, and their weights from files, for suites and the command line."""

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
from kdtoolkit.weights import load_weights

__all__ = ["build_model", "construct", "content_of", "is_code", "load_weights"]


def build_model(name: str, num_classes: int, args: Mapping[str, object] | None = None) -> nn.Module:
    """Build a detector.

    Args:
        name: "library/model", or "package.module:callable" for a class or function that returns a detector. Modules in
            the working directory are found too. Arguments may follow a question mark:
            "kdtoolkit/gfl?backbone=resnet18&strides=[8, 16, 32]".
        num_classes: number of classes, without background. It is passed on as a keyword argument of this name.
        args: further keyword arguments. They override those in the name.

    Raises:
        KDError: there is no such detector, it does not take these arguments, or its library is not installed.
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


def is_code(name: str) -> bool:
    """Whether a model's name is "package.module:callable", so that building it imports a module of that name."""
    return library_of_name(name) is None and ":" in name.partition("?")[0]


def construct(factory: Callable[..., object], name: str, num_classes: int, args: Mapping[str, object]) -> nn.Module:
    """Call `factory` with `num_classes` and `args`. Raises KDError if it does not take such arguments, or values."""
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
    except (Exception, SystemExit) as error:  # a library, or the user's code, may raise anything
        given = ", ".join(f"{key}={value!r}" for key, value in args.items())
        raise KDError(f"model {name!r} cannot be built from {given or 'its defaults'}: {_said(error)}") from error
    if not isinstance(model, nn.Module):
        raise KDError(f"model {name!r} must return a torch.nn.Module; it returned {type(model).__name__}")
    return model


def content_of(name: str) -> str:
    """What identifies the files behind `hf/FOLDER` or `hf/OWNER/NAME`, which may change while the name stays.

    For a folder it is a digest of its files. For a name on the Hugging Face hub it is the commit that lies in the hub's
    cache on this machine. It is empty if the name stands for no files, or if the cache has none.
    """
    library, _, place = name.partition("?")[0].partition("/")
    if library != "hf":
        return ""
    if not Path(place).is_dir():
        return _commit_of(place)
    digest = hashlib.sha256()
    for path in sorted(Path(place).iterdir()):
        if path.suffix in (".json", ".safetensors"):
            about = path.stat()
            digest.update(path.name.encode() + b"\0" + _digest_of(path.resolve(), about.st_size, about.st_mtime_ns))
    return digest.hexdigest()[:16]


def _commit_of(repository: str) -> str:
    """The commit of a repository (OWNER/NAME) that lies in the hub's cache; empty if there is none."""
    if repository.count("/") != 1:
        return ""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repository, "config.json")  # .../snapshots/COMMIT/config.json
    except ValueError:  # no name that the hub allows
        return ""
    return Path(found).parent.name if isinstance(found, str) else ""


@cache  # a plan asks again for each of its cells
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
    if (here := str(Path.cwd())) not in sys.path:  # `python -m` puts it there, console scripts do not
        sys.path.append(here)
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:  # the user's module may raise anything when it is imported
        raise KDError(f"model {name!r} cannot be imported: {_said(error)}") from error
    if not callable(factory):
        raise KDError(f"model {name!r} is not callable: name a class or a function that returns a detector")
    found: Callable[..., object] = factory
    return found
