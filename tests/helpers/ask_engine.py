"""Asks an engine with processes of its own: DIR, the engine's options as JSON; prints tokens, log-probabilities."""

import json
import sys
from pathlib import Path

from serving import ask, engine, prompts


def main() -> None:
    with engine(Path(sys.argv[1]), **json.loads(sys.argv[2])) as llm:
        said = [answer.outputs[0] for answer in ask(llm, prompts())]
        steps = [[step[token].logprob for step, token in zip(s.logprobs, s.token_ids, strict=True)] for s in said]
        print("ANSWERS", json.dumps([(list(s.token_ids), logprobs) for s, logprobs in zip(said, steps, strict=True)]))


if __name__ == "__main__":
    main()
