"""Questions on documents (qa_1: SQuAD, qa_2: HotpotQA): the documents that answer one stand among others."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from hylo.errors import HyloError
from hylo.evaluate.ruler.task import Draft, Setting, Task, Text

TEMPLATE = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\n"
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {query}"
)
PREFIX = " Answer:"
DOCUMENT = "Document {number}:\n{text}"


@dataclass(frozen=True)
class Questions(Task):
    """Sample i asks the i-th question of the data."""

    def drafts(self, setting: Setting) -> Callable[[int], Draft]:
        data = setting.sources.questions(self.source or "")

        def draft(index: int) -> Draft:
            if index >= len(data.questions):
                raise HyloError(
                    f"{self.name} has {len(data.questions)} questions in {data.name}; ask for as many samples or fewer"
                )
            rng = self.random(setting, index)
            question = data.questions[index]
            order = [*question.documents, *rng.sample(question.near, len(question.near))]
            own, others = set(order), random.Random(rng.getrandbits(64))
            rank: list[float] = []  # of every document, so that more documents leave the others in place

            def build(units: int) -> Text:
                if units > len(order) == len(own):
                    wanted = min(len(data.documents), setting.length)  # there is no room for more
                    order.extend(i for i in others.sample(range(len(data.documents)), wanted) if i not in own)
                rank.extend(rng.random() for _ in range(units - len(rank)))
                chosen = sorted(range(units), key=rank.__getitem__)  # all again and again where there are too few
                documents = [data.documents[order[i % len(order)]] for i in chosen]
                context = "\n\n".join(DOCUMENT.format(number=i + 1, text=text) for i, text in enumerate(documents))
                return Text(TEMPLATE.format(context=context, query=question.text), PREFIX, question.answers)

            return Draft(len(question.documents), build)

        return draft
