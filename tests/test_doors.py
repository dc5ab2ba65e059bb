"""The doors people come in by: pipelines, streamers and servers with threads, evaluation loops, dispatched models."""

import copy
import itertools
import re
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from conftest import make_prompt
from helpers import dotted_tokenizer, tiny_tokenizer, word
from reference import assert_same_text
from transformers import AutoModel, StopStringCriteria, TextIteratorStreamer, pipeline
from transformers.pipelines import base as pipelines

import hf_jetflow
from hf_jetflow import GenerationStats


EOS = 2


def generate(target, input_ids, head=None, **kwargs):
    torch.manual_seed(5)
    settings = dict(max_new_tokens=24, do_sample=False, assistant_model=head)
    return target.generate(input_ids, **{**settings, **kwargs})


@pytest.fixture
def tokenizer(target):
    return tiny_tokenizer(target.config.vocab_size)


# --- pipelines -------------------------------------------------------------------------------------------------------


QUESTION = " ".join(word(token) for token in (17, 200, 31, 44, 5))
CHAT = [{"role": "user", "content": QUESTION}]
SETTINGS = dict(max_new_tokens=24, do_sample=False)


@pytest.mark.parametrize("given", ["head", "folder"])
@pytest.mark.parametrize("asked", [QUESTION, CHAT, [QUESTION, QUESTION]], ids=["text", "chat", "list"])
def test_a_pipeline_takes_a_head_or_its_folder(given, asked, target, tokenizer, random_head, tmp_path):
    head = random_head(target)
    head.save_pretrained(tmp_path)
    plain = pipeline("text-generation", model=target, tokenizer=tokenizer)(asked, **SETTINGS)
    assistant = head if given == "head" else str(tmp_path)
    pipe = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=assistant)
    assert pipe(asked, **SETTINGS) == plain
    assert pipe.assistant_model.last_stats.num_drafted > 0
    assert (pipe.assistant_model is head) == (given == "head")
    assert not list(tmp_path.glob("*token*")), "this folder should hold no tokenizer"


def test_a_pipeline_samples_the_plain_text(target, tokenizer, random_head):
    texts = []
    for assistant in (None, random_head(target)):
        pipe = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=assistant)
        torch.manual_seed(5)
        texts.append(pipe(CHAT, max_new_tokens=24, do_sample=True))
    assert texts[0] == texts[1]


def test_a_pipeline_takes_a_head_with_each_call(target, tokenizer, random_head):
    pipe = pipeline("text-generation", model=target, tokenizer=tokenizer)
    head = random_head(target)
    assert pipe(QUESTION, assistant_model=head, **SETTINGS) == pipe(QUESTION, **SETTINGS)
    assert head.last_stats.num_drafted > 0


def test_a_pipeline_moves_a_head_that_it_loads_to_the_target(tiny_target, tokenizer, random_head, tmp_path):
    target = copy.deepcopy(tiny_target("llama")).to(torch.bfloat16)
    random_head(target).save_pretrained(tmp_path)
    pipe = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=str(tmp_path))
    assert pipe.assistant_model.dtype == torch.bfloat16
    assert pipe(QUESTION, **SETTINGS)


def test_other_assistants_of_a_pipeline_go_through_untouched(tiny_target, target, tokenizer, tmp_path, monkeypatch):
    small = tiny_target("llama", num_hidden_layers=2)
    small.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for assistant in (small, str(tmp_path)):
        pipe = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=assistant)
        assert type(pipe.assistant_model) is type(small)
    wrapped = pipelines.load_assistant_model
    hf_jetflow.disable()
    try:
        assert pipelines.load_assistant_model is wrapped.__wrapped__
    finally:
        hf_jetflow.enable()


def test_a_head_is_an_auto_model(target, random_head, tmp_path):
    head = random_head(target)
    head.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is type(head)


PAGE = (Path(__file__).resolve().parents[1] / "docs" / "chats.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), ids=itertools.count())
def test_the_page_on_chats_runs(code, target, tokenizer, random_head, tmp_path, monkeypatch):
    head = random_head(target)
    for model, name in ((target, "target"), (tokenizer, "target"), (head, "head")):
        model.save_pretrained(tmp_path / "org" / name)
    monkeypatch.chdir(tmp_path)
    inputs = tokenizer(QUESTION, return_tensors="pt", return_token_type_ids=False)
    exec(compile(code, "docs/chats.md", "exec"), dict(target=target, tokenizer=tokenizer, head=head, inputs=inputs))


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("do_sample", [False, True])
def test_text_is_streamed_out_of_a_thread(do_sample, target, tokenizer, random_head, prompt):
    head = random_head(target)
    pieces = []
    for assistant in (None, head):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        torch.manual_seed(5)
        settings = dict(max_new_tokens=24, do_sample=do_sample, streamer=streamer, assistant_model=assistant)
        thread = threading.Thread(target=target.generate, args=(prompt,), kwargs=settings)
        thread.start()
        pieces.append(list(streamer))
        thread.join()
    assert "".join(pieces[0])
    assert pieces[0] == pieces[1]
    assert head.last_stats.num_new_tokens == 24  # this thread generated nothing, so it sees the other's


@pytest.mark.any_release
@pytest.mark.parametrize(("family", "node_budget"), [("llama", "auto"), ("gemma3_text", 16)])
def test_threads_share_one_head(family, node_budget, tiny_target, random_head):
    """Prompts of different lengths, each answered several times, and plain ones beside."""
    target = tiny_target(family)
    head = random_head(target)
    head.generation_config.node_budget = node_budget
    prompts = [make_prompt(length, seed=length) for length in (3, 12, 30, 47)]
    plain = [generate(target, prompt) for prompt in prompts]

    def answer(index):
        assistant = None if index % 5 == 4 else head
        settings = dict(max_new_tokens=24 - index, do_sample=False, assistant_model=assistant)
        text = target.generate(prompts[index % 4], **settings)
        return text, head.last_stats.num_new_tokens if assistant is not None else None

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(answer, range(8)))
    for index, (text, num_new_tokens) in enumerate(answers):
        expected = plain[index % 4][:, : prompts[index % 4].shape[1] + 24 - index]
        assert_same_text(expected, text)
        assert num_new_tokens in (None, 24 - index), "these statistics are another thread's"
    assert target.config._attn_implementation == "sdpa"


def test_another_thread_reads_between_the_steps_of_a_hook(target, random_head, prompt, monkeypatch):
    """torch adds and removes a hook and its flags one after the other; a thread may call the target in between."""
    expected = generate(target, prompt)
    texts = []

    class Flags(OrderedDict):
        def read_elsewhere(self):
            with ThreadPoolExecutor(1) as pool:
                texts.append(pool.submit(generate, target, prompt).result())

        def __setitem__(self, hook, flag):
            self.read_elsewhere()
            super().__setitem__(hook, flag)

        def __delitem__(self, hook):
            super().__delitem__(hook)
            self.read_elsewhere()

    monkeypatch.setattr(target, "_forward_hooks_with_kwargs", Flags())
    texts.append(generate(target, prompt, random_head(target)))
    assert len(texts) == 3
    for text in texts:
        assert_same_text(expected, text)


def test_a_chat_may_move_between_threads(target, random_head, prompt):
    head = random_head(target)
    text, cache = prompt, None
    for seed in (9, 10):
        with ThreadPoolExecutor(1) as pool:
            settings = dict(return_dict_in_generate=True, past_key_values=cache)
            output = pool.submit(generate, target, text, head, **settings).result()
        assert_same_text(generate(target, text), output.sequences)
        text, cache = torch.cat([output.sequences, make_prompt(5, seed)], dim=1), output.past_key_values


def test_a_thread_that_generated_nothing_sees_the_latest_statistics(target, random_head):
    head = random_head(target)
    assert head.last_stats is None
    stats = GenerationStats()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(setattr, head, "last_stats", stats).result()
        assert head.last_stats is stats
        head.last_stats = own = GenerationStats()
        assert head.last_stats is own
        assert pool.submit(getattr, head, "last_stats").result() is stats


# --- evaluation loops ------------------------------------------------------------------------------------------------


def test_many_short_calls_of_an_evaluation(target, random_head):
    """Left padding to a multiple, stop strings, an EOS token, all lengths from one on; one head and its settings."""
    head, tokenizer = random_head(target), dotted_tokenizer(target.config.vocab_size)
    generator = torch.Generator().manual_seed(7)
    ends = set()
    with torch.inference_mode():
        for num_tokens in range(1, 25):
            length = int(torch.randint(1, 40, (), generator=generator))
            prompt = make_prompt(length, seed=num_tokens)
            plain = generate(target, prompt)
            text = plain[0, length:].tolist()
            stops = [f".{text[num_tokens // 2]}", f".{text[3]}.{text[4]}"]
            padding = -length % 8
            settings = dict(
                attention_mask=(torch.arange(length + padding) >= padding).long()[None],
                max_new_tokens=num_tokens,
                stop_strings=stops if num_tokens % 3 else None,
                tokenizer=tokenizer,
                eos_token_id=text[-num_tokens] if num_tokens % 2 else None,
                pad_token_id=0,
                do_sample=num_tokens % 4 == 0,
                use_cache=True,
            )
            padded = torch.cat([prompt.new_zeros(1, padding), prompt], dim=1)
            expected = generate(target, padded, **settings)
            assert_same_text(expected, generate(target, padded, head, **settings))
            assert head.last_stats.num_new_tokens == expected.shape[1] - length - padding
            ends.add(expected.shape[1] - length - padding == num_tokens)
    assert ends == {True, False}, "this loop should stop at the length and before it"


def test_stopping_criteria_of_the_caller_are_asked_in_a_loop(target, random_head, prompt):
    head, tokenizer = random_head(target), dotted_tokenizer(target.config.vocab_size)
    plain = generate(target, prompt)
    for index in (0, 3, 10):
        criterion = StopStringCriteria(tokenizer, f".{int(plain[0, 12 + index])}")
        expected = generate(target, prompt, stopping_criteria=[criterion])
        assert_same_text(expected, generate(target, prompt, head, stopping_criteria=[criterion]))
        assert expected.shape[1] <= 13 + index


# --- models that accelerate moves about ------------------------------------------------------------------------------


def split(target, folder):
    """The target's layers on the CPU and on disk, as `device_map` makes them."""
    devices = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    devices |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(target.config.num_hidden_layers)}
    return dispatch_model(target, devices, main_device="cpu", offload_dir=folder)


DISPATCHED = {
    "one device": lambda target, folder: dispatch_model(target, {"": "cpu"}, force_hooks=True),
    "cpu and disk": split,
    "all on disk": lambda target, folder: disk_offload(target, folder, execution_device="cpu"),
    "offloaded": lambda target, folder: cpu_offload(target, execution_device="cpu"),
}


@pytest.mark.parametrize(
    ("way", "kind", "do_sample"),
    [(way, "random", False) for way in DISPATCHED]
    + [("cpu and disk", "random", True), ("cpu and disk", "path", False)],
)
def test_a_dispatched_target_gives_the_plain_text(way, kind, do_sample, tiny_target, head_of_kind, prompt, tmp_path):
    plain_target = tiny_target("llama")
    plain = generate(plain_target, prompt, do_sample=do_sample)
    head = head_of_kind(kind, plain_target, plain)
    target = DISPATCHED[way](copy.deepcopy(plain_target), tmp_path)
    assert_same_text(plain, generate(target, prompt, do_sample=do_sample))
    assert_same_text(plain, generate(target, prompt, head, do_sample=do_sample))
    assert head.last_stats.num_drafted > 0


def test_a_target_is_loaded_over_a_device_map(tiny_target, random_head, prompt, tmp_path):
    plain_target = tiny_target("llama")
    plain_target.save_pretrained(tmp_path / "target")
    plain = generate(plain_target, prompt)
    target = type(plain_target).from_pretrained(tmp_path / "target", device_map="auto")
    assert_same_text(plain, generate(target, prompt, random_head(target)))
