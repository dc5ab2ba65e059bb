"""The Space: two calls that take turns, what each token is said to come from, and the app around them."""

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import save_pair


ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "examples" / "space"


@pytest.fixture
def race(monkeypatch):
    monkeypatch.syspath_prepend(str(SPACE))
    return importlib.import_module("race")


def run(*runners):
    while waiting := [runner for runner in runners if not runner.is_finished]:
        waiting[0].step()


@pytest.mark.parametrize("do_sample", [False, True])
def test_both_sides_give_the_text_of_generate(do_sample, race, target, head, prompt):
    settings = dict(max_new_tokens=20, do_sample=do_sample)
    plain, drafted = race.Runner(target, prompt, None, settings), race.Runner(target, prompt, head, settings)
    for _ in range(3):  # interleaved
        plain.step()
        drafted.step()
    run(drafted, plain)
    torch.manual_seed(0)
    expected = target.generate(prompt, **settings)[0, prompt.shape[1] :].tolist()
    assert plain.progress.ids == drafted.progress.ids == expected
    assert plain.progress.seconds > 0


def test_each_token_says_where_it_came_from(race, target, echo_head, prompt):
    text = target.generate(prompt, max_new_tokens=20, do_sample=False)
    head = echo_head(target, text)
    head.generation_config.node_budget = 8
    drafted = race.Runner(target, prompt, head, dict(max_new_tokens=20, do_sample=False))
    run(drafted)
    progress = drafted.progress
    assert len(progress.kinds) == len(progress.ids) == 20
    assert progress.kinds[0] == "plain"
    assert progress.kinds.count("bonus") <= len(progress.rounds)
    num_accepted = progress.rounds[0].num_accepted
    assert progress.kinds[1 : 2 + num_accepted] == [*["accepted"] * num_accepted, "bonus"]
    assert progress.tokens_per_round > 2


def test_a_call_whose_reader_left_ends_and_one_that_fails_says_why(race, target, prompt):
    runner = race.Runner(target, prompt, None, dict(max_new_tokens=200, do_sample=False))
    runner.step()
    runner.stop()
    assert runner.is_finished
    assert len(runner.progress.ids) < 3
    failing = race.Runner(target, prompt, None, dict(max_new_tokens=5, num_beams=0))
    with pytest.raises(ValueError, match="num_beams"):
        run(failing)


def test_the_app_streams_both_sides_a_tree_and_a_verdict(race, target, head, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="the Space needs gradio")
    pytest.importorskip("matplotlib")
    save_pair(tmp_path, target, head)
    monkeypatch.setenv("TARGET", str(tmp_path / "target"))
    monkeypatch.setenv("HEAD", str(tmp_path / "head"))
    monkeypatch.setattr("hf_jetflow.target.loading.fast_dtype", lambda: "float32")
    monkeypatch.delitem(sys.modules, "app", raising=False)
    app = importlib.import_module("app")
    app.build()
    updates = list(app.answer("t010 t011", 12, "8", 0.0))
    plain, drafted, verdict, tree = updates[-1]
    assert "Both texts are the same, token for token (float32)" in verdict
    assert "12 tokens in" in plain
    assert 'class="bonus"' in drafted
    assert 'class="accepted"' not in plain
    assert tree.startswith('<div class="tree"><img')
    assert len(updates) > 12, "it streams"


def test_the_folder_is_what_a_space_needs():
    card = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", (SPACE / "README.md").read_text("utf-8"), re.DOTALL)[1])
    assert (card["sdk"], card["app_file"], card["license"]) == ("gradio", "app.py", "apache-2.0")
    needs = (SPACE / "requirements.txt").read_text(encoding="utf-8").split()
    assert {"hf-jetflow[bench]", "hf-jetflow-smollm2"} <= set(needs)
