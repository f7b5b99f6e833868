"""What reports are made of: a run's own report, and results as `hylo evaluate` and `hylo bench` write them."""

import random
from typing import Any

TASKS = (
    *(f"niah_single_{i}" for i in (1, 2, 3)),
    *(f"niah_multikey_{i}" for i in (1, 2, 3)),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
)
COMMONSENSE = ("arc_challenge", "arc_easy", "hellaswag", "openbookqa", "piqa", "race", "winogrande")
MIXERS = ("mla", "gated_deltanet", "gated_deltanet", "mla")
TEACHER, HYBRID, CONTROL = "teacher", "hybrid", "control/hybrid"


def model(name: str, number: int) -> dict[str, Any]:
    """What `hylo.evaluate.describe.describe` knows of it; `number` makes its hash."""
    hybrid = name != TEACHER
    training = {"arm": "control" if "control" in name else "", "length": 2048, "tokens": 480_000, "yarn": True}
    training |= {"positions": "yarn", "objective": "forward_kl", "teacher": TEACHER, "teacher_parameters": 1_803_904}
    return {
        "directory": f"/models/{name}",
        "hash": f"{number:064x}",
        "parameters": 1_900_000 + number,
        "context": 2048,
        "model_type": "hylo" if hybrid else "llama",
        "layout": "2MLA2GDN" if hybrid else None,
        "mixers": list(MIXERS) if hybrid else None,
        "plan": None,
        "training": training if hybrid else None,
    }


def results(
    names: tuple[str, ...] = (TEACHER, HYBRID, CONTROL), lengths: tuple[int, ...] = (1024, 2048), samples: int = 20
) -> dict[str, Any]:
    """A whole results file: the later a model, the worse; longer is harder."""
    models = {name: model(name, number) for number, name in enumerate(names, 1)}
    suites: dict[str, Any] = {
        "ruler": {
            "settings": {"lengths": list(lengths), "samples": samples, "seed": 0, "chat": False, "haystack": None}
        },
        "needle": {"settings": {"lengths": list(lengths), "depths": 5, "answers": 64, "seed": 0}},
        "commonsense": {"settings": {"few_shot": 0, "limit": 200}},
        "gsm8k": {"settings": {"few_shot": 0, "limit": 200}},
        "intrinsic": {"settings": {"lengths": list(lengths), "tokens": 16384, "seed": 0, "teacher": f"{1:064x}"}},
    }
    makers = {"ruler": _ruler, "needle": _needle, "commonsense": _short, "gsm8k": _short, "intrinsic": _intrinsic}
    for suite, part in suites.items():
        part["not_run"] = {}
        part["results"] = {
            name: makers[suite](random.Random(f"{suite} {name}"), suite, number, lengths, samples)
            for number, name in enumerate(names)
        }
    suites["ruler"]["not_run"] = {"qa_2": "HotpotQA is not here: give --hotpotqa FILE"}
    for result in suites["ruler"]["results"].values():
        del result["scores"]["qa_2"]
    meta = {"versions": {"hylo": "0.1.0", "torch": "2.13.0"}, "device": "cpu", "precision": "float32", "seconds": 900.5}
    return {"format": "hylo-evaluation-1", "models": models, "suites": suites, "meta": meta}


def _share(draw: random.Random, number: int, length: int) -> float:
    """Between 0 and 1."""
    return max(0.0, min(1.0, 0.95 - 0.25 * number - length / 20_000 + draw.uniform(-0.05, 0.05)))


def _error(share: float, n: int) -> float:
    return (share * (1 - share) / max(1, n - 1)) ** 0.5


def _mean(cells: list[dict[str, Any]]) -> dict[str, Any]:
    n = len(cells)
    error = sum(cell["se"] ** 2 for cell in cells) ** 0.5 / n
    return {"score": sum(cell["score"] for cell in cells) / n, "se": error, "tasks": n}


def _ruler(draw: random.Random, suite: str, number: int, lengths: tuple[int, ...], samples: int) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    for task in TASKS:
        scores[task] = {}
        for length in lengths:
            share = _share(draw, number, length)
            cell = {"score": 100 * share, "se": 100 * _error(share, samples), "samples": samples, "failed": 0}
            scores[task][str(length)] = cell
    means = {str(n): _mean([scores[task][str(n)] for task in TASKS if task != "qa_2"]) for n in lengths}
    return {"scores": scores, "mean": means}


def _needle(draw: random.Random, suite: str, number: int, lengths: tuple[int, ...], samples: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for length in map(str, lengths):
        depths = [_share(draw, number, int(length)) for _ in range(5)]
        share = sum(depths) / 5
        values = {"needle": share, "needle_se": _error(share, 320), "needle_depth": depths, "needle_answers": 320}
        values["needle_depth_se"] = [_error(depth, 64) for depth in depths]
        for key, value in values.items():
            found.setdefault(key, {})[length] = value
    return found


def _short(draw: random.Random, suite: str, number: int, lengths: tuple[int, ...], samples: int) -> dict[str, Any]:
    scores = {}
    for task in COMMONSENSE if suite == "commonsense" else ("gsm8k",):
        share = 0.7 * _share(draw, number, 0)
        scores[task] = {"score": 100 * share, "se": 100 * _error(share, 200), "samples": 200, "metric": "acc"}
    return {"scores": scores, "mean": _mean(list(scores.values()))}


def _intrinsic(draw: random.Random, suite: str, number: int, lengths: tuple[int, ...], samples: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for length in lengths:
        edges = [0, 32, *(2**i for i in range(6, 30) if 2**i < length), length]
        buckets = []
        for start, end in zip(edges, edges[1:], strict=False):
            bucket = {"from": start, "to": end, "perplexity": 60 - 2 * len(buckets) + number, "perplexity_se": 1.5}
            buckets.append(bucket | ({"kl": 0.2 * number, "kl_se": 0.01} if number else {}))
        state = 286_720 if number else 0
        cache = 512 if number else 6144
        values = {
            "perplexity": 50.0 + number,
            "perplexity_se": 0.4,
            "tokens": 16384,
            "by_position": buckets,
            "memory": {
                "cache_bytes_per_token": cache, "state_bytes": state, "total_bytes": cache * length + state,
            },
        } | ({"kl": 0.3 * number, "kl_se": 0.01} if number else {})  # fmt: skip
        for key, value in values.items():
            found.setdefault(key, {})[str(length)] = value
    if number:
        found["mixer_error"] = [
            {"layer": i, "mixer": mixer, "error": 0.1 * number + draw.random() / 10, "error_se": 0.004}
            for i, mixer in enumerate(MIXERS)
        ]
    return found


def latency(names: tuple[str, ...] = (TEACHER, HYBRID), kind: str = "serve") -> dict[str, Any]:
    """A result of hylo bench: the first model runs out of memory at the longest context."""
    models = []
    for number, name in enumerate(names):
        slope = 0.0 if number else 1e-6
        points: list[dict[str, Any]] = [
            {"length": n, "concurrency": 1, "status": "measured", "ttft": n / 8192, "tpot": 0.01 + n * slope}
            for n in (1024, 4096, 16384)
        ]  # fmt: skip
        for point in points:
            point |= {f"{key}_of_repeats": [0.9 * point[key], point[key], 1.2 * point[key]] for key in ("ttft", "tpot")}
        if number == 0:
            points[-1] = {"length": 16384, "concurrency": 1, "status": "out of memory"}
        models.append({"model": name, "layout": "4A", "dtype": "float32", "points": points})
    return {
        "kind": kind,
        "device": "one CPU",
        "cores": 2,
        "versions": {"torch": "2.13.0"},
        "settings": {},
        "models": models,
    }


def run_stage(name: str, kl: float | None) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "needle": {"64": 0.96875, "128": 0.5},
        "needle_se": {"64": 0.011, "128": 0.03},
        "needle_depth": {"64": [1.0, 0.9], "128": [0.4, 0.6]},
        "perplexity": {"64": 9.51, "128": 1234.5},
    }
    if kl is not None:
        metrics["kl"] = {"64": kl, "128": kl * 1.1}
    return {"name": name, "metrics": metrics, "seconds": 12.5, "tokens": 4096}


def run_report() -> dict[str, Any]:
    kinds = ["attention", "mla", "gated_deltanet", "mamba2"]
    layers = [
        {
            "index": i,
            "mixer": kind,
            "parameters": 3000 + i,
            "mixer_parameters": 1000 + i,
            "kv_bytes_per_token": 128 >> i if i < 2 else 0,
            "state_bytes_per_sequence": 4096 if i > 1 else 0,
        }
        for i, kind in enumerate(kinds)
    ]
    steps = [{"step": i, "tokens": 64 * i, "loss": 3.0 / i} for i in range(1, 600)]
    names = ("converted", "aligned", "extended", "control", "no_alignment", "something <new>")
    return {
        "title": "tiny & small",
        "base": "tiny",
        "layout": "1A1MLA1GDN1M2",
        "plan": {
            "parameters": 12_000,
            "parameters_untied": 13_000,
            "base_parameters": 11_000,
            "kv_bytes_per_token": 192,
            "base_kv_bytes_per_token": 512,
            "kv_percent_of_base": 37.5,
            "state_bytes_per_sequence": 8192,
            "layers": layers,
        },
        "kv_percent_of_base": 37.5,
        "lengths": [64, 128],
        "l_short": 64,
        "l_long": 128,
        "stages": [run_stage("teacher", None)] + [run_stage(name, 0.1 * i) for i, name in enumerate(names, 1)],
        "training": {"align": steps, "extend 128": steps[:3], "control 128": steps[:1]},
        "checks": [
            {"name": "needle at L_long", "value": 0.5, "threshold": "≥ 0.8", "passed": False},
            {"name": "KV cache", "value": 9.5, "threshold": 10, "passed": True},
        ],
        "meta": {"seed": 3, "versions": {"torch": "2.13.0"}},
    }
