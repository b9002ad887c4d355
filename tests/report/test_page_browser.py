"""The report in a real browser: Chromium, headless, at the width of a desktop and of a phone, light and dark.

The page is put into a frame of the wanted width, whose script measures it and leaves the result in the outer document,
which ``--dump-dom`` prints. Skipped where there is no Chromium.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report_pages import HOSTILE, matrices, write_results, write_run
from safetensors.torch import save_file

from lightning_prune.report import report

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (found := shutil.which(name))),
    None,
)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; apt-get install chromium"),
    pytest.mark.xdist_group("browser"),
]

# The frame has the origin of the outer document (srcdoc), so its layout can be read; the page's own policy forbids
# scripts inside it. Contrast is that of WCAG 2, of every text against the nearest opaque background.
MEASURE = """
<!doctype html><html><body><pre id="result">not measured</pre>
<template id="page">PAGE</template>
<script>
const results = [];
const channels = text => (text.match(/[\\d.]+/g) || []).map(Number);
const rgb = text => {
  const c = channels(text);
  return text.startsWith("color(") ? [c[0] * 255, c[1] * 255, c[2] * 255, c[3]] : c;
};
const luminance = color => {
  const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = color.slice(0, 3).map(v => linear(v / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const measure = frame => {
  const view = frame.contentWindow, page = frame.contentDocument, wide = view.innerWidth;
  const elements = [...page.querySelectorAll("body *")];
  const background = element => {
    for (let e = element; e; e = e.parentElement) {
      const c = rgb(view.getComputedStyle(e).backgroundColor);
      if (c.length >= 3 && (c[3] === undefined || c[3] === 1)) return c;
    }
    return [255, 255, 255];
  };
  let worst = [99, ""];
  for (const e of elements) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.getClientRects().length) continue;
    const [a, b] = [luminance(rgb(view.getComputedStyle(e).color)), luminance(background(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst[0]) worst = [ratio, e.textContent.trim().slice(0, 40)];
  }
  results.push({
    innerWidth: wide,
    scrollWidth: page.documentElement.scrollWidth,
    outside: elements.filter(e => !e.closest(".scroll") && e.getBoundingClientRect().right > wide + 1).length,
    resources: view.performance.getEntriesByType("resource").map(r => r.name).filter(n => !n.startsWith("data:")),
    scripts: page.scripts.length,
    broken: [...page.images].filter(i => !i.complete || !i.naturalWidth).length,
    images: page.images.length,
    unnamed: [...page.querySelectorAll("svg, img")].filter(e => !(e.getAttribute("aria-label") || e.alt)).length,
    headings: [...page.querySelectorAll("h1, h2, h3")].map(h => h.tagName + " " + h.textContent),
    background: view.getComputedStyle(page.body).backgroundColor,
    contrast: worst,
    text: page.body.innerText,
  });
  document.getElementById("result").textContent = JSON.stringify(results);
};
const next = widths => {
  if (!widths.length) return;
  const frame = document.createElement("iframe");
  frame.width = widths[0];
  frame.height = 900;
  frame.style.border = 0;
  frame.onload = () => { measure(frame); next(widths.slice(1)); };
  frame.srcdoc = document.getElementById("page").content.textContent;
  document.body.append(frame);
};
next(WIDTHS);
</script></body></html>
"""


def look(tmp_path: Path, page: str, widths: list[int], dark: bool) -> list[dict[str, Any]]:
    """Lay the page out at some widths and measure it; also which resources it asked for."""
    assert CHROMIUM is not None
    outer = tmp_path / "outer.html"
    outer.write_text(MEASURE.replace("WIDTHS", str(widths)).replace("PAGE", html.escape(page)), encoding="utf-8")
    # Chromium's preferred color scheme: 0 is dark, 1 is light.
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=5000", "--dump-dom",
        outer.as_uri(),
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment, check=False)
    found = re.search(r'<pre id="result">(\[.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"nothing measured: {done.stdout[-500:]} {done.stderr[-1500:]}"
    measured: list[dict[str, Any]] = json.loads(html.unescape(found.group(1)))
    assert len(measured) == len(widths)
    return measured


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report of a run whose layers, settings and rows are called like scripts."""
    folder, dense = tmp_path_factory.mktemp("report"), matrices(blocks=6)
    save_file(dense, folder / "dense.safetensors")
    run = write_run(folder / ("a_run_with_a_long_name_" * 4), dense, hostile=HOSTILE)
    results = write_results(folder / "results.json", run.name, hostile=HOSTILE)
    file = report(run, folder / "r.html", dense=folder / "dense.safetensors", results=[results], progress=False)
    return file.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_in_a_browser(tmp_path: Path, page: str, dark: bool) -> None:
    widths = [1280, 390, 320]
    for width, seen in zip(widths, look(tmp_path, page, widths, dark), strict=True):
        assert seen["innerWidth"] == width
        assert seen["scrollWidth"] <= width, "the page scrolls sideways"
        assert seen["outside"] == 0
        assert seen["resources"] == []
        assert seen["scripts"] == 0
        assert seen["images"] >= 4
        assert seen["broken"] == 0
        assert seen["unnamed"] == 0
        assert seen["contrast"][0] >= 4.5, seen["contrast"]  # WCAG 2 AA
        assert (max(map(int, re.findall(r"\d+", seen["background"])[:3])) < 80) == dark
        assert seen["headings"][0].startswith("H1 ")
        for expected in (
            "Where it is sparse",
            "How the zeros lie",
            "Sparsity in percent",
            "62.20 → 63.60",
            "alert('x')",
        ):
            assert expected in seen["text"], expected
        for wrong in ("nan", "None", "undefined", "{{", "Markup("):
            assert not re.search(rf"(?<![\w.]){re.escape(wrong)}(?!\w)", seen["text"]), wrong


@pytest.mark.slow
def test_the_test_sees_what_is_wrong(tmp_path: Path, page: str) -> None:
    """Too wide, too pale, and from elsewhere: each is noticed."""
    wrong = page.replace("default-src 'none'; ", "").replace(
        "</main>",
        '<div style="width:900px">wide</div><p style="color:#ddd;background:#fff">pale</p>'
        '<img alt="x" src="http://127.0.0.1:9/x.png"></main>',
    )
    wrong = wrong.replace("img-src data:", "img-src * data:")
    (seen,) = look(tmp_path, wrong, [390], False)
    assert seen["scrollWidth"] > 390
    assert seen["contrast"][0] < 2
    assert seen["broken"] == 1
    assert seen["resources"] == ["http://127.0.0.1:9/x.png"]
