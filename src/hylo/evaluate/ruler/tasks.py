"""The thirteen tasks of RULER by name, in the order of the paper's table."""

from hylo.evaluate.ruler.niah import Niah
from hylo.evaluate.ruler.question_answering import Questions
from hylo.evaluate.ruler.task import Task
from hylo.evaluate.ruler.tracking import VariableTracking
from hylo.evaluate.ruler.words import CommonWords, FrequentWords

NEEDLE_TOKENS = 128

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Niah("niah_single_1", NEEDLE_TOKENS, haystack="noise"),
        Niah("niah_single_2", NEEDLE_TOKENS, "essays"),
        Niah("niah_single_3", NEEDLE_TOKENS, "essays", value="uuids"),
        Niah("niah_multikey_1", NEEDLE_TOKENS, "essays", keys=4),
        Niah("niah_multikey_2", NEEDLE_TOKENS, haystack="needles"),
        Niah("niah_multikey_3", NEEDLE_TOKENS, haystack="needles", key="uuids", value="uuids"),
        Niah("niah_multivalue", NEEDLE_TOKENS, "essays", values=4),
        Niah("niah_multiquery", NEEDLE_TOKENS, "essays", keys=4, queries=4),
        VariableTracking("vt", 30),
        CommonWords("cwe", 120),
        FrequentWords("fwe", 50),
        Questions("qa_1", 32, "squad", part=True),
        Questions("qa_2", 32, "hotpotqa", part=True),
    )
}
