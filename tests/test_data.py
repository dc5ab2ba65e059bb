"""Answers on disk, their order, anchors and stored features."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import answer, write_lines

from hf_jetflow.training.data import (
    AnchorCollator,
    AnswerDataset,
    EpochSampler,
    FeatureStore,
    frequent_tokens,
    read_answers,
)


def test_answers_are_read_from_their_files_when_indexed(tmp_path):
    first, second, third = answer("é", 2, 3), {**answer("two", 4, 4), "source": "web"}, answer("three", 1, 2)
    (tmp_path / "a.jsonl").write_text(f"\n{json.dumps(first, ensure_ascii=False)}\n\n{json.dumps(second)}\n")
    answers = read_answers([tmp_path / "a.jsonl", write_lines(tmp_path / "b.jsonl", third, end="")])
    assert list(answers) == [first, second, third]
    assert [answers[index] for index in (2, 0, -1)] == [third, first, third]
    with pytest.raises(IndexError):
        answers[3]
    assert (list(answers.num_prompt), list(answers.num_answer)) == ([2, 4, 1], [3, 4, 2])
    assert answers.sources == ["a", "web", "b"]


def test_answers_hold_no_token_ids_in_memory(tmp_path):
    answers = read_answers([write_lines(tmp_path / "a.jsonl", *(answer(str(n), 100, 900) for n in range(20)))])
    held = [part for part in vars(answers).values() if not isinstance(part, int | None)]
    assert sum(len(part) for part in held) <= 5 * 20 + 2


def test_an_answer_id_that_occurs_twice_is_named(tmp_path):
    paths = [write_lines(tmp_path / f"{name}.jsonl", answer("one", 2, 3)) for name in "ab"]
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1: the id 'one' occurs twice; remove or rename"):
        read_answers(paths)


def test_answers_without_ids_in_two_files_do_not_collide(tmp_path):
    records = [{key: answer("", size, 3)[key] for key in ("prompt_ids", "answer_ids")} for size in (2, 4)]
    paths = [write_lines(tmp_path / f"{name}.jsonl", record) for name, record in zip("ab", records, strict=True)]
    assert [len(record["prompt_ids"]) for record in read_answers(paths)] == [2, 4]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"answer_ids": "text"}, '`answer_ids`: expected a list of integers, got "text"; give token ids, or the conv'),
        ({"answer_ids": [1, 2.5]}, "`answer_ids`: expected a list of integers"),
        ({"answer_ids": [1, True]}, "`answer_ids`: expected a list of integers"),
        ({"prompt_ids": [1, [2]]}, "`prompt_ids`: expected a list of integers"),
        ({"prompt_ids": None}, "`prompt_ids`: expected a list of integers"),
        ({"prompt_ids": []}, "`prompt_ids`: expected at least one token, got none; remove the record"),
        ({"answer_ids": []}, "`answer_ids`: expected at least one token"),
        ({"answer_ids": [3, 20]}, "`answer_ids`: expected token ids from 0 to 19, as the target has, got 20"),
        ({"prompt_ids": [-1, 3]}, "`prompt_ids`: expected token ids from 0 to 19, as the target has, got -1"),
    ],
)
def test_a_bad_answer_is_named_with_file_and_line(tmp_path, change, cause):
    path = write_lines(tmp_path / "a.jsonl", answer("one", 2, 3), {**answer("two", 2, 3), **change})
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: ") as error:
        read_answers([path], vocab_size=20)
    assert cause in str(error.value)


def test_an_answer_without_token_ids_is_named(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"id": "one", "answer": "text"})
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: expected `prompt_ids` and `answer_ids`"):
        read_answers([path])


ANSWERS = [{"answer_ids": [7, 7, 7, 2, 2]}, {"answer_ids": [9, 2, 4]}]


def test_frequent_tokens_are_in_ascending_order():
    assert frequent_tokens(ANSWERS, 2).tolist() == [2, 7]


def test_frequent_tokens_include_the_required_ones():
    assert frequent_tokens(ANSWERS, 3, always=[50, 4]).tolist() in ([2, 4, 50], [4, 7, 50])


def test_a_draft_vocabulary_larger_than_the_answers_is_refused():
    with pytest.raises(
        ValueError, match="`--draft-vocab` is 5, but the answers hold only 4 different tokens; choose a smaller"
    ):
        frequent_tokens(ANSWERS, 5)


def test_the_dataset_skips_what_holds_no_anchor_and_reports_it():
    answers = [answer("good", 3, 2), answer("short", 3, 1), answer("long prompt", 9, 5), answer("cut", 8, 5)]
    dataset = AnswerDataset(answers, max_length=10)
    assert [len(item["ids"]) for item in dataset] == list(dataset.lengths) == [5, 10]
    assert dataset[1] == {"ids": list(range(1, 11)), "num_prompt": 8, "index": (1, 0, 0)}
    assert dataset.skipped == (
        "1 skipped, fewer than two answer tokens; 1 skipped, the prompt fills the 10 tokens of a sequence; "
        "1 cut at 10 tokens"
    )
    assert AnswerDataset(answers[:1], max_length=10).skipped == ""


def test_the_dataset_is_the_same_from_files_and_from_a_list(tmp_path):
    records = [answer("a", 3, 4), answer("b", 3, 1), {**answer("c", 2, 9), "source": "web"}]
    ours = AnswerDataset(read_answers([write_lines(tmp_path / "answers.jsonl", *records)]), 10)
    theirs = AnswerDataset(records, 10)
    assert (list(ours), ours.sources, ours.skipped) == (list(theirs), theirs.sources, theirs.skipped)
    assert list(ours.lengths) == list(theirs.lengths)


def make_dataset(*sources: str, seed: int = 0) -> AnswerDataset:
    lengths = torch.randint(2, 90, (len(sources),), generator=torch.Generator().manual_seed(seed)).tolist()
    records = [{**answer(str(n), 3, length), "source": sources[n]} for n, length in enumerate(lengths)]
    return AnswerDataset(records, max_length=100)


def epoch_of(sampler: EpochSampler, epoch: int) -> list[tuple[int, int, int]]:
    sampler.epoch = epoch
    places = list(sampler)
    assert len(places) == len(sampler) == len(set(places))
    assert {place[1] for place in places} == {epoch}
    return places


def test_every_epoch_holds_every_record_once_in_a_new_order():
    dataset = make_dataset(*["a"] * 23)
    orders = [epoch_of(EpochSampler(dataset, 4, seed, {}), epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert all(sorted(number for number, *_ in order) == list(range(23)) for order in orders)
    numbers = [[number for number, *_ in order] for order in orders]
    assert numbers[0] == numbers[3]
    assert numbers[0] != numbers[1] != numbers[2] != numbers[0]


def test_an_epoch_does_not_depend_on_those_before_it():
    sampler = EpochSampler(make_dataset(*["a"] * 23), 4, 0, {"a": 1.5})
    later = [epoch_of(sampler, epoch) for epoch in (0, 1, 2)][2]
    assert epoch_of(EpochSampler(make_dataset(*["a"] * 23), 4, 0, {"a": 1.5}), 2) == later


def test_batches_hold_similar_lengths_in_random_order():
    dataset = make_dataset(*["a"] * 402)
    lengths = [int(dataset.lengths[number]) for number, *_ in epoch_of(EpochSampler(dataset, 4, 0, {}), 0)]
    batches = [lengths[start : start + 4] for start in range(0, 402, 4)]
    assert len(batches[-1]) == 2
    padded = sum(len(batch) * max(batch) for batch in batches) / sum(lengths)
    assert padded < 1.1  # at random about 1.6
    longest = [max(batch) for batch in batches]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


def test_weights_say_how_often_records_of_a_source_occur():
    dataset = make_dataset(*["a"] * 10, *["b"] * 10, *["c"] * 10, *["d"] * 10)
    sampler = EpochSampler(dataset, 4, 0, {"a": 2.0, "b": 0.5, "c": 1.5})
    epochs = [epoch_of(sampler, epoch) for epoch in (0, 1)]
    assert [len(epoch) for epoch in epochs] == [20 + 5 + 15 + 10] * 2
    both = Counter(number for epoch in epochs for number, *_ in epoch)
    assert [{both[number] for number in range(start, start + 10)} for start in (0, 10, 20, 30)] == [{4}, {1}, {3}, {2}]
    chosen = sorted(number for number, *_ in epochs[0] if 10 <= number < 20)
    assert chosen != list(range(10, 15)), "the first half is no random half"


def test_a_source_with_a_small_weight_occurs_at_all():
    assert len(EpochSampler(make_dataset("a", "a", "b"), 2, 0, {"b": 0.1})) == 3


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"c": 2.0}, r"names 'c', but the sources are \['a', 'b'\]; use one of these names"),
        ({"a": 0.0}, "the weight of 'a' is 0.0, expected more than 0; remove what"),
        ({"a": float("nan")}, "the weight of 'a' is nan"),
    ],
)
def test_a_weight_that_fits_no_source_is_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        EpochSampler(make_dataset("a", "b"), 2, 0, weights)


def collate(num_anchors: int, *sizes: tuple[int, int], seed: int = 0) -> dict:
    dataset = AnswerDataset([answer(f"r{row}", *size) for row, size in enumerate(sizes)], max_length=100)
    return AnchorCollator(num_anchors, seed)(list(dataset))


def test_a_batch_is_padded_on_the_right_to_a_multiple():
    items = list(AnswerDataset([answer("r0", 3, 4), answer("r1", 2, 2)], max_length=100))
    batch = AnchorCollator(2, pad_to_multiple_of=4)(items)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 0], [1, 2, 3, 4, 0, 0, 0, 0]]
    assert batch["lengths"].tolist() == [7, 4]


def test_anchors_are_distinct_answer_tokens_with_a_successor_in_order():
    seen = set()
    for seed in range(50):
        anchors = collate(3, (4, 6), seed=seed)["anchors"][0].tolist()
        assert anchors == sorted(set(anchors))
        seen |= set(anchors)
    assert seen == {4, 5, 6, 7, 8}


def test_missing_anchors_are_marked_behind_the_others():
    assert collate(4, (3, 3), (2, 2), (1, 6))["anchors"][:2].tolist() == [[3, 4, -1, -1], [2, -1, -1, -1]]


def test_anchors_depend_only_on_the_seed_and_the_index():
    dataset = AnswerDataset([answer("one", 4, 60), answer("two", 4, 60)], max_length=100)

    def anchors(seed: int, *place: int) -> tuple[int, ...]:
        torch.randn(1)  # the global generator stands elsewhere each time
        return tuple(AnchorCollator(4, seed)([dataset[1], dataset[place]])["anchors"][1].tolist())

    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    draws = [anchors(*place) for place in places]
    assert len(set(draws)) == len(places)
    assert [anchors(*place) for place in places] == draws


class Killed(BaseException):
    pass


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


def test_a_killed_write_leaves_no_file_that_looks_complete(tmp_path, monkeypatch):
    def killed_save(tensors: dict, path: Path) -> None:
        path.write_bytes(b"half a file")
        raise Killed

    monkeypatch.setattr("hf_jetflow.training.data.save_file", killed_save)
    with pytest.raises(Killed):
        FeatureStore(Compute(), tmp_path).get(collate(2, (3, 4)))
    assert list(tmp_path.glob("*.safetensors")) == []


def test_features_of_a_record_that_was_cut_shorter_are_recomputed(tmp_path):
    records = [answer("one", 3, 9)]
    compute = Compute()
    for max_length in (6, 12, 6):
        batch = AnchorCollator(2)(list(AnswerDataset(records, max_length)))
        got = FeatureStore(compute, tmp_path).get(batch)
        assert_same_features(batch, got, Compute()(batch["input_ids"]))
    assert compute.num_sequences == 2


def test_features_of_other_tokens_under_the_same_id_are_not_mixed_up(tmp_path):
    for answer_ids in ([5, 6, 7], [8, 9, 7]):
        records = [{"id": "same", "prompt_ids": [1, 2], "answer_ids": answer_ids}]
        batch = AnchorCollator(1)(list(AnswerDataset(records, 16)))
        got = FeatureStore(Compute(), tmp_path).get(batch)
        assert_same_features(batch, got, Compute()(batch["input_ids"]))
