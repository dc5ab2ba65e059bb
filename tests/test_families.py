"""Targets of many families: with a head, the text of plain decoding; and the table in `docs/` says what was seen."""

import pytest
import support_matrix
import transformers
from families import FAMILIES


def test_the_table_lists_the_tested_families():
    assert list(support_matrix.read_table()) == list(FAMILIES), "run `make support-matrix`"


def test_the_table_says_nothing_but_what_a_check_can_say():
    for cells in support_matrix.read_table().values():
        outcome = {cells[column] for column in ("greedy", "sampled", "tied embeddings")}
        assert outcome == ({""} if cells["refused because"] else {"exact"})


@pytest.mark.parametrize("name", list(filter(support_matrix.is_known, FAMILIES)))
def test_the_family_does_what_the_table_says(name):
    expected, got = support_matrix.read_table()[name], support_matrix.row(name)
    if f"transformers {transformers.__version__}." not in support_matrix.TABLE.read_text():
        reason = "refused because"  # another release has other names for things
        assert bool(expected.pop(reason)) == bool(got.pop(reason))
    assert expected == got, "run `make support-matrix` if this is meant"
