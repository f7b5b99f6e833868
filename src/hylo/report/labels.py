"""Names beside points, each where it covers neither a point nor another name."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH, HEIGHT = 0.56, 1.25  # of a letter and of a line, in font sizes; near enough for every sans-serif
PLACES = (  # offset in points, and where the name lies from there; the first that is free is taken
    *((x, y, "left" if x > 0 else "right", "bottom" if y > 0 else "top") for y in (4, -4) for x in (6, -6)),
    (8, 0, "left", "center"),
    (-8, 0, "right", "center"),
    *((0, y, "center", "bottom" if y > 0 else "top") for y in (8, -8, 20, -20)),
)
Box = tuple[float, float, float, float]


class Point(NamedTuple):
    """A marker of an axes; `reach` in points around it, errors as error bars have them, `size` of its name."""

    x: float
    y: float
    name: str
    x_error: float = 0.0
    y_error: float = 0.0
    reach: float = 5.0
    size: float = 8.5


def label_points(axes: Axes, points: Sequence[Point]) -> None:
    """Writes each point's name where it is free; limits and layout must be what they will be."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    scale = 72 / figure.dpi
    marks, taken = [], []
    for x, y, _, x_error, y_error, reach, _ in points:
        corners = [(x, y), (x - x_error, y - y_error), (x + x_error, y + y_error)]
        (at_x, at_y), (left, low), (right, high) = axes.transData.transform(corners) * scale
        marks.append((at_x, at_y))
        taken.append((at_x - reach, at_y - reach, at_x + reach, at_y + reach))
        taken.append((left, at_y - 1, right, at_y + 1))
        taken.append((at_x - 1, low, at_x + 1, high))
    inside = axes.get_window_extent()
    whole = (inside.x0 * scale, inside.y0 * scale, inside.x1 * scale, inside.y1 * scale)
    for point, mark in zip(points, marks, strict=True):
        boxes = [_box(mark, place, len(point.name) * WIDTH * point.size, HEIGHT * point.size) for place in PLACES]
        costs = [_cost(box, taken, whole) for box in boxes]
        best = costs.index(min(costs))
        dx, dy, ha, va = PLACES[best]
        axes.annotate(
            point.name, (point.x, point.y), xytext=(dx, dy), textcoords="offset points", ha=ha, va=va,
            fontsize=point.size, zorder=6, annotation_clip=False,
        )  # fmt: skip
        taken.append(boxes[best])


def _cost(box: Box, others: Sequence[Box], whole: Box) -> float:
    """Area over others and, three times worse, outside of the axes."""
    return sum(_overlap(box, other) for other in others) + 3 * (_area(box) - _overlap(box, whole))


def _box(mark: Any, place: tuple[float, float, str, str], width: float, height: float) -> Box:
    dx, dy, ha, va = place
    left = mark[0] + dx - {"left": 0.0, "center": width / 2, "right": width}[ha]
    low = mark[1] + dy - {"bottom": 0.0, "center": height / 2, "top": height}[va]
    return left, low, left + width, low + height


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
