"""The parts of the vLLM check that need no vLLM; `make vllm-check` runs all of it."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from helpers import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import vllm_check


@dataclass
class Counter:
    name: str
    value: int


@dataclass
class Vector:
    name: str
    values: list[int] = field(default_factory=list)


def counters(num_passes, num_accepted):
    prefix = "vllm:spec_decode_num"
    return vllm_check.read_counters(
        [
            Counter("vllm:prompt_tokens", 99),
            Counter(f"{prefix}_drafts", num_passes),
            Counter(f"{prefix}_draft_tokens", 7 * num_passes),
            Counter(f"{prefix}_accepted_tokens", num_accepted),
            Vector(f"{prefix}_accepted_tokens_per_pos", [num_accepted, 0]),
        ]
    )


@pytest.fixture(scope="module")
def folders(target, random_head, tmp_path_factory):
    """Target and head as vLLM gets them; the head had a draft vocabulary and a branch correction."""
    folder = tmp_path_factory.mktemp("vllm")
    head = random_head(target, draft_vocab_size=40, branch_correction="parent")
    head.save_pretrained(folder / "ours")
    tokenizer = tiny_tokenizer(target.config.vocab_size)
    left_out = vllm_check.write_folders(folder, target, tokenizer, str(folder / "ours"), "dflash")
    return folder, left_out


def test_the_folders_have_what_vllm_reads(target, folders):
    folder, left_out = folders
    config = json.loads((folder / "head" / "config.json").read_text())
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["is_causal"] is True
    assert isinstance(config["dflash_config"]["mask_token_id"], int)
    assert [what.partition("(")[0].partition(" of ")[0].strip() for what in left_out] == [
        "the branch correction",
        "the draft vocabulary",
    ]
    again = AutoModelForCausalLM.from_pretrained(folder / "target")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(again(ids).logits, target(ids).logits)
    assert AutoTokenizer.from_pretrained(folder / "target")("t005 t006").input_ids == [5, 6]


def test_our_chain_of_the_exported_head_gives_the_target_s_text(target, folders):
    settings = vllm_check.Settings("float32", max_new_tokens=10, num_drafted=3, kv_cache_mib=1)
    (text,), counts = vllm_check.run_ours(target, folders[0] / "head", [[5, 6, 7]], settings)
    plain = target.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=10, do_sample=False)
    assert text == plain[0, 3:].tolist()
    assert counts["tokens_per_pass"] == pytest.approx(1 + counts["num_accepted"] / counts["num_passes"], abs=1e-3)
    assert counts["num_passes"] >= (len(text) - 1) / (settings.num_drafted + 1)


def test_counters_are_read_by_name():
    assert counters(10, 12) == {
        "num_passes": 10,
        "num_drafted": 70,
        "num_accepted": 12,
        "accepted_by_depth": [12, 0],
        "tokens_per_pass": 2.2,
    }
    assert vllm_check.read_counters([Counter("vllm:prompt_tokens", 99)]) == {}


def test_texts_are_compared_prompt_by_prompt():
    rows = vllm_check.compare_texts(("a", "b"), [[1, 2], [3]], [[1, 2], [3, 4]], [[1], [3]])
    assert [(row["num_tokens"], row["same_with_head"], row["same_as_generate"]) for row in rows] == [
        (2, True, False),
        (1, False, True),
    ]


SAME = [{"prompt": "a", "same_with_head": True}]
OURS = {"tokens_per_pass": 2.0}


def test_a_good_result_has_no_failures():
    assert vllm_check.failures(SAME, counters(10, 10), OURS) == []


@pytest.mark.parametrize(
    ("rows", "counts", "message"),
    [
        ([*SAME, {"prompt": "b", "same_with_head": False}], counters(10, 10), "the text differs with the head: b"),
        (SAME, {}, "vLLM drafted nothing"),
        (SAME, counters(10, 0), "expected at least 1.2 tokens per pass, got 1.00"),
        (SAME, counters(10, 6), "1.60 tokens per pass, but 2.00 in `generate`"),
    ],
)
def test_each_failure_is_named(rows, counts, message):
    assert message in vllm_check.failures(rows, counts, OURS)[0]


def test_the_check_has_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vllm_check.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        vllm_check.main()
    assert "make vllm-check" in capsys.readouterr().out


def test_without_vllm_the_check_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(vllm_check, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["vllm_check.py"])
    with pytest.raises(SystemExit, match="make vllm-check"):
        vllm_check.main()


def test_a_failing_engine_is_explained(monkeypatch):
    def fail(*_):
        raise ValueError("No available memory for the cache blocks")

    monkeypatch.setattr(vllm_check, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(vllm_check, "run_vllm", fail)
    monkeypatch.setattr(vllm_check, "version", lambda name: "0.32.0")
    with pytest.raises(SystemExit, match=r"No available memory for the cache blocks\n.*--kv-cache-mib"):
        vllm_check.in_own_process("target", None, [], None)


class InThisProcess:
    """A pool of no processes."""

    def __init__(self, **_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, function, *arguments):
        self.result = lambda: function(*arguments)
        return self
