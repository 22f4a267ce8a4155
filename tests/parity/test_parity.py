"""The comparison with reference values, over the copies in `data` and, where it is present, all of ../shared/golden."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity.__main__ import KINDS, main, run
from tests.parity._check import Check
from tests.parity.heads import EXACT, _conditioned

HERE = Path(__file__).parent / "data"
GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
FILES = sorted(HERE.glob("*.npz")) + [p for p in sorted(GOLDEN.glob("*.npz")) if not (HERE / p.name).exists()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_agrees_with_the_reference(path):
    checks = run(path)
    assert checks
    above = [f"{c.quantity}: {c.difference:.2e} > {c.bound:.0e}" for c in checks if not c.passed]
    assert not above, "\n".join(above)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="../shared/golden is absent: compared with the copies in data alone")
def test_all_reference_files_are_found():
    assert len(FILES) >= len(list(GOLDEN.glob("*.npz"))) > len(list(HERE.glob("*.npz")))


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="../shared/golden is absent")
def test_an_error_in_an_ill_conditioned_file_is_still_found(tmp_path):
    path = GOLDEN / "crosskd_fcos_normonbbox_2.npz"
    with np.load(path) as z:
        wrong = {key: z[key] * np.float32(1.1) for key in ("grad.feat_student.0", "gradnorm.student.conv_reg.weight")}
    above = [check.quantity.split()[0] for check in run(Path(altered(path, tmp_path, **wrong))) if not check.passed]
    assert above == list(wrong)


def test_difference_is_relative_to_the_largest_entry():
    assert Check("x", torch.tensor([1.0, -4.0]), np.array([1.0, -5.0])).difference == pytest.approx(0.2)
    assert Check("shape", torch.ones(2), np.ones(3)).difference == float("inf")
    assert Check("nan", float("nan"), 1.0).difference == float("inf")
    assert not Check("zero", 1e-3, 0.0).passed
    assert Check("noise", 1e-3, 0.0, 1e-2, 1.0).passed


def test_only_what_a_rounding_moves_is_ill_conditioned():
    off = Check("gradient", torch.tensor([1.0, 2.003]), torch.tensor([1.0, 2.0]), 1e-3)
    steady = [off._replace(ours=torch.tensor([1.0, 2.0031])) for _ in range(3)]
    assert _conditioned(off, steady) == off
    moved = _conditioned(off, [*steady, off._replace(ours=torch.tensor([1.0, 1.998]))])
    assert moved.passed
    assert moved.quantity == "gradient (ill-conditioned: 2e-03)"
    labels = Check("target.labels", torch.tensor([1, 2]), torch.tensor([1, 3]), EXACT)
    assert _conditioned(labels, [labels._replace(ours=torch.tensor([1, 3]))]) == labels


def altered(path, tmp_path, **changes):
    """A copy of a file under another name, with other values."""
    with np.load(path) as z:
        arrays = {key: z[key] for key in z.files} | changes
    np.savez(tmp_path / "copy.npz", **arrays)
    return str(tmp_path / "copy.npz")


def test_a_wrong_value_is_reported_and_sets_the_exit_status(tmp_path, capsys):
    good = altered(HERE / "fgd_gfl_padded.npz", tmp_path)
    assert main([good]) == 0
    assert "0 above" in capsys.readouterr().out
    with np.load(good) as z:
        wrong = z["loss.fg"] * np.float32(1.001)
    bad = altered(HERE / "fgd_gfl_padded.npz", tmp_path, **{"loss.fg": wrong})
    assert main(["-q", bad]) == 1
    out = capsys.readouterr().out.splitlines()
    assert "loss.fg" in out[0]
    assert "ABOVE" in out[0]
    assert ", 1 above" in out[-1]


def test_files_that_cannot_be_compared_exit_2_with_one_line_each(tmp_path, capsys):
    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "array.npy", np.ones(3))
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    np.savez(tmp_path / "fgd_truncated.npz", x=np.ones(3))
    names = ["text.npz", "array.npy", "other.npz", "fgd_truncated.npz", "absent.npz"]
    assert main([str(tmp_path / name) for name in names]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].rsplit("/")[-1] for line in lines[:-1]] == names
    assert "unknown kind" in lines[2]


def test_each_kind_is_known_by_one_key():
    for path in FILES:
        with np.load(path) as z:
            assert [name for key, name, _ in KINDS if key in z.files], path.name
