"""The comparison with other packages, if they are installed: see `make parity`."""

import importlib.util
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import parity


@pytest.mark.parametrize("package", parity.PACKAGES)
def test_heads_of_a_package_and_ours_have_equal_logits_both_ways(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: `make parity` has an environment with it")
    rows = parity.run(package)
    assert {row["saved_by"] for row in rows} == {package, "hf_jetflow"}
    assert all(row["passed"] for row in rows), rows


def test_the_comparison_notices_a_wrong_flag(tmp_path):
    """Compare two of our heads that differ in causality only."""
    target = parity.small_target(tmp_path / "target")
    head, written = parity.our_head(tmp_path, 0, "jetspec", {"is_causal": True})
    other = parity.JetFlowHead.from_pretrained(written, is_causal=False)

    def same(ids, features):
        return parity.our_logits(target, head, ids, features)

    assert parity.compare(target, head, same)["max_difference"] < parity.TOLERANCE / 10
    wrong = parity.compare(target, other, same)
    assert wrong["max_difference"] > 100 * parity.TOLERANCE
    assert not wrong["same_chains"]
