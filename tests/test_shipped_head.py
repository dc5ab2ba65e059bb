"""The shipped head with the real SmolLM2-135M-Instruct: plain decoding's text in fp32, several tokens per round."""

import re
import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from hf_jetflow import JetFlowHead
from hf_jetflow.doctor.doctor import examine
from hf_jetflow.prompts import encode_chat
from hf_jetflow.target.loading import load_model, load_target


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
HEAD = EXAMPLES / "heads" / "smollm2-135m-instruct"
QUESTIONS = (
    "Tom has 3 boxes with 12 pencils each and gives away 9 pencils. How many pencils does he have left?",
    "Write a Python function that checks whether a word is a palindrome.",
)


@pytest.fixture(scope="module")
def gguf():
    sys.path.insert(0, str(EXAMPLES))
    try:
        from smollm2 import gguf_path

        return gguf_path()
    except SystemExit as missing:
        pytest.skip(str(missing))
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def pair(gguf):
    return load_target(gguf, "float32")


@pytest.fixture
def head():
    return JetFlowHead.from_pretrained(HEAD, dtype=torch.float32)


@pytest.fixture
def no_bars():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.mark.usefixtures("no_bars")
def test_the_target_loads_without_bars_where_they_are_off(gguf, capsys):
    load_model(gguf, "float32")
    assert "%|" not in capsys.readouterr().err


def test_the_text_is_plain_decoding_s_own(pair, head):
    """All questions in one test, so that one process of the test run loads the model."""
    target, tokenizer = pair
    head.generation_config.node_budget = 32
    sampling = {"do_sample": True, "temperature": 0.8}
    for question, settings in zip(QUESTIONS, ({"do_sample": False}, sampling), strict=True):
        ids = torch.tensor([encode_chat(tokenizer, [{"role": "user", "content": question}])])
        settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=20, **settings)
        torch.manual_seed(11)
        plain = target.generate(ids, **settings)
        torch.manual_seed(11)
        drafted = target.generate(ids, assistant_model=head, **settings)
        assert drafted.tolist() == plain.tolist(), "the shipped head changed the text of the real model in float32"
        if question == QUESTIONS[0]:
            assert head.last_stats.tokens_per_round > 2.5


@pytest.mark.slow
@pytest.mark.parametrize("page", [EXAMPLES.parent / "README.md", HEAD / "README.md"], ids=["readme", "card"])
def test_the_example_that_is_shown_answers_as_pasted(page, pair, tmp_path, monkeypatch, capsys):
    """In a folder where the target's id is the real target; nothing is changed but the length."""
    for part in pair:
        part.save_pretrained(tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?assistant_model=head.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[1]
    exec(code.replace("max_new_tokens=256", "max_new_tokens=24"), {})
    answer, tokens_per_round = capsys.readouterr().out.strip().rsplit("\n", 1)
    assert "sky" in answer.lower()
    assert float(tokens_per_round) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "changed"),
    [
        (None, {}),
        ("taps", {"hidden_state_indices": [3, 10, 16, 22, 29]}),
        ("causality", {"is_causal": False}),
    ],
)
def test_the_doctor_finds_the_shipped_head_sound_and_names_mistakes_that_cost_it_little(pair, mistake, changed):
    head = JetFlowHead.from_pretrained(HEAD, dtype=torch.float32, **changed)
    faults = examine(*pair, head, max_new_tokens=48)["faults"]
    assert [fault["mistake"] for fault in faults] == ([] if mistake is None else [mistake])


def test_the_shipped_folder_is_small_and_holds_safetensors_only():
    names = sorted(path.name for path in HEAD.iterdir())
    assert names == ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    assert sum(path.stat().st_size for path in HEAD.iterdir()) < 40 * 2**20
