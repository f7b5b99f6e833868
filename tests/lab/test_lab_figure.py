"""The laboratory's figures are drawn from the comparison, and its page needs nothing from anywhere."""

import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from lab_example import lab_example
from matplotlib.figure import Figure
from matplotlib.text import Text

from hylo.errors import HyloError
from hylo.files import read_json
from hylo.lab.compare import compare
from hylo.lab.figure import arms_figure, differences_figure, draw_lab, lines_figure, place
from hylo.lab.page import duration, write_lab

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def texts(figure: Figure | None) -> str:
    assert figure is not None
    figure.draw_without_rendering()
    found = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    return " | ".join(text.get_text() for text in found if text.get_text())


def places(figure: Figure | None, panel: int, marker: str) -> list[tuple[float, float]]:
    assert figure is not None
    lines = [line for line in figure.axes[panel].get_lines() if line.get_marker() == marker]
    return [(float(x), float(y)) for line in lines for x, y in np.asarray(line.get_xydata())]


def test_arms_have_a_row_each_with_mean_seeds_and_verdict() -> None:
    comparison = compare(*lab_example())
    figure = arms_figure(comparison)
    said = texts(figure)
    for part in ("KL at 2K ↓", "Needle accuracy at 2K (%) ↑", "more tokens", "baseline: the recipe", "better", "worse"):
        assert part in said, part
    assert figure is not None and len(figure.axes) == 3
    round_ones = places(figure, 1, "o")
    assert (pytest.approx(100 * comparison.summaries["recipe"]["needle@2048"].mean), 0) in round_ones
    assert len([y for _, y in round_ones if 2 < y < 2.5]) == 4  # the third arm's seeds
    (worse,) = [x for x, y in places(figure, 0, "s") if y == 2]
    assert worse == pytest.approx(comparison.summaries["none"]["kl@2048"].mean)


def test_differences_stand_beside_nothing() -> None:
    comparison = compare(*lab_example())
    figure = differences_figure(comparison)
    assert "difference from the recipe" in texts(figure) and "baseline" not in texts(figure)
    (worse,) = [x for x, y in places(figure, 0, "s") if y == 1]
    assert worse == pytest.approx(comparison.differences["none"]["kl@2048"].mean)


def test_lines_over_an_axis() -> None:
    comparison = compare(*lab_example(axis=True))
    figure = lines_figure(comparison)
    said = texts(figure)
    assert "longest length trained at (tokens)" in said and "1K | " in said and said.endswith("YaRN | plain")
    means = [comparison.summaries[f"plain{n}"]["kl@2048"].mean for n in (256, 512, 1024, 2048)]
    assert places(figure, 0, "s") == [(x, pytest.approx(y)) for x, y in zip((256, 512, 1024, 2048), means, strict=True)]


@pytest.mark.parametrize("x, shown", [(1, "1"), (2.5, "2.5"), (2048, "2K"), (120_000, "120 K"), (300, "300")])
def test_ticks(x: float, shown: str) -> None:
    assert place(x) == shown


def test_figures_without_data_are_left_out() -> None:
    view, results = lab_example()
    assert draw_lab(compare(view, [])) == {}
    assert lines_figure(compare(view, results)) is None
    alone = compare(view, [one for one in results if one["arm"] == "recipe"])
    assert differences_figure(alone) is None and arms_figure(alone) is not None
    assert "no difference shown" in texts(differences_figure(compare(*lab_example(seeds=1))))


def test_everything_is_written(tmp_path: Path) -> None:
    view, results = lab_example(axis=True)
    comparison = write_lab(view, results, tmp_path, "hylo lab suite.yaml")
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    figures = {f"figures/{name}.{kind}" for name in ("arms", "differences", "lines") for kind in ("png", "svg")}
    assert found == {"lab.json", "lab.md", "lab.html"} | figures
    assert read_json(tmp_path / "lab.json", "comparison") == comparison.to_json() | {"command": "hylo lab suite.yaml"}
    for name in ("arms", "differences", "lines"):
        ElementTree.parse(tmp_path / "figures" / f"{name}.svg")
        assert f"![{name}](figures/{name}.png)" in (tmp_path / "lab.md").read_text()
    write_lab(view, [], tmp_path, "hylo lab suite.yaml")  # over what was there
    with pytest.raises(HyloError, match="cannot write"):
        write_lab(view, [], tmp_path / "lab.md", "hylo lab suite.yaml")


def test_the_page_holds_all_and_fetches_nothing(tmp_path: Path) -> None:
    view, results = lab_example()
    write_lab(view, results, tmp_path, "hylo lab a<b.yaml")
    text = (tmp_path / "lab.html").read_text()
    parts = ["Does stage 1 pay", "18 of 20 runs done", "no alignment &lt;b&gt;", "a&lt;b.yaml", "loss is not finite"]
    parts += ["1 not run: another order | of rows seed 3.", "four times as many", "p, Holm", "4.32 M"]
    for part in parts:
        assert part in text, part
    assert text.count("<svg") == 2 and 'aria-labelledby="caption-arms"' in text and 'id="caption-arms"' in text
    assert not re.search(r'(src|href)="(?!#)', text) and "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    write_lab(view, [], tmp_path, "x")
    assert "Nothing yet" in (tmp_path / "lab.html").read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [1200, 520])
def test_the_page_is_no_wider_than_the_window(tmp_path: Path, width: int) -> None:
    assert CHROMIUM is not None
    write_lab(*lab_example(), tmp_path / "lab", "hylo lab suite.yaml")
    page = tmp_path / "lab" / "lab.html"
    look = "document.title = document.documentElement.scrollWidth - document.documentElement.clientWidth"
    page.write_text(page.read_text().replace("</body>", f"<script>{look}</script></body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    command = [CHROMIUM, *options, f"--window-size={width},4000", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "<title>0</title>" in unescape(done.stdout)


def test_durations() -> None:
    assert [duration(seconds) for seconds in (3.14159, 99, 600, 7200)] == ["3.14 s", "99 s", "10 min", "2 h"]
