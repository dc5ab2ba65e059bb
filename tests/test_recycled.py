"""Recycled choices: what the target chose at rejected nodes, looked up like n-grams of the text for one round."""

import pytest
import torch
from conftest import make_prompt
from test_ngrams import VOCAB, WEIGHTS, WIDTH, branches, in_committed, random_candidates, read

from hf_jetflow.decoding.ranking import Ranker
from hf_jetflow.trees.device_ngrams import MatchedNgrams
from hf_jetflow.trees.ngrams import ContextNgrams
from hf_jetflow.trees.recycled import NO_CHOICE, RecycledChoices, RecycledNgrams, no_choices, recycle
from hf_jetflow.trees.tree import DraftTree


NODES, GAIN = 12, 1.5


def random_tree(generator, text, num_committed) -> RecycledChoices:
    """A tree behind the text as it was before `num_committed` tokens, some of its nodes accepted."""
    root = text[len(text) - 1 - num_committed]
    tokens = torch.cat([root[None], torch.randint(0, VOCAB, (NODES - 1,), generator=generator)])
    parents = torch.tensor([-1, *(int(torch.randint(0, node, (1,), generator=generator)) for node in range(1, NODES))])
    choices = torch.randint(0, VOCAB, (NODES,), generator=generator)
    choices[[0, 3, 5]] = NO_CHOICE
    return RecycledChoices(tokens[None], parents[None], choices[None], torch.tensor([num_committed]))


def on_host(text, recycled, row=0) -> RecycledNgrams:
    parts = (recycled.tokens, recycled.parents, recycled.choices)
    nodes = [part[row].tolist() for part in parts]
    return RecycledNgrams(*nodes, text.tolist(), int(recycled.num_committed[row]), len(WEIGHTS))


def from_tree(text: list[int], recycled: RecycledChoices, branch: list[int]) -> dict[int, float]:
    """What each token gains as the next one of a branch, counted node by node."""
    votes = dict.fromkeys(range(VOCAB), 0.0)
    before = text[: len(text) - 1 - int(recycled.num_committed)]  # the tree's root comes next
    tokens, parents, choices = (part[0].tolist() for part in (recycled.tokens, recycled.parents, recycled.choices))
    for length, weight in enumerate(WEIGHTS, 1):
        found = []
        for node, choice in enumerate(choices):
            path, at = [], node
            while at >= 0:
                path, at = [tokens[at], *path], parents[at]
            if choice >= 0 and [*before, *path][-length:] == branch[-length:] and len(branch) >= length:
                found.append(choice)
        for choice in found:
            votes[choice] += GAIN * weight / len(found)
    return votes


@pytest.mark.parametrize("num_committed", [1, 4])
@pytest.mark.parametrize("length", [2, 6, 30])
@pytest.mark.parametrize("kind", ["host", "device"])
def test_votes_are_those_counted_by_hand(kind, length, num_committed):
    generator = torch.Generator().manual_seed(length)
    text = torch.randint(0, VOCAB, (length,), generator=generator)
    num_committed = min(num_committed, length - 1)
    recycled, candidates = random_tree(generator, text, num_committed), random_candidates(generator)
    if kind == "device":
        scorer = MatchedNgrams(text[None], candidates, WEIGHTS, recycled.padded(NODES + 4), GAIN)
    else:
        sources = [[read(text, WEIGHTS), on_host(text, recycled)]]
        scorer = ContextNgrams(sources, candidates, [WEIGHTS, [GAIN * weight for weight in WEIGHTS]])
    texts, num_votes = [text.tolist()], 0
    for depth, parents, tokens, votes in branches(scorer, generator):
        if depth:
            texts = [texts[parent] + [token] for parent, token in zip(parents.tolist(), tokens.tolist(), strict=True)]
        for branch, of_branch in zip(texts, votes.tolist(), strict=True):
            of_text, of_tree = in_committed(text.tolist(), branch, WEIGHTS), from_tree(text.tolist(), recycled, branch)
            chosen = candidates.tokens[depth].tolist()
            assert of_branch == pytest.approx([of_text[token] + of_tree[token] for token in chosen])
            num_votes += any(of_tree.values())
    assert num_votes > 3


def test_a_batch_of_padded_texts_is_as_its_rows_on_both_devices():
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(0, VOCAB, (length,), generator=generator) for length in (30, 12, 2)]
    trees = [random_tree(generator, text, min(5, len(text) - 1)) for text in texts]
    parts = zip(*((tree.tokens, tree.parents, tree.choices, tree.num_committed) for tree in trees), strict=True)
    recycled = RecycledChoices(*map(torch.cat, parts))
    candidates = random_candidates(generator, (3,))
    padded = torch.stack([torch.nn.functional.pad(text, (30 - len(text), 0), value=-1) for text in texts])
    on_device = MatchedNgrams(padded, candidates, WEIGHTS, recycled, GAIN)
    sources = [[read(text, WEIGHTS), on_host(text, recycled, row)] for row, text in enumerate(texts)]
    weights = [WEIGHTS, [GAIN * weight for weight in WEIGHTS]]
    for depth, parents, tokens, votes in branches(ContextNgrams(sources, candidates, weights), generator, (3,)):
        torch.testing.assert_close(votes, on_device(depth, parents, tokens))
    kept = recycled.select_sequences(torch.tensor([2, 0]))
    assert torch.equal(kept.tokens, torch.cat([trees[2].tokens, trees[0].tokens]))
    assert kept.num_committed.tolist() == [1, 5]


def test_without_a_tree_nothing_matches():
    generator = torch.Generator().manual_seed(3)
    text, candidates = torch.randint(0, VOCAB, (30,), generator=generator), random_candidates(generator)
    fixed = MatchedNgrams(text[None], candidates, WEIGHTS, no_choices(1, NODES, text.device))
    alone = ContextNgrams([[read(text, WEIGHTS)]], candidates, [WEIGHTS])
    for depth, parents, tokens, votes in branches(alone, generator):
        torch.testing.assert_close(votes, fixed(depth, parents, tokens))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [0.0, -9.0])  # all logits of the second lie below zero
def test_choices_are_the_target_s_argmax(shift, dtype):
    tree = DraftTree(*(torch.zeros(2, 5, dtype=torch.long) for _ in range(3)), torch.zeros(2, 5), 0)
    logits = (torch.rand(2, 5, 40, generator=torch.Generator().manual_seed(2)) + shift).to(dtype)
    recycled = recycle(tree, logits, [[0], [0]])
    assert torch.equal(logits[:, 1:].gather(-1, recycled.choices[:, 1:, None])[..., 0], logits[:, 1:].amax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_choices_at_all_nodes_but_the_path_are_kept(dtype):
    tokens = torch.tensor([[7, 1, 2, 3], [7, 4, 5, 6]])
    parents = torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 0]])
    depths = torch.tensor([[0, 1, 1, 2], [0, 1, 2, 1]])
    tree = DraftTree(tokens, parents, depths, torch.zeros(2, 4), 2)
    logits = torch.zeros(2, 4, WIDTH, dtype=dtype)
    logits[0, range(4), [2, 3, 4, 5]] = logits[1, range(4), [5, 4, 3, 2]] = 1
    recycled = recycle(tree, logits, [[0, 1, 3], [0]])
    assert recycled.choices.tolist() == [[NO_CHOICE, NO_CHOICE, 4, NO_CHOICE], [NO_CHOICE, 4, 3, 2]]
    assert recycled.num_committed.tolist() == [3, 1]
    alone = DraftTree(*(part[:, :1] for part in (tokens, parents, depths)), torch.zeros(2, 1), 0)
    assert recycle(alone, logits[:, :1], [[0], [0]]) is None, "a plain round rejects nothing"


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("do_sample", [False, True])
def test_the_text_is_that_of_plain_decoding_and_drafts_read_the_choices(
    do_sample, batch, tiny_target, random_head, monkeypatch
):
    target = tiny_target("llama")
    head, seen, rank = random_head(target, branch_correction="path"), [], Ranker.rank
    monkeypatch.setattr(Ranker, "rank", lambda self, *args: seen.append(args[3]) or rank(self, *args))
    prompts = make_prompt(12).repeat(batch, 1)
    prompts[:, -1] += torch.arange(batch)
    texts = []
    for assistant in (None, head):
        torch.manual_seed(4)
        settings = dict(do_sample=do_sample, max_new_tokens=24, attention_mask=torch.ones_like(prompts))
        texts.append(target.generate(prompts, assistant_model=assistant, **settings).tolist())
    assert texts[0] == texts[1]
    assert seen[0] is None, "nothing was verified yet"
    assert any(each is not None and (each.choices >= 0).any() for each in seen)


@pytest.mark.parametrize("off", [dict(ngram_weights=[]), dict(recycled_weight=0)])
def test_choices_can_be_turned_off(off, tiny_target, random_head, monkeypatch):
    target = tiny_target("llama")
    head = random_head(target, **off)
    monkeypatch.setattr("hf_jetflow.decoding.drafter.recycle", lambda *_: 1 / 0)
    target.generate(make_prompt(12), assistant_model=head, do_sample=False, max_new_tokens=8)
    assert head.last_stats.num_rounds
