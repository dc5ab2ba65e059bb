"""Recorded draft trees, their layout, and the pages and pictures of them."""

import json
import random
import re
from itertools import pairwise

import pytest
import torch
from conftest import make_prompt
from helpers import run_command, save_pair, tiny_tokenizer, write_lines
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_jetflow.decoding.tree_log import TreeRound
from hf_jetflow.errors import JetFlowError
from hf_jetflow.show import show
from hf_jetflow.show.show import ShowSettings, record_rounds, write_trees
from hf_jetflow.show.token_text import TokenLabels, display_width, text_pieces
from hf_jetflow.show.tree_layout import lay_out
from hf_jetflow.show.tree_page import tree_page
from hf_jetflow.show.tree_plot import CHIP, check_rounds, draw_trees
from hf_jetflow.training.evaluation import tokens_per_round


NEW_TOKENS = 24
BUDGET = 12


@pytest.fixture
def head(target, corrected_head):
    """A head that drafts the texts of `generate` below well; its node budget is 12."""
    ids = make_prompt(12)
    answer = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS + 8, do_sample=False)
    head = corrected_head("path", target, answer)
    head.generation_config.node_budget = BUDGET
    return head


@pytest.fixture
def generate(target, head):
    """`generate(**options)`: the new ids of one greedy call."""

    def run(**options):
        ids = make_prompt(12)
        settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, **options)
        return target.generate(ids, assistant_model=head, **settings)[0, ids.shape[1] :].tolist()

    return run


@pytest.fixture
def rounds(head, generate):
    head.record_trees = True
    generate()
    return head.last_trees


def random_round(num_nodes, seed):
    """A tree of up to seven levels with a random path and a bonus token that was not drafted."""
    chance = random.Random(seed)
    parents, depths, probabilities = [-1], [0], [1.0]
    for node in range(1, num_nodes):
        parent = chance.choice([earlier for earlier in range(node) if depths[earlier] < 7])
        parents.append(parent)
        depths.append(depths[parent] + 1)
        probabilities.append(probabilities[parent] * chance.random())
    path = [num_nodes - 1]
    while path[-1]:
        path.append(parents[path[-1]])
    seconds = {"draft": 0.004, "verify": 0.02}
    tokens = list(range(num_nodes))
    return TreeRound(tokens, parents, depths, probabilities, path[::-1], 250, max(depths), 0, seconds)


# Recording


def test_nothing_is_recorded_by_default(head, generate):
    generate()
    assert head.last_trees is None
    head.record_trees = True
    generate()
    assert head.last_trees
    head.record_trees = False
    generate()
    assert head.last_trees is None, "trees of an earlier call stand beside the figures of a later one"


def test_recording_does_not_change_the_text(head, generate):
    plain = generate()
    head.record_trees = True
    assert generate() == plain


@pytest.mark.parametrize("node_budget", [1, 2, BUDGET, "auto"])
def test_recorded_rounds_add_up_to_the_text_and_to_the_statistics(head, generate, node_budget):
    head.generation_config.node_budget = node_budget
    head.record_trees = True
    ids = generate()
    rounds, stats = head.last_trees, head.last_stats
    assert [rounds[0].tokens[0]] + [token for each in rounds for token in each.new_ids] == ids
    assert [each.tokens[0] for each in rounds[1:]] == [each.bonus_id for each in rounds[:-1]]
    assert len(rounds) == stats.num_rounds
    assert sum(each.num_accepted for each in rounds) == stats.num_accepted
    assert sum(len(each.tokens) - 1 for each in rounds) == stats.num_drafted
    steps = [step for step in stats.seconds_by_step if step != "prefill"]
    for step in steps:
        total = sum(each.seconds_by_step[step] for each in rounds)
        assert total == pytest.approx(stats.seconds_by_step[step], rel=1e-6), step
    assert all(each.seconds == sum(each.seconds_by_step.values()) > 0 for each in rounds)


def test_a_recorded_round_is_a_tree_with_the_accepted_path(rounds):
    assert max(each.num_accepted for each in rounds) > 1
    for each in rounds:
        assert each.parents[0] == -1
        assert each.probabilities[0] == 1
        for node, parent in enumerate(each.parents[1:], 1):
            assert parent < node
            assert each.depths[node] == each.depths[parent] + 1
            assert 0 < each.probabilities[node] <= each.probabilities[parent]
        assert each.path[0] == 0
        assert [each.parents[node] for node in each.path[1:]] == each.path[:-1]
        assert all(type(token) is int for token in each.tokens), "plain data was promised"


def test_an_evaluation_leaves_recorded_trees_unchanged(target, head, rounds):
    before = list(rounds)
    tokens_per_round(target, head, [[5, 6, 7]], 4, max_new_tokens=6)
    assert head.record_trees
    assert head.last_trees == before


# Layout


@pytest.mark.parametrize("path_first", [False, True])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_nodes", [1, 2, 16, 256])
def test_no_two_nodes_and_no_two_edges_overlap(num_nodes, seed, path_first):
    nodes = lay_out(random_round(num_nodes, seed), path_first)
    assert len({(node.depth, node.row) for node in nodes}) == len(nodes) == num_nodes + 1
    children = {index: [node for node in nodes if node.parent == index] for index in range(len(nodes))}
    ends = {}  # by column: rows between which the children of one node hang
    for index, node in enumerate(nodes):
        if children[index]:
            rows = [child.row for child in children[index]]
            assert min(rows) == node.row, "a node stands beside its first child"
            ends.setdefault(node.depth, []).append((min(rows), max(rows)))
    for spans in ends.values():
        spans.sort()
        assert all(bottom < top for (_, bottom), (top, _) in pairwise(spans))


def test_siblings_stand_in_order_of_probability_and_the_bonus_above_them():
    tree = TreeRound([9, 1, 2, 3], [-1, 0, 0, 1], [0, 1, 1, 2], [1.0, 0.2, 0.7, 0.1], [0, 1], 5, 2, 0, {})
    nodes = lay_out(tree)
    assert [node.kind for node in nodes] == ["root", "accepted", "rejected", "rejected", "bonus"]
    assert [node.row for node in nodes] == [0, 1, 0, 2, 1]
    assert nodes[4].probability is None
    assert [node.row for node in lay_out(tree, path_first=True)] == [0, 0, 1, 1, 0]


def test_rounds_of_several_sequences_are_refused():
    rounds = [TreeRound([9], [-1], [0], [1.0], [0], 5, 0, row, {}) for row in (0, 1)]
    with pytest.raises(ValueError, match=r"several sequences of a batch; select one: .*each.row == 0"):
        check_rounds(rounds)
    assert check_rounds(rounds[:1]) == [1]


def test_a_drafted_last_token_is_drawn_once():
    tree = TreeRound([9, 1, 2], [-1, 0, 1], [0, 1, 2], [1.0, 0.5, 0.4], [0, 1], 2, 2, 0, {})
    assert [node.kind for node in lay_out(tree)] == ["root", "accepted", "bonus"]


# Tokens as text


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token for each byte, in the order of the bytes."""
    names = {name: token for token, name in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=names, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_pieces_of_a_text_join_to_the_text_and_hold_whole_characters(byte_tokenizer):
    text = "a é\n漢🌳!"
    ids = byte_tokenizer(text)["input_ids"]
    pieces = text_pieces(byte_tokenizer, ids)
    assert len(pieces) == len(ids) > len(text)
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)


def test_labels_show_white_space(byte_tokenizer):
    labels = TokenLabels(byte_tokenizer)
    ids = byte_tokenizer(" \n\tx")["input_ids"]
    assert [labels.label(token) for token in ids] == ["·", "↵", "⇥", "x"]
    assert labels.text(ids[1]) == "\n"


def test_a_token_has_the_space_before_it():
    labels = TokenLabels(tiny_tokenizer(20))
    assert labels.label(7) == "·t007"


def test_labels_are_cut_to_a_width_of_columns(monkeypatch, byte_tokenizer):
    labels = TokenLabels(byte_tokenizer)
    monkeypatch.setattr(labels, "text", lambda token: "漢字" * 9)
    label = labels.label(0)
    assert label.endswith("字…")
    assert display_width(label) <= 18


# The page


def page_data(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_holds_the_recorded_rounds(head, rounds, target):
    tokenizer = tiny_tokenizer(target.config.vocab_size)
    data = page_data(tree_page(rounds, tokenizer, prompt="Why?", about="a head", first=2))
    assert (data["prompt"], data["about"], data["first"]) == ("Why?", "a head", 2)
    ids = [rounds[0].tokens[0]] + [token for each in rounds for token in each.new_ids]
    assert "".join(text for text, _, _ in data["pieces"]) == tokenizer.decode(ids)
    assert [number for _, _, number in data["pieces"]] == [
        -1,
        *(number for number, each in enumerate(rounds) for _ in each.new_ids),
    ]
    assert [accepted / offered for accepted, offered in data["depths"]] == head.last_stats.acceptance_by_depth
    assert data["figures"][0] == [f"{head.last_stats.tokens_per_round:.2f}", "tokens per round"]
    for each, drawn in zip(rounds, data["rounds"], strict=True):
        assert [node[0] for node in drawn["nodes"]][: len(each.tokens)] == each.tokens
        assert [node[1] for node in drawn["nodes"]][: len(each.tokens)] == each.parents
        assert drawn["accepted"] == each.num_accepted
    assert {str(token) for each in rounds for token in [*each.tokens, each.bonus_id]} == set(data["labels"])


def test_the_page_loads_nothing_and_no_text_ends_its_script(rounds, target):
    hostile = "</script><script>alert(1)</script><!--"
    page = tree_page(rounds, tiny_tokenizer(target.config.vocab_size), prompt=hostile, about=hostile)
    assert page.count("<script") == 2
    assert page_data(page)["prompt"] == hostile
    assert "default-src 'none'" in page
    without_namespace = page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|src=|href=|@import|url\(|fetch\(", without_namespace)


# The picture


def test_no_text_leaves_its_box_and_no_boxes_touch(rounds, target):
    tokenizer = tiny_tokenizer(target.config.vocab_size)
    figure = draw_trees([*rounds[:2], random_round(128, 1)], tokenizer)
    (axes,) = figure.axes
    figure.canvas.draw()
    boxes = [patch.get_window_extent() for patch in axes.patches if getattr(patch, "get_boxstyle", None)]
    texts = [(text.get_text(), text.get_window_extent()) for text in axes.texts if text.get_text()]
    num_nodes = sum(len(lay_out(each)) for each in rounds[:2]) + 129
    assert len(boxes) == num_nodes + 4, "a box for each node and for each kind in the legend"
    assert all(box.height == pytest.approx(CHIP) for box in boxes)
    whole = figure.bbox
    drawn = boxes + [extent for _, extent in texts]
    assert all(whole.x0 <= each.x0 and each.x1 <= whole.x1 for each in drawn)
    assert all(whole.y0 <= each.y0 and each.y1 <= whole.y1 for each in drawn)
    ordered = sorted(boxes, key=lambda box: (round(box.y0), box.x0))
    for left, right in pairwise(ordered):
        assert round(left.y0) != round(right.y0) or left.x1 < right.x0
    for text, extent in texts:
        middle = (extent.y0 + extent.y1) / 2
        is_inside = any(box.x0 < extent.x0 and extent.x1 < box.x1 and box.y0 < middle < box.y1 for box in boxes)
        assert is_inside or text.startswith(("round", "percentages")), text


def test_only_the_rounds_asked_for_are_drawn(rounds, target):
    figure = draw_trees(rounds, tiny_tokenizer(target.config.vocab_size), [2])
    titles = [text.get_text() for text in figure.axes[0].texts if text.get_text().startswith("round")]
    assert len(titles) == 1
    assert titles[0].startswith(f"round 2 of {len(rounds)}: {len(rounds[1].tokens)} nodes")


@pytest.mark.parametrize("ending", [".html", ".svg", ".png"])
def test_files_are_written_atomically(rounds, target, tmp_path, ending):
    path = tmp_path / "new" / f"trees{ending}"
    write_trees(rounds, tiny_tokenizer(target.config.vocab_size), path, only=1)
    starts = {".html": b"<!DOCTYPE html>", ".svg": b"<?xml", ".png": b"\x89PNG"}
    assert path.read_bytes().startswith(starts[ending])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_impossible_drawings_are_refused(rounds, target, tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer(target.config.vocab_size)
    with pytest.raises(ValueError, match=r"record_trees = True"):
        draw_trees(None, tokenizer)
    with pytest.raises(ValueError, match=rf"expected a round from 1 to {len(rounds)}, got 99"):
        write_trees(rounds, tokenizer, tmp_path / "trees.html", only=99)
    with pytest.raises(ValueError, match=r"expected a name that ends in \.html, \.svg, \.png"):
        write_trees(rounds, tokenizer, tmp_path / "trees.gif")
    monkeypatch.setattr(show, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match=r"--round"):
        write_trees(rounds, tokenizer, tmp_path / "trees.png")
    assert list(tmp_path.iterdir()) == []


# The command


@pytest.fixture
def folders(target, head, tmp_path):
    return save_pair(tmp_path, target, head)


def run_show(folders, *more):
    settings = ["--max-new-tokens", "6", "--node-budget", "4", "--dtype", "float32"]
    return run_command("show", *folders, *settings, *map(str, more))


def test_the_command_draws_the_answer_to_a_prompt(folders, tmp_path):
    prompts = write_lines(tmp_path / "p.jsonl", {"prompt": "t010 t011"}, {"prompt": "t012 t013"})
    result = run_show(folders, "--prompts", prompts, "--index", 1, "--output", tmp_path / "trees.html")
    assert result.exit_code == 0, result.output
    assert "tokens per round" in result.output
    data = page_data((tmp_path / "trees.html").read_text(encoding="utf-8"))
    assert data["prompt"] == "t012 t013"
    assert len(data["pieces"]) == 6
    assert data["about"] == "head drafts for target, float32, node budget 4"


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ([], "expected exactly one of --prompt TEXT and --prompts FILE"),
        (["--prompt", "t010", "--node-budget", "many"], "`--node-budget` is 'many', expected 'auto' or a number"),
        (["--prompt", "t010", "--round", "40"], "got 40"),
        (["--prompt", "t010", "--output", "trees.gif"], "`--output` is trees.gif"),
    ],
)
def test_the_command_reports_errors_in_one_line(folders, tmp_path, options, cause):
    result = run_show(folders, "--output", tmp_path / "trees.html", *options)
    assert result.exit_code == 1
    assert cause in " ".join(result.output.split())
    assert not (tmp_path / "trees.html").exists()


def test_a_prompt_outside_the_file_is_refused(tmp_path):
    prompts = write_lines(tmp_path / "p.jsonl", {"prompt": "t010"})
    settings = ShowSettings(tmp_path / "trees.html", prompts=prompts, index=3)
    with pytest.raises(JetFlowError, match=r"`--index` is 3, but .* holds 1 prompts"):
        settings.messages()


def test_recording_one_answer_leaves_the_settings_of_the_head_unchanged(target, head):
    tokenizer = tiny_tokenizer(target.config.vocab_size)
    messages = [{"role": "user", "content": "t010 t011"}]
    rounds, stats = record_rounds(target, tokenizer, head, messages, max_new_tokens=8, node_budget=5)
    assert stats.num_rounds == len(rounds)
    assert sum(len(each.new_ids) for each in rounds) == 7
    assert max(len(each.tokens) for each in rounds) == 5
    assert (head.generation_config.node_budget, head.record_trees) == (BUDGET, False)
