"""The examples that readers start with, on tiny models: generate, chat, the Hub folder, the recipes and the server."""

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import EXAMPLES
from helpers import save_pair, tiny_tokenizer, word, write_lines
from huggingface_hub import ModelCard
from transformers import Qwen3Config

from hf_jetflow import GenerationStats
from hf_jetflow.head.card import card_text


SHARED = ("smollm2.py", "replayed.py", "turns.py")  # what the examples import


@pytest.fixture
def pair(tiny_target, random_head, tmp_path):
    """Options that name a tiny target and head."""
    head = random_head(tiny_target("llama"))
    options = save_pair(tmp_path, tiny_target("llama"), head)
    card = card_text(head.config, name="head", num_parameters=head.num_parameters(), training="None.")
    (tmp_path / "head" / "README.md").write_text(card)
    return options


def test_generate_prints_plain_decoding_s_answer(example, pair, tiny_target, capsys, monkeypatch):
    monkeypatch.setattr("hf_jetflow.target.loading.fast_dtype", lambda: "float32")
    example("generate", *pair, "--max-new-tokens", 9, "t010 t011")
    text, rounds = capsys.readouterr().out.splitlines()
    ids = torch.tensor([[3, 10, 11, 4, 5]])
    plain = tiny_target("llama").generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
    assert text.split() == [word(token) for token in plain[0, 5:].tolist()]
    assert re.fullmatch(r"\(\d\.\d\d tokens per round\)", rounds)


@pytest.fixture
def demo(example, example_module, pair, monkeypatch):
    """Runs the demo with a tiny pair, in float32."""
    module = example_module("demo")
    monkeypatch.setattr(module, "gguf_path", lambda: str(pair[1]))
    monkeypatch.setattr(module, "HEAD", pair[3])
    return lambda *arguments: example("demo", "--dtype", "float32", "--max-new-tokens", 6, *arguments)


def test_the_demo_proves_equality_and_counts_equal_texts_beside_those_of_a_batch(demo, capsys):
    demo("--runs", 2)
    text = capsys.readouterr().out
    assert text.index("identical to plain decoding, token for token") < text.index("medians of 2 runs")
    assert "float32: 3 of 3 with the head, 3 of 3 for plain decoding in a batch of four" in " ".join(text.split())


def test_the_demo_explains_where_texts_differ(demo, capsys, monkeypatch):
    module = sys.modules["demo"]
    real = module.Demo.answer

    def other_text(self, prompt, head, silently=None):
        ids, seconds = real(self, prompt, head, silently)
        return ([*ids[:2], 77] if head is not None else ids), seconds

    monkeypatch.setattr(module.Demo, "answer", other_text)
    demo("--runs", 1)
    text = " ".join(capsys.readouterr().out.split())
    assert "NOT IDENTICAL" in text
    assert "the texts differ from token 3 on" in text


def test_the_demo_states_no_speedup_above_the_tokens_per_round(demo, capsys, monkeypatch):
    module = sys.modules["demo"]
    real = module.Demo.answer
    durations = {True: 9.0, False: 1.0}  # of plain runs and of those with a head
    monkeypatch.setattr(module.Demo, "answer", lambda *call, **k: (real(*call, **k)[0], durations[call[2] is None]))
    demo("--runs", 1)
    text = capsys.readouterr().out
    assert "no speedup stated" in text
    assert "speedup 9" not in text
    assert "Mostly plain rounds" not in text


@pytest.mark.parametrize(("slowest", "shown"), [(1.5, " (0.67 - 1.00) "), (0.1, " ")])
def test_the_demo_gives_the_range_of_its_runs_unless_one_was_disturbed(slowest, shown, demo, capsys, monkeypatch):
    module = sys.modules["demo"]
    real = module.Demo.answer
    durations = itertools.cycle([1.0, 1.0, 1.0, slowest, 1.0, 1.0])  # plain and with the head in turn, 3 runs

    def timed(self, prompt, head, silently=None):
        ids, _ = real(self, prompt, head, silently)
        return ids, next(durations) if prompt in module.PROMPTS.values() else 1.0

    monkeypatch.setattr(module.Demo, "answer", timed)
    demo("--runs", 3)
    text = " ".join(capsys.readouterr().out.split())
    assert f"speedup 1.00{shown}" in text
    assert (" - 1.00)" in text) == (slowest == 1.5)


@pytest.mark.parametrize(
    ("dtype", "nodes", "reason"),
    [
        ("float32", 16, "Speedup below 1: on a CPU without bf16 instructions"),
        ("bfloat16", 16, "Speedup below 1: other work slowed a run down"),
        ("float32", 1, "Mostly plain rounds"),
    ],
)
def test_the_demo_says_once_why_drafting_did_not_pay(dtype, nodes, reason, demo, capsys, monkeypatch):
    module = sys.modules["demo"]
    real = module.Demo.answer
    monkeypatch.setattr(module, "fast_dtype", lambda: dtype)

    def slow(self, prompt, head, silently=None):
        ids, _ = real(self, prompt, head, silently)
        self.head.last_stats = GenerationStats(num_rounds=5, num_accepted=5, rounds_by_nodes={nodes: 5})
        return ids, 1.0 if head is None else 2.0

    monkeypatch.setattr(module.Demo, "answer", slow)
    demo("--runs", 1)
    text = " ".join(capsys.readouterr().out.split())
    assert f"rounds by number of nodes: 5 {'plain' if nodes == 1 else 'of 16'}" in text
    summary = text[text.index("summary") :]
    assert summary.count(reason) == 1
    assert summary.count("Speedup below 1") + summary.count("Mostly plain rounds") == 1


@pytest.fixture
def says(monkeypatch):
    """`says(*lines)`: what the user types, then Ctrl-D."""

    def type_in(*lines):
        typed = iter(lines)

        def answer(_):
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", answer)

    return type_in


@pytest.fixture
def chat_and_seen(example_module, monkeypatch):
    """The module of the chat, and the conversations that it sends."""
    chat = example_module("chat")
    seen, real = [], chat.encode_chat

    def record(tokenizer, messages):
        seen.append(list(messages))
        return real(tokenizer, messages)

    monkeypatch.setattr(chat, "encode_chat", record)
    return chat, seen


def test_chat_sends_the_whole_conversation_each_turn_and_starts_another(example, pair, says, chat_and_seen, capsys):
    _, seen = chat_and_seen
    says("t010", "t011", "/new", "t012", "", "never")
    example("chat", *pair, "--max-new-tokens", 4, "--system", "t020")
    assert [[message["role"][0] for message in messages] for messages in seen] == [
        list("su"),
        list("suau"),
        list("su"),
    ]
    answers = [line for line in capsys.readouterr().out.splitlines() if line and "tokens per round" not in line]
    assert seen[1][2]["content"].split() == answers[0].split()
    assert seen[2] == [{"role": "system", "content": "t020"}, {"role": "user", "content": "t012"}]


def test_an_interrupted_answer_stays_in_the_chat(example, pair, says, chat_and_seen, capsys, monkeypatch):
    chat, seen = chat_and_seen

    def interrupt(self, text, stream_end=False):
        self.text += "t044"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.RecordingStreamer, "on_finalized_text", interrupt)
    says("t010", "t011")
    example("chat", *pair, "--max-new-tokens", 4)
    assert "(interrupted)" in capsys.readouterr().out
    assert seen[1][1] == {"role": "assistant", "content": "t044"}


def test_a_hub_folder_decodes_by_its_name_and_has_a_valid_card(example, pair, target, tmp_path, monkeypatch, capsys):
    example("hub_folder", *pair[2:], "--repo", "me/head", "--output", tmp_path / "hub" / "me" / "head")
    folder = tmp_path / "hub" / "me" / "head"
    assert "hf upload me/head" in capsys.readouterr().out
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "README.md",
        "config.json",
        "custom_generate/generate.py",
        "custom_generate/requirements.txt",
        "generation_config.json",
        "model.safetensors",
    ]
    card = ModelCard.load(folder / "README.md")
    assert "custom_generate" in card.data.tags
    assert 'custom_generate="me/head"' in card.text
    (folder / "custom_generate" / "requirements.txt").unlink()  # here the package is not installed under that name
    monkeypatch.chdir(tmp_path / "hub")  # where the id me/head is this folder
    ids = torch.tensor([[5, 6, 7, 8]])
    settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    drafted = target.generate(ids, custom_generate="me/head", trust_remote_code=True, **settings)
    assert drafted.tolist() == target.generate(ids, **settings).tolist()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(repo="head"), "expected a repository ORG/NAME, got"),
        (dict(output="head"), "exists already"),
        (dict(head="target"), "lacks .*generate|lacks README.md"),
    ],
)
def test_an_invalid_hub_folder_is_refused_with_the_cause(example, pair, tmp_path, change, words):
    options = {"head": "head", "output": "hub", **change}
    arguments = ["--head", tmp_path / options["head"], "--output", tmp_path / options["output"]]
    with pytest.raises(SystemExit, match=words):
        example("hub_folder", *arguments, "--repo", options.get("repo", "me/head"))
    assert not (tmp_path / "hub").exists()


# --- recipes for GPUs, without one -----------------------------------------------------------------------------------


def dry_run(script, *arguments, **variables):
    environment = {**os.environ, "DRY_RUN": "1", **{name: str(value) for name, value in variables.items()}}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["bash", str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_recipe_for_several_gpus_says_its_commands_and_starts_nothing(tmp_path):
    done = dry_run("train_qwen3_8b.sh", tmp_path / "run", "q.jsonl", GPUS=4, STEPS=7)
    assert done.returncode == 0, done.stderr
    steps = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert [re.search(r"(\w+)\.py|mkdir|pip|mv|accelerate", step).group() for step in steps] == [
        "training_cost.py",
        "mkdir",
        "pip",
        "prepare_prompts.py",
        "answers_vllm.py",
        "accelerate",
    ]
    assert "--num_processes 4 -m hf_jetflow train --target Qwen/Qwen3-8B" in steps[-1]
    assert not (tmp_path / "run").exists()
    given = dry_run("train_qwen3_8b.sh", tmp_path / "run", ANSWERS="mine.jsonl")
    assert "answers_vllm" not in given.stdout
    assert "--answers mine.jsonl" in given.stdout


def test_every_command_of_the_recipe_has_the_options_it_is_given(tmp_path):
    from hf_jetflow.cli.main import command_parser

    done = dry_run("train_qwen3_8b.sh", tmp_path / "run")
    steps = [line[2:].split() for line in done.stdout.splitlines() if line.startswith("+ ")]
    for words in steps:
        scripts = [word for word in words if word.endswith(".py")]
        options = {word for word in words if word.startswith("--")}
        if scripts:
            assert {f'"{option}"' for option in options} <= set(
                re.findall(r'"--[\w-]+"', Path(scripts[0]).read_text())
            )
    words = steps[-1]
    command_parser("train").parse_args(words[words.index("train") + 1 :])


def test_the_recipe_s_memory_and_time_are_those_of_the_cost_model(example, tmp_path, capsys):
    Qwen3Config(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
    ).save_pretrained(tmp_path)
    recipe = (EXAMPLES / "train_qwen3_8b.sh").read_text()
    shape = re.search(r"shape=\((.*?)\)\n", recipe, re.DOTALL).group(1).replace('"${STEPS:-20000}"', "20000").split()
    example("training_cost", "--target", tmp_path, *shape)
    printed = capsys.readouterr().out
    memory, update, hours = re.search(
        r"([\d.]+) GB at the peak and ([\d.]+) s per update, ([\d.]+) h", printed
    ).groups()
    assert f"{memory} GB at the peak and {update} s per update, {hours} h for the 20,000 updates" in recipe
    assert "1.32 B parameters" in printed


def test_vllm_s_answers_are_written_as_training_reads_them_and_none_twice(
    example, pair, tmp_path, monkeypatch, capsys
):
    asked = []

    class LLM:
        def __init__(self, model, max_model_len, **_):
            assert (Path(model).name, max_model_len) == ("target", 40)

        def generate(self, prompts, sampling):
            asked.extend(prompts)
            ids = [7, 8, 2][: sampling["max_tokens"]]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids))]) for _ in prompts]

    vllm = ModuleType("vllm")
    vllm.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    vllm.LLM, vllm.SamplingParams, vllm.TokensPrompt = LLM, dict, lambda prompt_token_ids: prompt_token_ids
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    prompts = write_lines(tmp_path / "math.jsonl", {"id": "a", "prompt": "t010"}, {"id": "b", "prompt": "t011"})
    output = tmp_path / "runs" / "answers.jsonl"
    options = [*pair[:2], "--output", output, "--max-new-tokens", 3, "--max-length", 40, "--prompts"]
    example("answers_vllm", *options, prompts)
    long = {"id": "long", "prompt": "t010 " * 40}
    more = write_lines(tmp_path / "more.jsonl", {"id": "c", "prompt": "t012", "source": "other"}, long)
    example("answers_vllm", *options, prompts, "--prompts", more)
    assert asked == [[3, 10, 4, 5], [3, 11, 4, 5], [3, 12, 4, 5]]
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert records[0] == {"id": "a", "source": "math", "prompt_ids": [3, 10, 4, 5], "answer_ids": [7, 8, 2]}
    assert [record["source"] for record in records] == ["math", "math", "other"]
    assert "1 prompts to answer, 2 answered before" in capsys.readouterr().out


def test_the_server_is_started_with_the_head_s_number_of_depths(pair, tmp_path):
    done = dry_run("serve_vllm.sh", "--port", 8001, TARGET=pair[1], HEAD=pair[3], OUT=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    convert, serve = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert f"-m hf_jetflow convert {pair[3]} --to dflash --target {pair[1]}" in convert
    assert "-m vllm.entrypoints.openai.api_server" in serve
    assert serve.endswith("--port 8001")
    settings = json.loads(re.search(r"\{.*\}", serve).group())
    assert settings == {"method": "dflash", "model": str(tmp_path / "out"), "num_speculative_tokens": 7}


def test_the_server_says_what_it_lacks():
    environment = {name: value for name, value in os.environ.items() if name not in ("TARGET", "HEAD")}
    done = subprocess.run(
        ["bash", str(EXAMPLES / "serve_vllm.sh")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "name the target" in done.stderr


def test_every_example_is_listed():
    listed = (EXAMPLES / "README.md").read_text()
    files = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")]
    assert [name for name in files if f"({name})" not in listed and name not in SHARED] == []


@pytest.mark.slow  # the harness collects facts about the machine
def test_the_harness_scores_the_same_in_batches_with_a_head(example, pair, tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    lengths = (1, 4, 2, 3, 6)
    questions = [{"question": "t011 " * length, "answer": str(length)} for length in lengths]
    write_lines(tmp_path / "questions.jsonl", *questions)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer = tiny_tokenizer(257)
    tokenizer.eos_token, tokenizer.pad_token = word(2), word(0)
    tokenizer.save_pretrained(tmp_path / "target")
    options = ["--questions", tmp_path / "questions.jsonl", "--dtype", "float32", "--max-new-tokens", 12]
    example("evaluate_head", *pair, *options, "--batch-size", 2)
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("plain: "))
    _, score, drafted, same_score, same = lines[start:]
    assert drafted.startswith("with the head: ")
    assert "tokens per round" in drafted
    assert score == same_score
    assert same == "same answers: 5 of 5"
