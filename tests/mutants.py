"""Whether the tests notice what mutants.toml lists: one change after the other, in a copy of the project.

``python tests/mutants.py csrc/step.c``: only what is listed for this file.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest

ROOT = Path(__file__).parents[1]
LIST = ROOT / "tests/mutants.toml"
CORE = "gsgd/_core.abi3.so"


@dataclass(frozen=True)
class Mutant:
    """A change of a file, the tests of which one should fail, and why none does where none can."""

    file: str
    old: str
    new: str
    tests: list[str]
    survives: str = ""

    def change(self, text: str) -> str:
        """The file's text with the change."""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.old!r} stands {text.count(self.old)} times in {self.file}: once was expected")
        return text.replace(self.old, self.new)


def mutants(*files: str) -> list[Mutant]:
    """Those of these files, or all."""
    listed = tomllib.loads(LIST.read_text())
    return [Mutant(file, **change) for file in files or listed for change in listed[file]]


def build(root: Path) -> None:
    """The extension; compilation takes longer than what is run of it."""
    flags = ["-std=c11", "-O0", "-ffp-contract=off", "-shared", "-fPIC", "-w", "-Icsrc"]
    headers = [f"-I{path}" for path in (numpy.get_include(), sysconfig.get_path("include"))]
    sources = map(str, root.glob("csrc/**/*.c"))
    subprocess.run(["cc", *flags, *headers, *sources, "-lm", "-o", CORE], cwd=root, check=True)


def failure(root: Path, tests: list[str]) -> str:
    """The first test that fails, if one does; run by a child, for which the frameworks are imported already."""
    with tempfile.TemporaryFile("w+") as log:
        if (child := os.fork()) == 0:
            signal.alarm(3600)
            os.chdir(root)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            sys.path.insert(0, str(root))
            os.environ["PYTHONPATH"] = str(root)
            options = ["-x", "-q", "--tb=no", "-W", "ignore", "--hypothesis-profile=unshrunk"]
            os._exit(pytest.main([*options, *(f"tests/test_{name}" for name in tests)]))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        log.seek(0)
        lines = log.read().splitlines()
    if status > 2:
        raise ValueError("\n".join(lines))
    return next((line for line in lines if line.startswith(("FAILED", "ERROR"))), f"signal {-status}") if status else ""


def main(root: Path, listed: list[Mutant]) -> bool:
    """Try them all; whether the tests are strong enough."""
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.so"))
    build(root)
    core, survivors = (root / CORE).read_bytes(), []
    for mutant in listed:
        file = root / mutant.file
        text = file.read_text()
        file.write_text(mutant.change(text))
        if mutant.file.startswith("csrc"):
            build(root)
        failed = failure(root, mutant.tests)
        file.write_text(text)
        (root / CORE).write_bytes(core)
        survivors += [] if failed else [mutant]
        print(f"{mutant.file}: {mutant.old!r} -> {mutant.new!r}: {failed or mutant.survives or 'SURVIVES'}", flush=True)
    print(f"{len(listed)} changes, {len(survivors)} survive")
    return all(mutant.survives for mutant in survivors) and len(survivors) <= 0.05 * len(listed)


if __name__ == "__main__":
    import gsgd.jax
    import gsgd.torch  # noqa: F401

    for name in [name for name in sys.modules if name.split(".")[0] == "gsgd"]:
        del sys.modules[name]  # what it has imported stays
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(not main(Path(folder, "gsgd"), mutants(*sys.argv[1:])))
