"""An OpenAI server of completions on this machine: GET /v1/models and POST /v1/completions, answered by a function."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class CompletionsServer:
    """`asked`: what was posted. `stop` closes the address, as a server that dies does."""

    address: str
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    stop: Callable[[], None] = lambda: None


@contextmanager
def completions_server(
    answer: Callable[[list[int], int], Any], models: tuple[str, ...] = ("tiny",), context: int | None = 512
) -> Iterator[CompletionsServer]:
    """`answer(prompt ids, max_tokens)` gives a text, or (status, body) for an error, or None to hang up."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            cards = [{"id": model, "object": "model", "root": f"/models/{model}"} for model in models]
            for card in cards:
                card |= {} if context is None else {"max_model_len": context}
            self._send(200, {"object": "list", "data": cards})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append(asked)
            server.headers.append(dict(self.headers))
            said = answer(asked["prompt"], asked["max_tokens"])
            if said is None:
                self.close_connection = True
            elif isinstance(said, tuple):
                self._send(*said)
            else:
                self._send(200, {"object": "text_completion", "choices": [{"index": 0, "text": said}]})

        def _send(self, status: int, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = CompletionsServer(f"http://127.0.0.1:{listener.server_port}")
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def stop() -> None:
        listener.shutdown()
        listener.server_close()
        thread.join()

    server.stop = stop
    try:
        yield server
    finally:
        if thread.is_alive():
            stop()
