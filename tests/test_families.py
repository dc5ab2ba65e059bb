"""Targets of many families: with a head, the text of plain decoding; and the table in `docs/` says what was seen."""

import pytest
import support_matrix
from families import FAMILIES


def test_the_table_lists_the_tested_families():
    assert list(support_matrix.read_table()) == list(FAMILIES), "run `make support-matrix`"


def test_the_table_says_nothing_but_what_a_check_can_say():
    for cells in support_matrix.read_table().values():
        outcome = {cells[column] for column in ("greedy", "sampled", "tied embeddings")}
        assert outcome == ({""} if cells["refused because"] else {"exact"})


@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_does_what_the_table_says(name):
    assert support_matrix.row(name) == support_matrix.read_table()[name], "run `make support-matrix` if this is meant"
