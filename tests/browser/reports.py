# SPDX-License-Identifier: Apache-2.0
"""Makes small runs of every task and opens their reports in Chromium, at the width of a phone and of a desk.

    python tests/browser/reports.py [--keep FOLDER]

Fails where a picture is not shown, the page is wider than the window, a section is empty, the browser
complains, or anything is loaded from elsewhere.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

from playwright.sync_api import Browser, sync_playwright
from report_checks import read_report
from test_detection_task import TINY as DETECT
from test_detection_task import scenes_as_coco
from test_segment_train import TINY as SEGMENT
from train_helpers import ONCE, SMALL, folder
from vimcore.cli import main

WIDTHS = (390, 1280)
# Of the page, when all of its pictures had time to be decoded.
MEASURE = """async () => {
  const pictures = [...document.images];
  pictures.forEach(picture => { picture.loading = "eager"; });
  const broken = [];
  for (const picture of pictures) {
    try { await picture.decode(); } catch (error) { broken.push(picture.alt); continue; }
    const box = picture.getBoundingClientRect();
    if (!picture.naturalWidth || !box.width || !box.height) broken.push(picture.alt);
  }
  return {
    content: document.documentElement.scrollWidth,
    pictures: pictures.length,
    broken,
    sections: [...document.querySelectorAll("section")].map(part => part.getBoundingClientRect().height),
  };
}"""


def run(*arguments: object) -> None:
    status = main([*map(str, arguments)])
    assert status == 0, (arguments, status)


def reports(root: Path) -> list[Path]:
    """Of a run of each task, and of an evaluation."""
    photos = folder(root / "photos")
    tiny = ["--depth", "2", "--embed-dim", "16", "--workers", "0", "--epochs", "1", "--batch-size", "8"]
    runs = {
        "classify": ["--data", photos, *SMALL, *ONCE, "--epochs", "2", "--val-fraction", "0.3"],
        "segment": SEGMENT,
        "detect": [*DETECT, "--data", scenes_as_coco(root / "train", 8, held_out=False)],
        "pretrain": [
            "--preset",
            "digits-mim",
            "--data",
            photos,
            "--val-fraction",
            "0.2",
            *tiny,
            "--epochs",
            "1",
        ],
    }
    runs["detect"] += ["--val", scenes_as_coco(root / "val", 4, held_out=True)]
    for name, arguments in runs.items():
        run("train", *arguments, "--out", root / name)
    run("plot", *(root / name for name in runs), "--format", "html", "--out", root / "pages")
    run("eval", root / "classify", "--workers", "0", "--html", root / "pages" / "evaluation.html")
    return sorted((root / "pages").glob("*.html"))


def check(browser: Browser, page: Path) -> None:
    """At every width."""
    wanted = read_report(page)
    for width in WIDTHS:
        found = opened(browser, page, width)
        assert found["content"] <= width, f"{page}: {found['content']} pixels wide in a window of {width}"
        assert found["broken"] == [], found["broken"]
        assert found["pictures"] == len(wanted.pictures)
        assert len(found["sections"]) == len(wanted.headings)
        assert min(found["sections"]) > 60, found["sections"]
    print(
        f"{page.name}: {len(wanted.pictures)} pictures, {page.stat().st_size // 1024} KiB, well at {WIDTHS}"
    )


def opened(browser: Browser, page: Path, width: int) -> dict[str, Any]:
    """What Chromium makes of a page, all of whose folded parts are opened by a click."""
    seen = browser.new_page(viewport={"width": width, "height": 900}, offline=True)
    said: list[str] = []
    asked: list[str] = []
    seen.on("console", lambda message: said.append(message.text))
    seen.on("pageerror", lambda error: said.append(str(error)))
    seen.on("request", lambda request: asked.append(request.url[:100]))
    seen.goto(page.as_uri())
    for part in seen.query_selector_all("summary"):
        part.click()
    found = dict(seen.evaluate(MEASURE))
    assert all(part.is_visible() for part in seen.query_selector_all("details > *"))
    seen.screenshot(path=page.with_name(f"{page.stem}-{width}.png"), full_page=True)
    seen.close()
    assert said == [], said
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep runs, pages and pictures of them there"
    )
    options = parser.parse_args()
    place = options.keep or Path(tempfile.mkdtemp(prefix="vimcore-reports-"))
    try:
        pages = reports(place)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"] if os.geteuid() == 0 else []
            )
            for each in pages:
                check(browser, each)
            browser.close()
    finally:
        if options.keep is None:
            shutil.rmtree(place)
