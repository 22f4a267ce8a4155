import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from kdtoolkit.benchmark.keys import cell_parts, difference, same_settings, source_digest
from kdtoolkit.benchmark.suite import DetectorSection
from kdtoolkit.method_use import MethodUse
from kdtoolkit.methods import PKD, all_methods


def test_a_folder_of_weights_is_known_by_its_content(tmp_path):
    section = DetectorSection(model=f"hf/{tmp_path}", train={"steps": 1})
    settings = {"seed": 0, "steps": 1, "data": "d", "teacher": "t", "device": "cpu", "threads": 1}
    (tmp_path / "config.json").write_text("{}")
    before = cell_parts(section, (), **settings)
    assert cell_parts(section, (), **settings) == before
    (tmp_path / "config.json").write_text('{"d_model": 8}')
    assert difference(before, cell_parts(section, (), **settings)) == "changed: weights"


def test_a_file_of_weights_may_be_moved(tmp_path):
    found = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "weights.safetensors"
        file.write_text("the same")
        section = DetectorSection(model="kdtoolkit/gfl", args={"pretrained": str(file)}, weights=str(file))
        found.append(cell_parts(section, (), seed=0, steps=1, data="d", teacher="t", device="cpu", threads=1))
    assert found[0] == found[1]


def test_settings_are_the_same_whatever_code_and_hardware_made_the_result():
    section = DetectorSection(model="kdtoolkit/gfl", train={"steps": 1})
    new = cell_parts(section, (), seed=0, steps=1, data="d", teacher="t", device="cpu", threads=1)
    elsewhere = {**new, "code": "c", "torch": "1.0", "library": "kdtoolkit 0.0", "device": "a GPU", "threads": "2"}
    assert same_settings(elsewhere, new)
    for name in ("methods", "seed", "steps", "data", "teacher", "precision"):
        assert not same_settings({**new, name: "different"}, new)
    assert not same_settings(new, {**new, "unlabelled": "u"})

    half = DetectorSection(model="kdtoolkit/gfl", train={"steps": 1, "precision": "bfloat16"})
    chosen = cell_parts(half, (), seed=0, steps=1, data="d", teacher="t", device="cpu", threads=1)
    assert not same_settings(chosen, new)
    assert same_settings(chosen, new, any_precision=True)
    assert not same_settings({**chosen, "steps": "2"}, new, any_precision=True)

    fields = json.loads(new["detector"])
    del fields["train"]["momentum"]  # an option that the earlier version did not have, with its default in the new one
    assert same_settings({**new, "detector": json.dumps(fields)}, new)
    fields["train"]["lr"] = 1.0
    assert not same_settings({**new, "detector": json.dumps(fields)}, new)
    assert not same_settings({**new, "detector": "0123456789abcdef"}, new)


def test_the_code_of_a_method_is_its_file_and_what_it_imports(monkeypatch, request):
    request.addfinalizer(source_digest.cache_clear)  # the last digest is of a file that nobody changed
    read = Path.read_bytes

    def code(*names, changed=""):
        edited = lambda path: read(path) + (b"#" if path.name == changed else b"")  # noqa: E731
        monkeypatch.setattr(Path, "read_bytes", edited)
        source_digest.cache_clear()
        return source_digest("kdtoolkit/gfl", tuple(all_methods()[name] for name in names))

    assert code("CLoCKDistill") != code("CLoCKDistill", changed="fgd.py")  # it takes masks from there
    assert code("CLoCKDistill") != code("CLoCKDistill", changed="queries.py")
    assert code("PKD") == code("PKD", changed="fgd.py")
    assert code() == code(changed="common.py")
    assert code() == code(changed="probe_words.py")  # a file of commands
    assert code() != code(changed="gradients.py")  # shares are held by it


DETECTOR = "from kdtoolkit.detectors import GFL\nfrom ownlayers.blocks import WIDTH\nclass Own(GFL): ...\n"
ADAPTER = (
    "from kdtoolkit.adapters.native import DenseAdapter\nfrom owndet import Own\nclass OwnAdapter(DenseAdapter): ...\n"
)
METHOD = "from kdtoolkit.methods import PKD\nfrom ownkd.formula import factor\nclass OwnPKD(PKD): ...\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A user's project: a detector, its adapter in a second file, and a package of a method."""
    files = {"owndet.py": DETECTOR, "owndet_adapter.py": ADAPTER, "ownlayers/blocks.py": "WIDTH = 8\n"}
    files |= {"ownkd/__init__.py": "", "ownkd/methods.py": METHOD, "ownkd/formula.py": "factor = 1\n", "other.py": ""}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    points = {"kdtoolkit.adapters": "owndet_adapter:OwnAdapter", "kdtoolkit.methods": "ownkd.methods:OwnPKD"}
    monkeypatch.setattr("kdtoolkit.plugins.entries", lambda group: (EntryPoint("own", points[group], group),))
    yield tmp_path
    source_digest.cache_clear()
    for name in (
        "owndet",
        "owndet_adapter",
        "ownlayers",
        "ownlayers.blocks",
        "ownkd",
        "ownkd.methods",
        "ownkd.formula",
    ):
        sys.modules.pop(name, None)


def changes(project, name, digest):
    """Whether a digest changes with a file of the project."""
    source_digest.cache_clear()
    before = digest()
    with (project / name).open("a") as file:
        file.write("# changed\n")
    source_digest.cache_clear()
    return digest() != before


@pytest.mark.parametrize(
    ("name", "counts"),
    [("owndet.py", True), ("owndet_adapter.py", True), ("ownlayers/blocks.py", True), ("other.py", False)],
)
def test_the_code_of_an_own_detector_is_its_files_and_those_of_its_adapter(name, counts, project):
    assert str(project) not in sys.path  # as where `kd` starts
    assert changes(project, name, lambda: source_digest("owndet:Own")) == counts


@pytest.mark.parametrize(
    ("name", "counts"), [("ownkd/methods.py", True), ("ownkd/formula.py", True), ("owndet.py", False)]
)
def test_the_code_of_an_own_method_is_its_package(name, counts, project):
    sys.path.append(str(project))
    use = MethodUse.model_validate("OwnPKD")
    assert changes(project, name, lambda: source_digest("kdtoolkit/gfl", (use.method,))) == counts


def test_code_of_other_packages_changes_no_cell_without_it(project):
    assert not changes(project, "owndet_adapter.py", lambda: source_digest("kdtoolkit/gfl", (PKD,)))


def test_an_own_method_counts_what_it_may_import(project, monkeypatch):
    sys.path.append(str(project))
    digests = []
    read = Path.read_bytes
    for changed in ("", "pkd.py"):
        monkeypatch.setattr(Path, "read_bytes", lambda path, name=changed: read(path) + b"#" * (path.name == name))
        source_digest.cache_clear()
        digests.append(source_digest("kdtoolkit/gfl", (all_methods()["OwnPKD"],)))
    assert digests[0] != digests[1]
