"""What goes wrong before the first step ends in a line that says what to do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gsgd.torch

ROOT = Path(__file__).parents[1]


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    """What a Python that fails says last."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, text=True, capture_output=True
    )
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


def test_python_started_in_a_checkout_that_is_not_built_says_so(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "gsgd", tmp_path / "gsgd", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    said = python("-c", "import gsgd", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "Start Python in another folder" in said
    assert "build_ext --inplace" in said


@pytest.fixture
def numpy_1(tmp_path: Path) -> str:
    """A folder with a NumPy that tells an old version, and can do nothing."""
    package = tmp_path / "old" / "numpy"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '1.26.4'\n")
    return str(package.parent)


def test_numpy_1_is_told_to_be_too_old(numpy_1: str, tmp_path: Path) -> None:
    installed = str(Path(gsgd.__file__).parents[1])
    said = python("-c", "import gsgd", cwd=tmp_path, PYTHONPATH=os.pathsep.join([numpy_1, installed]))
    assert "needs NumPy 2.1 or later, and this is 1.26.4: pip install" in said


def build(tmp_path: Path, **environment: str) -> str:
    arguments = ["setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path)]
    return python(*arguments, cwd=ROOT, **environment)


def test_building_with_numpy_1_says_what_to_install(numpy_1: str, tmp_path: Path) -> None:
    assert "pip install 'numpy>=2.1'" in build(tmp_path, PYTHONPATH=numpy_1)


def test_building_without_a_compiler_says_what_to_install(tmp_path: Path) -> None:
    assert "apt install gcc" in build(tmp_path, CC="no-such-compiler")


def test_building_without_headers_says_what_to_install(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(
        '#!/bin/sh\nfor f; do case "$f" in *.c) grep -q Python.h "$f" && exit 1;; esac; done\nexec cc "$@"\n'
    )
    compiler.chmod(0o755)
    assert "apt install python3-dev" in build(tmp_path, CC=str(compiler))


def test_parameters_instead_of_the_model_suggest_the_model() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"write GSGD\(model, \.\.\.\)"):
        gsgd.torch.GSGD(model.parameters(), lr=0.1)


def test_zero_redundancy_optimizer_is_refused(tmp_path: Path) -> None:
    """It hands parameters without names to every process, and not all of them."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="named_parameters"):
            ZeroRedundancyOptimizer(nn.Linear(2, 1).parameters(), optimizer_class=gsgd.torch.GSGD, lr=0.1)
    finally:
        torch.distributed.destroy_process_group()
