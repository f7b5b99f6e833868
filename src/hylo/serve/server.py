"""Runs `vllm serve` as a child: waits until it is healthy, watches that it stays so, hands signals on."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO

from hylo.errors import HyloError

ANSWER_SECONDS = 10  # a busy server may be slow to say that it is well
POLL_SECONDS, WATCH_SECONDS = 0.5, 5.0  # between questions, before and after it is up
TAIL_LINES = 400  # of the log, in which the reason for a death is looked for
CAUSE = re.compile(r"\b((?:\w+\.)*\w*(?:Error|Exception|Interrupt): .+)")
CONSEQUENCES = ("Engine core initialization failed", "EngineDeadError")  # vLLM's, after the cause
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def run_server(
    command: Sequence[str],
    host: str,
    port: int,
    start_timeout: float,
    ready: Callable[[], None],
    environment: Mapping[str, str],
) -> int:
    """Runs the server until it ends and returns its status; its log goes to standard error as it comes.

    `ready` is called once GET /health answers 200. SIGINT and SIGTERM reach the server; a second one kills it. Where it
    dies later, or says that its engine has, the reason is the last line of standard error and the status is not 0.
    Raises HyloError if the port is taken, and if the server is not healthy after `start_timeout` seconds.
    """
    _check_port(host, port)
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    with _started(command, environment) as server, _signals_to(server):
        _wait_until_healthy(server, reached, port, start_timeout)
        if not server.asked:
            ready()
        died = None
        while died is None and not server.ended(WATCH_SECONDS):
            if not server.asked and (health(reached, port) or 200) >= 500:
                died = "vLLM's engine died"
                server.ended(WATCH_SECONDS)  # by itself, having said why
        status = server.status()
        if server.asked:
            return status
        died = died or f"vllm serve ended by itself, with status {status}"  # 0 where its engine was killed
        print(f"hylo: {died}: {server.reason()}", file=sys.stderr)
        return status or 1


def _wait_until_healthy(server: "_Server", host: str, port: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not server.asked and health(host, port) != 200:
        if server.ended(POLL_SECONDS):
            if server.asked:
                return
            raise HyloError(f"vllm serve ended before it answered: {server.reason()}")
        if time.monotonic() > deadline:
            raise HyloError(f"vllm serve did not answer within {seconds:g} s; give it more with --start-timeout")


def health(host: str, port: int) -> int | None:
    """The HTTP status of GET /health; None where nobody answers."""
    name = f"[{host}]" if ":" in host else host
    try:
        with _DIRECT.open(f"http://{name}:{port}/health", timeout=ANSWER_SECONDS) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError):
        return None


def reason_in(log: Iterable[str]) -> str:
    """Why a process ended: the last exception in its log that is no mere consequence, or else the last line."""
    lines = [line.strip() for line in log if line.strip()]
    errors = [found[1] for line in lines if (found := CAUSE.search(line))]
    causes = [error for error in errors if not any(text in error for text in CONSEQUENCES)]
    return (causes or errors or lines or ["it said nothing"])[-1]


class _Server:
    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        try:
            self.process = subprocess.Popen(
                list(command),
                env=dict(environment),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # a terminal's Ctrl-C reaches it once, from us
            )
        except OSError as error:
            raise HyloError(f"cannot start {command[0]}: {error.strerror}; install vLLM beside hylo") from error
        self.asked: list[int] = []  # signals to end that came in
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        assert self.process.stdout is not None
        self._reader = threading.Thread(target=self._copy, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def _copy(self, log: IO[str]) -> None:
        for line in log:
            sys.stderr.write(line)
            sys.stderr.flush()
            self.tail.append(line)

    def ended(self, seconds: float) -> bool:
        """Whether it has ended, after waiting for that at most so long."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        self._reader.join(seconds)  # the last lines
        return True

    def status(self) -> int:
        """As a shell has it: 128 + n for a death by signal n; 0 while it runs."""
        code = self.process.poll() or 0
        return code if code >= 0 else 128 - code

    def reason(self) -> str:
        return reason_in(self.tail)

    def signal(self, number: int) -> None:
        self.asked.append(number)
        if len(self.asked) > 1:
            self.kill()
        else:
            self.process.send_signal(number)

    def kill(self) -> None:
        """It and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@contextmanager
def _started(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[_Server]:
    server = _Server(command, environment)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.terminate()
            server.ended(10)
        server.kill()
        server.ended(10)


@contextmanager
def _signals_to(server: _Server) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda got, _: server.signal(got))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_port(host: str, port: int) -> None:
    """Somebody else's answer must not pass for the server's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise HyloError(f"cannot listen at {host}:{port} ({error.strerror}); choose another --port") from error
