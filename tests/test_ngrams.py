"""Context n-grams: what followed a branch's last tokens earlier in the text."""

import pytest
import torch
from conftest import make_prompt
from reference import assert_same_text

from hf_jetflow import JetFlowConfig
from hf_jetflow.decoding.branch_scores import BranchScores
from hf_jetflow.decoding.drafter import JetFlowCandidateGenerator
from hf_jetflow.head.configuration_jetflow import NGRAM_WEIGHTS
from hf_jetflow.target.target import Target
from hf_jetflow.trees.device_ngrams import MatchedNgrams, continue_with_matches
from hf_jetflow.trees.ngrams import MAX_SEARCHED, ContextNgrams, TextNgrams, continue_tree
from hf_jetflow.trees.tree import Candidates, build_tree


VOCAB, DEPTHS, WIDTH = 9, 5, 6
WEIGHTS = [0.5, 2.0, 1.0]


def branches(of_context, generator, batch=()):
    """Random frontiers, depth by depth, and their votes."""
    parents, tokens = torch.zeros(*batch, 1, dtype=torch.long), torch.zeros(*batch, 1, dtype=torch.long)
    for depth in range(DEPTHS):
        if depth:
            parents = torch.randint(0, 1 if depth == 1 else 3, (*batch, 3), generator=generator)
            tokens = torch.randint(0, VOCAB, (*batch, 3), generator=generator)
        yield depth, parents, tokens, of_context(depth, parents, tokens)


def read(text, weights):
    of_text = TextNgrams(len(weights))
    of_text.follow(text.tolist())
    return of_text


def of_text(kind, text, candidates, weights):
    if kind == "device":
        return MatchedNgrams(text[None], candidates, weights)
    return ContextNgrams([[read(text, weights)]], candidates, [weights])


def random_candidates(generator, batch=()):
    tokens = torch.stack([torch.randperm(VOCAB, generator=generator)[:WIDTH] for _ in range(DEPTHS)])
    return Candidates(tokens.expand(*batch, DEPTHS, WIDTH), torch.zeros(*batch, DEPTHS, WIDTH))


@pytest.mark.parametrize("length", [1, 2, 3, 40])
@pytest.mark.parametrize("weights", [WEIGHTS, [1.0], [0.0], [0.5, 0.0, 2.0], list(NGRAM_WEIGHTS)])
@pytest.mark.parametrize("kind", ["host", "device"])
def test_votes_are_those_counted_by_hand(kind, weights, length):
    generator = torch.Generator().manual_seed(length)
    text = torch.randint(0, VOCAB, (length,), generator=generator)
    candidates = random_candidates(generator)
    texts = [text.tolist()]
    num_votes = 0
    for depth, parents, tokens, votes in branches(of_text(kind, text, candidates, weights), generator):
        if depth:
            texts = [texts[parent] + [token] for parent, token in zip(parents.tolist(), tokens.tolist(), strict=True)]
        assert votes.shape == (len(texts), WIDTH)
        for branch, of_branch in zip(texts, votes.tolist(), strict=True):
            # Only the committed text is searched, by the branch's own last tokens.
            expected = in_committed(text.tolist(), branch, weights)
            assert of_branch == pytest.approx([expected[token] for token in candidates.tokens[depth].tolist()])
            num_votes += any(of_branch)
    assert num_votes > 5 or length < 40 or not any(weights)


def in_committed(text: list[int], branch: list[int], weights: list[float]) -> dict[int, float]:
    """What each token gains as the next one of a branch, counted place by place."""
    votes = dict.fromkeys(range(VOCAB), 0.0)
    for length, weight in enumerate(weights, 1):
        tail = branch[-length:]
        ends = [end for end in range(length, len(text)) if len(tail) == length and text[end - length : end] == tail]
        for end in ends:
            votes[text[end]] += weight / len(ends)
    return votes


def test_a_batch_is_as_its_rows():
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(0, VOCAB, (length,), generator=generator) for length in (30, 12)]
    candidates = random_candidates(generator, (2,))
    rows = [
        ContextNgrams([[read(text, WEIGHTS)]], Candidates(candidates.tokens[row], candidates.logprobs[row]), [WEIGHTS])
        for row, text in enumerate(texts)
    ]
    of_all = ContextNgrams([[read(text, WEIGHTS)] for text in texts], candidates, [WEIGHTS])
    for depth, parents, tokens, votes in branches(of_all, generator, (2,)):
        for row, alone in enumerate(rows):
            torch.testing.assert_close(votes[row], alone(depth, parents[row], tokens[row]))


def test_the_votes_on_a_device_are_those_on_the_host_for_padded_texts_of_a_batch():
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(0, VOCAB, (length,), generator=generator) for length in (30, 12, 2)]
    candidates = random_candidates(generator, (3,))
    padded = torch.stack([torch.nn.functional.pad(text, (30 - len(text), 0), value=-1) for text in texts])
    on_device = MatchedNgrams(padded, candidates, WEIGHTS)
    on_host = ContextNgrams([[read(text, WEIGHTS)] for text in texts], candidates, [WEIGHTS])
    for depth, parents, tokens, votes in branches(on_host, generator, (3,)):
        torch.testing.assert_close(votes, on_device(depth, parents, tokens))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("node_budget", [2, 16, 64, 256])
def test_trees_on_a_device_are_those_on_the_host(node_budget, seed):
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(1, 60, (1,), generator=generator))
    text = torch.randint(0, VOCAB, (length if seed % 2 else 7,), generator=generator).repeat(1 if seed % 2 else 8)
    candidates = random_candidates(generator, (1,))
    scores = torch.log_softmax(4 * torch.randn(1, DEPTHS, WIDTH + 2, generator=generator), dim=-1)
    candidates.logprobs = scores.sort(descending=True).values[..., :WIDTH]
    trees = []
    for kind in ("host", "device"):
        scorer = BranchScores(candidates, of_text(kind, text, candidates, WEIGHTS), None)
        tree = build_tree(text[None, -1:], candidates, node_budget, scorer)
        assert tree.num_nodes == node_budget
        continued = [
            continue_tree(tree, text[None], node_budget, 16),
            continue_with_matches(tree, text[None], node_budget, 16),
        ]
        trees.append(continued[kind == "device"])
    for name in ("tokens", "parents", "depths"):
        assert torch.equal(getattr(trees[0], name), getattr(trees[1], name)), name
    torch.testing.assert_close(trees[0].logprobs, trees[1].logprobs)
    assert torch.equal(trees[0].ancestor_mask, trees[1].ancestor_mask)


@pytest.mark.parametrize("seed", range(4))
def test_a_text_that_grows_and_loses_its_beginning_is_counted_as_if_read_recounted(seed):
    """Texts of few tokens, repeated ones among them, so that several pieces of the new text look like the old one."""
    generator = torch.Generator().manual_seed(seed)
    text, of_text = [], TextNgrams(3)
    for step in range(60):
        text += torch.randint(0, 2 + step % 3, (int(torch.randint(0, 6, (1,), generator=generator)),)).tolist()
        if step % 20 == 19:
            text = [5, *text[:10]]  # another one
        text = text[-30:]
        of_text.follow(text)
        recounted = TextNgrams(3)
        recounted.follow(text)
        assert counts(of_text.root) == counts(recounted.root)
        assert [counts(gram) for gram in of_text.tail] == [counts(gram) for gram in recounted.tail]


def counts(gram):
    return gram.count, gram.followed, {token: counts(longer) for token, longer in gram.nexts.items()}


# --- in drafting -----------------------------------------------------------------------------------------------------


def test_the_newest_tokens_of_a_long_text_are_searched(tiny_target, random_head):
    target = tiny_target("llama")
    head = random_head(target, ngram_weights=[1.0], branch_candidates=8)
    drafter = JetFlowCandidateGenerator(head, Target(target, head.config))
    text = torch.tensor([[-1, -1, 5, 7, *range(8, 6 + MAX_SEARCHED)]])  # padded in front
    (of_text,) = drafter.ranker._read_texts(text, 1)
    assert of_text.root.nexts[5].nexts.keys() == {7}
    (of_text,) = drafter.ranker._read_texts(torch.cat([text, torch.tensor([[3]])], dim=1), 1)
    assert 5 not in of_text.root.nexts
    assert of_text.root.nexts[7].nexts.keys() == {8}
    assert of_text.root.followed == MAX_SEARCHED


def first_scores(drafter, rows, text):
    with torch.no_grad():
        draft = drafter.ranker.rank(rows, torch.tensor(text), 8)
        candidates = draft.candidates
    scores = candidates.logprobs[0]
    if draft.score_branches is not None:
        scores = draft.score_branches(0, torch.zeros(1, dtype=torch.long), torch.tensor(text[-1:]))[0]
    return dict(zip(candidates.tokens[0].tolist(), scores.tolist(), strict=True)), candidates


@pytest.mark.parametrize("kind", [None, "parent", "path"])
@pytest.mark.parametrize("draft_vocab_size", [None, 200])
def test_a_token_that_came_next_before_is_proposed_and_more_likely(kind, draft_vocab_size, tiny_target, random_head):
    """Also one that the head ranks far behind, and with ids in the text that no vocabulary has."""
    target = tiny_target("llama")
    config = dict(branch_correction=kind, draft_vocab_size=draft_vocab_size, branch_candidates=8)
    head = random_head(target, **config)
    if draft_vocab_size:
        head.d2t.copy_(torch.arange(20, 220))
    drafter = JetFlowCandidateGenerator(head, Target(target, head.config))
    rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(7)) * 0.1
    head.config.ngram_weights = []
    plain = drafter.ranker.logprobs(rows)[0].detach()
    place = int(plain.argsort()[20])  # of the draft vocabulary
    token = place if head.draft_token_ids is None else int(head.draft_token_ids[place])
    text = [100, 101, token, 10**6, -1, 100, 101]
    without, _ = first_scores(drafter, rows, text)
    assert token not in without
    head.config.ngram_weights = [1.0, 2.0]
    scores, candidates = first_scores(drafter, rows, text)
    assert token in scores
    assert candidates.logprobs[0, candidates.tokens[0] == token].item() == pytest.approx(float(plain[place]))
    logits = plain.clone()
    logits[place] += 3.0
    for known, score in scores.items():
        known_place = known if head.draft_token_ids is None else int((head.draft_token_ids == known).nonzero())
        assert score == pytest.approx(float(torch.log_softmax(logits, -1)[known_place]), abs=1e-4)


def test_a_tree_follows_the_text(tiny_target, random_head):
    """With rows that say nothing, the best path is what came before, token by token."""
    target = tiny_target("llama")
    head = random_head(target, ngram_weights=[2.0, 4.0], branch_candidates=20)
    drafter = JetFlowCandidateGenerator(head, Target(target, head.config))
    text = [*range(50, 58), 9, 50, 51]
    draft = drafter.ranker.rank(torch.zeros(5, 64), torch.tensor(text), 8)
    candidates = draft.candidates
    tree = build_tree(torch.tensor([51]), candidates, 12, draft.score_branches)
    node, path = 0, []
    for token in range(52, 57):
        found = ((tree.parents == node) & (tree.tokens == token)).nonzero().flatten().tolist()
        assert found, path
        node = found[0]
        path.append(token)


@pytest.mark.parametrize("settings", [dict(), dict(width=1), dict(node_budget="auto")])
def test_a_text_that_repeats_itself_is_drafted_better(settings, tiny_target, random_head):
    target = tiny_target("llama")
    head = random_head(target)
    for name, value in settings.items():
        setattr(head.generation_config, name, value)
    prompt = make_prompt(6).repeat(1, 8)
    cycle = prompt[0, :6].tolist()
    kwargs = dict(max_new_tokens=40, do_sample=False)
    kwargs["prefix_allowed_tokens_fn"] = lambda _row, ids: [cycle[len(ids) % 6]]
    plain = target.generate(prompt, **kwargs)
    accepted = []
    for weights in ([], list(NGRAM_WEIGHTS)):
        head.config.ngram_weights = weights
        assert_same_text(plain, target.generate(prompt, assistant_model=head, **kwargs))
        accepted.append(head.last_stats.num_accepted)
    if settings.get("node_budget") != "auto":  # which may choose not to draft
        assert accepted[1] > accepted[0] + 10


@pytest.mark.parametrize("weights", [[-1.0], [1.0, float("nan")], [float("inf")]])
def test_weights_that_are_no_weights_are_refused(weights):
    with pytest.raises(ValueError, match="ngram_weights"):
        JetFlowConfig(mask_token_id=4, ngram_weights=weights)


def test_the_weights_are_saved(tiny_target, random_head, tmp_path):
    target = tiny_target("llama")
    for given, kept in ((None, list(NGRAM_WEIGHTS)), ([], []), ([2, 1.5], [2, 1.5])):
        random_head(target, ngram_weights=given).save_pretrained(tmp_path)
        assert JetFlowConfig.from_pretrained(tmp_path).ngram_weights == kept
