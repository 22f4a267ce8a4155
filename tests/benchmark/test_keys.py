import inspect
import json
from pathlib import Path

from kdtoolkit.benchmark.keys import cell_parts, difference, same_settings, source_digest
from kdtoolkit.benchmark.suite import DetectorSection
from kdtoolkit.methods import all_methods


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
        files = tuple(Path(inspect.getfile(all_methods()[name])) for name in names)
        return source_digest("kdtoolkit/gfl", files)

    assert code("CLoCKDistill") != code("CLoCKDistill", changed="fgd.py")  # it takes masks from there
    assert code("CLoCKDistill") != code("CLoCKDistill", changed="queries.py")
    assert code("PKD") == code("PKD", changed="fgd.py")
    assert code() == code(changed="common.py")
    assert code() == code(changed="probe_words.py")  # a file of commands
    assert code() != code(changed="gradients.py")  # shares are held by it
