"""The runner of transformers' own generation tests, on a stand-in for their sources."""

import subprocess
import sys
from pathlib import Path

import pytest
from generation_tests import Heads, report


MIXIN = """
import torch

class GenerationTesterMixin:
    def prepare_config_and_inputs_for_generate(self, batch_size=2):
        return dict(input_ids=torch.arange(5, 10).repeat(batch_size, 1), max_new_tokens=6, pad_token_id=0)

    def test_greedy(self):
        inputs = self.prepare_config_and_inputs_for_generate()
        self.assertEqual(len(self.model.generate(**inputs, do_sample=False)), len(inputs["input_ids"]))

    def test_without_a_cache(self):
        self.model.generate(**self.prepare_config_and_inputs_for_generate(), use_cache=False)

    def test_of_beams(self):
        self.model.generate(**self.prepare_config_and_inputs_for_generate(), num_beams=2)

    def test_broken_with_or_without_a_head(self):
        self.assertEqual(self.prepare_config_and_inputs_for_generate(), {})

    def test_forwards_of_one_token(self):
        widths = set()
        hook = self.model.register_forward_pre_hook(
            lambda _, args, kwargs: widths.add(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        self.model.generate(**self.prepare_config_and_inputs_for_generate(), do_sample=False)
        hook.remove()
        self.assertEqual(widths, {5, 1})
"""
MODEL = """
import unittest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from ...generation.test_utils import GenerationTesterMixin

class LlamaModelTest(GenerationTesterMixin, unittest.TestCase):
    def setUp(self):
        torch.manual_seed(1)
        sizes = dict(vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        self.model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).eval()

    def test_of_the_family_alone(self):
        self.fail("the runner selects the mixin's tests only")
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transformers")
    for package in ("tests", "tests/generation", "tests/models", "tests/models/llama"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").touch()
    (folder / "tests/generation/test_utils.py").write_text(MIXIN)
    (folder / "tests/models/llama/test_modeling_llama.py").write_text(MODEL)
    return folder


def run(sources: Path) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("generation_tests.py")
    return subprocess.run(
        [sys.executable, script, sources, "--families", "llama"], capture_output=True, text=True, timeout=300
    )


def test_a_test_that_only_a_head_breaks_fails_the_run_and_drafts_are_counted(sources):
    done = run(sources)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-2:] == [
        "failed: llama::test_forwards_of_one_token, batch 1",
        "failed: llama::test_forwards_of_one_token, batch 2",
    ]
    assert "fails without a head, too: llama::test_broken_with_or_without_a_head, batch 1" in done.stdout
    assert "2 calls refused: draft heads need the target's cache" in done.stdout
    assert "the_family_alone" not in done.stdout
    tests, calls = (part.split() for part in done.stdout.split("llama ")[1].split("|")[:2])
    assert dict(zip(("with draft", "no draft", "failed", "expected", "skipped"), tests, strict=True)) == {
        "with draft": "2",
        "no draft": "4",
        "failed": "4",
        "expected": "0",
        "skipped": "0",
    }
    assert dict(zip(("drafted", "refused", "plain"), calls, strict=True)) == {
        "drafted": "4",
        "refused": "4",
        "plain": "0",
    }


def test_a_run_that_drafts_nothing_fails():
    assert report({"llama::test_greedy, batch 1": "passed"}, {}, Heads(), ["llama"]) == ["nothing was drafted: llama"]
