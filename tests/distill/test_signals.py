"""Signals: at once outside of training, at the end of a step inside, and for good the second time."""

import os
import signal
from collections.abc import Callable

import pytest

from hylo.distill import signals
from hylo.distill.signals import Stopped, held, requested, watched


def exit_status(function: Callable[[], None]) -> int:
    """Of a process of its own that runs it: 0, 3 for Stopped, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with watched():
                function()
            code = 0
        except Stopped:
            code = 3
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_outside_of_training_a_signal_stops_at_once(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped), watched():
        send(number)
        raise AssertionError
    assert signal.getsignal(number) is before and not requested()


def test_in_training_it_waits_to_be_asked_for() -> None:
    reached = []
    with watched(), pytest.raises(Stopped), held():
        with held():
            assert not requested()
            send(signal.SIGTERM)
            assert requested()
        reached.append("the end of the inner one")
    assert reached and not requested()


def test_nobodys_except_swallows_it() -> None:
    with pytest.raises(Stopped), watched():
        try:
            send(signal.SIGTERM)
        except Exception:
            raise AssertionError from None


@pytest.mark.parametrize(("pause", "status"), [(2.0, -signal.SIGINT), (0.5, 3)])
def test_a_second_signal_kills_unless_it_is_the_same_one_passed_on(
    monkeypatch: pytest.MonkeyPatch, pause: float, status: int
) -> None:
    clock = iter([100.0, 100.0 + pause])
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(clock))

    def twice() -> None:
        with held():
            send(signal.SIGTERM)
            send(signal.SIGINT)

    assert exit_status(twice) == status


def test_without_watched_nothing_is_changed() -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored, in a shell's background
    with held():
        assert signal.getsignal(signal.SIGINT) is before
