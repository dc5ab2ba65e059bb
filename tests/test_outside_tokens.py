"""Tokens of the text outside the draft vocabulary: candidates scored as the head's other tokens are."""

import pytest
import torch
from helpers import drafter_of

from hf_jetflow.decoding import outside_tokens
from hf_jetflow.decoding.outside_tokens import NO_TOKEN, distinct_outside
from hf_jetflow.decoding.ranking import Ranker


DRAFTED = torch.arange(20, 220)  # the draft vocabulary
OUTSIDE = [5, 240]


def vocabulary(size: int = 256) -> torch.Tensor:
    indices = torch.full((size + 1,), len(DRAFTED))
    return indices.scatter_(0, DRAFTED, torch.arange(len(DRAFTED)))


@pytest.mark.parametrize("must_not_wait", [False, True])
def test_the_distinct_tokens_of_each_text_outside_the_draft_vocabulary(must_not_wait, monkeypatch):
    monkeypatch.setattr(outside_tokens, "must_not_wait", lambda _device: must_not_wait)
    ids = torch.tensor(
        [[30, 5, 255, 5, 10**6, 219, 0], [-1, -2, 220, 19, 220, 19, 220], [-1, 20, 21, 22, 23, 24, 256]]
    )
    found = distinct_outside(ids, vocabulary())
    kept = [[token for token in text if token != NO_TOKEN] for text in found.tolist()]
    assert [sorted(text) for text in kept] == [[0, 5, 255], [19, 220], []]
    assert found.shape[1] == (7 if must_not_wait else 3)
    alone = distinct_outside(ids[2], vocabulary())
    assert (alone == NO_TOKEN).all()
    assert alone.dim() == 1


@pytest.fixture
def target(tiny_target):
    return tiny_target("llama")


def pair_of(target, random_head, kind):
    """A head with a draft vocabulary, and the same one without."""
    heads = [
        random_head(target, branch_correction=kind, branch_candidates=300, draft_vocab_size=size)
        for size in (len(DRAFTED), None)
    ]
    heads[0].d2t.copy_(DRAFTED)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter, same in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.ndim == 1))
            same.copy_(parameter)
    return heads


def scores_of(head, target, ids):
    """Scores of all candidates by depth, along the branch of each depth's first candidate, and their tokens."""
    anchors = torch.full((len(ids),), ids.shape[1] - 1)
    draft = drafter_of(head, target, ids).propose(ids, anchors, head.config.block_size - 1, width=8)
    parents, tokens, scores = torch.zeros_like(anchors)[:, None], ids[:, -1:], []
    for depth in range(draft.candidates.tokens.shape[1]):
        scores.append(draft.score_branches(depth, parents, tokens)[:, 0])
        tokens = torch.full_like(tokens, OUTSIDE[0])
    return draft.candidates, torch.stack(scores, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, "parent", "path"])
@pytest.mark.parametrize("batch", [1, 2])
def test_they_are_scored_as_by_a_head_of_all_tokens(batch, kind, target, random_head):
    """Up to one number per depth: neither the text nor the draft vocabulary holds all the tokens that share it."""
    head, whole = pair_of(target, random_head, kind)
    ids = torch.tensor([[30, OUTSIDE[0], 31, OUTSIDE[1], 30], [40, 41, OUTSIDE[1], 43, 41]])[:batch]
    chosen, scores = scores_of(head, target, ids)
    expected, of_all = scores_of(whole, target, ids)
    for row, text in enumerate(ids.tolist()):
        for depth in range(chosen.tokens.shape[1]):
            tokens = chosen.tokens[row, depth, chosen.logprobs[row, depth] > -torch.inf].tolist()
            assert sorted(tokens) == sorted({*DRAFTED.tolist(), *(token for token in text if token in OUTSIDE)})
            known = expected.tokens[row, depth].tolist()
            ours, theirs = slice(len(tokens)), [known.index(token) for token in tokens]
            for numbers, others in ((chosen.logprobs, expected.logprobs), (scores, of_all)):
                difference = numbers[row, depth, ours] - others[row, depth, theirs]
                torch.testing.assert_close(difference, difference[:1].expand_as(difference), atol=1e-4, rtol=0)


@pytest.mark.parametrize("off", ["own scores", "no n-grams"])
def test_heads_that_cannot_score_them_draft_from_their_vocabulary(off, target, random_head):
    config = dict(own_lm_head=True) if off == "own scores" else dict(ngram_weights=[])
    head = random_head(target, draft_vocab_size=len(DRAFTED), **config)
    head.d2t.copy_(DRAFTED)
    ids = torch.tensor([[30, *OUTSIDE, 31, *OUTSIDE, 30]])
    draft = drafter_of(head, target, ids).propose(ids, torch.tensor([6]), head.config.block_size - 1, width=200)
    assert not set(draft.candidates.tokens.flatten().tolist()) & set(OUTSIDE)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("do_sample", [False, True])
def test_they_are_accepted_and_the_text_is_that_of_plain_decoding(do_sample, batch, target, echo_head, monkeypatch):
    prompts = (3 + torch.randperm(150, generator=torch.Generator().manual_seed(1)))[None].repeat(batch, 1)
    settings = dict(max_new_tokens=24, do_sample=do_sample, attention_mask=torch.ones_like(prompts))

    def text(head=None):
        torch.manual_seed(4)
        return target.generate(prompts, assistant_model=head, **settings)

    plain = text()
    vocabulary = sorted(set(range(256)) - set(prompts[0].tolist()))  # what it leaves out stands in the prompt
    head = echo_head(target, plain[:1], draft_vocab_size=len(vocabulary))
    head.d2t.copy_(torch.tensor(vocabulary))
    with_them = text(head)
    rounds = head.last_stats.num_rounds
    assert torch.equal(with_them, plain)
    monkeypatch.setattr(Ranker, "scores_outside_tokens", False)
    assert torch.equal(text(head), plain)
    assert rounds < head.last_stats.num_rounds
