"""Parameters that are cut between processes take the steps of one process: see sharded.py, which every one runs."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded import METHODS, SCENARIOS

PROGRAM = Path(__file__).with_name("sharded.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the processes have written."""
    folder = tmp_path_factory.mktemp("sharded")
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(PROGRAM), str(folder), str(rank)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(max(SCENARIOS))
    ]
    try:
        errors = [run.communicate(timeout=400)[1] for run in runs]
    finally:
        for process in runs:
            process.kill()
    assert [process.returncode for process in runs] == [0] * len(runs), errors
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """What each process has found, by the number of processes that took part; three load what two have saved."""
    return {
        world: [torch.load(folder / f"{world}-{rank}.pt", weights_only=False) for rank in range(world)]
        for world in SCENARIOS
    }


COMPARED = [
    (2, "rows"),
    (2, "columns"),
    (2, "parallel"),
    (2, "triton"),
    (3, "rows"),
    (3, "arrays"),
    (3, "clipped"),
    (4, "rows"),
    (4, "two dimensions"),
]


@pytest.mark.parametrize(("world", "scenario"), COMPARED)
def test_as_one_process(found: dict[int, list[dict[str, Any]]], world: int, scenario: str) -> None:
    """Steps differ by rounding, and a step has one all-reduce of a few numbers per unit."""
    for name, result in found[world][0][scenario].items():
        assert result["difference"] < 1e-12, name
        if name == "ones":
            continue
        assert result["c"] < 1e-12, name
        assert result["engine"] == "sharded"
        assert result["units"] > 15
        assert result["least moved"] > 1e-3
        assert result["stats"][0] == result["stats"][1]
        all_reduces, size = result["reduced"]
        dimensions = 2 if name == "FSDP and TP" else 1
        assert all_reduces == dimensions * (2 if name.startswith("clip_norm, ") else 1)
        assert size <= all_reduces * 8 * 6 * (result["units"] + 2)
        assert result["state is sharded"] or scenario == "parallel"
    if scenario == "clipped":
        assert found[world][0][scenario]["max_ratio"]["stats"][0][1] > 0


def test_all_processes_agree(found: dict[int, list[dict[str, Any]]]) -> None:
    for others in found.values():
        for rank in others[1:]:
            for scenario in ("rows", "failures", "zeros"):
                assert rank.get(scenario) == others[0].get(scenario)


def test_zero_candidates_and_dead_units(found: dict[int, list[dict[str, Any]]]) -> None:
    """A unit whose out-edges are 0 at the start waits, and joins, as in one process; dead ones do not."""
    result = found[3][0]["zeros"]
    assert [result[when]["pinned"] for when in ("start", "later")] == [3, 2]
    for when in ("start", "later"):
        assert result[when]["same"]
        assert result[when]["scale"] < 1e-12
    assert result["difference"] < 1e-12


def test_a_process_that_ends_is_an_error_of_the_others(folder: Path) -> None:
    """Torch's own, and nothing is written."""
    said = torch.load(folder / "death.pt")
    assert re.search("[Cc]onnection|peer|closed|reset", said), said


def test_failures(found: dict[int, list[dict[str, Any]]]) -> None:
    """A NaN on one process leaves the step out on all; what can't be done is refused on all."""
    result = found[2][0]["failures"]
    assert result["untouched"]
    assert result["stats"] == "Stats(steps=3, clamped=0, skipped=1)"
    assert "negative bit" in result["negative moments"]
    assert result["largest"].startswith("rule: expected 'modulo' for sharded parameters")
    assert result["engine"].startswith("engine 'core': takes float32 and float64 parameters")
    assert result["no network"].startswith("network: expected that of the model before it was sharded")
    assert result["networks"].startswith("the network at parameter 'mid.bias' differs between processes")
    assert result["not finite"] == "parameter 'out.bias' has entries that are not finite"
    assert result["copies"].startswith("parameter 'out.weight' differs between processes")


def test_mixed_precision_and_the_usual_order(found: dict[int, list[dict[str, Any]]]) -> None:
    """Shards stay in float32; the network of a model without values, an optimizer before the weights are loaded."""
    mixed = found[2][0]["mixed precision"]
    assert mixed["dtype"] == "torch.float32"
    assert mixed["last"] < mixed["first"]
    assert found[3][0]["usual order"]["difference"] < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_goes_to_another_number_of_processes(found: dict[int, list[dict[str, Any]]], method: str) -> None:
    """From two to three by torch.distributed.checkpoint, whose rehearsed step counts nothing."""
    saved, loaded = found[2][0]["save"][method], found[3][0]["load"][method]
    assert loaded["steps"] == (0, 10)
    for w, other in zip(saved, loaded["weights"], strict=True):
        torch.testing.assert_close(other, w, rtol=1e-12, atol=1e-14)


def test_the_example_goes_on_from_its_checkpoint() -> None:
    """On two processes, to the same loss as without the interruption."""
    program = PROGRAM.parents[1] / "examples" / "fsdp.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    first, last, expected = map(float, re.findall(r"\d+\.\d+", done.stdout))
    assert last == expected < first
