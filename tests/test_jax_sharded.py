"""JAX's sharded parameters take the steps of one device, and stay where they are: see jax_sharded.py, which is run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optax", reason="Optax is not installed")
PROGRAM = Path(__file__).with_name("jax_sharded.py")
WIDTH = 128


def run(*command: Any) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_as_one_device(tmp_path: Path) -> None:
    """Compiled once, eager, donated and in a scan; what is exchanged and made meanwhile is O(units)."""
    run(PROGRAM, tmp_path / "found.json")
    for name, found in json.loads((tmp_path / "found.json").read_text()).items():
        assert max(found["differences"]) < 1e-12, name
        assert found["lies as given"], name
        assert found["units"] == 2 * WIDTH
        assert (found["collectives"] > 0) >= (not name.startswith("Auto columns")), name
        assert found["largest collective"] <= 4 * (found["units"] + 1), name
        assert not found["temporaries"] or found["temporaries"] < 8 * WIDTH * WIDTH / 2, name


def test_the_example_runs() -> None:
    out = run(PROGRAM.parents[1] / "examples" / "jax_mesh.py")
    for losses in re.findall(r"loss (.*)", out):
        first, last = map(float, losses.split(" -> "))
        assert last < first / 2
