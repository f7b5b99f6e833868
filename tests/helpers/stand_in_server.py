"""In place of `vllm serve`: `stand_in_server.py BEHAVIOUR --port N ...` answers GET /health as the behaviour says."""

import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

BEHAVIOUR = sys.argv[1]
PORT = int(sys.argv[sys.argv.index("--port") + 1])


class Health(BaseHTTPRequestHandler):
    answered = 0

    def do_GET(self) -> None:
        Health.answered += 1
        dead = BEHAVIOUR == "dying engine" and Health.answered > 2
        if dead:
            print("(EngineCore pid=7) ERROR RuntimeError: the device was lost", flush=True)
        self.send_response(503 if dead else 200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


if BEHAVIOUR == "dies":
    print("INFO starting")
    print("(EngineCore pid=7) ERROR 01-01 00:00:00 [core.py:1] ValueError: no room for one sequence")
    print("(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.")
    sys.exit(1)
if BEHAVIOUR == "silent":
    time.sleep(60)
if BEHAVIOUR == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if BEHAVIOUR == "polite":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
if BEHAVIOUR == "short":
    threading.Timer(1.5, lambda: (print("FatalError: enough", flush=True), signal.raise_signal(signal.SIGKILL))).start()
print("arguments:", *sys.argv[2:], flush=True)
HTTPServer(("127.0.0.1", PORT), Health).serve_forever()
