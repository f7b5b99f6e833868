"""The tables say what was compared, how sure it is, and what is not in them."""

import io

import pytest
from lab_example import lab_example
from rich.console import Console

from hylo.lab.compare import BETTER, SAME, WORSE, Difference, Metric, Summary, compare
from hylo.lab.table import decimals, interval, markdown, notes, probability, table, verdicts, with_error

KL, NEEDLE = Metric("kl@256", "KL", True), Metric("needle@256", "needle", False)


def printed(width: int = 120, seeds: int = 4) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(table(compare(*lab_example(seeds))))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_numbers_have_the_figures_that_their_errors_leave() -> None:
    assert with_error(Summary({0: 0.0421, 1: 0.0443}), KL) == "0.0432 ± 0.0011"
    assert with_error(Summary({0: 0.5, 1: 0.6}), NEEDLE) == "55.0 ± 5.0"
    assert with_error(Difference({0: -0.0421, 1: -0.0443}), KL) == "−0.0432 ± 0.0011"
    assert with_error(Difference({0: 0.02}), NEEDLE) == "+2.000"
    assert with_error(Summary({0: 1.0, 1: 1.0}), NEEDLE) == "100.00 ± 0"
    assert with_error(Difference({0: 0.0, 1: 0.0}), NEEDLE) == "0 ± 0"
    assert with_error(Summary({0: 0.1, 1: 0.1 + 1e-9}), KL) == "0.100 ± 0"
    assert with_error(None, KL) == "–"
    assert interval(Difference({0: 1.0, 1: 1.2, 2: 0.8}), KL) == "+0.50 to +1.50"
    assert interval(Difference({0: 1.0}), KL) == interval(Difference({0: 1.0, 1: 1.0}), KL) == ""
    assert [decimals(error) for error in (0.0011, 0.095, 0.1, 2.5, 12, 150, 1e-9, 0)] == [4, 3, 2, 1, 0, 0, 6, 0]
    assert [probability(p) for p in (0.0004, 0.0123, None)] == ["< 0.001", "0.012", "–"]


def test_the_terminals_table_has_a_section_a_metric() -> None:
    text = printed()
    assert (
        "KL at 2K ↓" in text
        and "needle accuracy at 2K (%) ↑" in text
        and "± one standard error; ↓ lower is better" in text
    )
    row = next(line for line in text.splitlines() if line.strip().startswith("more tokens"))
    assert row.split()[-2:] == ["better", "†"] and "neither" in text and "−0.05" in row
    assert "no alignment <b>" in text and "3 of 4" in text
    assert "1 failed: learning rate tenfold and a label" in text and "seed 1: loss is" in text
    assert max(map(len, printed(width=80).splitlines())) <= 80


def test_the_readmes_table_is_githubs_with_better_in_bold() -> None:
    text = markdown(compare(*lab_example()))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 5 and {row.replace("\\|", "").count("|") for row in rows} == {6}
    assert rows[0] == "|  | seeds | KL at 2K ↓ | needle accuracy at 2K (%) ↑ | perplexity at 512 ↓ |"
    assert rows[2].startswith("| the recipe (baseline) | 4 | 0.2000 ± ")
    assert rows[3].count("<br>**") == 3 and rows[3].count("**†") == 3
    assert (
        rows[4].startswith("| no alignment &lt;b&gt; |")
        and rows[4].count("**") == 0
        and rows[4].count("<br>+") == 2
        and rows[4].count("†") == 3
    )
    assert "another order \\| of rows" in rows[5] and "| 3 of 4 |" in rows[5] and "**" not in rows[5]


def test_notes_say_how_strong_a_verdict_is_and_what_is_missing() -> None:
    strength, corrected, failed, missing = notes(compare(*lab_example()))
    assert "4 seeds exceed in 14 % of comparisons where there is none" in strength
    assert corrected.startswith("† 6 of 12 comparisons stand at 5 %") and "for making 12" in corrected
    assert failed.endswith("more than one line seed 1: loss is not finite.") and failed.startswith("1 failed: ")
    assert missing == "1 not run: another order | of rows seed 3."


def test_one_seed_is_not_judged() -> None:
    view, results = lab_example(seeds=1)
    comparison = compare(view, results)
    assert notes(comparison) == ["One seed has no error: differences are shown, and none is judged."]
    assert "one seed" in printed(seeds=1)


def test_verdicts_by_metric() -> None:
    found = verdicts(compare(*lab_example()))
    assert found["KL at 2K"][BETTER] == ["more tokens †"] and found["KL at 2K"][WORSE][0] == "no alignment <b> †"
    assert "another order | of rows" in found["perplexity at 512"][SAME]


@pytest.mark.parametrize("seeds", [1, 4])
def test_nothing_to_show_is_shown(seeds: int) -> None:
    view, _ = lab_example(seeds)
    comparison = compare(view, [])
    assert "the recipe (baseline) | 0 of" in markdown(comparison) and verdicts(comparison) == {}
    assert notes(comparison)[0].startswith(f"{5 * seeds} not run: the recipe seed")
