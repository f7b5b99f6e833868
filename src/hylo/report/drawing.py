"""How every figure looks and is kept: one style, and the same drawing as PNG and as SVG, for a light or a dark page."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

INK, MUTED, FAINT, FILL, PAPER = "#222222", "#555555", "#c8c8c8", "#dcdcdc", "#ffffff"
DARK, LIGHT = "#111111", "#fefefe"  # of text upon a colour, which no page changes
NEUTRALS = {  # colour: its name in the page's style sheet, and what a dark page has in its place
    INK: ("ink", "#e6edf3"),
    "#1a1a1a": ("series", "#f0f3f6"),
    "#444444": ("ticks", "#b4bdc8"),
    MUTED: ("muted", "#a8b1bc"),
    "#7a7a7a": ("grey", "#9aa4af"),
    FAINT: ("faint", "#4a525c"),
    FILL: ("fill", "#3d444d"),
    "#e3e3e3": ("grid", "#2a3038"),
    PAPER: ("paper", "#0d1117"),
}


def _properties(values: list[tuple[str, str]]) -> str:
    return "".join(f"--figure-{name}: {colour}; " for name, colour in values)


FIGURE_CSS = (
    f":root {{ {_properties([(name, light) for light, (name, _) in NEUTRALS.items()])}}}\n"
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {_properties(list(NEUTRALS.values()))}}} }}\n"
)

STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "text.color": INK,
    "axes.labelcolor": INK,
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
    """`svg` is an element for a page that has FIGURE_CSS; `png` stands on white."""

    svg: str
    png: bytes

    @property
    def file(self) -> str:
        """The SVG as a document of its own: on white, in plain colours, which every viewer knows."""
        text = re.sub(r"var\(--figure-\w+, (#\w+)\)", r"\1", self.svg)
        opening = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
        assert opening is not None
        width, height = opening.groups()
        names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        head = f'<svg {names} width="{width}pt" height="{height}pt" {opening[0]}>'
        return re.sub(r"<svg[^>]*>", f'{head}\n<rect width="100%" height="100%" fill="{PAPER}"/>', text, count=1)


def ink_on(colour: str | tuple[float, ...]) -> str:
    """The colour of text upon another: dark or light, whichever stands out more (WCAG's contrast)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return DARK if (luminance + 0.05) / (0.0056 + 0.05) > 1.05 / (luminance + 0.05) else LIGHT


def drawn_as(name: str, draw: Callable[[], Figure | None]) -> Drawing | None:
    """The figure that `draw` makes, in the house style; None if it makes none. `name` also keeps SVG ids apart."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = draw()
        return None if figure is None else Drawing(png=_png(figure), svg=_svg(figure, name))


def log_axis(axes: Axes) -> None:
    """A logarithmic axis whose ticks are plain numbers, also where it spans less than a decade."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    fine = (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)
    steps = ((2.5, fine), (5, (1, 1.5, 2, 3, 5, 7)), (200, (1, 2, 5)))
    subs = next((subs for span, subs in steps if high / low < span), (1,))
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
    for light, (own, _) in NEUTRALS.items():
        text = re.sub(rf"{light}\b", f"var(--figure-{own}, {light})", text)
    opening = re.search(r'viewBox="[^"]*"', text)
    assert opening is not None
    return re.sub(r"<svg[^>]*>", f'<svg {opening[0]} role="img" aria-labelledby="caption-{name}">', text, count=1)
