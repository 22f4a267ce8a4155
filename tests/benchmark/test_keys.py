from kdtoolkit.benchmark.keys import cell_parts, difference
from kdtoolkit.benchmark.suite import DetectorSection


def test_a_folder_of_weights_is_known_by_its_content(tmp_path):
    section = DetectorSection(model=f"hf/{tmp_path}", train={"steps": 1})
    settings = {"seed": 0, "steps": 1, "data": "d", "teacher": "t", "device": "cpu", "threads": 1}
    (tmp_path / "config.json").write_text("{}")
    before = cell_parts(section, (), **settings)
    assert cell_parts(section, (), **settings) == before
    (tmp_path / "config.json").write_text('{"d_model": 8}')
    assert difference(before, cell_parts(section, (), **settings)) == "changed: weights"
