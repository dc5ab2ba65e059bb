"""Training data: the target's answers, their order, random anchors and target features.

Answers are stored as JSON lines of token ids, features as one safetensors file per answer. A killed run continues with
both. Order and anchors depend only on the seed, the epoch and the record, never on the state of a random generator.
"""

import hashlib
import json
import os
import sys
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from ..errors import JetFlowError
from ..files import atomic_write
from ..head.configuration_jetflow import JetFlowConfig
from ..jsonl import numbered_records, shown


class Answers:
    """
    Answers in JSON lines files. Only their offsets and lengths are in memory; a record is read when it is indexed.

    Items are `{"id", "prompt_ids", "answer_ids", ...}`, as in the file.

    Args:
        vocab_size (`int`, *optional*): Vocabulary size of the target; larger ids are refused.

    Attributes:
        files (`list[Path]`), starts (`list[int]`): The files, and the index of the first answer of each.
        num_prompt, num_answer (`array`): Tokens of each prompt and each answer.
        sources (`list[str]`): The field `source` of each, or else the name of its file without the suffix.
    """

    def __init__(self, vocab_size: int | None = None):
        self.files: list[Path] = []
        self.starts: list[int] = []
        self.num_prompt, self.num_answer = array("i"), array("i")
        self.sources: list[str] = []
        self._vocab_size = vocab_size
        self._offsets = array("q")
        self._ids: set[str] = set()

    def add(self, path: str | os.PathLike) -> None:
        """
        Add the records of a file.

        Raises:
            JetFlowError: If a record has no token ids, or some outside the vocabulary, or an id occurs twice.
        """
        path = Path(path)
        self.files.append(path)
        self.starts.append(len(self))
        for number, (line, offset, record) in enumerate(numbered_records(path), 1):
            where = f"{path}, line {line}"
            if not {"prompt_ids", "answer_ids"} <= record.keys():
                raise JetFlowError(
                    f"{where}: expected `prompt_ids` and `answer_ids`, got {sorted(record)}; give token ids in all "
                    "records or `messages` in all, and prompts without answers with `--prompts`"
                )
            for key in ("prompt_ids", "answer_ids"):
                _check_token_ids(record[key], f"{where}: `{key}`", self._vocab_size)
            answer_id = str(record.get("id", f"{path.stem}-{number}"))
            if answer_id in self._ids:
                raise JetFlowError(f"{where}: the id {answer_id!r} occurs twice; remove or rename one of the records")
            self._ids.add(answer_id)
            self._offsets.append(offset)
            self.num_prompt.append(len(record["prompt_ids"]))
            self.num_answer.append(len(record["answer_ids"]))
            self.sources.append(sys.intern(str(record.get("source", path.stem))))

    def __len__(self) -> int:
        return len(self.num_answer)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        with open(self.files[bisect_right(self.starts, index) - 1], "rb") as file:
            file.seek(self._offsets[index])
            return json.loads(file.readline())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


def _check_token_ids(ids: Any, what: str, vocab_size: int | None) -> None:
    if not isinstance(ids, list) or set(map(type, ids)) - {int}:
        raise JetFlowError(
            f"{what}: expected a list of integers, got {shown(ids)}; give token ids, or the conversation as `messages`"
        )
    if not ids:
        raise JetFlowError(f"{what}: expected at least one token, got none; remove the record")
    if min(ids) < 0 or (vocab_size is not None and max(ids) >= vocab_size):
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise JetFlowError(
            f"{what}: expected token ids from 0 to {(vocab_size or 0) - 1}, as the target has, got {wrong}; tokenize "
            "the answers for this target: regenerate them, or give them as `messages`"
        )


def read_answers(paths: Sequence[str | os.PathLike], vocab_size: int | None = None) -> Answers:
    """The answers of some files; for the errors see `Answers.add`."""
    answers = Answers(vocab_size)
    for path in paths:
        answers.add(path)
    return answers


def derived_seed(*facts: int | str) -> int:
    """A seed that depends on all the facts."""
    return int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:4], "big")


def frequent_tokens(answers: Iterable[dict[str, Any]], size: int, always: Sequence[int] = ()) -> torch.Tensor:
    """The `size` most frequent answer tokens, those of `always` first, ascending: the `d2t` of a draft vocabulary."""
    counts: Counter[int] = Counter()
    for answer in answers:
        counts.update(answer["answer_ids"])
    for token in always:
        counts[token] += sum(counts.values())
    chosen = [token for token, _ in counts.most_common(size)]
    if len(chosen) < size:
        raise JetFlowError(
            f"`--draft-vocab` is {size}, but the answers hold only {len(chosen)} different tokens; choose a smaller "
            "size, or give more answers"
        )
    return torch.tensor(sorted(chosen))


class AnswerDataset(Dataset):
    """
    Answers long enough to hold one anchor and one drafted token, cut at `max_length` tokens.

    Indexed by a record's number, or by (number, epoch, copy), so that each occurrence gets its own anchors.

    Attributes:
        lengths (`np.ndarray`), sources (`list[str]`): Tokens and source of each.
        skipped (`str`): How many answers were skipped or cut, and why; empty if none.
    """

    def __init__(self, answers: Answers | Sequence[dict[str, Any]], max_length: int):
        if isinstance(answers, Answers):
            num_prompt, num_answer = np.array(answers.num_prompt), np.array(answers.num_answer)
            sources = answers.sources
        else:
            num_prompt, num_answer = (
                np.array([len(record[key]) for record in answers], dtype=int) for key in ("prompt_ids", "answer_ids")
            )
            sources = [record.get("source", "answers") for record in answers]
        is_short, is_long = num_answer < 2, num_prompt + 2 > max_length
        self._answers, self._max_length = answers, max_length
        self._used = np.flatnonzero(~is_short & ~is_long)
        lengths = (num_prompt + num_answer)[self._used]
        self.lengths = lengths.clip(max=max_length)
        self.sources = [sources[index] for index in self._used]
        counts = {
            "skipped, fewer than two answer tokens": int(is_short.sum()),
            f"skipped, the prompt fills the {max_length} tokens of a sequence": int((is_long & ~is_short).sum()),
            f"cut at {max_length} tokens": int((lengths > max_length).sum()),
        }
        self.skipped = "; ".join(f"{count} {what}" for what, count in counts.items() if count)

    def __len__(self) -> int:
        return len(self._used)

    def __getitem__(self, index: int | tuple[int, int, int]) -> dict[str, Any]:
        index = (index, 0, 0) if isinstance(index, int) else index
        record = self._answers[int(self._used[index[0]])]
        ids = (record["prompt_ids"] + record["answer_ids"])[: self._max_length]
        return {"ids": ids, "num_prompt": len(record["prompt_ids"]), "index": index}


def check_weights(weights: Mapping[str, float], sources: Iterable[str]) -> None:
    """
    Raises:
        JetFlowError: If a weight is not above 0, or its name is none of the sources.
    """
    for name, weight in weights.items():
        if name not in (known := sorted(set(sources))):
            raise JetFlowError(f"`--weights` names {name!r}, but the sources are {known}; use one of these names")
        if not 0 < weight < float("inf"):
            raise JetFlowError(f"the weight of {name!r} is {weight}, expected more than 0; remove what is not wanted")


class EpochSampler(Sampler):
    """
    The indices (number, epoch, copy) of one epoch in random order, with similar lengths in a batch.

    They depend only on the seed and on `epoch`, which the owner sets before each epoch.

    Args:
        batch_size (`int`): Sequences per micro-batch, over all processes.
        weights (`dict[str, float]`): How often the records of a source occur per epoch; 1 for sources not named. With
            a fraction the records take turns: with 0.5, each occurs every second epoch.
    """

    POOL = 50  # random batches that are sorted by length together

    def __init__(self, dataset: AnswerDataset, batch_size: int, seed: int, weights: Mapping[str, float]):
        check_weights(weights, dataset.sources)
        self.epoch = 0
        self._lengths, self._batch_size, self._seed = torch.from_numpy(dataset.lengths), batch_size, seed
        by_source: dict[str, list[int]] = defaultdict(list)
        for number, source in enumerate(dataset.sources):
            by_source[source].append(number)
        self._shares = []
        for source, numbers in by_source.items():
            whole, part = divmod(weights.get(source, 1.0), 1)
            turns = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(derived_seed(seed, source)))
            num_turns = round(part * len(numbers)) if whole else max(round(part * len(numbers)), 1)
            self._shares.append((torch.tensor(numbers)[turns], int(whole), num_turns))

    def __len__(self) -> int:
        return sum(whole * len(numbers) + num_turns for numbers, whole, num_turns in self._shares)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        epoch = self.epoch
        drawn, copies = [], []
        for numbers, whole, num_turns in self._shares:
            turn = (torch.arange(num_turns) + epoch * num_turns) % len(numbers)
            drawn += [numbers] * whole + [numbers[turn]]
            copies += [torch.full_like(numbers, copy) for copy in range(whole)] + [torch.full_like(turn, whole)]
        numbers, copy_of = torch.cat(drawn), torch.cat(copies)
        generator = torch.Generator().manual_seed(derived_seed(self._seed, epoch))
        batches: list[torch.Tensor] = []
        for pool in torch.randperm(len(numbers), generator=generator).split(self.POOL * self._batch_size):
            by_length = self._lengths[numbers[pool]].argsort(descending=True, stable=True)
            batches += pool[by_length].split(self._batch_size)
        num_full = len(numbers) // self._batch_size  # a smaller batch comes last
        shuffled = [batches[index] for index in torch.randperm(num_full, generator=generator)]
        for drawn_index in torch.cat([*shuffled, *batches[num_full:]]):
            yield int(numbers[drawn_index]), epoch, int(copy_of[drawn_index])


@dataclass
class AnchorCollator:
    """
    Pads sequences on the right and draws random anchors among the answer tokens (arXiv 2606.18394, section 3.3).

    They depend only on the seed and the item's index.
    """

    num_anchors: int
    seed: int = 0
    pad_token_id: int = 0
    pad_to_multiple_of: int = 64  # few different shapes: kernels are compiled once

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """`input_ids` (batch, seq), `lengths` (batch,), `anchors` (batch, num_anchors), -1 for a missing one."""
        longest = max(len(item["ids"]) for item in items)
        longest = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = torch.full((len(items), longest), self.pad_token_id)
        anchors = torch.full((len(items), self.num_anchors), -1)
        for row, item in enumerate(items):
            length = len(item["ids"])
            input_ids[row, :length] = torch.tensor(item["ids"])
            # An anchor is an answer token with a successor; drawn without replacement.
            generator = torch.Generator().manual_seed(derived_seed(self.seed, *item["index"]))
            order = torch.randperm(length - 1 - item["num_prompt"], generator=generator)
            anchors[row, : len(order)] = (item["num_prompt"] + order[: self.num_anchors]).sort().values
        lengths = torch.tensor([len(item["ids"]) for item in items])
        return {"input_ids": input_ids, "lengths": lengths, "anchors": anchors}


def features_fingerprint(config: JetFlowConfig) -> str:
    """Folder name of the features of a target and its tapped layers."""
    facts = [config.target_name, config.target_model_type, config.num_target_layers, config.target_hidden_size]
    return hashlib.sha256(json.dumps([*facts, config.hidden_state_indices]).encode()).hexdigest()[:16]


class FeatureStore:
    """Tapped target states of the training sequences: computed on first use and, with a folder, stored on disk."""

    def __init__(self, compute: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], folder: Path | None):
        self._compute = compute
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (batch, seq, taps x hidden) and normed last hidden states (batch, seq, hidden) of a batch."""
        if self._folder is None:
            return self._compute(batch["input_ids"])
        lengths = batch["lengths"].tolist()
        sequences = [ids[:length] for ids, length in zip(batch["input_ids"].cpu(), lengths, strict=True)]
        paths = [self._folder / f"{_content_hash(sequence)}.safetensors" for sequence in sequences]
        stored = [load_file(path) if path.exists() else {} for path in paths]
        missing = [row for row, record in enumerate(stored) if not record]
        if missing:
            computed = self._compute(batch["input_ids"][missing])
            for index, row in enumerate(missing):
                features, last = (part[index, : lengths[row]].contiguous().cpu() for part in computed)
                stored[row] = {"features": features, "last_hidden_state": last}
                with atomic_write(paths[row]) as partial:
                    save_file(stored[row], partial)
        num_missing = batch["input_ids"].shape[1] - max(lengths)
        features, last_states = (
            pad(pad_sequence([record[name] for record in stored], batch_first=True), (0, 0, 0, num_missing))
            for name in ("features", "last_hidden_state")
        )
        device = batch["input_ids"].device
        return features.to(device), last_states.to(device)


def _content_hash(token_ids: torch.Tensor) -> str:
    """File name of a sequence's features, which depend on its tokens only, not on the record's id."""
    return hashlib.sha256(token_ids.numpy().tobytes()).hexdigest()[:32]
