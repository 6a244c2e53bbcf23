"""The list of `make mutants` is not stale."""

from mutants import ROOT, mutants


def test_every_change_that_is_listed_can_be_made() -> None:
    listed = mutants()
    assert len(listed) >= 40
    for mutant in listed:
        assert mutant.change((ROOT / mutant.file).read_text()) != mutant.old
        assert all((ROOT / f"tests/test_{name}".split("::")[0]).exists() for name in mutant.tests)
