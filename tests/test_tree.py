"""The best tree within a budget, against brute force over every set of nodes that contains its parents."""

import pytest
import torch
from helpers import random_parents

from hf_jetflow.trees.tree import Candidates, DraftTree, ancestor_mask, build_tree


ANCHOR = torch.tensor([99])
DEPTH, WIDTH = 3, 3

Path = tuple[int, ...]  # tokens below the root


def make_candidates(depth: int = DEPTH, width: int = WIDTH, seed: int = 0) -> Candidates:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.stack([torch.randperm(50, generator=generator)[:width] for _ in range(depth)])
    logits = 2 * torch.randn(depth, width + 1, generator=generator)  # one token more than is offered: no sum is 1
    logprobs = torch.log_softmax(logits, dim=-1)[:, :width].sort(descending=True).values
    return Candidates(tokens, logprobs)


def row_after(path: Path, width: int) -> torch.Tensor:
    """Log-probabilities of the next depth's candidates that depend on every token of the path."""
    generator = torch.Generator().manual_seed(hash(path) % 2**31)
    return torch.log_softmax(2 * torch.randn(width + 1, generator=generator), dim=-1)[:width]


class PathScorer:
    """Scores by the whole path, which it knows only through `parents` and `tokens`, as a recurrent scorer would."""

    def __init__(self, width: int = WIDTH):
        self.width = width
        self.calls: list[int] = []
        self.paths: list[Path] = [()]

    def __call__(self, depth: int, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        self.calls.append(depth)
        if depth == 0:
            assert parents.tolist() == [0]
            assert torch.equal(tokens, ANCHOR)
        else:
            links = zip(parents.tolist(), tokens.tolist(), strict=True)
            self.paths = [(*self.paths[parent], token) for parent, token in links]
        return torch.stack([row_after(path, self.width) for path in self.paths])


def scores_of_all_paths(candidates: Candidates, is_scored: bool) -> dict[Path, float]:
    scores: dict[Path, float] = {(): 0.0}
    level: list[Path] = [()]
    for tokens, logprobs in zip(candidates.tokens.tolist(), candidates.logprobs, strict=True):
        deeper = []
        for path in level:
            row = row_after(path, len(tokens)) if is_scored else logprobs
            for token, logprob in zip(tokens, row.tolist(), strict=True):
                scores[(*path, token)] = scores[path] + logprob
                deeper.append((*path, token))
        level = deeper
    return scores


def all_trees(paths: set[Path], size: int) -> set[frozenset[Path]]:
    """Every set of `size` paths that holds the root and the parent of each of its paths."""
    trees = {frozenset([()])}
    for _ in range(size - 1):
        trees = {tree | {path} for tree in trees for path in paths - tree if path[:-1] in tree}
    return trees


def paths_of(tree: DraftTree) -> list[Path]:
    paths: list[Path] = [()]
    for parent, token in zip(tree.parents.tolist()[1:], tree.tokens.tolist()[1:], strict=True):
        paths.append((*paths[parent], token))
    return paths


def on_offer(depth: int, width: int) -> int:
    return sum(width**level for level in range(depth + 1))


@pytest.mark.parametrize("is_scored", [False, True], ids=["shared rows", "scorer"])
@pytest.mark.parametrize("node_budget", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(4))
def test_the_tree_is_the_likeliest_of_all_trees_of_its_size(seed, node_budget, is_scored):
    candidates = make_candidates(seed=seed)
    tree = build_tree(ANCHOR, candidates, node_budget, PathScorer() if is_scored else None)
    scores = scores_of_all_paths(candidates, is_scored)
    best = max(all_trees(set(scores), node_budget), key=lambda paths: sum(scores[path] for path in paths))
    assert set(paths_of(tree)) == best


@pytest.mark.parametrize("is_scored", [False, True], ids=["shared rows", "scorer"])
@pytest.mark.parametrize("node_budget", [1, 7, 20, 39, 40, 64])
def test_the_nodes_are_those_with_the_highest_scores_at_any_budget(node_budget, is_scored):
    candidates = make_candidates(seed=9)
    tree = build_tree(ANCHOR, candidates, node_budget, PathScorer() if is_scored else None)
    scores = scores_of_all_paths(candidates, is_scored)
    assert set(paths_of(tree)) == set(sorted(scores, key=scores.__getitem__, reverse=True)[:node_budget])


@pytest.mark.parametrize("is_scored", [False, True], ids=["shared rows", "scorer"])
def test_each_node_carries_its_cumulative_log_probability(is_scored):
    candidates = make_candidates(depth=4, seed=2)
    tree = build_tree(ANCHOR, candidates, 30, PathScorer() if is_scored else None)
    scores = scores_of_all_paths(candidates, is_scored)
    torch.testing.assert_close(tree.logprobs, torch.tensor([scores[path] for path in paths_of(tree)]))


@pytest.mark.parametrize(("depth", "width"), [(1, 1), (1, 6), (3, 1), (2, 4), (5, 3)])
@pytest.mark.parametrize("node_budget", [1, 2, 4, 6, 17, 400])
def test_the_tree_has_as_many_nodes_as_budget_and_candidates_allow(depth, width, node_budget):
    tree = build_tree(ANCHOR, make_candidates(depth, width), node_budget)
    assert len(tree.tokens) == min(node_budget, on_offer(depth, width))
    assert {len(part) for part in (tree.parents, tree.depths, tree.logprobs, *tree.ancestor_mask)} == {
        len(tree.tokens)
    }


@pytest.mark.parametrize("node_budget", [2, 9, 33])
def test_parents_come_before_their_children_and_lie_one_level_higher(node_budget):
    tree = build_tree(ANCHOR, make_candidates(depth=6, width=4), node_budget)
    assert tree.parents[0] == -1
    assert tree.depths[0] == 0
    children = torch.arange(1, len(tree.tokens))
    assert bool((tree.parents[children] < children).all())
    assert torch.equal(tree.depths[tree.parents[children]] + 1, tree.depths[children])
    assert bool((tree.depths.diff() >= 0).all())


def test_siblings_hold_different_tokens_of_their_own_depth():
    candidates = make_candidates(depth=4, width=4)
    tree = build_tree(ANCHOR, candidates, 60)
    pairs = list(zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    for depth, token in zip(tree.depths.tolist()[1:], tree.tokens.tolist()[1:], strict=True):
        assert token in candidates.tokens[depth - 1].tolist()


def test_width_one_yields_a_chain():
    candidates = make_candidates(depth=5, width=1)
    tree = build_tree(ANCHOR, candidates, 16)
    assert tree.tokens.tolist() == [99, *candidates.tokens[:, 0].tolist()]
    assert tree.parents.tolist() == [-1, 0, 1, 2, 3, 4]
    assert torch.equal(tree.ancestor_mask, torch.ones(6, 6, dtype=torch.bool).tril())


def test_a_budget_of_one_yields_the_root_alone():
    tree = build_tree(ANCHOR, make_candidates(), 1)
    assert tree.tokens.tolist() == [99]
    assert tree.parents.tolist() == [-1]
    assert tree.ancestor_mask.tolist() == [[True]]
    assert tree.max_depth == 0


def test_no_candidates_yield_the_root_alone():
    nothing = Candidates(torch.empty(0, 4, dtype=torch.long), torch.empty(0, 4))
    assert build_tree(ANCHOR, nothing, 8).tokens.tolist() == [99]


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("node_budget", [2, 3, 5, 8, 30])
def test_nodes_as_likely_as_their_parents_never_replace_them(node_budget, width):
    candidates = make_candidates(depth=5, width=width)
    candidates.logprobs.zero_()
    tree = build_tree(ANCHOR, candidates, node_budget)
    paths = set(paths_of(tree))  # a lost parent would give a path that does not exist
    assert all(path[:-1] in paths for path in paths if path)
    assert bool((tree.parents[1:] < torch.arange(1, len(tree.tokens))).all())
    assert len(paths) == min(node_budget, on_offer(5, width))


def test_a_certain_spine_comes_before_any_doubtful_sibling():
    candidates = make_candidates(depth=4, width=3)
    candidates.logprobs[:] = torch.tensor([0.0, -20.0, -30.0])
    tree = build_tree(ANCHOR, candidates, 5)
    assert tree.depths.tolist() == [0, 1, 2, 3, 4]
    assert tree.tokens.tolist()[1:] == candidates.tokens[:, 0].tolist()


def test_impossible_candidates_fill_the_budget_only_when_nothing_else_is_left():
    candidates = make_candidates(depth=2, width=3)
    candidates.logprobs[:, 1:] = float("-inf")
    assert build_tree(ANCHOR, candidates, 3).depths.tolist() == [0, 1, 2]
    assert len(build_tree(ANCHOR, candidates, 6).tokens) == 6


@pytest.mark.parametrize("is_scored", [False, True], ids=["shared rows", "scorer"])
def test_a_greater_budget_only_adds_nodes(is_scored):
    candidates = make_candidates(depth=4, width=4, seed=3)
    smaller: set[Path] = set()
    for node_budget in range(1, 60):
        scorer = PathScorer(width=4) if is_scored else None
        paths = set(paths_of(build_tree(ANCHOR, candidates, node_budget, scorer)))
        assert smaller < paths
        smaller = paths


def test_the_scorer_is_called_once_per_depth_from_the_root_down():
    scorer = PathScorer()
    build_tree(ANCHOR, make_candidates(), 20, scorer)
    assert scorer.calls == list(range(DEPTH))


def test_the_scorer_is_not_asked_below_what_the_budget_can_reach():
    scorer = PathScorer()
    build_tree(ANCHOR, make_candidates(), 2, scorer)
    assert scorer.calls == [0]


def test_the_scorer_sees_no_more_branches_than_the_budget_has_nodes():
    scorer = PathScorer(width=4)
    build_tree(ANCHOR, make_candidates(depth=4, width=4), 7, scorer)
    assert 1 <= len(scorer.paths) <= 6


def test_the_scorer_is_spared_branches_that_have_fallen_out_of_the_tree():
    scores = {1: [-0.1, -9.0, -9.0, -9.0], 0: [-0.1, -8.0, -8.0, -8.0]}  # one likely path, all else far behind
    asked = []

    def scorer(depth: int, parents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        asked.append(len(tokens))
        return torch.tensor([scores[depth % 2]] * len(tokens))

    tree = build_tree(ANCHOR, make_candidates(depth=4, width=4), 5, scorer)
    assert asked == [1, 4, 1, 1]
    assert tree.depths.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("min_logprob", [-0.5, -2.0, -4.0, -99.0])
@pytest.mark.parametrize("node_budget", [2, 7, 20, 200])
def test_below_the_minimum_log_probability_nothing_is_drafted(node_budget, min_logprob):
    candidates, scorer = make_candidates(depth=4, width=4, seed=3), PathScorer(width=4)
    paths = set(paths_of(build_tree(ANCHOR, candidates, node_budget, scorer, min_logprob=min_logprob)))
    scores = scores_of_all_paths(candidates, is_scored=True)
    whole = paths_of(build_tree(ANCHOR, candidates, node_budget, PathScorer(width=4)))
    best_child = max((path for path in scores if len(path) == 1), key=scores.__getitem__)
    assert paths == {path for path in whole if scores[path] >= min_logprob} | {(), best_child}


@pytest.mark.parametrize("num_nodes", [1, 2, 9, 40])
def test_a_node_sees_itself_and_its_ancestors_only(num_nodes):
    parents = random_parents(num_nodes, torch.Generator().manual_seed(num_nodes))
    expected = torch.zeros(num_nodes, num_nodes, dtype=torch.bool)
    for node in range(num_nodes):
        seen = node
        while seen >= 0:
            expected[node, seen] = True
            seen = parents[seen]
    depth = int(expected.sum(dim=1).max()) - 1
    assert torch.equal(ancestor_mask(torch.tensor(parents), depth), expected)
    assert torch.equal(ancestor_mask(torch.tensor(parents), depth + 3), expected)
