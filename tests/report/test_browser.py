"""A report's page, and a laboratory's, in a real browser: no error, nothing wider than the window, every figure there,
all text legible in both colour schemes."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from lab_example import lab_example
from results_example import latency, results, run_report

from hylo.evaluate.published import published_rows
from hylo.lab.page import write_lab
from hylo.report.collect import completed
from hylo.report.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCHEMES = {"dark": 0, "light": 1}  # Blink's numbers
ENOUGH = 4.5  # contrast of text, WCAG AA

# Runs in the page and leaves what it found as JSON in its last element.
LOOK = r"""
const luminance = c => c.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const parse = text => (text.match(/[\d.]+/g) || []).map(Number);
const opaque = text => text && text.startsWith('rgb') && (parse(text)[3] ?? 1) > 0.5;
const contrast = (a, b) => { const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
  return (x + 0.05) / (y + 0.05); };
function behind(element, box) {
  const stack = document.elementsFromPoint(box.x + box.width / 2, box.y + box.height / 2);
  for (const other of stack.filter(e => !element.contains(e) && !e.contains(element) && e.tagName != 'text'
                                        && e.tagName != 'tspan')) {
    const fill = getComputedStyle(other).fill;
    if (other instanceof SVGElement && other.tagName != 'svg' && opaque(fill)) return parse(fill).slice(0, 3);
  }
  for (let e = element; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor;
    if (opaque(colour)) return parse(colour).slice(0, 3);
  }
  return [255, 255, 255];
}
const faint = [];
for (const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT); walker.nextNode();) {
  const node = walker.currentNode, element = node.parentElement;
  if (!node.data.trim() || ['SCRIPT', 'STYLE', 'style'].includes(element.tagName)) continue;
  const style = getComputedStyle(element), inside = element instanceof SVGElement;
  const range = document.createRange(); range.selectNodeContents(node);
  const box = range.getBoundingClientRect();
  if (!box.width) continue;
  const ratio = contrast(parse(inside ? style.fill : style.color).slice(0, 3), behind(element, box));
  if (!(ratio >= ENOUGH)) faint.push([node.data.trim().slice(0, 40), Math.round(100 * ratio) / 100]);
}
const found = {
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  figures: [...document.querySelectorAll('figure svg')].map(svg => { const box = svg.getBoundingClientRect();
    return [box.width, box.height, svg.querySelectorAll('path, use, rect').length]; }),
  faint, page: getComputedStyle(document.body).backgroundColor, texts: document.querySelectorAll('text').length,
};
const out = document.createElement('pre'); out.id = 'found'; out.textContent = JSON.stringify(found);
document.body.append(out);
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    run = tmp_path_factory.mktemp("run")
    write_report(run, run_report())
    whole = tmp_path_factory.mktemp("results")
    write_report(whole, completed(results() | {"latency": [latency()], "published": published_rows()}))
    lab, on_axis = (tmp_path_factory.mktemp("lab") for _ in range(2))
    for folder in (lab, on_axis):
        write_lab(*lab_example(axis=folder is on_axis), folder, "hylo lab suite.yaml --out lab")
    script = f"<script>const ENOUGH = {ENOUGH};{LOOK}</script></body>"
    for page in (run / "report.html", whole / "report.html", lab / "lab.html", on_axis / "lab.html"):
        page.with_name("look.html").write_text(page.read_text().replace("</body>", script))
    return [folder / "look.html" for folder in (run, whole, lab, on_axis)]


def look(page: Path, scheme: str, width: int, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What the script found, and what the browser said on its console."""
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    options += [
        f"--user-data-dir={folder}",
        f"--window-size={width},16000",
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
        "--dump-dom",
    ]
    done = subprocess.run([CHROMIUM, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_in_a_browser(scheme: str, pages: list[Path], tmp_path: Path) -> None:
    for page in pages:
        found, said = look(page, scheme, 1200, tmp_path)
        assert said == []
        assert found["overflow"] == 0
        assert found["page"] == {"dark": "rgb(13, 17, 23)", "light": "rgb(255, 255, 255)"}[scheme]
        assert len(found["figures"]) >= (2 if (page.parent / "lab.html").exists() else 4) and found["texts"] > 20
        assert all(width > 600 and height > 100 and parts > 5 for width, height, parts in found["figures"])
        assert found["faint"] == []


def test_on_a_narrow_screen(pages: list[Path], tmp_path: Path) -> None:
    for page in pages:
        assert look(page, "light", 520, tmp_path)[0]["overflow"] == 0
