"""The page of an evaluation in a real headless browser: quiet, alone, readable on a phone, light and dark.

Skipped where there is no Chromium, but not under continuous integration (CI=true).
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, Page, find_browser
from html_page import check_page
from PIL import Image
from tiny_models import save_dense

from moemerge.artifacts.manifest import read_manifest
from moemerge.stages.evaluate import evaluate

EVIL = "<img src=x onerror=alert(1)>"
OUTSIDE = '<img src="http://127.0.0.1:9/x.png" alt="x"><script>document.title = "ran"</script></main>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation in which models, sets and subsets have hostile names."""
    home = tmp_path_factory.mktemp("world")
    models = {name: str(save_dense(home / f"m{seed}", seed=seed)) for seed, name in enumerate(("base", EVIL))}
    pairs = [
        {"prompt": f"w{i}", "chosen": f" w{i} w1", "rejected": f" w{i + 1}", "subset": f"{EVIL}{i % 2}"}
        for i in range(12)
    ]
    pairs[3]["chosen"] = ""
    candidates = [
        {"prompt": f"w{i}", "candidates": [{"text": f" w{j}", "score": j % 4} for j in range(8)]}
        for i in range(3)
    ]
    for name, rows in (("pairs", pairs), ("candidates", candidates)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "pairs": {EVIL: str(home / "pairs.jsonl")},
        "candidates": {"bon": str(home / "candidates.jsonl")},
    }
    options = {"bad_rows": "skip", "resamples": 100, "threads": 1, "device": "cpu"}
    options["probes"] = ["accuracy", "best_of_n"]
    return evaluate(models=models, **given, **options, output=home / "evaluation")


def test_the_page_says_all(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    outline = check_page(text)
    titles = ["Summary", "Accuracy", "Best of n", "Models and data", "Provenance"]
    assert outline.text["h2"] == titles and EVIL in outline.text["th"]
    assert f"Against base: {EVIL}: " in "".join(outline.text["p"])
    report, manifest = json.loads((folder / "report.json").read_text()), read_manifest(folder)
    accuracy = report["probes"]["accuracy"]["sets"][EVIL]["all"]["models"]["base"]["accuracy"]
    assert f"{accuracy:.3f}" in outline.text["span"]
    for given in manifest["inputs"]["models"].values():
        assert given["sha256"][:16] in outline.text["td"]
    assert any(cell.startswith("no answer") or "empty" in cell for cell in outline.text["td"])
    alt = [image["alt"] or "" for image in outline.all("img")]
    assert len(alt) >= len(report["plots"]) >= 2
    assert any(f"base {accuracy:.4g}"[:9] in text for text in alt)
    assert "gold score against KL" in alt[0] and "goes from" in alt[0], "the first picture"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        assert os.environ.get("CI") != "true", (
            "continuous integration opens reports in a browser: install chromium"
        )
        pytest.skip("no Chromium on this machine")
    running = Browser(program, tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def page(browser: Browser) -> Page:
    return browser.new_page()


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("L"), dtype=float)


def test_quiet_and_alone(page: Page, folder: Path) -> None:
    page.open(folder / "report.html")
    place = (folder / "report.html").as_uri()
    assert {url for url in page.requests if not url.startswith("data:")} == {place}
    assert page.complaints == []
    assert page.value("[...document.images].every(image => image.complete && image.naturalWidth > 100)")
    assert page.value("document.images.length") >= 3 and page.value("document.scripts.length") == 0


def test_the_policy_keeps_out_what_gets_in(browser: Browser, folder: Path) -> None:
    """The checks above can fail, and even a page with markup in it loads and runs nothing."""
    page = browser.new_page()
    text = (folder / "report.html").read_text()
    (folder.parent / "hostile.html").write_text(text.replace("</main>", OUTSIDE))
    page.open(folder.parent / "hostile.html")
    assert page.value("document.title") == "Evaluation" and page.value("document.scripts.length") == 1
    assert len(page.complaints) == 2 and all("Content Security Policy" in text for text in page.complaints)


@pytest.mark.parametrize("width", [360, 390, 1200])
def test_nothing_is_wider_than_the_window(page: Page, folder: Path, width: int) -> None:
    page.open(folder / "report.html", width=width, height=844)
    page.value("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.value("document.documentElement.clientWidth") == width
    assert page.value("document.documentElement.scrollWidth") == width
    size = "parseFloat(getComputedStyle(document.querySelector('td')).fontSize)"
    assert page.value(size) >= 13
    if width < 400:
        boxes = "[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth)"
        assert page.value(f"{boxes}.length") > 0, "wide tables scroll in their own boxes"


def test_light_and_dark(page: Page, folder: Path) -> None:
    """Page and plots turn dark; in both, text stands out from what is behind it."""
    seen = {}
    for dark in (False, True):
        page.open(folder / "report.html", dark=dark)
        page.value("document.images[1].scrollIntoView({block: 'center'})")
        box = page.value("(r => [r.x, r.y, r.width, r.height])(document.images[1].getBoundingClientRect())")
        x, y, width, height = map(int, box)
        seen[dark] = (window := pixels(page.screenshot()))[y : y + height, x : x + width]
        assert window.shape == (900, 1200) and seen[dark].size > 10_000
    light, dark = seen[False], seen[True]
    assert np.median(light) > 240 and light.min() < 90
    assert np.median(dark) < 60 and dark.max() > 180
