"""docs/scaling.md: its tables are what its script prints."""

import contextlib
import io
import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


def test_tables_are_the_scripts_output() -> None:
    text = PAGE.read_text()
    (script,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    tables = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(script, str(PAGE), "exec"), {})
    assert out.getvalue() == "\n".join(tables)
