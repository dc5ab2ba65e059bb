"""Answers: written by the target with all that can interrupt it, or made elsewhere, tokenized and judged."""

import builtins
from pathlib import Path

import pytest
import torch
from helpers import answer, tiny_tokenizer, word, write_lines

from hf_jetflow.errors import JetFlowError
from hf_jetflow.jsonl import read_jsonl
from hf_jetflow.prompts import encode_chat
from hf_jetflow.training.answers import MAX_SURPRISE, regenerate_answers, surprise, with_token_ids
from hf_jetflow.training.data import read_answers


PROMPTS = [
    {
        "id": f"p{number}",
        "messages": [{"role": "user", "content": " ".join(word(20 + number + i) for i in range(length))}],
    }
    for number, length in enumerate([3, 9, 1, 6, 2, 12, 4])
]
NUM_NEW = 12


@pytest.fixture
def target(tiny_target):
    return tiny_target("llama")


@pytest.fixture
def tokenizer(target):
    """Its EOS is a token that the target writes early in some answers, not in all."""
    answers = [greedy_answer(target, encode_chat(tiny_tokenizer(257), prompt["messages"]), None) for prompt in PROMPTS]
    early = {token for ids in answers for token in ids[2:8]}
    eos_id = next(token for token in sorted(early) if not all(token in ids for ids in answers))
    return tiny_tokenizer(257, eos_id)


def greedy_answer(target, ids: list[int], eos_id: int | None) -> list[int]:
    """The answer to one prompt, alone and without padding."""
    generated = target.generate(torch.tensor([ids]), max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=eos_id)
    return generated[0, len(ids) :].tolist()


def regenerate(target, tokenizer, output: Path, **kwargs) -> dict[str, list[int]]:
    kwargs = {"batch_size": 3, "max_new_tokens": NUM_NEW, **kwargs}
    num_left_out = regenerate_answers(target, tokenizer, PROMPTS, output, **kwargs)
    records = list(read_jsonl(output))
    assert len({record["id"] for record in records}) == len(records), "an answer was written twice"
    assert num_left_out == len(PROMPTS) - len(records)
    return {record["id"]: record["answer_ids"] for record in records}


def test_regenerated_answers_are_those_of_greedy_generation_one_by_one(target, tokenizer, tmp_path):
    answers = regenerate(target, tokenizer, tmp_path / "deep" / "answers.jsonl")
    for prompt in PROMPTS:
        ids = encode_chat(tokenizer, prompt["messages"])
        assert answers[prompt["id"]] == greedy_answer(target, ids, tokenizer.eos_token_id)
    lengths = {len(ids) for ids in answers.values()}
    assert max(lengths) == NUM_NEW
    assert min(lengths) < NUM_NEW, "no answer met the EOS token: choose another one"


def test_answers_keep_their_eos_and_nothing_after_it(target, tokenizer, tmp_path):
    for ids in regenerate(target, tokenizer, tmp_path / "answers.jsonl").values():
        assert tokenizer.eos_token_id not in ids[:-1]
        assert len(ids) == NUM_NEW or ids[-1] == tokenizer.eos_token_id


def test_answers_carry_the_prompt_s_token_ids(target, tokenizer, tmp_path):
    regenerate(target, tokenizer, tmp_path / "answers.jsonl")
    prompts = {prompt["id"]: encode_chat(tokenizer, prompt["messages"]) for prompt in PROMPTS}
    assert {record["id"]: record["prompt_ids"] for record in read_answers([tmp_path / "answers.jsonl"])} == prompts


def test_without_any_eos_answers_have_full_length(target, tmp_path):
    answers = regenerate(target, tiny_tokenizer(257), tmp_path / "answers.jsonl")
    assert {len(ids) for ids in answers.values()} == {NUM_NEW}


def test_prompts_that_are_too_long_are_left_out(target, tokenizer, tmp_path):
    answers = regenerate(target, tokenizer, tmp_path / "answers.jsonl", max_prompt_tokens=9)
    assert sorted(answers) == ["p0", "p2", "p3", "p4", "p6"]


class Killed(BaseException):
    pass


class Report:
    """Records calls and lines; kills the run after some answers, of its own."""

    def __init__(self, kill_after: int | None = None):
        self.calls: list[int] = []
        self.said: list[str] = []
        self._kill_after = kill_after

    def __call__(self, done: int, total: int, what: str) -> None:
        assert (total, what) == (7, "answers")
        self.calls.append(done)
        if len(self.calls) - 1 == self._kill_after:
            raise Killed

    def say(self, text: str) -> None:
        self.said.append(text)


def test_progress_starts_at_once_and_counts_every_answer(target, tokenizer, tmp_path):
    report = Report()
    regenerate(target, tokenizer, tmp_path / "answers.jsonl", report=report)
    assert (report.calls, report.said) == (list(range(8)), [])


@pytest.mark.parametrize("num_written", [1, 2, 4])
def test_a_killed_run_loses_no_finished_answer_and_says_what_it_continues_from(
    target, tokenizer, tmp_path, num_written
):
    whole = regenerate(target, tokenizer, tmp_path / "whole" / "answers.jsonl")
    lines = (tmp_path / "whole" / "answers.jsonl").read_bytes().splitlines(True)
    output = tmp_path / "answers.jsonl"
    with pytest.raises(Killed):
        regenerate(target, tokenizer, output, report=Report(num_written))
    assert output.read_bytes() == b"".join(lines[:num_written])
    report = Report()
    assert regenerate(target, tokenizer, output, report=report) == whole
    assert output.read_bytes() == b"".join(lines)
    assert report.calls == list(range(num_written, 8))
    assert report.said == [f"continuing: {num_written} of 7 answers are in {output}"]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"max_new_tokens": 5}, "`max_new_tokens` was 12 and is 5"),
        ({}, {"temperature": 1.0}, "`temperature` was 0.0 and is 1.0"),
        ({"temperature": 1.0}, {"temperature": 1.0, "seed": 4}, "`seed` was 0 and is 4"),
        ({"temperature": 1.0}, {"temperature": 1.0, "batch_size": 4}, "`batch_size` was 3 and is 4"),
    ],
)
def test_answers_of_other_settings_are_not_mixed(target, tokenizer, tmp_path, first, second, message):
    output = tmp_path / "answers.jsonl"
    with pytest.raises(Killed):
        regenerate(target, tokenizer, output, **first, report=Report(2))
    before = output.read_bytes()
    with pytest.raises(JetFlowError, match=f"{message}; use the same settings to finish it, or delete the file"):
        regenerate(target, tokenizer, output, **second)
    assert output.read_bytes() == before
    output.unlink()
    regenerate(target, tokenizer, output, **second)


def test_greedy_answers_continue_with_another_batch_size_and_seed(target, tokenizer, tmp_path):
    output = tmp_path / "answers.jsonl"
    with pytest.raises(Killed):
        regenerate(target, tokenizer, output, report=Report(2))
    regenerate(target, tokenizer, output, batch_size=2, seed=4)


@pytest.mark.parametrize("kept", [0, 1, 40, -2, -1], ids=lambda kept: f"half a line of {kept}")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_killed_run_is_continued_without_loss_or_duplicates(target, tokenizer, tmp_path, kept, temperature):
    whole = regenerate(target, tokenizer, tmp_path / "whole.jsonl", temperature=temperature)
    output = tmp_path / "answers.jsonl"
    with pytest.raises(Killed):
        regenerate(target, tokenizer, output, temperature=temperature, report=Report(3))
    lines = output.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    output.write_text("".join(lines[:-1]) + lines[-1][:kept])  # -1: all of the line but its newline
    assert regenerate(target, tokenizer, output, temperature=temperature) == whole


def test_sampled_answers_follow_the_seed_and_the_temperature_alone(target, tokenizer, tmp_path):
    def sample(**kwargs) -> dict[str, list[int]]:
        torch.randn(1)  # the global generator stands elsewhere each time
        return regenerate(target, tokenizer, tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl", **kwargs)

    greedy, first = sample(), sample(temperature=1.0)
    assert sample(temperature=1.0) == first != greedy
    assert sample(temperature=1.0, seed=1) != first
    assert sample(temperature=1e-3) == greedy


def test_batches_are_seeded_apart(target, tokenizer, tmp_path):
    prompts = [{**PROMPTS[0], "id": str(number)} for number in range(2)]
    regenerate_answers(target, tokenizer, prompts, tmp_path / "a.jsonl", batch_size=1, temperature=3.0)
    first, second = read_answers([tmp_path / "a.jsonl"])
    assert first["answer_ids"] != second["answer_ids"]


def test_regeneration_leaves_the_global_generator_alone(target, tokenizer, tmp_path):
    before = torch.get_rng_state()
    regenerate(target, tokenizer, tmp_path / "answers.jsonl", temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_negative_temperature_is_refused(target, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"temperature is -1, expected 0 \(greedy\) or more"):
        regenerate(target, tokenizer, tmp_path / "answers.jsonl", temperature=-1)


def test_answers_carry_the_source_of_their_prompt(target, tokenizer, tmp_path):
    prompts = [{**PROMPTS[0], "source": "web"}, PROMPTS[1]]
    regenerate_answers(target, tokenizer, prompts, tmp_path / "own.jsonl", max_new_tokens=2)
    assert sorted(read_answers([tmp_path / "own.jsonl"]).sources) == ["own", "web"]


class FullDisk:
    """Files that are opened for appending take `room` more characters, all of them together."""

    def __init__(self, room: int):
        self.room = room

    def open(self, path, mode="r", **kwargs):
        file = builtins.open(path, mode, **kwargs)  # noqa: SIM115
        if mode == "a":
            file.writelines = lambda lines: self.write(file, "".join(lines))
        return file

    def write(self, file, text: str) -> None:
        file.write(text[: self.room])
        self.room -= len(text)
        if self.room < 0:
            raise OSError(28, "No space left on device")


@pytest.mark.parametrize("room", [0, 250, 800])
def test_a_full_disk_loses_nothing(target, tokenizer, tmp_path, monkeypatch, room):
    whole = regenerate(target, tokenizer, tmp_path / "whole.jsonl", temperature=1.0)
    output = tmp_path / "answers.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("hf_jetflow.jsonl.open", FullDisk(room).open, raising=False)
        with pytest.raises(
            JetFlowError, match=r"answers\.jsonl cannot be written \(No space left .*run the same command again"
        ):
            regenerate(target, tokenizer, output, temperature=1.0)
    assert output.stat().st_size == room
    assert regenerate(target, tokenizer, output, temperature=1.0) == whole


def test_a_finished_run_is_left_as_it_is(target, tokenizer, tmp_path):
    output = tmp_path / "answers.jsonl"
    regenerate(target, tokenizer, output)
    before = output.read_bytes()
    regenerate(target, tokenizer, output, report=Report(0))
    assert output.read_bytes() == before


ROLES = (
    "{% for message in messages %}{% if message.role == 'assistant' %}t005 {{ message.content }} t002 t009 "
    "{% else %}t003 {{ message.content }} t004 {% endif %}{% endfor %}{% if add_generation_prompt %}t005{% endif %}"
)


@pytest.fixture
def chat_tokenizer():
    """Its template marks roles, and sets the word t009 behind the EOS t002 of an answer."""
    tokenizer = tiny_tokenizer(257, eos_id=2)
    tokenizer.chat_template = ROLES
    return tokenizer


def conversation(*texts: str, **more) -> dict:
    roles = ["user", "assistant"] * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)], **more}


def test_conversations_become_answers_once(target, chat_tokenizer, tmp_path):
    path = write_lines(
        tmp_path / "chats.jsonl",
        conversation("t020", "t030 t031"),
        conversation("t020", "t030", "t021", "t032", id=7, source="web"),
    )
    output = with_token_ids(path, target, chat_tokenizer, tmp_path / "run" / "tokenized")
    assert list(read_jsonl(output)) == [
        {"id": "chats-1", "source": "chats", "prompt_ids": [3, 20, 4, 5], "answer_ids": [30, 31, 2]},
        {"id": "7", "source": "web", "prompt_ids": [3, 20, 4, 5, 30, 2, 9, 3, 21, 4, 5], "answer_ids": [32, 2]},
    ]
    changed = output.stat().st_mtime_ns
    assert with_token_ids(path, target, chat_tokenizer, output.parent) == output
    assert output.stat().st_mtime_ns == changed
    write_lines(path, conversation("t020", "t030"))
    assert len(read_answers([with_token_ids(path, target, chat_tokenizer, output.parent)])) == 1


def test_the_answer_is_tokenized_apart_where_its_start_merges_with_the_prompt(target, chat_tokenizer, tmp_path):
    chat_tokenizer.chat_template = ROLES.replace("t005 {{", "t005{{")  # one word for the tokenizer: unknown, 1
    path = write_lines(tmp_path / "a.jsonl", conversation("t020", "t030 t031"))
    (record,) = read_answers([with_token_ids(path, target, chat_tokenizer, tmp_path)])
    assert (record["prompt_ids"], record["answer_ids"]) == ([3, 20, 4, 5], [30, 31, 2])


def test_a_file_of_token_ids_is_taken_as_it_is(target, chat_tokenizer, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", answer("one", 2, 3))
    assert with_token_ids(path, target, chat_tokenizer, tmp_path) == path


@pytest.mark.parametrize(
    ("record", "template", "cause"),
    [
        (conversation("t020", "t030", "t021"), ROLES, "expected `messages` that end in an assistant's turn"),
        (answer("one", 2, 3), ROLES, "expected `messages` that end in an assistant's turn"),
        ({"messages": "text"}, ROLES, "expected `messages` that end in an assistant's turn"),
        ({"messages": [{"role": "assistant", "content": "t030"}]}, ROLES, "expected `messages` that end"),
        (
            conversation("t020", "t030", "t021", "t022"),
            "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}" + ROLES,
            "the chat template refuses the messages (too long); correct the line",
        ),
        (
            conversation("t020", "t030", "t021", "t022"),
            "{% if messages | length == 4 %}t006 {% endif %}" + ROLES,
            "does not render this answer directly behind its generation prompt; give `prompt_ids`",
        ),
    ],
)
def test_a_bad_conversation_is_named_and_nothing_half_done_is_kept(
    target, chat_tokenizer, tmp_path, record, template, cause
):
    chat_tokenizer.chat_template = template
    path = write_lines(tmp_path / "a.jsonl", conversation("t020", "t030"), record)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a\.jsonl, line 2: ") as error:
            with_token_ids(path, target, chat_tokenizer, tmp_path / "run")
        assert cause in str(error.value)


def own_answers(target, tokenizer, folder: Path, temperature: float) -> list[dict]:
    regenerate_answers(target, tokenizer, PROMPTS, folder / "a.jsonl", max_new_tokens=64, temperature=temperature)
    return list(read_answers([folder / "a.jsonl"]))


@pytest.mark.parametrize(("temperature", "low", "high"), [(0.0, -5, -0.2), (1.0, -0.2, 0.2), (4.0, 0.5, 20)])
def test_answers_surprise_the_target_the_more_the_hotter_they_were_sampled(target, tmp_path, temperature, low, high):
    answers = own_answers(target, tiny_tokenizer(257), tmp_path, temperature)
    assert low < surprise(target, answers, 512) < high


def test_answers_of_another_model_surprise_the_target(target, tiny_target, tmp_path):
    answers = own_answers(tiny_target("qwen3"), tiny_tokenizer(257), tmp_path, 0.0)
    assert surprise(target, answers, 512) > MAX_SURPRISE


@torch.no_grad()
def test_surprise_is_the_likelihood_less_the_entropy_of_the_answer_s_tokens(target):
    record = answer("one", 4, 6)
    log_probs = target(torch.tensor([record["prompt_ids"] + record["answer_ids"]])).logits[0, 3:-1].log_softmax(-1)
    figures = [
        float(-row[token] + (row.exp() * row).sum())
        for row, token in zip(log_probs, record["answer_ids"], strict=True)
    ]
    assert surprise(target, [record], 512) == pytest.approx(sum(figures) / 6, rel=1e-4)
    assert surprise(target, [record], 6) == pytest.approx(sum(figures[:2]) / 2, rel=1e-4)
    assert surprise(target, [record], 3) == 0
