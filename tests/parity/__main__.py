"""Compare kdtoolkit with stored reference values: `python -m tests.parity FILE...`.

Prints for every quantity of every file the largest difference, relative to the largest entry of the reference, and
its bound. Exit status: 0 all within bounds; 1 a quantity above its bound; 2 a file that cannot be read or compared.
"""

import argparse
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from tests.parity import features, losses, queries
from tests.parity._check import Check

Compare = Callable[[losses.Golden], Iterator[Check]]


class UnknownFileError(Exception):
    """The file cannot be read or compared; the message says why."""


def head(z: losses.Golden) -> Iterator[Check]:
    from tests.parity import heads  # builds detectors, which losses do without

    yield from heads.compare(z)


def ld(z: losses.Golden) -> Iterator[Check]:
    yield from losses.ld(z)
    yield from head(z)


def bckd(z: losses.Golden) -> Iterator[Check]:
    yield from losses.bckd(z)
    yield from head(z)


# A kind of file: a key that only it has, its name, and the comparison, if there is an implementation to compare.
KINDS: tuple[tuple[str, str, Compare], ...] = (
    ("student.gfl_cls.weight", "crosskd_gfl", head),
    ("student.atss_cls.weight", "crosskd_atss", head),
    ("student.retina_cls.weight", "crosskd_retinanet", head),
    ("student.conv_centerness.weight", "crosskd_fcos", head),
    ("loss.relation", "fgd", losses.fgd),
    ("loss.loss_score_kd.0", "bckd", bckd),
    ("soft_target.0", "ld", ld),
    ("pyramid.loss", "loss_pkd", losses.pkd),
    ("target_logits", "loss_kdqfl", losses.kdqfl),
    ("soft", "loss_kldiv", losses.kldiv),
    ("case0.tau1_w10.loss", "mmrazor_cwd", losses.cwd),
    ("case0.generated", "mmrazor_mgd", losses.mgd),
    ("loss.unweighted_feat", "mmrazor_fbkd", losses.fbkd),
    ("dkd_mean.tau1.loss", "mmrazor_logits", losses.logits),
    ("param.0.non_local_att.W.1.weight", "cankd", features.cankd),
    ("loss.GLOBAL", "detkds", features.detkds),
    ("level_of.0", "defeat", features.defeat),
    ("loss.dab.last.TOTAL_weighted", "kddetr", queries.kd_detr),
    ("loss.official.TOTAL", "detrdistill_official", queries.detr_distill),
    ("loss.target_aware_loss.0", "detrdistill", queries.detr_distill),
    ("loss.teacher_loss_self_attn.0", "d3etr", queries.detr_distill),
)


def read(path: Path) -> dict[str, np.ndarray]:
    """Load all arrays of a file, without pickles."""
    try:
        with np.load(path, allow_pickle=False) as z:
            return {key: z[key] for key in z.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        reason = "it is no .npz file" if isinstance(error, ValueError) else error  # numpy's words there are on pickles
        raise UnknownFileError(f"cannot be read: {reason}") from error


def comparison(z: losses.Golden, path: Path) -> Compare:
    """What compares a file: found by its keys, else by its name."""
    kinds = [kind for kind in KINDS if kind[0] in z] or [kind for kind in KINDS if path.stem.startswith(kind[1])]
    if not kinds:
        raise UnknownFileError("unknown kind of file")
    return kinds[0][2]


def run(path: Path) -> list[Check]:
    """All checks of one file; raises UnknownFileError."""
    z = read(path)
    compare = comparison(z, path)
    if "inputs_in" in z:  # of the file beside it
        inputs = read(path.with_name(f"{z['inputs_in']}.npz"))
        z = {**inputs, "inputs_cfg_json": inputs["cfg_json"], **z}
    try:
        return list(compare(z))
    except KeyError as error:
        raise UnknownFileError(f"lacks {error}") from error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="reference values (.npz)")
    parser.add_argument("-q", "--quiet", action="store_true", help="print what is above its bound, and the summary")
    args = parser.parse_args(arguments)
    checks: list[Check] = []
    unknown = 0
    for path in args.files:
        try:
            found = run(path)
        except UnknownFileError as error:
            print(f"{path}: {error}")
            unknown += 1
            continue
        if not args.quiet:
            print(path)
        for check in found:
            if not (args.quiet and check.passed):
                prefix = f"{path}: " if args.quiet else "  "
                mark = "" if check.passed else "  ABOVE"
                print(f"{prefix}{check.quantity:<44} {check.difference:9.2e}  bound {check.bound:.0e}{mark}")
        checks += found
    failed = sum(not check.passed for check in checks)
    worst = max((check.difference / check.bound for check in checks), default=0.0)
    print(
        f"{len(args.files)} files, {len(checks)} quantities: {len(checks) - failed} within bounds, {failed} above; "
        f"{unknown} files not compared; worst difference {worst:.2g} of its bound"
    )
    return 1 if failed else 2 if unknown else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
