import re
from pathlib import Path

import pytest
import torch

from kdtoolkit.listing import embedded_suites
from kdtoolkit.methods import all_methods
from tests.conftest import tiny_gfl

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_every_method_has_a_row_in_the_readme():
    rows = set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))
    missing = sorted(set(all_methods()) - rows)
    assert not missing, f"README.md has no row for {', '.join(missing)} in its table of methods: add one"
    assert rows <= set(all_methods())


@pytest.mark.parametrize("page", ["README.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))])
def test_links_lead_somewhere(page):
    path = ROOT / page
    prose = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
        assert (path.parent / target).exists(), f"{page} links to {target}"


def test_commands_in_the_readme_name_embedded_suites():
    named = set(re.findall(r"kd benchmark run (\w+)", README))
    assert named
    assert named <= set(embedded_suites())


def test_the_detectors_of_the_docs_are_built():
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "detectors.md").read_text("utf-8"), re.DOTALL).group(1)
    with torch.device("meta"):  # their weights are of no use here
        exec(code, {})


def test_the_python_example_runs(tmp_path, monkeypatch, batch):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    torch.save(tiny_gfl(seed=1).state_dict(), "teacher.pt")
    # The same text, with detectors of test size and two batches for a data set.
    small = re.sub(r"GFL\(num_classes=3, backbone=\"resnet\d+\"\)", "tiny_gfl(seed=1)", code)
    assert small.count("tiny_gfl") == 2
    exec(small, {"loader": [batch, batch], "tiny_gfl": tiny_gfl})
    tiny_gfl(seed=3).load_state_dict(torch.load("student.pt", weights_only=True))
