"""Which layers stay attention: a KV budget, scores of the layers, and the layout that they choose."""

from hylo.select.context import LayerScore, SelectionContext

__all__ = ["LayerScore", "SelectionContext"]
