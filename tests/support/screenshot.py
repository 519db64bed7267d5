"""Takes a picture of a page: `python -m tests.support.screenshot PAGE.html OUT.png`."""

import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright


def main(page_path: Path, out: Path) -> None:
    """Write the top of a page as a small PNG."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1000, "height": 800}, color_scheme="light")
        page.goto(page_path.absolute().as_uri())
        page.screenshot(path=str(out))
        browser.close()
    with Image.open(out) as image:
        image.convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(out, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
