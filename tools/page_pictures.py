"""Pictures of the web page for the docs, from a real server and a real model. Needs Chromium and Pillow."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from PIL import Image  # noqa: E402

from browser import Browser, Page, find_chromium  # noqa: E402
from millis import hub  # noqa: E402
from serving import Server  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
LONG = "Explain to a new colleague, in detail and with examples, how a bakery plans its day. " * 9


def main() -> None:
    """Writes docs/pictures/page.png and page-dark.png."""
    program = find_chromium()
    if program is None:
        sys.exit("no Chromium here; on Debian or Ubuntu: apt install chromium")
    PICTURES.mkdir(exist_ok=True)
    with (
        Server(hub.resolve("smollm2"), "--served-name", "smollm2") as server,
        tempfile.TemporaryDirectory() as folder,
        Browser(Path(folder), program) as browser,
    ):
        page = browser.page(server.facts["url"])
        page.choose("#system", "Answer in one short sentence.")
        for question in ("What is the capital of France?", "And of Italy?", "Name a river there."):
            ask(page, question, 11)
        page.click("#new")
        page.choose("#system", "")
        ask(page, "Give me three tips for a good night's sleep.", 10)
        take(page, PICTURES / "page.png")
        page.scheme("dark")
        page.choose("#language", "zh")
        ask(page, LONG, 0)
        take(page, PICTURES / "page-dark.png")


def ask(page: Page, text: str, deadline: int) -> None:
    page.choose("#deadline", deadline)
    before = page.count(".turn")
    page.click("#prompt")
    page.type(text)
    page.press("Enter")
    page.wait(f"document.querySelectorAll('.answer[aria-busy=false]').length > {before}")


def take(page: Page, path: Path) -> None:
    """The page once its live view has seen the last answer, in few colours."""
    page.run("new Promise((done) => setTimeout(done, 2500))")
    page.screenshot(path)
    Image.open(path).convert("RGB").quantize(256, kmeans=1, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
