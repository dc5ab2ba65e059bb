"""The draft as one function of fixed shapes: the trees of the host's way, one graph, and the plain text."""

import make_layouts as make
import make_scored_layouts as scored
import pytest
import torch
from helpers import drafter_of
from make_layouts import VOCAB

from hf_jetflow.decoding.captured_draft import as_draft, draft_tree
from hf_jetflow.head.cache import StaticHeadCache
from hf_jetflow.trees.recycled import NO_CHOICE, RecycledChoices, no_choices


CORRECTIONS = {kind: dict(branch_correction=kind) for kind in ("parent", "path")}
PATH = "path, draft vocabulary"
CORRECTIONS[PATH] = dict(branch_correction="path", draft_vocab_size=VOCAB // 2)
KINDS = ["plain", *CORRECTIONS, *scored.CHECKPOINTS]
CONTINUED = 16
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def target(tiny_target):
    return tiny_target("llama")


def head_of(kind, target, random_head, folder, **config):
    config = dict(branch_candidates=24) | config
    if kind in scored.CHECKPOINTS:
        return make.load(folder, *scored.CHECKPOINTS[kind](), **config)
    head = random_head(target, **CORRECTIONS.get(kind, {}), **config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.ndim == 1))
    return head


def texts(batch: int, seed: int = 9) -> torch.Tensor:
    """Ids (batch, 30), in which the second half repeats the first."""
    return torch.randint(4, VOCAB, (batch, 15), generator=torch.Generator().manual_seed(seed)).repeat(1, 2)


def trees_of(head, target, ids: torch.Tensor, budgets: list[int]) -> list:
    anchors = torch.full((len(ids),), ids.shape[1] - 1)
    draft = drafter_of(head, target, ids).propose(ids, anchors, head.config.block_size - 1, width=24)
    return [draft.best_tree(budget, width=24, max_continued=CONTINUED) for budget in budgets]


def recycled_after(ids):
    """Choices at the nodes of a tree that was verified three tokens ago."""
    nodes = torch.tensor([[int(ids[0, -4]), 11, 12, *ids[0, -3:].tolist()]])
    parents = torch.tensor([[-1, 0, 1, 0, 3, 4]])
    choices = torch.tensor([[NO_CHOICE, 13, 14, 15, 16, 17]])
    return RecycledChoices(nodes, parents, choices, torch.tensor([3]))


def assert_same_tree(host, fixed) -> None:
    """Fixed shapes may add nodes at minus infinity."""
    for row in range(len(host.tokens)):
        is_real = fixed.logprobs[row] > -torch.inf
        for name in ("tokens", "parents", "depths"):
            assert getattr(host, name)[row].tolist() == getattr(fixed, name)[row][is_real].tolist(), name
        torch.testing.assert_close(host.logprobs[row], fixed.logprobs[row][is_real], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_trees_of_fixed_shapes_are_those_of_the_host(kind, target, random_head, tmp_path, monkeypatch):
    head, budgets = head_of(kind, target, random_head, tmp_path), [1, 2, 7, 64, 256]
    for weights in ([], head.config.ngram_weights):
        head.config.ngram_weights = weights
        for batch in (1, 4):
            ids = texts(batch)
            with monkeypatch.context() as patched:
                host = trees_of(head, target, ids, budgets)
                patched.setattr(torch.compiler, "is_compiling", lambda: True)
                for one, other in zip(host, trees_of(head, target, ids, budgets), strict=True):
                    assert_same_tree(one, other)


@torch.no_grad()
@pytest.mark.parametrize("kind", [PATH, *(pytest.param(kind, marks=SLOW) for kind in KINDS if kind != PATH)])
@pytest.mark.parametrize("is_sampled", [False, True], ids=["greedy", "sampled"])
def test_a_draft_is_one_graph_for_all_rounds(is_sampled, kind, target, random_head, tmp_path):
    head, num_graphs, depth = head_of(kind, target, random_head, tmp_path), 0, 0

    def backend(graph, _inputs):
        nonlocal num_graphs
        num_graphs += 1
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(draft_tree, fullgraph=True, dynamic=False, backend=backend)
    depth = head.config.block_size - 1
    for seed in (1, 2):
        ids = texts(1, seed)
        drafter, anchors = drafter_of(head, target, ids), torch.tensor([ids.shape[1] - 1])
        drafter.ranker.prepare()
        cache = StaticHeadCache(head.config.num_hidden_layers, 64)
        on_host, recycled = drafter_of(head, target, ids), None
        if head.config.ngram_weights and seed == 1:
            recycled = no_choices(1, 64, ids.device)
        elif head.config.ngram_weights:
            on_host._recycled = recycled_after(ids)
            recycled = on_host._recycled.padded(64)
        noise = torch.randn(1, depth, target.config.vocab_size) if is_sampled else None
        host = on_host.propose(ids, anchors, depth, 24, noise).best_tree(64, 24, max_continued=CONTINUED)
        features, position_ids = drafter._take_pending()
        context = features, position_ids[0, :1], recycled, noise, cache
        outputs = compiled(drafter, ids, anchors, *context, 64, depth, 24, CONTINUED)
        draft = as_draft(outputs, depth + CONTINUED)
        assert_same_tree(host, draft.tree)
        assert torch.equal(host.ancestor_mask, draft.tree.ancestor_mask)
        assert draft.best_tree(16) is draft.tree, "the policy trims it"
    assert num_graphs == 1
