"""The bench: its rows, its figures, and what it refuses."""

import json

import pytest
import torch
from helpers import tiny_tokenizer

from hf_jetflow.bench import make_variants, run_bench, write_json


@pytest.fixture
def pair(tiny_target, random_head):
    target = tiny_target("llama")
    return target, tiny_tokenizer(target.config.vocab_size), random_head(target)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"id": i, "prompt": f"t0{i + 10} t020"}) + "\n" for i in range(3)))
    return path


def test_every_method_and_budget_has_one_row_with_the_documented_fields(pair, prompts):
    result = run_bench(*pair, [prompts], node_budgets=(2, 8), temperatures=(0.0, 0.7), max_new_tokens=6, repeats=2)
    rows = result["rows"]
    assert [(row["method"], row["node_budget"]) for row in rows[:4]] == [
        ("plain", None),
        ("chain", None),
        ("jetflow", 2),
        ("jetflow", 8),
    ]
    assert [row["temperature"] for row in rows] == [0.0] * 4 + [0.7] * 4
    fields = {
        "prompts", "method", "node_budget", "dtype", "temperature", "num_prompts", "num_new_tokens",
        "tokens_per_round", "tokens_per_second", "speedup", "speedup_spread", "identical_to_plain", "round_seconds",
    }  # fmt: skip
    assert all(fields <= row.keys() for row in rows)
    assert all(row["identical_to_plain"] == 1.0 for row in rows), (
        "a method gave other text than plain decoding in fp32"
    )
    assert all(row["num_new_tokens"] == 3 * 2 * 6 for row in rows)
    assert (rows[0]["speedup"], rows[0]["tokens_per_round"]) == (1.0, 1.0)
    assert set(rows[2]["round_seconds"]) == {"draft", "tree", "verify", "walk", "commit"}
    assert result["environment"]["torch"] == torch.__version__


def test_the_json_file_holds_the_result_and_no_partial_file_is_left(pair, prompts, tmp_path):
    result = run_bench(*pair, [prompts], methods=["jetflow"], node_budgets=(4,), max_new_tokens=4, num_prompts=1)
    write_json(result, tmp_path / "out" / "bench.json")
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == json.loads(json.dumps(result))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bench.json"]


def test_an_unknown_method_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'warp'.*choose from plain, jetflow, chain"):
        make_variants(["plain", "warp"], [8])


def test_progress_reaches_the_number_of_runs(pair, prompts):
    calls = []
    run_bench(*pair, [prompts], node_budgets=(4,), max_new_tokens=3, progress=lambda *call: calls.append(call))
    assert calls[-1][:2] == (9, 9)


@pytest.mark.parametrize("kind", [None, "path"])
def test_agreement_by_depth_is_told_for_greedy_texts(kind, tiny_target, random_head, prompts):
    target = tiny_target("llama")
    head = random_head(target, branch_correction=kind)
    tokenizer = tiny_tokenizer(target.config.vocab_size)
    result = run_bench(
        target, tokenizer, head, [prompts], methods=["chain"], temperatures=(0.0, 1.0), max_new_tokens=9, num_prompts=2
    )
    rates = result["agreement"][prompts.stem]
    names = {f"{group}{measure}" for group in ("", "spine_", "sibling_") for measure in ("top1", "corrected_top1")}
    assert rates.pop("kl")
    assert set(rates) == {name for name in names if kind or "corrected" not in name}
    assert all(len(values) == 7 and all(0 <= value <= 1 for value in values) for values in rates.values())
    if kind:  # a new correction changes nothing
        assert rates["corrected_top1"] == rates["top1"]


def test_no_agreement_is_told_where_nothing_was_greedy(pair, prompts):
    result = run_bench(*pair, [prompts], methods=["chain"], temperatures=(1.0,), max_new_tokens=4, num_prompts=1)
    assert result["agreement"] == {}
