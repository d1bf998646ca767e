"""Every layout is the same run: the rows of `cases.py` held to one process (see `matrix.hold`)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.mutants_list import MUTANTS, Mutant
from tests.conftest import ROOT
from tests.parallel.cases import CASES, TOGETHER, name_of, pairs, pairwise_cover
from tests.parallel.matrix import Case, hold

QUICK = pairwise_cover(CASES)


def rows(cases: list[Case]) -> list[object]:
    """The cases as parameters; those that the cover leaves out are slow tests."""
    return [
        pytest.param(case, id=name_of(case), marks=() if case in QUICK else pytest.mark.slow)
        for case in cases
    ]


@pytest.mark.parametrize("case", rows(CASES))
def test_a_layout_is_the_run_of_one_process(case: Case) -> None:
    hold(case, twice=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", rows([case for case in CASES if case.dtype == torch.float64]))
def test_a_layout_is_the_run_of_one_process_in_fp32(case: Case) -> None:
    hold(replace(case, dtype=torch.float32))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_has_its_place_in_the_program(mutant: Mutant) -> None:
    """A change of the program may move what `benchmarks/mutants.py` breaks; then the list wants the new place."""
    text = (ROOT / "modelyard" / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, mutant.old


def test_rows_have_names_of_their_own() -> None:
    names = [name_of(case) for case in CASES]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)


def test_the_quick_rows_have_the_pairs_that_must_be_together() -> None:
    every = set().union(*map(pairs, QUICK))
    print(f"\n{len(QUICK)} of {len(CASES)} rows have all {len(every)} pairs of features:")
    for case in QUICK:
        print(" ", name_of(case), "|", case.layout.world, "processes")
    missing = TOGETHER - set(map(frozenset, every))
    assert not missing, sorted(map(sorted, missing))
