"""Heads that score branches: each layout drafts what its own project drafts, and leaves the text alone."""

from itertools import pairwise

import make_layouts as make
import make_scored_layouts as scored
import pytest
import torch
from helpers import drafter_of
from make_layouts import VOCAB
from reference import assert_same_text
from scored_references import reference

from hf_jetflow import JetFlowCandidateGenerator, JetFlowHead
from hf_jetflow.head.formats import recognize
from hf_jetflow.target.target import Target


HAS_STATE = ("recurrent", "Domino", "xpress")
IDS = [5, 90, 17, 201, 33, 64, 8, 121, 77]  # of the text, the anchor last


@pytest.fixture(scope="module", params=scored.CHECKPOINTS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def head(name, tmp_path_factory) -> JetFlowHead:
    """The head of a layout, with all tokens as candidates and without n-grams."""
    folder = tmp_path_factory.mktemp("head")
    return make.load(folder, *scored.CHECKPOINTS[name](), branch_candidates=VOCAB, ngram_weights=[])


def draft_behind(head: JetFlowHead, target, ids: torch.Tensor):
    anchors = torch.full((len(ids),), ids.shape[1] - 1)
    return drafter_of(head, target, ids).propose(ids, anchors, head.config.block_size - 1, width=VOCAB)


def reference_of(name: str, target, ids: list[int]):
    config, tensors = scored.CHECKPOINTS[name]()
    states = target(torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states
    features = torch.cat([states[index + 1] for index in make.LAYER_IDS], dim=-1)
    return reference(config, tensors, target, features[0], ids[-1])


def by_draft_token(draft, scores: torch.Tensor, depth: int, head: JetFlowHead) -> torch.Tensor:
    """Scores (width,) of a depth's candidates in the order of the draft vocabulary."""
    token_ids = torch.arange(VOCAB) if head.draft_token_ids is None else head.draft_token_ids
    by_token = torch.full((VOCAB,), -torch.inf).scatter(0, draft.candidates.tokens[0, depth], scores)
    return by_token[token_ids]


def scores_along(draft, path: list[int]) -> list[torch.Tensor]:
    """Scores (width,) of each depth's candidates behind a path, anchor first."""
    if draft.score_branches is None:
        return [draft.candidates.logprobs[0, depth] for depth in range(len(path))]
    zero = torch.zeros(1, 1, dtype=torch.long)
    return [draft.score_branches(depth, zero, torch.tensor([[token]]))[0, 0] for depth, token in enumerate(path)]


def test_every_layout_is_recognized_and_has_a_miniature(name):
    layout = recognize(scored.CHECKPOINTS[name]()[0])
    assert layout.name == name.partition(",")[0]


@torch.no_grad()
def test_a_path_is_scored_as_in_the_original(name, head, target):
    logits = reference_of(name, target, IDS)
    draft = draft_behind(head, target, torch.tensor([IDS]))
    token_ids = list(range(VOCAB)) if head.draft_token_ids is None else head.draft_token_ids.tolist()
    generator = torch.Generator().manual_seed(3)
    drafted = torch.tensor(token_ids)[
        torch.randint(len(token_ids), (head.config.block_size - 2,), generator=generator)
    ]
    path = [IDS[-1], *drafted.tolist()]
    for depth, scores in enumerate(scores_along(draft, path)):
        expected = logits(depth, [IDS[-2], *path[: depth + 1]])
        got = by_draft_token(draft, scores, depth, head)
        is_scored = expected.isfinite()
        if is_scored.all():
            expected = expected.log_softmax(-1)
        torch.testing.assert_close(got[is_scored], expected[is_scored], atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_a_tree_of_width_one_is_the_original_s_greedy_chain(name, head, target):
    starts = torch.randint(4, VOCAB, (3, len(IDS)), generator=torch.Generator().manual_seed(8)).tolist()
    chains = []
    for ids in starts:
        logits, path = reference_of(name, target, ids), [ids[-2], ids[-1]]
        token_ids = list(range(VOCAB)) if head.draft_token_ids is None else head.draft_token_ids.tolist()
        for depth in range(head.config.block_size - 1):
            path.append(token_ids[int(logits(depth, path).argmax())])
        chain, _ = drafter_of(head, target, torch.tensor([ids])).get_candidates(torch.tensor([ids]))
        assert chain[0, len(ids) :].tolist() == path[2:]
        chains.append(tuple(path[2:]))
    assert len(set(chains)) == 3, "the miniature drafts the same whatever it reads"


@torch.no_grad()
def test_a_state_tells_branches_with_the_same_last_token_apart(name, head, target):
    draft = draft_behind(head, target, torch.tensor([IDS]))
    tokens = draft.candidates.tokens[0, :, :2].tolist()
    if draft.score_branches is None:
        assert name in ("DFlare", "transformers' Muse Glimmer assistant")
        return
    draft.score_branches(0, torch.zeros(1, 1, dtype=torch.long), torch.tensor([[IDS[-1]]]))
    siblings = draft.score_branches(1, torch.tensor([[0, 0]]), torch.tensor([tokens[0]]))[0]
    assert not torch.allclose(*siblings), "siblings are scored alike"
    cousins = draft.score_branches(2, torch.tensor([[0, 1]]), torch.tensor([[tokens[1][0]] * 2]))[0]
    assert torch.allclose(*cousins) != any(kind in name for kind in HAS_STATE)


@torch.no_grad()
def test_a_draft_of_no_depth_is_empty(name, head, target):
    rows = torch.zeros(1, head.config.num_rows, make.HIDDEN)
    if head.branch_correction is not None:
        rows = head.branch_correction.row_features(rows, rows, head.config.num_rows)
    drafter = JetFlowCandidateGenerator(head, Target(target, head.config))
    assert drafter.ranker.rank(rows[0, :0], torch.tensor(IDS), 8).best_tree(1).num_nodes == 1


@torch.no_grad()
def test_a_head_saved_by_us_drafts_the_same(name, head, target, tmp_path):
    head.save_pretrained(tmp_path)
    again = JetFlowHead.from_pretrained(tmp_path).eval()
    first, second = (draft_behind(each, target, torch.tensor([IDS])).best_tree(24) for each in (head, again))
    assert first.tokens.tolist() == second.tokens.tolist()
    assert torch.equal(first.logprobs, second.logprobs)


@torch.no_grad()
def test_the_trees_of_a_batch_are_those_of_its_sequences(name, head, target):
    ids = torch.randint(4, VOCAB, (3, len(IDS)), generator=torch.Generator().manual_seed(9))
    trees = draft_behind(head, target, ids).best_tree(24)
    for row, tokens in enumerate(ids):
        alone = draft_behind(head, target, tokens[None]).best_tree(24)
        pairs = set(zip(alone.parents[0].tolist(), alone.tokens[0].tolist(), strict=True))
        assert pairs == set(zip(trees.parents[row].tolist(), trees.tokens[row].tolist(), strict=True))
        # A product over a batch rounds differently on some processors, by up to 2.3e-6 here on an Intel Xeon.
        scores = (part.sort().values for part in (alone.logprobs[0], trees.logprobs[row]))
        torch.testing.assert_close(*scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_the_text_is_plain_decoding_s_own(name, head, target, do_sample):
    settings = dict(max_new_tokens=8, do_sample=do_sample, top_k=0, temperature=0.8)
    prompts = torch.randint(3, VOCAB, (4, 7), generator=torch.Generator().manual_seed(5))
    for ids in (prompts[:1], prompts):
        torch.manual_seed(1)
        plain = target.generate(ids, **settings)
        for budget in (64,) if do_sample else (1, 7, 64) if len(ids) == 1 else (16,):
            head.generation_config.node_budget = budget
            torch.manual_seed(1)
            text = target.generate(ids, assistant_model=head, **settings)
            for expected, got in zip(plain, text, strict=True):
                assert_same_text(expected[None], got[None])


@pytest.mark.parametrize("name", ["DFlash 2", "DSpark, SpecForge", "Domino", "speculators xpress", "TreeFlash"])
def test_n_grams_and_few_candidates_leave_the_text_alone(name, target, tmp_path, prompt):
    head = make.load(tmp_path, *scored.CHECKPOINTS[name](), branch_candidates=5)
    plain = target.generate(prompt, max_new_tokens=12, do_sample=False)
    for cache in (None, "static"):
        text = target.generate(
            prompt, assistant_model=head, max_new_tokens=12, do_sample=False, cache_implementation=cache
        )
        assert_same_text(plain, text)


def test_convolutions_and_a_selector_that_do_nothing_are_a_plain_dflash_head(target, tmp_path):
    config, tensors = scored.dflash2()
    for name, tensor in tensors.items():
        if "base_kernel" in name:
            tensor.zero_()[:, 0] = 1.0
        elif "kernel_projection" in name or "successor" in name:
            tensor.zero_()
    ids = torch.tensor([IDS])
    first = make.load(tmp_path / "first", make.dflash_old(False), make.body_tensors(), ngram_weights=[])
    second = make.load(tmp_path / "second", config, tensors, ngram_weights=[])
    first, second = (draft_behind(head, target, ids).best_tree(40) for head in (first, second))
    assert first.tokens.tolist() == second.tokens.tolist()
    torch.testing.assert_close(first.logprobs, second.logprobs)


@torch.no_grad()
def test_a_selector_scores_no_token_beyond_its_vocabulary(target, tmp_path):
    config, tensors = scored.dflash2()
    config["dflash_config"]["selector_vocab_size"] = 60
    head = make.load(tmp_path, config, tensors, branch_candidates=VOCAB, ngram_weights=[])
    draft = draft_behind(head, target, torch.tensor([IDS]))
    for depth, scores in enumerate(scores_along(draft, [IDS[-1], 7, 8])):
        is_changed = (scores - draft.candidates.logprobs[0, depth]).abs() > 1e-5
        changed = draft.candidates.tokens[0, depth][is_changed]
        assert 0 < len(changed) <= scored.TOP_K
        assert changed.max() < 60


@torch.no_grad()
@pytest.mark.parametrize("before", [-1, VOCAB, 10**6])
def test_what_is_no_token_before_the_anchor_counts_as_the_anchor(target, tmp_path, before):
    head = make.load(tmp_path, *scored.xpress(), ngram_weights=[])
    drafter, rows = JetFlowCandidateGenerator(head, Target(target, head.config)), torch.randn(7, 3 * make.HIDDEN)
    got, expected = (
        scores_along(drafter.ranker.rank(rows[None], torch.tensor([[first, 9]]), 8), [9, 5, 6])
        for first in (before, 9)
    )
    torch.testing.assert_close(got, expected)


def test_a_markov_head_of_rank_zero_is_none(tmp_path):
    config, tensors = scored.speculators_dspark()
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(("markov", "confidence"))}
    head = make.load(tmp_path, config | {"markov_rank": 0, "enable_confidence_head": False}, kept)
    assert head.branch_correction is None


@torch.no_grad()
def test_the_rows_of_transformers_own_assistant_are_its_model_s(target, tmp_path):
    from transformers import AutoModel

    head = make.load(tmp_path, *scored.muse_assistant(), attn_implementation="eager")
    theirs = AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    features = torch.randn(1, 9, 128)
    embeds = torch.randn(1, make.BLOCK, 64)
    positions = torch.arange(9 + make.BLOCK)[None]
    expected = theirs(noise_embeds=embeds, context_hidden_states=features, position_ids=positions)
    rows = head(embeds, features, positions[:, 9:], positions[:, :9])
    torch.testing.assert_close(rows, expected.last_hidden_state, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_head_whose_anchor_predicts_drafts_one_depth_earlier(target, tmp_path):
    """The same rows, read from the anchor's or from the next one."""
    scores = []
    for predicts in (True, False):
        config, tensors = scored.speculators_dspark("vanilla", predicts)
        config["block_size"] = make.BLOCK
        head = make.load(tmp_path / str(predicts), config, tensors, branch_candidates=VOCAB, ngram_weights=[])
        draft = draft_behind(head, target, torch.tensor([IDS]))
        path = [IDS[-1]] * (head.config.block_size - 1)
        by_depth = enumerate(scores_along(draft, path))
        scores.append([by_draft_token(draft, each, depth, head) for depth, each in by_depth])
    early, late = scores
    assert (len(early), len(late)) == (make.BLOCK, make.BLOCK - 1)
    for one, other in zip(early[1:], late, strict=True):
        torch.testing.assert_close(one, other)
    assert not any(torch.allclose(one, other) for one, other in pairwise(early))
