"""What several groups of commands use. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import TypeVar

import typer

from kdtoolkit.errors import KDError
from kdtoolkit.options import did_you_mean
from kdtoolkit.workflow.options import DATA

T = TypeVar("T")


class Device(StrEnum):
    """Where to train."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


DATA_HELP = f"{DATA[0].upper()}{DATA[1:]}."


def examples(*commands: str) -> str:
    """The end of a command's help."""
    return "\n".join(["\b", "Examples:", *(f"  {command}" for command in commands)])


def help_alone(context: typer.Context) -> None:
    """Show the help of a group of commands that is called without one of them."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr while something is counted, if that is a terminal; give it how much is done, and of how much."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def check_known(names: Collection[str], known: Collection[str], what: str) -> None:
    """Check that every name is known. Raises KDError for the first one that is not."""
    for name in names:
        if name not in known:
            raise KDError(f"unknown {what} '{name}'{did_you_mean(name, known)}; there are {', '.join(known)}")


def chosen(known: Mapping[str, T], names: Collection[str] | None) -> dict[str, T]:
    """The items of `known` that `names` lists; all items if it lists none."""
    return {name: known[name] for name in names or known}
