"""What a probe found, in words: a table, a verdict for each method, and weights to set."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

from kdtoolkit.probing import ALL, PARTS, TASK, Measured, Probe, Row

LARGE = 0.5  # a larger share outweighs the task
DROWNS = 0.99  # a larger share drowns it
NOTHING = 0.01  # a smaller share does nothing
PULL = 0.05  # a smaller cosine says nothing


class Verdict(StrEnum):
    """What a method does to the student beside its own loss."""

    DROWNS = "drowns the task"
    NOTHING = "does nothing"
    AGAINST = "pulls against the task"
    FINE = "is in range"


def verdicts(probe: Probe) -> dict[str, list[Verdict]]:
    """What each method does in training, by name. A method may both drown the task and pull against it.

    A share that is held is what its user wants, so it is not judged.
    """
    found = {}
    for name in probe.methods:
        own = probe.in_training(name)[0].parts.get(ALL)
        held = name in probe.held
        if own is None or not own.norm or (own.share < NOTHING and not held):
            found[name] = [Verdict.NOTHING]
            continue
        wrong = [Verdict.DROWNS] if own.share > DROWNS and not held else []
        if _against(own):
            wrong.append(Verdict.AGAINST)
        found[name] = wrong or [Verdict.FINE]
    return found


def sentences(probe: Probe) -> Iterator[str]:
    """What each method does, in words."""
    for name in probe.methods:
        row, *terms = probe.in_training(name)
        yield from _about(name, row, terms, held=name in probe.held)
    if ALL in probe.agreement:
        yield (
            f"For comparison: the task's own gradients of two batches have a cosine of {probe.agreement[ALL]:+.2f}. "
            "A larger cosine between two losses is rare"
        )


def table(probe: Probe) -> list[str]:
    """The rows as lines of text: value, share, and share and cosine by part."""
    rows = list(table_rows(probe))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def table_rows(probe: Probe) -> Iterator[list[str]]:
    """The table as cells, its header first. A method with one term is one row."""
    parts = [part for part in PARTS if part != ALL and any(part in row.parts for row in probe.rows)]
    yield ["loss", "value", "gradient", "share", "cosine", *(f"{part}: share, cosine" for part in parts)]
    for row in probe.rows:
        terms = [each for each in probe.rows if each.method == row.method and not each.is_sum]
        if not row.is_sum and len(terms) == 1:
            continue
        of_task = row.method == TASK
        own = row.parts.get(ALL)
        yield [
            (f"{row.name} (held)" if row.name in probe.held else row.name) if row.is_sum else f"  {row.name}",
            f"{row.value:.3g}",
            "none" if own is None else f"{own.norm:.3g}",
            "" if of_task else _share(own),
            "" if own is None or row.name == TASK else f"{own.cosine:+.2f}",
            *("" if row.name == TASK else _both(row.parts.get(part), of_task) for part in parts),
        ]


def _both(part: Measured | None, of_task: bool) -> str:
    if part is None:
        return "-"
    return f"{part.cosine:+.2f}" if of_task else f"{_share(part)}, {part.cosine:+.2f}"


def _share(part: Measured | None) -> str:
    return "0 %" if part is None else _percent(part.share)


def _percent(share: float) -> str:
    if share > 0.99:
        return "> 99 %"
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _about(name: str, row: Row, terms: list[Row], *, held: bool) -> Iterator[str]:
    own = row.parts.get(ALL)
    if own is None or not own.norm:
        yield f"{name} does nothing: it has no gradient at the student in these batches"
        return
    size = f"is held at a share of {_share(own)}" if held else _size(own)
    yield f"{name} {size}{_most_of(terms, own)}; it {_direction(own, row)}"
    for term in terms:
        part = term.parts.get(ALL)
        if len(terms) > 1 and (part is None or part.share < NOTHING) and own.share >= NOTHING:
            yield f"{term.name} does nothing: its share is {_share(part)}"
        elif len(terms) > 1 and part is not None and _against(part) and not _against(own):
            yield f"{term.name} pulls against the task (cosine {part.cosine:+.2f}), the method as a whole does not"


def _size(own: Measured) -> str:
    share = _share(own)
    if own.share > DROWNS:
        return f"drowns the task: its gradient is {_times(own.norm / own.task_norm)} times the task's (share {share})"
    if own.share > LARGE:
        return (
            f"outweighs the task: its gradient is {_times(own.norm / own.task_norm)} times the task's (share {share})"
        )
    if own.share < NOTHING:
        return f"does nothing: its share is {share}"
    return f"has a share of {share}"


def _most_of(terms: list[Row], own: Measured) -> str:
    """Which term the method's gradient comes from, if it is one of several."""
    if len(terms) < 2:
        return ""
    largest = max(terms, key=lambda term: term.parts[ALL].norm if ALL in term.parts else 0.0)
    return f", most of it from {largest.name}" if largest.parts[ALL].norm > 0.9 * own.norm else ""


def _direction(own: Measured, row: Row) -> str:
    where = {part: measured for part, measured in row.parts.items() if part != ALL}
    strongest = min(where, key=lambda part: where[part].cosine)
    at = f", at the {strongest} {where[strongest].cosine:+.2f}" if len(where) > 1 else ""
    if _against(own):
        pulls = f"pulls against the task (cosine {own.cosine:+.2f}{at})"
        if own.gain >= 0:  # one batch with a large gradient may outweigh several
            return pulls
        undoes = "all" if own.gain <= -1 else f"about {_percent(-own.gain)}"
        return f"{pulls}, and undoes {undoes} of what the task's step gains"
    if _against(where[strongest]):
        return f"pulls against the task at the {strongest} alone (cosine {where[strongest].cosine:+.2f})"
    if own.margin is None:
        return f"has a cosine of {own.cosine:+.2f}, and one batch cannot tell whether it pulls against the task"
    if own.cosine > max(PULL, own.margin):
        return f"pulls with the task (cosine {own.cosine:+.2f})"
    return f"pulls neither with the task nor against it (cosine {own.cosine:+.2f})"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"


def _against(part: Measured) -> bool:
    return part.margin is not None and part.cosine < -max(PULL, part.margin)
