"""How an answer is scored: the share of the wanted strings that it contains, or whether it contains one of them."""

import re

from hylo.evaluate.ruler.task import Task
from hylo.evaluate.ruler.tasks import TASKS


def score(task: str | Task, prediction: str, outputs: list[str]) -> float:
    """0..100, whatever the case of letters; qa_1 and qa_2 want one of `outputs`, all other tasks all of them."""
    said = re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
    found = [output.lower() in said for output in outputs]
    if (TASKS[task] if isinstance(task, str) else task).part:
        return 100.0 * any(found)
    return 100.0 * sum(found) / len(found)
