"""A hook of MkDocs: pages that lie outside of docs/, and links to files that have no page."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {  # page: file
    "index.md": "README.md",
    "examples.md": "examples/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
LINK = re.compile(r"(?P<shown>!?\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside of docs/."""
    for page, file in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Make links lead to pages of the site. A link to a file that has no page becomes its text."""
    here = page.file.src_uri
    folder = (ROOT / PAGES[here]).parent if here in PAGES else (Path(config.docs_dir) / here).parent
    pages = {(ROOT / file).resolve(): name for name, file in PAGES.items()}

    def mended(link: re.Match[str]) -> str:
        target = link["target"]
        if ":" in target:
            return link[0]
        place = (folder / target).resolve()
        inside = os.path.relpath(place, config.docs_dir)
        name = pages.get(place, inside)
        if files.get_file_from_path(name) is not None:
            return f"{link['shown']}({os.path.relpath(name, os.path.dirname(here) or '.')}{link['anchor'] or ''})"
        if place.exists():
            return link["shown"][1:-1]
        return link[0]  # which the strict build refuses

    return LINK.sub(mended, markdown)
