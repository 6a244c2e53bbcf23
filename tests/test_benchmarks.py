"""The benchmark of GPUs, where there is none."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import gpu

    return gpu


def test_its_models_are_the_published_ones(gpu: Any) -> None:
    """By their numbers of parameters."""
    found = {}
    with torch.device("meta"):
        for name, (build, shape) in gpu.CASES.items():
            model = build()
            model(torch.zeros(2, *shape[1:]))
            found[name] = sum(p.numel() for p in model.parameters())
    assert found == {
        "784-512-512-10": 669_706,
        "ResNet-18": 11_689_512,
        "ResNet-50": 25_557_032,
        "ViT-B/16": 86_567_656,
    }


def test_without_a_gpu_it_was_not_run(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    gpu.main()
    assert capsys.readouterr().out.startswith("not run")
