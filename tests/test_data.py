"""Prompts, regenerated answers, anchors and stored features."""

import json
from pathlib import Path

import pytest
import torch
from helpers import tiny_tokenizer, word

from hf_jetflow.data import (
    AnchorCollator,
    AnswerDataset,
    FeatureStore,
    encode_chat,
    frequent_tokens,
    read_answers,
    read_jsonl,
    read_prompts,
    regenerate_answers,
)


def write_lines(path: Path, *records: object, end: str = "\n") -> Path:
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records) + end)
    return path


def answer(record_id: str, num_prompt: int, num_answer: int) -> dict:
    ids = list(range(1, 1 + num_prompt + num_answer))
    return {"id": record_id, "prompt_ids": ids[:num_prompt], "answer_ids": ids[num_prompt:]}


def test_json_lines_are_read_in_order_and_blank_lines_skipped(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"x": 1}, "", {"x": 2})
    assert list(read_jsonl(path)) == [{"x": 1}, {"x": 2}]


def test_a_cut_off_last_line_is_left_out(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"x": 1}, '{"x": ', end="")
    assert list(read_jsonl(path)) == [{"x": 1}]


def test_a_complete_last_line_without_newline_is_read(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"x": 1}, {"x": 2}, end="")
    assert list(read_jsonl(path)) == [{"x": 1}, {"x": 2}]


def test_a_bad_line_is_named_with_file_and_number(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"x": 1}, "{'x': 2}", {"x": 3})
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not valid JSON .*; repair or remove the line"):
        list(read_jsonl(path))


def test_a_line_that_holds_no_object_is_named(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"x": 1}, [1, 2])
    with pytest.raises(ValueError, match=r"line 2: holds a list, but an object is needed"):
        list(read_jsonl(path))


def test_prompts_are_read_from_messages_turns_and_prompt(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = write_lines(
        tmp_path / "a.jsonl", {"id": 7, "messages": messages}, {"turns": ["first", "second"]}, {"prompt": "text"}
    )
    assert read_prompts([path]) == [
        {"id": "7", "messages": messages},
        {"id": "a-2", "messages": [{"role": "user", "content": "first"}]},
        {"id": "a-3", "messages": [{"role": "user", "content": "text"}]},
    ]


def test_a_prompt_without_text_is_named(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "x"}, {"text": "y"})
    with pytest.raises(ValueError, match=r"record 2: needs `messages`, `turns` or `prompt`, has \['text'\]"):
        read_prompts([path])


def test_a_prompt_id_that_occurs_twice_is_named(tmp_path):
    paths = [write_lines(tmp_path / name, {"id": "one", "prompt": name}) for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(ValueError, match=r"b\.jsonl, record 1: the id 'one' occurs twice"):
        read_prompts(paths)


def test_of_two_answers_with_one_id_the_first_is_kept(tmp_path):
    first, second = answer("one", 2, 3), answer("one", 4, 4)
    paths = [write_lines(tmp_path / "a.jsonl", first), write_lines(tmp_path / "b.jsonl", second, answer("two", 1, 2))]
    assert read_answers(paths) == [first, answer("two", 1, 2)]


def test_answers_without_ids_do_not_displace_those_of_another_file(tmp_path):
    records = [{key: answer("", size, 3)[key] for key in ("prompt_ids", "answer_ids")} for size in (2, 4)]
    paths = [write_lines(tmp_path / f"{name}.jsonl", record) for name, record in zip("ab", records, strict=True)]
    assert [len(record["prompt_ids"]) for record in read_answers(paths)] == [2, 4]


def test_an_answer_without_token_ids_is_named(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"id": "one", "answer": "text"})
    with pytest.raises(ValueError, match=r"a\.jsonl, record 1: needs `prompt_ids` and `answer_ids`"):
        read_answers([path])


def test_a_conversation_is_encoded_by_the_chat_template():
    messages = [{"role": "user", "content": "t009 t008"}]
    assert encode_chat(tiny_tokenizer(20), messages) == [3, 9, 8, 4, 5]


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
    regenerate_answers(target, tokenizer, PROMPTS, output, **kwargs)
    records = list(read_jsonl(output))
    assert len({record["id"] for record in records}) == len(records), "an answer was written twice"
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


def test_progress_is_told_after_every_batch(target, tokenizer, tmp_path):
    calls = []
    regenerate(target, tokenizer, tmp_path / "answers.jsonl", progress=lambda *call: calls.append(call))
    assert calls == [(3, 7), (6, 7), (7, 7)]


class Killed(BaseException):
    pass


def kill(*_: int) -> None:
    raise Killed


@pytest.mark.parametrize("kept", [0, 1, 40, -2, -1], ids=lambda kept: f"half a line of {kept}")
def test_a_killed_run_is_continued_without_loss_or_duplicates(target, tokenizer, tmp_path, kept):
    whole = regenerate(target, tokenizer, tmp_path / "whole.jsonl")
    output = tmp_path / "answers.jsonl"
    with pytest.raises(Killed):
        regenerate(target, tokenizer, output, progress=kill)
    lines = output.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    output.write_text("".join(lines[:-1]) + lines[-1][:kept])  # -1: all of the line but its newline
    assert regenerate(target, tokenizer, output) == whole


def test_a_finished_run_is_left_as_it_is(target, tokenizer, tmp_path):
    output = tmp_path / "answers.jsonl"
    regenerate(target, tokenizer, output)
    before = output.read_bytes()
    regenerate(target, tokenizer, output, progress=kill)
    assert output.read_bytes() == before


ANSWERS = [{"answer_ids": [7, 7, 7, 2, 2]}, {"answer_ids": [9, 2, 4]}]


def test_frequent_tokens_are_the_commonest_in_ascending_order():
    assert frequent_tokens(ANSWERS, 2).tolist() == [2, 7]


def test_frequent_tokens_hold_those_that_must_be_there():
    assert frequent_tokens(ANSWERS, 3, always=[50, 4]).tolist() in ([2, 4, 50], [4, 7, 50])


def test_fewer_tokens_than_asked_for_are_an_error():
    with pytest.raises(ValueError, match="hold 4 different tokens, fewer than the draft vocabulary of 5"):
        frequent_tokens(ANSWERS, 5)


def test_the_dataset_leaves_out_what_holds_no_anchor():
    answers = [answer("good", 3, 2), answer("short", 3, 1), answer("long prompt", 9, 5), answer("cut", 8, 5)]
    dataset = AnswerDataset(answers, max_length=10)
    assert [len(item["ids"]) for item in dataset] == [5, 10]
    assert dataset[1] == {"ids": list(range(1, 11)), "num_prompt": 8}


def collate(num_anchors: int, *sizes: tuple[int, int]) -> dict:
    dataset = AnswerDataset([answer(f"r{row}", *size) for row, size in enumerate(sizes)], max_length=100)
    return AnchorCollator(num_anchors)(list(dataset))


def test_a_batch_is_padded_on_the_right_to_a_multiple():
    items = list(AnswerDataset([answer("r0", 3, 4), answer("r1", 2, 2)], max_length=100))
    batch = AnchorCollator(2, pad_to_multiple_of=4)(items)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 0], [1, 2, 3, 4, 0, 0, 0, 0]]
    assert batch["lengths"].tolist() == [7, 4]


def test_anchors_are_distinct_answer_tokens_with_a_successor_in_order():
    seen = set()
    for _ in range(50):
        anchors = collate(3, (4, 6))["anchors"][0].tolist()
        assert anchors == sorted(set(anchors))
        seen |= set(anchors)
    assert seen == {4, 5, 6, 7, 8}


def test_missing_anchors_are_marked_behind_the_others():
    assert collate(4, (3, 3), (2, 2), (1, 6))["anchors"][:2].tolist() == [[3, 4, -1, -1], [2, -1, -1, -1]]


def test_anchors_follow_the_seed():
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(collate(4, (4, 60))["anchors"].tolist())
    assert draws[0] == draws[1] != draws[2]


class Compute:
    """Features that tell the token and its place; counts the sequences it is given."""

    def __init__(self):
        self.num_sequences = 0

    def __call__(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.num_sequences += len(input_ids)
        places = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return torch.stack([input_ids, places], dim=-1).float(), (input_ids * 10 + places)[..., None].bfloat16()


def assert_same_features(batch: dict, got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        for row, length in enumerate(batch["lengths"].tolist()):
            assert torch.equal(ours[row, :length], theirs[row, :length])


def test_features_from_disk_equal_those_computed_online(tmp_path):
    batch = collate(2, (3, 4), (2, 2), (5, 9))
    online = FeatureStore(Compute(), None).get(batch)
    store = FeatureStore(Compute(), tmp_path / "features")
    assert_same_features(batch, store.get(batch), online)
    assert_same_features(batch, store.get(batch), online)


def test_features_are_computed_once(tmp_path):
    batch = collate(2, (3, 4), (2, 2))
    compute = Compute()
    for _ in range(2):  # another run is another store
        FeatureStore(compute, tmp_path).get(batch)
    assert compute.num_sequences == 2


def test_only_missing_features_are_computed_after_a_killed_run(tmp_path):
    batch = collate(2, (3, 4), (2, 2), (5, 9))
    FeatureStore(Compute(), tmp_path).get(batch)
    next(tmp_path.glob("*.safetensors")).unlink()
    (tmp_path / "some.123.partial").write_bytes(b"half a file")
    compute = Compute()
    got = FeatureStore(compute, tmp_path).get(batch)
    assert compute.num_sequences == 1
    assert_same_features(batch, got, Compute()(batch["input_ids"]))


def test_a_killed_write_leaves_no_file_that_looks_whole(tmp_path, monkeypatch):
    def killed_save(tensors: dict, path: Path) -> None:
        path.write_bytes(b"half a file")
        raise Killed

    monkeypatch.setattr("hf_jetflow.data.save_file", killed_save)
    with pytest.raises(Killed):
        FeatureStore(Compute(), tmp_path).get(collate(2, (3, 4)))
    assert list(tmp_path.glob("*.safetensors")) == []


def test_features_of_a_record_that_was_cut_shorter_are_computed_anew(tmp_path):
    records = [answer("one", 3, 9)]
    compute = Compute()
    for max_length in (6, 12, 6):
        batch = AnchorCollator(2)(list(AnswerDataset(records, max_length)))
        got = FeatureStore(compute, tmp_path).get(batch)
        assert_same_features(batch, got, Compute()(batch["input_ids"]))
    assert compute.num_sequences == 2


def test_features_of_other_tokens_under_the_same_record_id_are_not_mixed_up(tmp_path):
    for answer_ids in ([5, 6, 7], [8, 9, 7]):
        records = [{"id": "same", "prompt_ids": [1, 2], "answer_ids": answer_ids}]
        batch = AnchorCollator(1)(list(AnswerDataset(records, 16)))
        got = FeatureStore(Compute(), tmp_path).get(batch)
        assert_same_features(batch, got, Compute()(batch["input_ids"]))
