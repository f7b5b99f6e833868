"""Small files in the published forms of RULER's sources: essays, SQuAD 2.0's dev set, HotpotQA's with distractors."""

import json
from pathlib import Path

from hylo.evaluate.ruler import Sources

TOWNS = ["Avonlea", "Brindle", "Cawdor", "Dunmore", "Elsdon", "Farley", "Glenrow", "Halden", "Inver", "Jarrow"]
FOUNDERS = ["Ada Pike", "Ben Rowe", "Cora Lind", "Dov Marsh", "Eve Tarn", "Finn Oake", "Gil Stead", "Hope Varr"]


def write_sources(directory: Path) -> Sources:
    """Eight questions of each kind; every answer is in its documents once."""
    essays, squad, hotpotqa = directory / "essays", directory / "dev-v2.0.json", directory / "hotpot_dev.json"
    essays.mkdir(parents=True)
    for n in range(4):
        lines = [f"Essay {n} comes to point {i}. It says that rivers run to the sea." for i in range(40)]
        (essays / f"{n}.txt").write_text("\n".join(lines))
    articles = [{"title": town, "paragraphs": [_paragraph(i)]} for i, town in enumerate(TOWNS[: len(FOUNDERS)])]
    squad.write_text(json.dumps({"version": "v2.0", "data": articles}))
    hotpotqa.write_text(json.dumps([_two_hops(i) for i in range(len(FOUNDERS))]))
    return Sources(essays=essays, squad=squad, hotpotqa=hotpotqa)


def _paragraph(i: int) -> dict[str, object]:
    context = f"{TOWNS[i]} is a town by the sea. It was founded by {FOUNDERS[i]} long ago. Boats lie in its harbour."
    answers = [{"text": FOUNDERS[i], "answer_start": context.index(FOUNDERS[i])}] * 2
    known = {"id": f"a{i}", "question": f"Who founded {TOWNS[i]}?", "answers": answers, "is_impossible": False}
    unknown = {"id": f"b{i}", "question": f"Who left {TOWNS[i]}?", "answers": [], "is_impossible": True}
    return {"context": context, "qas": [unknown, known]}


def _two_hops(i: int) -> dict[str, object]:
    town, founder, other = TOWNS[i], FOUNDERS[i], TOWNS[i + 1]
    context = [
        [town, [f"{town} is a town.", f" It was founded by {founder}."]],
        [founder, [f"{founder} was born in {other}."]],
        [f"{town} harbour", ["Boats lie there.", " It is deep."]],
    ]
    facts = [[town, 1], [founder, 0]]
    asked = {"_id": f"c{i}", "type": "bridge", "level": "hard", "question": f"Where was the founder of {town} born?"}
    return asked | {"answer": other, "context": context, "supporting_facts": facts}
