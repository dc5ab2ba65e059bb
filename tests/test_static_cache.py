"""`cache_implementation="static"`: forwards of few shapes, compiled where transformers compiles, the plain text."""

import functools

import pytest
import torch
from conftest import BLOCK_SIZE, make_prompt
from reference import assert_same_text
from torch.utils import _pytree as pytree
from transformers import CompileConfig, StaticCache

from hf_jetflow.decoding.captured_draft import IDLE_CACHES, draft_tree
from hf_jetflow.decoding.drafter import JetFlowCandidateGenerator
from hf_jetflow.head.cache import StaticHeadCache
from hf_jetflow.target.caches import STATIC_ROWS, commit_static_path, max_static_nodes, static_rows
from hf_jetflow.target.masks import static_inputs
from hf_jetflow.target.prefilled import PrefilledTarget, TargetStates
from hf_jetflow.trees.tree import ancestor_mask


FAMILIES = ["llama", "qwen3", "gemma"]


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()


@pytest.fixture
def shallow(tiny_target):
    """A target of two layers, which takes half as long to compile as `target`."""
    return tiny_target("llama", num_hidden_layers=2)


def rows(start: int, stop: int) -> torch.Tensor:
    """Keys (1, 2, rows, 3) that tell their row."""
    return torch.arange(start, stop, dtype=torch.float32)[None, None, :, None].expand(1, 2, -1, 3)


def generate(target, input_ids, head=None, **kwargs):
    torch.manual_seed(5)
    settings = dict(max_new_tokens=40, do_sample=False, cache_implementation="static", assistant_model=head)
    return target.generate(input_ids, **{**settings, **kwargs})


@pytest.mark.parametrize(
    ("kind", "node_budget", "do_sample"),
    [
        ("random", 64, True),
        ("echo", 64, False),
        ("noisy", 7, False),
        ("noisy", 64, False),
        ("noisy", 64, True),
        ("noisy", "auto", True),
        ("path", 64, False),
    ],
)
def test_the_text_is_the_plain_one(kind, node_budget, do_sample, tiny_target, head_of_kind, prompt):
    target = tiny_target("llama")
    plain = generate(target, prompt, do_sample=do_sample, cache_implementation=None)
    assert_same_text(plain, generate(target, prompt, do_sample=do_sample))
    head = head_of_kind(kind, target, plain)
    head.generation_config.node_budget = node_budget
    for _ in range(2):
        assert_same_text(plain, generate(target, prompt, head, do_sample=do_sample))
    if kind == "echo" and node_budget == 64:
        assert head.last_stats.tokens_per_round > 3


@pytest.mark.parametrize(
    ("family", "length"), [("llama", 1), ("llama", 2), ("llama", 30), ("qwen3", 1), ("gemma", 30), ("olmoe", 2)]
)
def test_families_and_prompt_lengths(family, length, tiny_target, noisy_head):
    target, input_ids = tiny_target(family), make_prompt(length)
    plain = generate(target, input_ids, cache_implementation=None)
    assert_same_text(plain, generate(target, input_ids, noisy_head(target, plain)))


def test_padding_on_the_left_is_not_seen(tiny_target, noisy_head, prompt):
    target = tiny_target("llama")
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), prompt], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 5).long()[None]
    plain = generate(target, padded, attention_mask=mask)
    head = noisy_head(target, generate(target, prompt))
    assert_same_text(plain, generate(target, padded, head, attention_mask=mask))


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 9])
def test_a_cache_with_little_room_takes_small_trees(num_tokens, tiny_target, echo_head, prompt):
    target = tiny_target("llama")
    plain = generate(target, prompt)
    head = echo_head(target, plain)
    cache = StaticCache(config=target.config, max_cache_len=prompt.shape[1] + num_tokens - 1)
    settings = dict(past_key_values=cache, cache_implementation=None, max_new_tokens=num_tokens)
    drafted = generate(target, prompt, head, **settings)
    assert_same_text(plain[:, : prompt.shape[1] + num_tokens], drafted)
    assert max(head.last_stats.rounds_by_nodes, default=1) <= 8


def test_a_cache_of_the_caller_goes_on(tiny_target, noisy_head, prompt):
    """Two calls with one static cache: the second goes on behind the first."""
    target = tiny_target("llama")
    plain = generate(target, prompt)
    head = noisy_head(target, plain)
    cache = StaticCache(config=target.config, max_cache_len=prompt.shape[1] + 80)
    first = generate(target, prompt, head, max_new_tokens=15, past_key_values=cache, cache_implementation=None)
    second = generate(target, first, head, max_new_tokens=25, past_key_values=cache, cache_implementation=None)
    assert_same_text(plain, second)


def test_hidden_states_are_those_of_plain_decoding(tiny_target, noisy_head, prompt):
    target = tiny_target("llama")
    asked = dict(output_hidden_states=True, return_dict_in_generate=True, max_new_tokens=12)
    plain = generate(target, prompt, **asked)
    drafted = generate(target, prompt, noisy_head(target, plain.sequences), **asked)
    for of_plain, of_drafted in zip(plain.hidden_states[1:], drafted.hidden_states[1:], strict=False):
        torch.testing.assert_close(of_drafted[-1], of_plain[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_forwards_give_the_plain_text(backend, shallow, random_head, prompt):
    """transformers' own compile path; `inductor` takes a C++ compiler."""
    target, plain = shallow, generate(shallow, prompt)
    head = random_head(target)
    head.generation_config.node_budget = 8
    num_graphs = 0

    def counted(graph, inputs):
        nonlocal num_graphs
        num_graphs += 1
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    config = CompileConfig(fullgraph=True, dynamic=False, backend=counted, mode=None)
    config._compile_all_devices = True
    assert_same_text(plain, generate(target, prompt, head, compile_config=config))
    assert 3 <= num_graphs <= 2 * len(STATIC_ROWS) + 1  # verify and commit per number of rows, and the draft
    known = num_graphs
    assert_same_text(plain, generate(target, prompt, head, compile_config=config))
    assert num_graphs == known  # nothing is compiled again


@pytest.mark.any_release
def test_texts_of_many_lengths_and_node_budgets_can_be_compiled(shallow, random_head):
    """torch raises where a function needs more than eight graphs."""
    target, graphs = shallow, []
    config = CompileConfig(fullgraph=True, backend=lambda graph, _: graphs.append(1) or graph.forward, mode=None)
    config._compile_all_devices = True
    head = random_head(target)
    for length, node_budget in [(length, 8) for length in range(5, 95, 10)] + [(9, 4), (9, 16), (9, "auto")]:
        head.generation_config.node_budget = node_budget
        ids = torch.randint(3, 200, (1, length), generator=torch.Generator().manual_seed(length))
        plain = target.generate(ids, max_new_tokens=6, do_sample=False)
        assert_same_text(plain, generate(target, ids, head, compile_config=config, max_new_tokens=6))
    assert len(graphs) < 16, "texts of similar lengths share graphs"


def static_address_of(cache: StaticHeadCache) -> list[int]:
    buffers = [cache._length, cache._position_ids, *(buffer for layer in cache._layers for buffer in layer)]
    # The mark that `torch._dynamo.mark_static_address` leaves, without which a graph copies what it changes.
    assert all(hasattr(buffer, "_dynamo_static_input_type") for buffer in buffers)
    return [buffer.data_ptr() for buffer in buffers]


@pytest.mark.any_release
def test_a_compiled_head_keeps_its_buffers_from_call_to_call(shallow, random_head, prompt):
    target, config = shallow, CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode=None)
    config._compile_all_devices = True
    head = random_head(target)
    head.generation_config.node_budget = 8
    plain, addresses, caches = generate(target, prompt), [], []
    for _ in range(2):
        assert_same_text(plain, generate(target, prompt, head, compile_config=config, max_cache_len=128))
        caches.append(IDLE_CACHES[head][2])
        addresses.append(static_address_of(caches[-1]))
    assert caches[0] is caches[1]
    assert addresses[0] == addresses[1]
    assert_same_text(plain, generate(target, prompt, head, compile_config=config, max_cache_len=600))
    assert IDLE_CACHES[head][2] is not caches[0], "a larger cache of the target needs more rows"


@pytest.mark.any_release
def test_what_a_head_is_asked_to_remember_is_not_overwritten_by_its_next_call(shallow, noisy_head, prompt):
    target, config = shallow, CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode=None)
    config._compile_all_devices = True
    plain = generate(target, prompt)
    head, other = noisy_head(target, plain), make_prompt(20, seed=9)
    head.generation_config.node_budget = 8
    settings = dict(compile_config=config, max_cache_len=128, return_dict_in_generate=True)
    first = generate(target, prompt, head, max_new_tokens=15, **settings)
    stored = first.past_key_values._jetflow_context.context
    before = [rows.clone() for layer in stored.layers for rows in layer]
    generate(target, other, head, **settings)
    for rows, known in zip((rows for layer in stored.layers for rows in layer), before, strict=True):
        assert torch.equal(rows, known)


@pytest.mark.parametrize("num_rows", [1, BLOCK_SIZE, BLOCK_SIZE + 1, BLOCK_SIZE + 16])
def test_a_path_of_any_length_runs_the_one_captured_draft(num_rows, tiny_target, random_head, monkeypatch):
    """N-grams continue trees below the block, so a path may be longer than one."""
    target, shapes = tiny_target("llama"), []
    head = random_head(target)
    plain = generate(target, make_prompt(40), max_new_tokens=2)
    original = JetFlowCandidateGenerator.observe

    def observe(self, states, tree=None, paths=None):
        if paths is not None:  # as if the round had accepted that many tokens
            features = torch.cat(states.taps, dim=-1)[:, :1].expand(-1, num_rows, -1)
            position_ids = states.position_ids[:, :1] + torch.arange(1 - num_rows, 1).to(states.position_ids)
            states, tree = TargetStates(states.logits, (features,), position_ids), None
        original(self, states, tree, paths)

    monkeypatch.setattr(JetFlowCandidateGenerator, "observe", observe)
    monkeypatch.setattr(PrefilledTarget, "forward_of", lambda _self, model: model)
    monkeypatch.setattr(PrefilledTarget, "captured", lambda _self, function, **_: functools.partial(run, function))

    def run(function, *inputs):
        if function is draft_tree:
            shapes.append(inputs[3].shape[1])
        return function(*inputs)

    config = CompileConfig()
    config._compile_all_devices = True
    generate(target, plain, head, max_new_tokens=5, max_cache_len=200, compile_config=config)
    assert len(shapes) > 1
    assert set(shapes) == {BLOCK_SIZE + 16}


@pytest.mark.any_release
def test_what_a_captured_function_returned_is_copied_before_the_next_one_runs(shallow, random_head, monkeypatch):
    """A CUDA graph overwrites its outputs when another one runs."""
    returned: list[torch.Tensor] = []
    is_overwriting = False

    def captured(function):
        def run(*args, **kwargs):
            for output in returned if is_overwriting else ():
                output.fill_(torch.nan if output.is_floating_point() else 0)
            outputs = function(*args, **kwargs)
            parts = outputs.values() if isinstance(outputs, dict) else outputs or ()
            returned[:] = [each for each in pytree.tree_leaves(list(parts)) if isinstance(each, torch.Tensor)]
            return outputs

        return run

    monkeypatch.setattr(PrefilledTarget, "forward_of", lambda _self, model: captured(model))
    monkeypatch.setattr(PrefilledTarget, "captured", lambda _self, function, **_: captured(function))
    config = CompileConfig()
    config._compile_all_devices = True
    target, prompt = shallow, make_prompt(20)
    head = random_head(target, branch_correction="path")
    head.record_trees, trees = True, []
    for _ in range(2):
        generate(target, prompt, head, max_cache_len=200, compile_config=config)
        trees.append([(tree.tokens, tree.parents, tree.path) for tree in head.last_trees])
        is_overwriting = True
    assert trees[0] == trees[1]


@pytest.mark.any_release
def test_inputs_of_forwards_of_all_sizes_are_one_graph():
    graphs = []
    captured = torch.compile(
        static_inputs, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(1) or graph.forward
    )
    for num_nodes, num_rows, num_slots in [(8, 8, 64), (5, 8, 64), (3, 4, 70), (64, 64, 512), (63, 64, 128)]:
        parents = (torch.arange(num_nodes) - 1)[None] // 2
        parents[:, 0] = -1
        sees_node = ancestor_mask(parents, 9)
        depths = sees_node.sum(-1) - 1
        nodes, places = (torch.arange(num_nodes) + 7, parents[0], depths[0]), torch.tensor([[20], [25]])
        (ids, positions), mask = captured(nodes, places, None, (num_rows, num_slots, 9), (None,), torch.bool)
        assert ids.shape == positions.shape == (1, num_rows)
        assert ids[0, :num_nodes].tolist() == [*range(7, 7 + num_nodes)]
        assert torch.equal(positions[:, :num_nodes], 25 + depths)
        assert mask[..., :20].all()
        assert torch.equal(mask[:, 0, :num_nodes, 20 : 20 + num_nodes], sees_node)
        assert not mask[..., :num_nodes, 20 + num_nodes :].any()
        assert mask.shape == (1, 1, num_rows, num_slots)
    assert len(graphs) == 1


def test_rows_are_padded_to_few_numbers():
    assert {static_rows(nodes) for nodes in range(1, 257)} == set(STATIC_ROWS)
    assert all(static_rows(nodes) >= nodes for nodes in range(1, 600))
    assert [max_static_nodes(free) for free in (0, 3, 4, 8, 63, 64, 1000)] == [1, 1, 4, 8, 32, 64, 256]


def test_a_commit_stays_in_place():
    cache = StaticCache(config=_llama_config(), max_cache_len=20)
    cache.update(rows(0, 10), rows(0, 10) + 0.5, 0)  # 2 rows of prefix, 5 nodes, 3 rows of padding
    layer = cache.layers[0]
    addresses = layer.keys.data_ptr(), layer.cumulative_length.data_ptr()
    cache.layers = cache.layers[:1]
    commit_static_path(cache, [0, 2, 4], num_rows=8)
    assert int(cache.get_seq_length()) == 5
    assert layer.keys[0, 0, :5, 0].tolist() == [0, 1, 2, 4, 6]
    assert layer.values[0, 0, :5, 0].tolist() == [0.5, 1.5, 2.5, 4.5, 6.5]
    assert (layer.keys.data_ptr(), layer.cumulative_length.data_ptr()) == addresses


def _llama_config():
    from conftest import build_target

    return build_target("llama", num_attention_heads=2, num_key_value_heads=2, head_dim=3).config


def test_the_head_s_static_cache_overwrites_padding():
    cache = StaticHeadCache(1, capacity=10)
    assert cache.is_empty
    positions = cache.extend_positions(torch.tensor([[0, 1, 2]]))
    keys, _ = cache.extend(0, torch.cat([rows(0, 3), rows(50, 52)], dim=2), rows(0, 5), num_context=3)
    cache.count_rows(3)
    assert keys[0, 0, [0, 1, 2, 10, 11], 0].tolist() == [0, 1, 2, 50, 51]
    assert positions[0, :3].tolist() == [0, 1, 2]
    assert (positions[0, 3:] > 10**9).all()
    for start in (3, 4):  # one row and one of padding each
        positions = cache.extend_positions(torch.tensor([[start, 99]]))
        keys, values = cache.extend(0, torch.cat([rows(start, start + 2), rows(60, 62)], dim=2), rows(0, 4), 2)
        cache.count_rows(1)
    assert keys[0, 0, [3, 4, 5, 10, 11], 0].tolist() == [3, 4, 5, 60, 61]
    assert positions[0, :6].tolist() == [0, 1, 2, 3, 4, 99]
    assert not cache.is_empty
    assert values.shape == keys.shape
