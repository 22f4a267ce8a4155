"""Boards with all that lies behind them, made up: nothing was trained. For tests of what is made of boards."""

import io
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from kdtoolkit.benchmark.across import Across, AcrossRow
from kdtoolkit.benchmark.board import METRICS, Board, Claim, Row
from kdtoolkit.benchmark.details import Curve, Details, RowCost
from kdtoolkit.benchmark.pictures import Gallery, Item, Panel
from kdtoolkit.benchmark.report import View
from kdtoolkit.benchmark.stats import Probability, RankRange, Spread, paired_difference, spread
from kdtoolkit.benchmark.suite import BASELINE, EQUAL_TIME, TEACHER
from kdtoolkit.engine.breakdown import ERRORS, TOTALS, Bin, Breakdown

GAINS = {"PKD": 2.6, "CrossKD": 1.7, "CrossKD+PKD": 3.0, "LD": 0.2, "FGD": -2.4}
CLASSES = ("RBC", "WBC", "Platelets")


def made_up_view(title="cells", *, classes=CLASSES, gains=None, seeds=3, level=34.0, pictures=True, chance=0):
    """A board of a baseline, a baseline at equal time, and a row for each of `gains`."""
    gains = GAINS if gains is None else gains
    random = np.random.default_rng(chance)
    luck = random.normal(0, 0.5, seeds)
    means = {BASELINE: 0.0, EQUAL_TIME: 0.6, **gains}
    aps = {name: dict(enumerate(level + gain + luck + random.normal(0, 0.35, seeds))) for name, gain in means.items()}
    rows = [_row(name, aps, level) for name in means]
    rows.sort(key=lambda row: -row.ap)
    ranked = [row for row in rows if row.entry != EQUAL_TIME]
    rows = [_ranked(row, ranked) for row in rows]
    teacher = _row(TEACHER, {TEACHER: {0: level + 7.5}}, level)
    claims = tuple(
        Claim(row.entry, BASELINE, row.versus_baseline.verdict, f"{row.entry}: {row.versus_baseline.text} AP")
        for row in rows
        if row.methods
    )
    pairs = {
        row.entry: {
            other.entry: paired_difference(aps[row.entry], aps[other.entry]) for other in ranked if other is not row
        }
        for row in ranked
    }
    board = Board(
        title=title,
        description="GFL on ResNet-50 into ResNet-18, 300 steps of 8 images",
        facts={
            "data": f"{title}, at most 160 px, {len(classes)} classes: 205 images for the teacher, 52 for the student",
            "seeds": f"{seeds} (rows are compared seed by seed)",
            "student": "kdtoolkit/gfl, 300 steps of 8 images, adamw, lr 0.002, cosine",
            "machine": "a machine, 1 thread a cell",
        },
        rows=tuple(rows),
        teacher=teacher,
        claims=claims,
        warnings=("FGD (seed 1): loss term fgd/background is exactly zero",),
        pairs=pairs,
        summary=f"{rows[0].entry} is first with {rows[0].ap:.1f} AP. It shares the first place with {rows[1].entry}.",
    )
    return View(board, _details(board, classes, random), _gallery(board, random) if pictures else None)


def made_up_across(views):
    """Mean ranks over some boards, as they would be if nothing could be told apart but the ends."""
    names = [row.entry for row in views[0].board.rows if row.entry != EQUAL_TIME]
    ranks = {}
    for name in names:
        aps = [{row.entry: row.ap for row in view.board.rows}[name] for view in views]
        places = [
            1.0 + sum(row.ap > ap for row in view.board.rows if row.entry != EQUAL_TIME)
            for view, ap in zip(views, aps, strict=True)
        ]
        ranks[name] = (tuple(aps), tuple(places))
    rows = [AcrossRow(name, "", aps, own, sum(own) / len(own)) for name, (aps, own) in ranks.items()]
    rows.sort(key=lambda row: row.mean_rank)
    order = [row.entry for row in rows]
    return Across(
        boards=tuple(view.board.title for view in views),
        rows=tuple(rows),
        friedman_p=0.08,
        critical_difference=3.4,
        groups=(tuple(order[:4]), tuple(order[2:])),
        notes=("Friedman's test: p = 0.08. Two data sets have little power.",),
    )


def _row(name, aps, level):
    own = spread(aps[name].values())
    plain = name in (BASELINE, EQUAL_TIME, TEACHER)
    versus = {
        other: paired_difference(aps[name], aps[other]) if other in aps and name not in (other, TEACHER) else None
        for other in (BASELINE, EQUAL_TIME)
    }
    difference = versus[BASELINE]
    if difference is not None and difference.low is not None:
        difference = replace(difference, p=0.01, p_holm=0.03 if difference.verdict != "not shown" else 0.4)
    return Row(
        entry=name,
        methods="" if plain else name.replace("+", " + "),
        seeds=tuple(aps[name]),
        metrics={
            metric: None if own is None else Spread(own.mean * factor, own.std, own.count)
            for metric, factor in zip(METRICS, (1, 1.7, 0.9, 0.3, 0.9, 1.3), strict=True)
        },
        versus_baseline=difference,
        versus_equal_time=None if name == BASELINE else versus[EQUAL_TIME],
        gap_recovered=None if difference is None else difference.mean / 7.5,
        steps=540 if name == EQUAL_TIME else 300,
        step_ms=900.0 if plain else 1500.0 + 40 * len(name),
        train_seconds=270.0 if name == BASELINE else 480.0 + 9 * len(name),
        peak_memory_mb=980.0,
        parameters=21_000_000 if name == TEACHER else 3_262_187,
        gap_interval=None if difference is None or difference.low is None else (0.1, 0.6),
        p_improvement=None if name in (BASELINE, TEACHER) else Probability(0.89, 0.6, 1.0),
        aps=aps[name],
    )


def _ranked(row, ranked):
    if row not in ranked:
        return row
    close = [place + 1 for place, other in enumerate(ranked) if abs(other.ap - row.ap) < 1]
    return replace(row, rank=RankRange(min(close), max(close)))


def _details(board, classes, random):
    names = [row.entry for row in (board.teacher, *board.rows)]
    aps = {row.entry: row.metrics["ap"].mean for row in (board.teacher, *board.rows)}
    return Details(
        curves={name: _curves(name, aps[name], random) for name in names if name != TEACHER},
        breakdown={name: _breakdown(aps[name], classes, random) for name in names},
        costs={
            row.entry: RowCost(
                train_seconds=row.train_seconds,
                step_ms=row.step_ms,
                latency_ms=41.0 if row.entry == TEACHER else 11.5,
                gflops=12.4 if row.entry == TEACHER else 1.9,
                parameters=row.parameters,
            )
            for row in (board.teacher, *board.rows)
        },
        commands={name: f"kd benchmark run suite.yaml --only '{name}' --seeds 3" for name in names},
        settings={name: f"model: kdtoolkit/gfl\ntrain:\n  steps: 300\n  lr: 0.002\n# {name}\n" for name in names},
        limits=(
            "Larger data and longer schedules: students see 52 photos of 160 px for 300 steps.",
            "A different choice of photos: all seeds share one split.",
        ),
    )


def _curves(name, ap, random):
    steps = np.linspace(3, 300, 100)

    def falling(start, end):
        mean = end + (start - end) * np.exp(-steps / 60) * random.uniform(0.97, 1.03, 100)
        return _curve(steps, mean, 0.06 * mean)

    found = {"task/cls": falling(0.9, 0.05), "task/box": falling(1.9, 0.3), "task/dfl": falling(0.7, 0.15)}
    for method in ("CrossKD", "PKD", "LD", "FGD"):
        if method in name:
            found[f"{method.lower()}/loss"] = falling(20.0 if method == "PKD" else 3.0, 0.9)
            found[f"conflict/{method}"] = _curve(steps[9::30], np.linspace(0.3, -0.05, 4), np.full(4, 0.08))
            found[f"share/{method}"] = _curve(steps[9::30], np.linspace(0.8, 0.3, 4), np.full(4, 0.05))
    at = np.linspace(30, 300, 10)
    found["eval/ap"] = _curve(at, ap * (1 - np.exp(-at / 80)), np.full(10, 0.7))
    return found


def _curve(steps, mean, half):
    return Curve(
        steps=tuple(steps.tolist()),
        mean=tuple(mean.tolist()),
        low=tuple((mean - half).tolist()),
        high=tuple((mean + half).tolist()),
    )


def _breakdown(ap, classes, random):
    centres = np.linspace(0.05, 0.95, 10)
    return Breakdown(
        errors=dict(zip((*ERRORS, *TOTALS), (np.array([3, 9, 1, 2, 5, 12, 14, 19]) * 35 / ap).tolist(), strict=True)),
        by_class={
            name: None if i == 7 else ap * (0.5 + (i * 37 % 10) / 10) + random.normal(0, 1)
            for i, name in enumerate(classes)
        },
        by_size={"small": 0.3 * ap, "medium": 0.9 * ap, "large": 1.3 * ap},
        by_iou={f"{iou:.2f}": ap * (1.8 - 1.7 * (iou - 0.5) / 0.45) for iou in np.linspace(0.5, 0.95, 10)},
        calibration=tuple(
            Bin(low=c - 0.05, high=c + 0.05, confidence=c, precision=float(c**1.3), count=100) for c in centres
        ),
        calibration_error=0.07,
    )


def _gallery(board, random):
    names = ["ground truth", TEACHER, BASELINE, *(row.entry for row in board.rows if row.methods)]
    items = []
    for number in range(3):
        pixels = Image.effect_noise((160, 120), 30).convert("RGB")
        panels = []
        for name in names:
            picture = pixels.copy()
            draw = ImageDraw.Draw(picture)
            for _ in range(3):
                left, top = random.integers(0, 100), random.integers(0, 70)
                draw.rectangle((left, top, left + 40, top + 35), outline="lime", width=2)
            file = io.BytesIO()
            picture.save(file, "JPEG")
            panels.append(Panel(name=name, alt=f"{name}: 3 right", image=file.getvalue(), mime="image/jpeg"))
        items.append(Item(title=f"photo_{number}.jpg", alt="F1 from 0.2 to 0.8", panels=tuple(panels)))
    return Gallery(items=tuple(items), note="The images on which the rows differ most, by F1.")
