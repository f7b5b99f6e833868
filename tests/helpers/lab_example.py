"""A suite's results made by hand: an arm that is better, one that is worse, one alike, one that fails at times."""

from typing import Any

from hylo.lab.compare import Arm, Metric, SuiteView

NOISE = (0.010, -0.004, 0.006, -0.012)
METRICS = [
    Metric("kl@2048", "KL at 2K", True),
    Metric("needle@2048", "needle accuracy at 2K", False),
    Metric("perplexity@512", "perplexity at 512", True),
]


def lab_example(seeds: int = 4, axis: bool = False) -> tuple[SuiteView, list[dict[str, Any]]]:
    """`axis`: eight arms on two lines instead."""
    arms = {
        "recipe": Arm("the recipe", "as it is"),
        "more": Arm("more tokens", "four times as many"),
        "none": Arm("no alignment <b>", "straight to stage 2"),
        "seedless": Arm("another order | of rows"),
        "wild": Arm("learning rate tenfold and a label that needs more than one line"),
    }
    effects = {"recipe": 0.0, "more": -0.05, "none": 0.06, "seedless": 0.0, "wild": 0.02}
    if axis:
        lengths = (256, 512, 1024, 2048)
        arms = {f"{line}{n}": Arm(f"{line}, {n}", "", n, line) for line in ("YaRN", "plain") for n in lengths}
        effects = {name: 0.05 * name.startswith("plain") - (arm.x or 0) / 50_000 for name, arm in arms.items()}
    view = SuiteView(
        "What alignment is worth",
        "Does stage 1 pay for its tokens?",
        next(iter(arms)),
        arms,
        list(range(seeds)),
        METRICS,
        "longest length trained at (tokens)" if axis else "",
    )
    results: list[dict[str, Any]] = []
    for i, name in enumerate(arms):
        for seed in view.seeds:
            run: dict[str, Any] = {"arm": name, "seed": seed, "status": "done", "reason": None}
            own = effects[name] + NOISE[seed] + 0.1 * NOISE[(seed * 3 + i) % 4]
            values = {"kl@2048": 0.2 + own, "needle@2048": 0.8 - 2 * own, "perplexity@512": 8 + 5 * own}
            run |= {"metrics": values, "tokens": 240_000, "seconds": 90.0}
            if name == "wild" and seed == 1:
                run |= {"status": "failed", "reason": "loss is not finite", "metrics": {}, "tokens": 0, "seconds": 0.0}
            if name != "seedless" or seed != 3:
                results.append(run)
    return view, results
