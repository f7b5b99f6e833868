"""Each figure is drawn from its data and says what it shows; one without data is left out, with what makes it."""

import itertools
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from hylo.evaluate.published import published_rows
from hylo.report.collect import completed
from hylo.report.drawing import FIGURE_CSS, NEUTRALS, ink_on
from hylo.report.figures import FIGURES, draw_figures
from hylo.report.labels import Point, label_points
from hylo.report.latency import latency_figures
from hylo.report.missing import missing_figures
from hylo.report.mla_drawing import initialisation_figure
from hylo.report.needle_map import needle_figure
from hylo.report.positions import positions_figure
from hylo.report.scores import short_long_figure, spread
from hylo.report.trained import teacher_size_figure, training_length_figure

Report = dict[str, Any]


def mean(score: float, tasks: int = 13) -> dict[str, float]:
    return {"score": score, "se": 1.5, "tasks": tasks}


def model(name: str, layout: str | None, **training: Any) -> dict[str, Any]:
    trained = {"yarn": True, "teacher": "big", "teacher_parameters": 4000, "objective": "forward_kl", "arm": ""}
    return {
        "directory": f"models/{name}",
        "hash": name,
        "layout": layout,
        "training": trained | training if training else None,
    }


def ruler(*scores: float, tasks: int = 13) -> dict[str, Any]:
    return {"scores": {}, "mean": {n: mean(s, tasks) for n, s in zip(("8192", "65536"), scores, strict=False)}}


def suite(results: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {"settings": settings, "not_run": {}, "results": results}


def example() -> Report:
    """A base, a hybrid, two others trained otherwise; every suite and bench that figures are drawn from."""
    models = {
        "base": model("base", None),
        "extended": model("extended", "1MLA1GDN", length=65536),
        "short": model("short", "1MLA1GDN", length=8192),
        "unscaled": model("unscaled", "1MLA1GDN", length=8192, yarn=False),
        "alone": model("alone", "1MLA1GDN", length=65536, teacher=None, teacher_parameters=0, objective="ce"),
    }
    points = {"status": "measured", "concurrency": 1, "tpot": 0.01, "ttft_of_repeats": [0.1, 0.4]}
    bench = {"kind": "serve", "device": "GPU", "cores": 8, "source": "latency.json"}
    buckets = [{"from": 0, "to": 32, "perplexity": 30.0, "perplexity_se": 1.0, "kl": 0.2, "kl_se": 0.01}]
    buckets += [{"from": 32, "to": 64, "perplexity": 20.0, "perplexity_se": 1.0, "kl": 0.3, "kl_se": 0.01}]
    layers = [{"index": i, "mixer": mixer, "parameters": 10} for i, mixer in enumerate(("mla", "gated_deltanet"))]
    ranks = [{"layer": 0, "kv_rank": 8, "kv_energy": 0.91, "q_rank": 12, "q_energy": 0.975}]
    return {
        "title": "figures",
        "models": models,
        "layout": "1MLA1GDN",
        "plan": {"layers": layers},
        "suites": {
            "ruler": suite(
                {
                    "base": ruler(80, 20),
                    "extended": ruler(70, 60),
                    "short": ruler(72, 30),
                    "unscaled": ruler(71, 10),
                    "alone": ruler(60, 40),
                },
                haystack="essays",
            ),
            "gsm8k": suite({"base": {"mean": mean(50, 1)}, "extended": {"mean": mean(42, 1)}}),
            "needle": suite({"base": {"needle_depth": {"64": [1.0, 0.25], "128": [0.5, 0.0]}, "needle": {"64": 0.6}}}),
            "intrinsic": suite({name: {"by_position": {"64": buckets}} for name in ("base", "extended")}),
        },
        "latency": [
            bench | {"models": [{"model": "extended", "points": [points | {"length": 1024, "ttft": 0.2}]}]},
            bench | {"models": [{"model": "base", "points": [points | {"length": 1024, "ttft": 0.3}]}]},
            bench | {"kind": "generate", "models": [{"model": "x", "points": [points | {"length": 64, "ttft": 0.3}]}]},
        ],
        "initialisation": {
            "init": "pairs-fast",
            "rope_key": "pca",
            "calibration_tokens": 0,
            "base": {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
            "geometry": {"qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 16},
            "layers": ranks,
        },
        "published": published_rows(),
    }


def texts(figure: Figure | None) -> str:
    assert figure is not None
    figure.draw_without_rendering()
    found = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    return " | ".join(text.get_text() for text in found if text.get_text())


def heights(figure: Figure | None, panel: int) -> list[list[float]]:
    """Of every drawn line of a panel that joins points."""
    assert figure is not None
    lines = [line for line in figure.axes[panel].get_lines() if line.get_linestyle() != "None"]
    return [ys for line in lines if len(ys := [float(y) for y in np.asarray(line.get_ydata())]) > 1]


def points(figure: Figure | None, panel: int) -> dict[tuple[float, float], str]:
    """Every place of a panel with a marker (of an error bar's ends too), and the colour that fills it."""
    assert figure is not None
    return {
        (float(x), float(y)): str(line.get_markerfacecolor())
        for line in figure.axes[panel].get_lines()
        if line.get_marker() not in ("_", "|", "None")
        for x, y in np.asarray(line.get_xydata())
    }


def test_every_figure_is_drawn_as_png_and_two_svgs() -> None:
    drawn = draw_figures(example())
    assert set(drawn) == {*FIGURES} - {"training"} | {"latency", "latency_2"}
    for name, drawing in drawn.items():
        assert drawing.png.startswith(b"\x89PNG")
        assert f'aria-labelledby="caption-{name}"' in drawing.svg
        assert "var(--figure-" in drawing.svg and "var(" not in drawing.file
        ElementTree.fromstring(drawing.file)
        assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", drawing.file)


def test_neutral_colours_are_the_pages() -> None:
    drawing = draw_figures(example())["lengths"]
    for light, (name, dark) in NEUTRALS.items():
        assert f"--figure-{name}: {light};" in FIGURE_CSS and f"--figure-{name}: {dark};" in FIGURE_CSS
        assert not re.search(rf"(?<!, ){light}\b", drawing.svg), f"{light} stays as it is on a dark page"
    scale = {to_hex(matplotlib.colormaps["cividis"](i)) for i in range(256)}
    assert not scale & set(NEUTRALS)  # or a map's cell would change with the page


def test_text_stands_out_from_what_it_is_upon() -> None:
    assert [ink_on(colour) for colour in ("#000000", "#0072B2", "#E69F00", "#ffffff", (0.1, 0.1, 0.1, 1))] == [
        "#fefefe",
        "#fefefe",
        "#111111",
        "#111111",
        "#fefefe",
    ]


def test_short_score_against_ruler_has_a_panel_a_length_and_quoted_models_apart() -> None:
    figure = short_long_figure(completed(example()))
    said = texts(figure)
    assert "RULER at 8K tokens" in said and "RULER at 64K tokens" in said and "GSM8K (%)" in said
    assert "hollow: quoted from HyLo, arXiv 2604.24715" in said and "Jet-Nemotron-2B" in said
    drawn = points(figure, 1)
    assert drawn[50, 20] == "#7a7a7a" and drawn[42, 60] == "#0072B2"
    hollow = {place for place, colour in drawn.items() if colour == "#ffffff"}
    assert hollow == {(row["gsm8k"], row["ruler"]["65536"]) for row in published_rows()}
    assert "quoted" not in texts(short_long_figure(completed(example() | {"published": []})))


def test_commonsense_stands_in_for_gsm8k_and_nothing_for_both() -> None:
    report = example()
    report["suites"]["commonsense"] = report["suites"].pop("gsm8k")
    assert "commonsense, mean of tasks (%)" in texts(short_long_figure(completed(report)))
    del report["suites"]["commonsense"]
    assert short_long_figure(completed(report)) is None
    assert missing_figures(report)[0].command == (
        "hylo evaluate models/base models/extended models/short models/unscaled models/alone --suite gsm8k "
        "--lengths 64 --json results.json"
    )


def test_fewer_tasks_and_other_haystacks_are_said() -> None:
    report = example()
    report["suites"]["ruler"] = suite({"base": ruler(80, 20, tasks=8)}, haystack="stand-in: text.txt")
    assert "mean RULER (8 of 13 tasks, stand-in haystack) (%)" in texts(short_long_figure(completed(report)))


def test_training_lengths_make_two_lines_and_leave_other_teachers_out() -> None:
    figure = training_length_figure(completed(example()))
    assert "YaRN | no YaRN" in texts(figure)
    assert heights(figure, 1)[0] == [30, 60]  # YaRN: trained at 8K and 64K, evaluated at 64K
    assert figure is not None and len(figure.axes) == 2
    drawn = points(figure, 1)
    assert (0, 10) in drawn and (1, 40) not in drawn


def test_runs_at_one_place_are_averaged() -> None:
    report = example()
    report["models"]["again"] = report["models"]["short"] | {"hash": "again"}
    report["suites"]["ruler"]["results"]["again"] = ruler(70, 40)
    assert heights(training_length_figure(completed(report)), 1)[0] == [35, 60]


def test_teachers_of_two_sizes_and_none() -> None:
    figure = teacher_size_figure(completed(example()))
    assert heights(figure, 1) == [[40, 60]]
    assert "none | big\n4 K" in texts(figure)


@pytest.mark.parametrize(
    "kept, figures",
    [("short", {"training_length"}), ("unscaled", {"training_length"}), ("alone", {"teacher_size"}), ("", set())],
)
def test_figures_of_training_need_runs_that_differ_in_that(kept: str, figures: set[str]) -> None:
    report = example()
    for name in {"short", "unscaled", "alone"} - {kept}:
        report["models"][name]["training"] = None
    assert {"training_length", "teacher_size"} & set(draw_figures(report)) == figures


def test_needle_maps_stand_side_by_side_without_the_stages_between() -> None:
    report = example()
    results = report["suites"]["needle"]["results"]
    for name in ("converted", "extended"):
        report["models"][name] = model(name, "1MLA1GDN") | {"stage": name, "final": name == "extended"}
        results[name] = results["base"]
    figure = needle_figure(completed(report))
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["Base", "Extended"]
    assert texts(figure).count("25 | ") >= 2


def test_positions_are_those_of_the_longest_common_length() -> None:
    report = example()
    results = report["suites"]["intrinsic"]["results"]
    results["base"]["by_position"]["128"] = results["base"]["by_position"]["64"]
    figure = positions_figure(completed(report))
    assert "Perplexity by position, 64 tokens" in texts(figure)
    assert heights(figure, 1)[0] == [0.2, 0.3]


def test_benches_of_one_machine_share_a_figure() -> None:
    report = completed(example())
    figures = {name: draw() for name, draw in latency_figures(report).items()}
    assert list(figures) == ["latency", "latency_2"]
    assert "Extended | Base" in texts(figures["latency"]) and "hylo bench generate, GPU" in texts(figures["latency_2"])


def test_the_initialisation_is_drawn_with_its_shapes_and_energies() -> None:
    said = texts(initialisation_figure(completed(example())))
    for part in ("64 × 48", "$W_K$, unrotated rows   24 × 48", "kv_a_proj, latent   8 × 48", "rank 12", "91.0", "97.5"):
        assert part in said, part
    report = example()
    report["initialisation"] |= {"init": "recipe", "rope_key": "mean", "calibration_tokens": 64}
    said = texts(initialisation_figure(completed(report)))
    assert "$W_K$, all rows   32 × 48" in said and "mean over the kv heads" in said and "weighted by the inputs" in said
    assert initialisation_figure(completed(example() | {"initialisation": {"layers": []}})) is None


def test_what_is_left_out_is_named_with_its_command() -> None:
    assert missing_figures(example()) == []
    report = example() | {"suites": {}, "latency": [], "initialisation": None}
    found = {missing.figure[0]: missing for missing in missing_figures(report)}
    assert list(found) == ["1", "2", "3", "4", "5", "6"]
    assert "--suite ruler,gsm8k" in found["1"].command and "--suite needle" in found["2"].command
    assert found["3"].why == "the runs that differ have no RULER or needle score"
    assert "positions=unscaled" in found["3"].command and "--set teacher=DIR" in found["4"].command
    assert found["5"].command.startswith("hylo bench serve models/base models/extended")
    assert "initialisation.json" in found["6"].why
    untrained = example()
    untrained["models"] = {name: about | {"training": None} for name, about in untrained["models"].items()}
    assert [missing.why for missing in missing_figures(untrained)] == [
        "no two runs differ in the length trained at alone",
        "no two runs differ in the teacher alone",
    ]
    drawn = set(draw_figures(untrained))
    assert not {"training_length", "teacher_size"} & drawn and "short_long" in drawn


def test_names_cover_neither_each_other_nor_markers() -> None:
    figure = Figure(figsize=(4, 3))
    axes = figure.add_subplot(xlim=(0, 100), ylim=(0, 100))
    points = [Point(50 + n, 50 + 2 * (n % 2), f"name {n}", x_error=3) for n in range(4)] + [Point(99, 99, "corner")]
    label_points(axes, points)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 5 and not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    for point in points:
        assert not any(box.contains(*axes.transData.transform((point.x, point.y))) for box in boxes)
    assert all(axes.bbox.padded(8).containsx(box.x1) for box in boxes)


def test_lengths_are_spread_over_few_panels() -> None:
    assert spread(["1", "2", "3"], 4) == ["1", "2", "3"]
    assert spread([str(n) for n in range(9)], 4) == ["0", "3", "5", "8"]
