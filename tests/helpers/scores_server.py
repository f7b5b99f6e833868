"""An OpenAI server of completions over a tiny model: greedy text, and log-probabilities of an echoed prompt."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ScoresServer:
    """`asked`: what was posted. Requests for which `fails` is true get HTTP status 500."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer, self.asked, self.address = model, tokenizer, [], ""
        self.fails = lambda text: False
        self._one_at_a_time = threading.Lock()

    def complete(self, asked: dict[str, Any]) -> dict[str, Any]:
        ids = asked["prompt"][0] if isinstance(asked["prompt"][0], list) else asked["prompt"]
        if len(ids) + asked["max_tokens"] > self.model.config.max_position_embeddings:
            raise ValueError("longer than the context")
        with self._one_at_a_time, torch.no_grad():
            self.asked.append(asked)
            written: list[int] = []
            for _ in range(asked["max_tokens"]):
                scores = self.model(torch.tensor([ids + written])).logits[0].log_softmax(-1)
                if not written:
                    first = scores
                written.append(int(scores[-1].argmax()))
                text = self.tokenizer.decode(written, skip_special_tokens=True)
                stops = [stop for stop in asked.get("stop") or [] if stop in text]
                if stops or written[-1] == self.tokenizer.eos_token_id:
                    break
        for stop in stops:
            text = text.split(stop)[0]
        choice: dict[str, Any] = {"index": 0, "text": text}
        if asked.get("echo"):
            shown = zip([None, *first[:-1]], [*ids], strict=True)
            values = [(None, None) if row is None else (float(row[i]), float(row.max())) for row, i in shown]
            tops = [None if own is None else {"own": own, "top": top} for own, top in values]
            last = float(first[-1].max())
            choice["logprobs"] = {
                "token_logprobs": [*(own for own, _ in values), last],
                "top_logprobs": [*tops, {"top": last}],
            }
        return {"object": "text_completion", "choices": [choice]}


@contextmanager
def scores_server(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[ScoresServer]:
    server = ScoresServer(model, tokenizer)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            card = {"id": "tiny", "object": "model", "max_model_len": model.config.max_position_embeddings}
            self._send(200, {"object": "list", "data": [card]})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = asked["prompt"][0] if isinstance(asked["prompt"][0], list) else asked["prompt"]
            if server.fails(tokenizer.decode(prompt)):
                return self._send(500, {"message": "out of order"})
            try:
                self._send(200, server.complete(asked))
            except ValueError as error:
                self._send(400, {"message": str(error)})

        def _send(self, status: int, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.address = f"http://127.0.0.1:{listener.server_port}"
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
