"""How every figure looks and is kept: one style, and the same drawing as PNG and as SVG."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#222222",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "hatch.linewidth": 0.6,
}


@dataclass(frozen=True)
class Drawing:
    svg: str
    png: bytes


def drawn_as(name: str, draw: Callable[[], Figure | None]) -> Drawing | None:
    """The figure that `draw` makes, in the house style; None if it makes none. `name` also keeps SVG ids apart."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = draw()
        return None if figure is None else Drawing(png=_png(figure), svg=_svg(figure, name))


def log_axis(axes: Axes) -> None:
    """A logarithmic axis whose ticks are plain numbers, also where it spans less than a decade."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1, 1.5, 2, 3, 5, 7) if high / low < 5 else (1, 2, 5) if high / low < 200 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    figure.set_layout_engine("none")  # what the layout found stays
    return buffer.getvalue()


def _svg(figure: Figure, name: str) -> str:
    """The figure as an element for an HTML page: no addresses, no fixed size, no names that clash."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<g\b[^>]*?) id="[^"]*"', r"\1", text)  # names of groups, which nothing refers to
    opening = re.search(r'viewBox="[^"]*"', text)
    assert opening is not None
    return re.sub(r"<svg[^>]*>", f'<svg {opening[0]} role="img" aria-labelledby="caption-{name}">', text, count=1)
