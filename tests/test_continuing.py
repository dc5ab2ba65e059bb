"""Trees that n-grams continue below the block, where the text repeats itself."""

import math

import pytest
import torch
from conftest import BLOCK_SIZE, FAMILIES, make_prompt
from helpers import as_batch, make_tree
from reference import assert_same_text

from hf_jetflow.decoding.policy import MAX_CONTINUED, TreeLimits, chain_limits, plan_round
from hf_jetflow.trees import ngrams
from hf_jetflow.trees.ngrams import MAX_MATCH, _longest_match, continue_tree
from hf_jetflow.trees.tree import ancestor_mask


# Two paths below the anchor 10: 11 12, which came before 13 14 15, and 11 20.
CONTEXT = [10, 11, 12, 13, 14, 15, 16, 17, 20, 5, 10]


def two_paths(of_known=-0.5, of_new=-0.7):
    tree = make_tree([10, 11, 12, 20], [-1, 0, 1, 1])
    tree.logprobs = torch.tensor([0.0, -0.1, of_known, of_new])
    tree.max_depth = 2
    return tree


def continued(tree, node_budget=10, max_continued=4, context=CONTEXT, **limits):
    return continue_tree(tree, torch.tensor(context), node_budget, max_continued, **limits)


@pytest.mark.parametrize("has_batch", [False, True])
def test_the_best_leaf_is_followed_by_what_came_after_it(has_batch):
    tree = two_paths()
    result = continued(as_batch(tree) if has_batch else tree)
    assert result.tokens.shape == ((1, 8) if has_batch else (8,))
    result = result if not has_batch else type(result)(*(value[0] for value in list(vars(result).values())[:4]), 6)
    assert result.tokens.tolist() == [10, 11, 12, 20, 13, 14, 15, 16]
    assert result.parents.tolist() == [-1, 0, 1, 1, 2, 4, 5, 6]
    assert result.depths.tolist() == [0, 1, 2, 2, 3, 4, 5, 6]
    shares = torch.tensor([3 / 5, 4 / 6, 5 / 7, 6 / 8]).log().cumsum(0)  # three tokens match, then four, ...
    torch.testing.assert_close(result.logprobs[4:], shares - 0.5)
    assert torch.equal(result.ancestor_mask, ancestor_mask(result.parents, 6))
    assert result.max_depth == 6


@pytest.mark.parametrize(
    ("tree", "limits"),
    [
        (two_paths(of_new=-0.2), dict(context=[10, 11, 12, 13, 5, 10])),  # no place matches the best leaf
        (two_paths(), dict(max_continued=0)),
        (two_paths(), dict(node_budget=4)),  # all places are taken by likelier nodes
        (two_paths(), dict(min_logprob=-0.9)),
        (make_tree([10, 11, 12], [-1, 0, 1]), {}),  # which ends above its deepest level
    ],
)
def test_a_tree_is_left_as_it_is(tree, limits):
    if tree.num_nodes == 3:
        tree.max_depth = 3
    assert continued(tree, **limits) is tree


@pytest.mark.parametrize(
    ("tree", "node_budget"),
    [(two_paths(of_known=-9.0, of_new=-9.0), 4), (make_tree([10], [-1]), 1)],
    ids=["its deepest leaf is its least likely", "a plain round"],
)
def test_nothing_is_searched_where_nothing_can_be_added(tree, node_budget, monkeypatch):
    monkeypatch.setattr(ngrams, "_longest_match", lambda text: pytest.fail("searched"))
    if tree.num_nodes == 1:
        tree.max_depth = 0
    assert continued(tree, node_budget=node_budget) is tree


def test_trees_of_a_batch_are_left_as_they_are():
    trees = as_batch(two_paths(), two_paths())
    assert continue_tree(trees, torch.tensor([CONTEXT, CONTEXT]), 10, 4) is trees


def test_the_likeliest_nodes_stay():
    tree = two_paths(of_new=-1.2)
    assert continued(tree, node_budget=5).tokens.tolist() == [10, 11, 12, 20, 13]
    assert continued(tree, node_budget=4).tokens.tolist() == [10, 11, 12, 13]
    assert continued(tree, min_logprob=math.log(0.5) - 0.5).tokens.tolist() == [10, 11, 12, 20, 13]


def test_a_loop_is_followed_round_and_round():
    tree = make_tree([7, 8], [-1, 0])
    result = continued(tree, max_continued=5, context=[7, 8, 7])
    assert result.tokens.tolist() == [7, 8, 7, 8, 7, 8, 7]


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_match_is_found(seed):
    text = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
    length, place = _longest_match(text)
    found = [
        (count, end)
        for end in range(1, len(text))
        for count in range(1, end + 1)
        if text[end - count : end] == text[len(text) - count :]
    ]
    assert (length, place) == max(found)
    assert _longest_match([1, 2, 3]) == (0, 0)
    assert _longest_match([5] * 99) == (MAX_MATCH, 98)


def test_no_more_is_added_than_may_be_emitted_or_cached():
    limits = TreeLimits(64, 7, 63, max_continued=MAX_CONTINUED)
    assert [plan_round(limits, left).max_continued for left in (None, 3, 8, 9, 12, 99)] == [16, 0, 0, 1, 4, 16]
    assert chain_limits(limits).max_continued == 0


CYCLE = make_prompt(11, seed=8)


def repeating(do_sample=False, **settings):
    """Settings under which a target repeats eleven tokens, whatever it would say."""
    cycle = CYCLE[0].tolist()
    allowed = dict(prefix_allowed_tokens_fn=lambda _row, ids: [cycle[len(ids) % len(cycle)]])
    return dict(attention_mask=torch.ones(1, 44), do_sample=do_sample, **allowed) | settings


@pytest.mark.parametrize(("family", "do_sample"), [*((name, False) for name in FAMILIES), ("llama", True)])
def test_rounds_go_beyond_the_block_and_the_text_stays(family, do_sample, tiny_target, echo_head):
    """Past windows of nine tokens too, which take paths longer than they are."""
    target = tiny_target(family)
    kwargs = repeating(do_sample, max_new_tokens=70, return_dict_in_generate=True, output_logits=True)
    torch.manual_seed(0)
    plain = target.generate(CYCLE.repeat(1, 4), **kwargs)
    head = echo_head(target, plain.sequences)
    torch.manual_seed(0)
    drafted = target.generate(CYCLE.repeat(1, 4), assistant_model=head, **kwargs)
    assert_same_text(plain.sequences, drafted.sequences)
    torch.testing.assert_close(torch.stack(drafted.logits), torch.stack(plain.logits), atol=2e-3, rtol=1e-3)
    assert head.last_stats.tokens_per_round > BLOCK_SIZE
    assert len(head.last_stats.acceptance_by_depth) > BLOCK_SIZE - 1  # what n-grams continued counts, too


def decode_both(target, echo_head, prompt, kwargs, **head_settings):
    """The head of a call whose text is the plain one."""
    plain = target.generate(prompt, **kwargs)
    head = echo_head(target, plain[:1])
    for name, value in head_settings.items():
        setattr(head.generation_config, name, value)
    assert_same_text(plain, target.generate(prompt, assistant_model=head, **kwargs))
    return head


@pytest.mark.parametrize("setting", [dict(max_depth=3), dict(node_budget=8), dict(width=1, node_budget=8)])
def test_a_lower_depth_or_a_full_budget_bounds_the_rounds(setting, tiny_target, echo_head):
    kwargs = repeating(max_new_tokens=50)
    head = decode_both(tiny_target("llama"), echo_head, CYCLE.repeat(1, 4), kwargs, **setting)
    depth = setting.get("max_depth", BLOCK_SIZE - 1)
    assert depth <= head.last_stats.tokens_per_round <= depth + 1


def test_a_chain_goes_on_too(tiny_target, echo_head):
    kwargs = repeating(max_new_tokens=50)
    head = decode_both(tiny_target("llama"), echo_head, CYCLE.repeat(1, 4), kwargs, width=1, node_budget=16)
    assert head.last_stats.tokens_per_round > BLOCK_SIZE


def test_static_caches_take_them(tiny_target, echo_head):
    kwargs = repeating(max_new_tokens=50, cache_implementation="static")
    head = decode_both(tiny_target("llama"), echo_head, CYCLE.repeat(1, 4), kwargs)
    assert head.last_stats.tokens_per_round > BLOCK_SIZE


def test_batches_take_blocks_only(tiny_target, echo_head):
    prompt = CYCLE.repeat(2, 4)
    kwargs = repeating(max_new_tokens=50, attention_mask=torch.ones_like(prompt))
    head = decode_both(tiny_target("llama"), echo_head, prompt, kwargs)
    assert BLOCK_SIZE - 1 <= head.last_stats.tokens_per_round <= BLOCK_SIZE


def test_a_conversation_goes_on_behind_them(tiny_target, echo_head):
    """The cache that a call leaves, and what the head has read, after rounds beyond the block."""
    target, outputs = tiny_target("llama"), []

    def converse(assistant):
        text, cache = CYCLE.repeat(1, 4), None
        for _ in range(3):
            output = target.generate(
                text,
                past_key_values=cache,
                assistant_model=assistant,
                return_dict_in_generate=True,
                **repeating(max_new_tokens=40, attention_mask=torch.ones_like(text)),
            )
            text, cache = output.sequences, output.past_key_values
        outputs.append(text)
        return cache.get_seq_length()

    num_cached = converse(None)
    head = echo_head(target, outputs[0])
    assert converse(head) == num_cached
    assert_same_text(*outputs)
    assert head.last_stats.tokens_per_round > BLOCK_SIZE
