"""Takes pictures of a board's page for the docs: light, dark and on a phone.

    python benchmarks/pictures/board.py runs/quick/leaderboard.html docs/results/quick

It needs Debian's package chromium and the Python package playwright (extra dev). It writes board.webp, board-dark.webp
and board-phone.webp, and with `--sections` a picture of each of these sections, such as `--sections costs1 sources1`.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

WIDTH, HEIGHT = 1180, 1250
PHONE_WIDTH, PHONE_HEIGHT = 360, 760


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sections", nargs="*", default=(), metavar="ID", help="sections of the page by their names")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])

        def opened(scheme: str, width: int = WIDTH, height: int = HEIGHT) -> Page:
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            page = context.new_page()
            page.goto(given.page.resolve().as_uri())
            return page

        light = opened("light")
        save(light.screenshot(), given.out / "board.webp")
        save(opened("dark").screenshot(), given.out / "board-dark.webp")
        save(opened("light", PHONE_WIDTH, PHONE_HEIGHT).screenshot(), given.out / "board-phone.webp")
        for name in given.sections:
            save(light.locator(f"#{name}").screenshot(), given.out / f"board-{name.rstrip('0123456789')}.webp")
        browser.close()


def save(picture: bytes, path: Path) -> None:
    Image.open(io.BytesIO(picture)).convert("RGB").save(path, "WEBP", quality=88, method=6)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
