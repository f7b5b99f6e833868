"""How a report's figures were measured: the models, and for every source its settings, versions, seeds and hashes."""

from collections.abc import Mapping
from html import escape
from typing import Any

from hylo.report.tables import models_table, table

KINDS = {"run": "Run", "results": "Results of hylo evaluate", "bench": "Results of hylo bench"}


def origin(report: Mapping[str, Any]) -> str:
    """Without sources, a run's own report: its meta alone."""
    parts = [models_table(report)]
    for source in report["sources"] or [{"meta": report.get("meta") or {}}]:
        values = {"measured on": dict(source.get("meta") or {}), **(source.get("settings") or {})}
        values |= {"versions": values["measured on"].pop("versions", {})}
        rows = [[escape(key), escape(text)] for key, part in values.items() if (text := said(part))]
        title = f"<h3>{KINDS[source['kind']]}: <code>{escape(source['path'])}</code></h3>" if "path" in source else ""
        parts += [title + (table([], rows, text_columns=2) if rows else "")]
    return "".join(parts)


def said(values: Mapping[str, Any]) -> str:
    """Nested values in a line: `seed 0; lengths 1,024, 2,048; sources: essays 1f2e`."""
    parts = []
    for key, value in values.items():
        name = str(key).replace("_", " ")
        if isinstance(value, Mapping):
            parts.append(f"{name}: {said(value)}")
        elif value is not None:
            parts.append(f"{name} {_text(value)}")
    return "; ".join(parts)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)
