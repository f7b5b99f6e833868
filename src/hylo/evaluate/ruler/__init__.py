"""RULER's thirteen tasks (Hsieh et al. 2024, arXiv 2404.06654): samples of any length, and how answers are scored."""

from hylo.evaluate.ruler.encoding import encode
from hylo.evaluate.ruler.samples import Sample, check_tasks, ruler_samples
from hylo.evaluate.ruler.scoring import score
from hylo.evaluate.ruler.sources import Sources
from hylo.evaluate.ruler.task import Task
from hylo.evaluate.ruler.tasks import TASKS

__all__ = ["TASKS", "Sample", "Sources", "Task", "check_tasks", "encode", "ruler_samples", "score"]
