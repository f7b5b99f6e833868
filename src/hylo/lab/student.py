"""Student's t for whole degrees of freedom, by its finite series (Abramowitz and Stegun 26.7.3 and 26.7.4)."""

import math


def two_sided(t: float, freedom: int) -> float:
    """P(|T| >= |t|): how often chance alone goes as far."""
    if math.isinf(t):
        return 0.0
    angle = math.atan(abs(t) / math.sqrt(freedom))
    squared = math.cos(angle) ** 2
    term = total = math.cos(angle) if freedom % 2 else 1.0
    for i in range(3 if freedom % 2 else 2, freedom, 2):  # each term is the last one * (i-1)/i cos^2
        term *= squared * (i - 1) / i
        total += term
    if freedom == 1:
        inside = 2 * angle / math.pi
    elif freedom % 2:
        inside = 2 / math.pi * (angle + math.sin(angle) * total)
    else:
        inside = math.sin(angle) * total
    return max(0.0, 1.0 - inside)


def critical(freedom: int, level: float = 0.05) -> float:
    """The t that chance alone exceeds, to either side, with probability `level`: 1.96 for many degrees of freedom."""
    low, high = 0.0, 1.0
    while two_sided(high, freedom) > level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, freedom) > level else (low, middle)
    return (low + high) / 2


def holm(chances: list[float]) -> list[float]:
    """Each p-value corrected for having looked at all of them (Holm 1979): valid however they depend on each other."""
    corrected = [1.0] * len(chances)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(chances)), key=lambda i: chances[i])):
        largest = max(largest, min(1.0, (len(chances) - rank) * chances[i]))
        corrected[i] = largest
    return corrected
