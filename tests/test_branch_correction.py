"""The branch correction: drafting scores a node as training does, on its whole branch, and starts from nothing."""

import pytest
import torch
from helpers import alter, tiny_config, tiny_head
from reference import assert_same_text
from torch import nn

from hf_jetflow import JetFlowConfig, JetFlowHead
from hf_jetflow.decoding import branch_scores
from hf_jetflow.decoding.drafter import JetFlowCandidateGenerator
from hf_jetflow.target.target import Target
from hf_jetflow.training.blocks import DraftedRows, measure_agreement, score_candidates
from hf_jetflow.training.losses import chunked_forward_kl, correction_kl
from hf_jetflow.training.replay import replay
from hf_jetflow.trees.tree import Candidates, build_tree, corrected_logprobs, with_rest


KINDS = ["parent", "path"]
VOCAB_SIZE = 257


@pytest.fixture
def rows() -> torch.Tensor:
    """Hidden rows of seven depths."""
    return torch.randn(7, 64, generator=torch.Generator().manual_seed(7))


def make_drafter(tiny_target, random_head, **config) -> JetFlowCandidateGenerator:
    target = tiny_target("llama")
    head = random_head(target, ngram_weights=[], **config)
    alter(head)
    return JetFlowCandidateGenerator(head, Target(target, head.config))


def shifts_along(head: JetFlowHead, target: nn.Module, rows: torch.Tensor, path: list[int]) -> torch.Tensor:
    """What training computes: the shift of each depth's row when the true tokens are those of `path`, anchor first."""
    block = torch.cat([torch.zeros(1, rows.shape[1]), rows])[None]
    parents = target.get_input_embeddings()(torch.tensor([[0, *path]]))
    return head._shifts(block, parents)[0, 1:].detach()


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_correction_changes_no_score(kind, tiny_target, random_head, rows):
    target = tiny_target("llama")
    drafter = JetFlowCandidateGenerator(
        head := random_head(target, branch_correction=kind, branch_candidates=20, ngram_weights=[]),
        Target(target, head.config),
    )
    draft = drafter.ranker.rank(rows, torch.tensor([9]), 64)
    candidates = draft.candidates
    for depth in range(7):
        scores = draft.score_branches(depth, torch.zeros(1, dtype=torch.long), torch.tensor([5]))
        torch.testing.assert_close(scores[0], candidates.logprobs[depth])


@torch.no_grad()
@pytest.mark.parametrize("capacity", [4, 9, 2048])
def test_projected_tokens_are_stored_for_the_next_rounds(capacity, tiny_target, random_head, monkeypatch):
    monkeypatch.setattr(branch_scores, "MAX_CACHED_TOKENS", capacity)
    drafter = make_drafter(tiny_target, random_head, branch_correction="path")
    parts = branch_scores.ProjectedTokenCache(drafter.head.branch_correction, drafter.target)
    project, asked = parts._project, []
    monkeypatch.setattr(parts, "_project", lambda tokens: asked.append(tokens.tolist()) or project(tokens))
    rounds = [([5, 7, 5], [8, 9, 7]), ([9, 7], []), ([7, 30, 8], [31]), ([1, 2, 3, 4, 5, 6], [5]), ([5, 6], [])]
    for tokens, soon in rounds:
        tokens = torch.tensor(tokens)
        torch.testing.assert_close(parts.lookup(tokens, torch.tensor(soon)), project(tokens))
    if capacity == 2048:
        assert asked == [[5, 7, 8, 9], [30, 31], [1, 2, 3, 4, 6]]
    if capacity == 9:  # the fourth round does not fit in: what was stored is dropped
        assert asked == [[5, 7, 8, 9], [30, 31], [1, 2, 3, 4, 5, 6]]
    if capacity == 4:  # nor would the fourth alone
        assert asked[-2:] == [[1, 2, 3, 4, 5, 6], [5, 6]]


@pytest.mark.parametrize("is_shared", [True, False], ids=["shared parts once", "each branch for itself"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_is_scored_as_in_training(kind, is_shared, tiny_target, random_head, rows, monkeypatch):
    """Every node of a tree: its log-probability is that of its own path under the teacher-forced shifts."""
    if not is_shared:  # as on other devices than the CPU
        monkeypatch.setattr(
            branch_scores.ProjectedTokenCache, "lookup", lambda parts, tokens, soon: parts._project(tokens)
        )
        monkeypatch.setattr(branch_scores, "_distinct", lambda ids: (ids, torch.arange(len(ids))))
    drafter = make_drafter(tiny_target, random_head, branch_correction=kind, branch_candidates=12)
    head, target = drafter.head, drafter.target.model
    weight = target.get_output_embeddings().weight.detach()
    rows = rows * 0.05  # so that no depth is certain of one token
    draft = drafter.ranker.rank(rows, torch.tensor([9]), 64)
    candidates = draft.candidates
    tree = build_tree(torch.tensor([9]), candidates, 40, draft.score_branches)
    assert tree.depths.max() > 2
    assert len(set(tree.parents.tolist())) > 5, "almost no branches, so this test shows little"
    for leaf in range(1, 40):
        path = []
        node = leaf
        while node >= 0:
            path.insert(0, node)
            node = int(tree.parents[node])
        tokens = tree.tokens[path].tolist()
        shifts = shifts_along(head, target, rows, (tokens + [0] * 8)[:7])
        expected = 0.0
        for depth, token in enumerate(tokens[1:]):
            logits = rows[depth] @ weight.T
            chosen = logits.topk(12).indices
            base = torch.log_softmax(logits, -1)[chosen]
            changed = torch.cat([(base + weight[chosen] @ shifts[depth]), (1 - base.exp().sum()).log()[None]])
            expected += float(torch.log_softmax(changed, -1)[chosen.tolist().index(token)])
        assert float(tree.logprobs[leaf].detach()) == pytest.approx(expected, abs=2e-4)


def test_the_path_kind_looks_further_up_than_the_parent(tiny_target, random_head, rows):
    target = tiny_target("llama")
    changed = {}
    for kind in KINDS:
        head = make_drafter(tiny_target, random_head, branch_correction=kind).head
        shifts = [shifts_along(head, target, rows, [8, 3, grandparent, 5, 6, 7, 8]) for grandparent in (20, 21)]
        changed[kind] = [not torch.equal(*pair) for pair in zip(*shifts, strict=True)]
    assert changed["parent"] == [False, False, True, False, False, False, False]
    assert changed["path"] == [False, False, True, True, True, True, True]


def test_corrected_probabilities_and_the_rest_sum_to_one():
    logprobs = torch.log_softmax(torch.randn(5, 30), -1)[:, :8]
    corrected = corrected_logprobs(with_rest(logprobs), 3 * torch.randn(5, 8))
    torch.testing.assert_close(corrected.exp().sum(-1), torch.ones(5))
    unchanged = corrected_logprobs(with_rest(logprobs), torch.zeros(5, 8))
    torch.testing.assert_close(unchanged[:, :-1], logprobs)


def test_a_corrected_score_is_never_above_one():
    logprobs = torch.log_softmax(torch.tensor([[9.0, 0.0, -3.0]]), -1)  # all tokens are candidates: there is no rest
    corrected = corrected_logprobs(with_rest(logprobs), torch.tensor([[50.0, -50.0, 0.0]]))
    assert (corrected <= 0).all()
    assert corrected.isfinite().all()


def test_a_corrected_chain_follows_the_best_child_of_each_node():
    candidates = Candidates(torch.tensor([[1, 2, 3]] * 3), torch.tensor([[-0.5, -1.5, -2.5]] * 3))
    after = {0: [-0.5, -1.5, -2.5], 1: [-3.0, -2.0, -0.2], 3: [-2.0, -0.1, -4.0]}
    tree = build_tree(
        torch.tensor([0]), candidates, 4, lambda _, __, tokens: torch.tensor([after[int(t)] for t in tokens]), width=1
    )
    assert tree.tokens.tolist() == [0, 1, 3, 2]
    assert tree.parents.tolist() == [-1, 0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_correction_is_saved_and_loaded(kind, tmp_path):
    head = tiny_head(branch_correction=kind, branch_intermediate_size=24, branch_candidates=9)
    head.save_pretrained(tmp_path)
    loaded = JetFlowHead.from_pretrained(tmp_path)
    assert (loaded.config.branch_correction, loaded.config.branch_intermediate_size) == (kind, 24)
    assert loaded.config.branch_candidates == 9
    saved = head.state_dict()
    assert saved.keys() == loaded.state_dict().keys()
    assert any(name.startswith("branch_correction.") for name in saved)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in saved.items())


def test_a_head_without_correction_has_no_tensors_of_one():
    assert not [name for name in tiny_head().state_dict() if "branch" in name]


def test_a_checkpoint_that_lacks_its_correction_is_refused(tmp_path):
    tiny_head().save_pretrained(tmp_path)
    tiny_config(branch_correction="path").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing.*branch_correction|branch_correction.*missing"):
        JetFlowHead.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(branch_correction="sibling"), "branch_correction"),
        (dict(branch_correction="path", branch_intermediate_size=0), "branch_intermediate_size"),
        (dict(branch_correction="path", branch_candidates=0), "branch_candidates"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        JetFlowConfig(**settings)


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_the_correction_s_loss_equals_its_definition(chunk_size):
    generator = torch.Generator().manual_seed(8)
    rows, teacher, shifts = (0.4 * torch.randn(11, 16, generator=generator) for _ in range(3))
    projection = torch.randn(30, 16, generator=generator)
    kl = chunked_forward_kl(rows, teacher, projection, num_candidates=7)
    shifts.requires_grad_()
    divergence, is_top1 = correction_kl(kl, shifts, projection, chunk_size)
    divergence.sum().backward()

    free = shifts.detach().clone().requires_grad_()
    logits, p = rows @ projection.T, torch.softmax(teacher @ projection.T, -1)
    chosen = logits.topk(7).indices
    base = torch.log_softmax(logits, -1).gather(1, chosen)
    changed = base + (free @ projection.T).gather(1, chosen)
    rest = (1 - base.exp().sum(-1, keepdim=True)).log()
    log_q = torch.log_softmax(torch.cat([changed, rest], -1), -1)
    p = torch.cat([p.gather(1, chosen), 1 - p.gather(1, chosen).sum(-1, keepdim=True)], -1)
    expected = (p * (p.log() - log_q)).sum(-1)
    expected.sum().backward()
    torch.testing.assert_close(divergence, expected)
    torch.testing.assert_close(shifts.grad, free.grad)
    best = chosen.gather(1, log_q[:, :-1].argmax(-1, keepdim=True))[:, 0]
    assert is_top1.tolist() == (best == (teacher @ projection.T).argmax(-1)).tolist()


def test_rows_learn_from_the_corrected_scores_as_their_shifts_do():
    generator = torch.Generator().manual_seed(9)
    rows, teacher, shifts = (0.4 * torch.randn(6, 16, generator=generator) for _ in range(3))
    rows.requires_grad_()
    shifts.requires_grad_()
    drafted = DraftedRows(rows, shifts, teacher, *torch.zeros(2, 6, dtype=torch.long), torch.ones(6, dtype=torch.bool))
    _, corrected, _ = score_candidates(drafted, torch.randn(30, 16, generator=generator), 1.0, 7)
    assert corrected is not None
    corrected.sum().backward()
    torch.testing.assert_close(rows.grad, shifts.grad)
    assert rows.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("kind", "width"), [("random", None), ("noisy", None), ("parent", None), ("path", None), ("noisy", 1), ("path", 1)]
)
def test_a_replay_counts_the_rounds_of_decoding(kind, width, tiny_target, head_of_kind, prompt):
    target = tiny_target("llama")
    plain = target.generate(prompt, max_new_tokens=33, do_sample=False)
    head = head_of_kind(kind, target, plain)
    replayed = replay(
        Target(target, head.config), head, [(plain[0].tolist(), prompt.shape[1])], [2, 8, 40], width=width
    )
    for budget, stats in replayed.items():
        head.generation_config.node_budget, head.generation_config.width = budget, width
        text = target.generate(prompt, max_new_tokens=33, do_sample=False, assistant_model=head)
        assert_same_text(plain, text)
        assert stats.num_new_tokens == head.last_stats.num_new_tokens
        assert stats.num_rounds == head.last_stats.num_rounds
        assert stats.accepted_by_depth == head.last_stats.accepted_by_depth
        assert stats.offered_by_depth == head.last_stats.offered_by_depth
    head.generation_config.width = None


def test_agreement_tells_the_spine_from_siblings(tiny_target, echo_head, noisy_head, prompt):
    target = tiny_target("llama")
    plain = target.generate(prompt, max_new_tokens=33, do_sample=False)
    text = (plain[0].tolist(), prompt.shape[1])
    echo = measure_agreement(Target(target, (head := echo_head(target, plain)).config), head, [text])
    assert echo.rates()["top1"] == [1.0] * 7
    assert echo.rates()["spine_top1"] == [1.0] * 7
    assert echo.sums["sibling_count"].tolist() == [0.0] * 7
    assert echo.sums["count"].tolist() == [32.0 - depth for depth in range(7)]

    noisy = measure_agreement(Target(target, (head := noisy_head(target, plain)).config), head, [text])
    is_first = head.rows[prompt.shape[1] :] @ target.get_output_embeddings().weight.T
    is_first = is_first.argmax(-1) == plain[0, prompt.shape[1] :]
    for depth in range(7):  # anchors 0 .. 31 of the answer; depth d drafts token anchor + d + 1
        pairs = [(bool(is_first[place - 1]), bool(is_first[place])) for place in range(depth + 1, 33)]
        spines = [all(is_first[place - depth : place]) for place in range(depth + 1, 33)]
        assert noisy.sums["spine_count"][depth] == sum(spines)
        assert noisy.sums["spine_top1"][depth] == sum(s and own for s, (_, own) in zip(spines, pairs, strict=True))
        assert noisy.rates()["top1"][depth] == pytest.approx(sum(own for _, own in pairs) / len(pairs))
    assert noisy.sums["sibling_count"][1:].min() > 0
