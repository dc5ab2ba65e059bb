"""The walk on trees and logits written by hand."""

from dataclasses import dataclass

import pytest
import torch
from helpers import as_batch, make_tree, random_parents
from transformers import LogitsProcessorList

from hf_jetflow.trees.tree import DraftTree
from hf_jetflow.trees.walk import Chooser, walk_trees


VOCAB = 10
# root 9 -> {1: token 5 -> {3: token 2}, 2: token 7 -> {4: token 2 -> {5: token 8}}}
TREE = make_tree(tokens=[9, 5, 7, 2, 2, 8], parents=[-1, 0, 0, 1, 2, 4])


@dataclass
class Walk:
    """What came of a walk."""

    path: list[int]
    bonus_id: int


class Spy:
    """A logits processor that changes nothing and records what it was shown."""

    def __init__(self):
        self.prefixes: list[list[int]] = []
        self.rows: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.prefixes.append(input_ids[0].tolist())
        self.rows.append(scores.clone())
        return scores


class Committed:
    """What the emitter does for the walk, on a list; ends when `last` tokens were pushed."""

    def __init__(self, last: int | None = None):
        self.ids = [1, 9]
        self.num_left = last
        self.active = [0]

    def committed_ids(self, sequence: int) -> torch.Tensor:
        return torch.tensor([self.ids])

    def push(self, sequence: int, token: int, scores: tuple[torch.Tensor, ...] | None) -> bool:
        self.ids.append(token)
        self.num_left = None if self.num_left is None else self.num_left - 1
        return self.num_left == 0


def choices(*tokens: int) -> torch.Tensor:
    """Logits (nodes, vocab) under which the target chooses `tokens[node]` after each node."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(len(tokens), VOCAB, generator=generator) + 5 * torch.eye(VOCAB)[list(tokens)]


def plain_chooser() -> Chooser:
    return Chooser(LogitsProcessorList(), do_sample=False)


def walk(
    logits: torch.Tensor, chooser: Chooser | None = None, committed: Committed | None = None, tree: DraftTree = TREE
) -> Walk:
    committed = committed or Committed()
    (path,) = walk_trees(as_batch(tree), logits[None], [chooser or plain_chooser()], committed)
    return Walk(path, committed.ids[-1])


def test_the_walk_descends_while_a_child_holds_the_target_s_choice():
    assert walk(choices(7, 0, 2, 0, 8, 3)) == Walk(path=[0, 2, 4, 5], bonus_id=3)


def test_a_choice_that_no_child_holds_is_the_bonus_token():
    assert walk(choices(7, 0, 6, 0, 8, 3)) == Walk(path=[0, 2], bonus_id=6)


def test_a_refused_first_token_keeps_the_root_alone():
    assert walk(choices(4, 2, 2, 0, 8, 3)) == Walk(path=[0], bonus_id=4)


def test_a_token_under_another_parent_is_not_followed():
    # After node 1 the target chooses 8, which only node 4 has as a child.
    assert walk(choices(5, 8, 2, 0, 8, 3)) == Walk(path=[0, 1], bonus_id=8)


def test_the_same_token_leads_to_the_child_of_the_right_parent():
    assert walk(choices(5, 2, 2, 6, 8, 3)) == Walk(path=[0, 1, 3], bonus_id=6)


def test_a_leaf_s_choice_is_the_bonus_token():
    assert walk(choices(4), tree=make_tree([9], [-1])) == Walk(path=[0], bonus_id=4)


def test_the_path_s_tokens_and_the_bonus_token_are_pushed_in_order():
    committed = Committed()
    walk(choices(7, 0, 2, 0, 8, 3), committed=committed)
    assert committed.ids == [1, 9, 7, 2, 8, 3]


@pytest.mark.parametrize(("last", "path", "bonus_id"), [(1, [0], 7), (2, [0, 2], 2), (3, [0, 2, 4], 8)])
@pytest.mark.parametrize("is_general", [False, True], ids=["plain argmax", "processors"])
@pytest.mark.parametrize("is_ahead", [False, True], ids=["node by node", "all nodes at once"])
def test_the_walk_stops_where_push_says_so(last, path, bonus_id, is_general, is_ahead, monkeypatch):
    monkeypatch.setattr("hf_jetflow.trees.walk._reads_once", lambda _device: is_ahead)
    committed = Committed(last)
    chooser = Chooser(LogitsProcessorList([Spy()]), do_sample=False) if is_general else plain_chooser()
    # The last token's node is not on the path although the tree has it: its logits were not used.
    assert walk(choices(7, 0, 2, 0, 8, 3), chooser, committed) == Walk(path, bonus_id)
    assert committed.ids == [1, 9, 7, 2, 8][: 2 + last]


@pytest.mark.parametrize("do_sample", [False, True], ids=["argmax", "sampling"])
def test_processors_run_on_the_path_only_and_see_the_true_prefix(do_sample):
    spy = Spy()
    logits = choices(7, 0, 2, 0, 6, 3) * 20
    result = walk(logits, Chooser(LogitsProcessorList([spy]), do_sample))
    assert result == Walk(path=[0, 2, 4], bonus_id=6)
    assert spy.prefixes == [[1, 9], [1, 9, 7], [1, 9, 7, 2]]
    assert torch.equal(torch.cat(spy.rows), logits[result.path])


def test_processors_decide_and_not_the_raw_logits():
    def forbid_seven(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.tensor([7]), float("-inf"))

    logits = choices(7, 2, 2, 4, 8, 3)
    logits[0, 5] += 4  # the runner-up at the root
    result = walk(logits, Chooser(LogitsProcessorList([forbid_seven]), do_sample=False))
    assert result == Walk(path=[0, 1, 3], bonus_id=4)


def test_a_processor_that_writes_in_place_leaves_the_target_s_logits_alone():
    def spoil(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.zero_()

    logits = choices(7, 0, 2, 0, 8, 3)
    before = logits.clone()
    walk(logits, Chooser(LogitsProcessorList([spoil]), do_sample=False))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("is_ahead", [False, True], ids=["node by node", "all nodes at once"])
@pytest.mark.parametrize("seed", range(6))
def test_plain_argmax_and_the_general_path_agree(seed, is_ahead, monkeypatch):
    monkeypatch.setattr("hf_jetflow.trees.walk._reads_once", lambda _device: is_ahead)
    generator = torch.Generator().manual_seed(seed)
    parents = random_parents(20, generator)
    # Tokens by place among the siblings: few enough that the target often chooses one of them.
    tree = make_tree([9] + [parents[1:node].count(parents[node]) % VOCAB for node in range(1, 20)], parents)
    logits = torch.rand(20, VOCAB, generator=generator)
    logits[:, :3] += 1
    runs = []
    for chooser in (plain_chooser(), Chooser(LogitsProcessorList([Spy()]), do_sample=False)):
        committed = Committed()
        runs.append((walk(logits, chooser, committed, tree), committed.ids))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_broken", [False, True], ids=["equal logits", "a logit that is not a number"])
def test_the_first_of_equal_logits_is_chosen_as_in_plain_decoding(dtype, is_broken):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randint(0, 3, (1, 1, 5000), generator=generator).to(dtype)  # each some 1,700 times
    if is_broken:
        logits[..., [4000, 2000]] = torch.nan
    root = make_tree(tokens=[9], parents=[-1])
    committer = Committed()
    walk_trees(as_batch(root), logits, [Chooser(LogitsProcessorList(), do_sample=False)], committer)
    assert committer.ids[-1] == int(logits[0].float().argmax(dim=-1)) == (2000 if is_broken else committer.ids[-1])


def test_sampling_draws_as_plain_decoding_does_from_the_same_seed():
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    paths = set()
    for seed in range(60):
        torch.manual_seed(seed)
        result = walk(logits, Chooser(LogitsProcessorList(), do_sample=True))
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        drawn = [int(torch.multinomial(torch.softmax(logits[node], dim=-1), 1)) for node in result.path]
        assert [*TREE.tokens[result.path[1:]].tolist(), result.bonus_id] == drawn
        assert torch.equal(torch.get_rng_state(), state), "the walk drew more or fewer numbers than plain decoding"
        paths.add(tuple(result.path))
    assert len(paths) > 2


def test_scores_and_logits_of_every_choice_are_recorded_on_request():
    def double(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores * 2

    logits = choices(7, 0, 2, 0, 6, 3)
    chooser = Chooser(LogitsProcessorList([double]), do_sample=False, keep_scores=True, keep_logits=True)
    path = walk(logits, chooser).path
    assert torch.equal(torch.cat(chooser.logits), logits[path])
    assert torch.equal(torch.cat(chooser.scores), 2 * logits[path])


class CommittedBatch:
    """What the emitter does for the walk of a batch whose slots hold the sequences 2 and 0."""

    def __init__(self):
        self.active = [2, 0]
        self.ids = {2: [3, 9], 0: [4, 4, 9]}

    def committed_ids(self, sequence: int) -> torch.Tensor:
        return torch.tensor([self.ids[sequence]])

    def push(self, sequence: int, token: int, scores: tuple[torch.Tensor, ...] | None) -> bool:
        self.ids[sequence].append(token)
        return False


@pytest.mark.parametrize("is_ahead", [False, True], ids=["node by node", "all nodes at once"])
def test_each_sequence_of_a_batch_is_walked_on_its_own(is_ahead, monkeypatch):
    monkeypatch.setattr("hf_jetflow.trees.walk._reads_once", lambda _device: is_ahead)
    other = make_tree(tokens=[9, 6, 1, 1, 0, 3], parents=[-1, 0, 0, 1, 2, 3])
    logits = torch.stack([choices(7, 0, 2, 0, 8, 3), choices(6, 1, 0, 9, 0, 0)])
    committed = CommittedBatch()
    paths = walk_trees(as_batch(TREE, other), logits, [plain_chooser(), plain_chooser()], committed)
    assert paths == [[0, 2, 4, 5], [0, 1, 3]]
    assert committed.ids == {2: [3, 9, 7, 2, 8, 3], 0: [4, 4, 9, 6, 1, 9]}


def test_each_sequence_of_a_batch_has_its_own_processors_and_prefix():
    spies = [Spy(), Spy()]
    logits = torch.stack([choices(7, 0, 6, 0, 8, 3), choices(4, 0, 2, 0, 8, 3)])
    choosers = [Chooser(LogitsProcessorList([spy]), do_sample=False) for spy in spies]
    walk_trees(as_batch(TREE, TREE), logits, choosers, CommittedBatch())
    assert [spy.prefixes for spy in spies] == [[[3, 9], [3, 9, 7]], [[4, 4, 9]]]
