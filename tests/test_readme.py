"""The code in README and in the documentation runs: a page's blocks of a language, in order, are one program."""

import ast
import inspect
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import gsgd.torch

ROOT = Path(__file__).parents[1]
HOWTO = ROOT / "docs" / "howto" / "index.md"


def program(page: Path, language: str = "python") -> str:
    """The blocks of a language; after those of the how-to pages' index on these."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    before = [program(HOWTO)] if page.parent == HOWTO.parent and page != HOWTO else []
    return "\n".join(before + blocks)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("page", [p for p in PAGES if program(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_python_of_a_page_runs(page: Path) -> None:
    if "import skorch" in program(page):
        pytest.importorskip("skorch")
    exec(compile(program(page), str(page), "exec"), {"__name__": "page"})


def test_defaults_on_the_page_about_moving_are_those_of_both_sides() -> None:
    sides: list[inspect.Signature] = []
    compared = 0
    for row in re.findall(r"^\|(.*)\|$", (ROOT / "docs" / "moving.md").read_text(), flags=re.M):
        cells = [cell.strip(" *") for cell in row.split("|")]
        if re.fullmatch(r"`torch\.optim\.\w+`", cells[0]):
            modules = {"torch": torch.optim, "gsgd": gsgd.torch}
            sides = [
                inspect.signature(getattr(modules[cell.strip("`").split(".")[0]], cell.strip("`").split(".")[-1]))
                for cell in cells[:2]
            ]
        for signature, cell in zip(sides, cells, strict=False):
            for name, value in re.findall(r"`(\w+)=([^`]+)`", cell):
                if name in signature.parameters:  # others are among the options that are passed on
                    assert signature.parameters[name].default == ast.literal_eval(value)
                    compared += 1
    assert compared > 15


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "METHOD.md"])
def test_links_lead_somewhere(name: str) -> None:
    """The site's own links are checked when it is built."""
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / name).read_text())
    assert [t for t in targets if not (ROOT / t).exists()] == []


def test_c_of_its_page_compiles_and_trains(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = tmp_path / "page.c"
    source.write_text(program(ROOT / "docs" / "start" / "c.md", "c"))
    core = (ROOT / "csrc").glob("*.c")
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, source, *core, "-lm", "-o", tmp_path / "page"], check=True)
    subprocess.run([tmp_path / "page"], check=True)
