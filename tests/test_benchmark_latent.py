"""The benchmark of latent attention on sizes small enough for a test."""

import io
import json
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from scripts import script

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads /proc")


@pytest.fixture
def latent(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("latent", monkeypatch)


def test_everything_is_measured_and_reported(latent: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_this_process(make: Any, *arguments: Any, threads: int) -> int:
        """The run alone, without the seconds that a fresh process takes to import."""
        make(*arguments)()
        return 1000

    monkeypatch.setattr(latent.measure, "peak_bytes", in_this_process)
    geometries = [latent.Geometry("tiny", 4, 2, 4, 4, 8, 16), latent.Geometry("normed", 4, 2, 4, 4, 8, 16, True)]
    sizes = {"cached": (3, 5, 9), "batches": (1, 2), "prefills": (128, 200), "convolutions": ((9, 8),)}
    results = latent.rows(1, geometries, **sizes, peers_up_to=128, repeats=1)
    assert [sum(row["part"] == part for row in results) for part in ("decode", "prefill", "convolution")] == [24, 10, 1]
    assert results[0]["cache_bytes"] == 3 * 20 * 4
    text = io.StringIO()
    latent.report(Console(file=text, width=200), results)
    for words in ("latent decode, normed, bfloat16, batch 2", "torch, T x T mask", "conv1d's seconds"):
        assert words in text.getvalue()
    assert len(latent.targets(results)) == 2 * 8 + 8 + 2
    json.dumps(results)


@torch.no_grad()
@pytest.mark.parametrize("key_norm", [False, True])
def test_forms_that_are_compared_are_one_function(latent: ModuleType, key_norm: bool) -> None:
    g = latent.Geometry("tiny", 4, 2, 4, 4, 8, 16, key_norm)
    absorbed, expanded = (latent.decode_of(form, g, 9, 2, torch.float32)() for form in latent.FORMS[:2])
    torch.testing.assert_close(absorbed, expanded)
    for form in latent.FORMS[2:]:
        assert latent.decode_of(form, g, 9, 2, torch.float32)().shape[0] == 2


def test_prefills_that_are_compared_are_one_function(latent: ModuleType) -> None:
    runs = [latent.prefill_of(f"{who}, narrow values", 40)() for who in ("hylo", "torch")]
    torch.testing.assert_close(*runs)
    whole, half = (latent.prefill_of(which, 40)() for which in ("hylo", "hylo, second half"))
    assert whole.shape[2] == 2 * half.shape[2]


def test_both_convolutions_are_one_function(latent: ModuleType) -> None:
    torch.manual_seed(0)
    results = [latent.convolution_of(which, 9, 8)() for which in ("hylo", "conv1d")]
    for hylo, conv1d in zip(*results, strict=True):
        torch.testing.assert_close(hylo, conv1d)
