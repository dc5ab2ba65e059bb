"""The cost model: hand-worked rooflines, counted parameters, trees by rank, fitted figures, and the stored checks."""

import dataclasses
import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import alter, run_command, tiny_config
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, LlamaConfig, MambaConfig, Qwen3MoeConfig

from hf_jetflow import JetFlowConfig, JetFlowHead
from hf_jetflow.simulate.fitting import fit_hardware
from hf_jetflow.simulate.hardware import PRESETS, Hardware
from hf_jetflow.simulate.inputs import fitting_rows
from hf_jetflow.simulate.roofline import (
    HeadShape,
    ModelShape,
    expected_experts,
    forward_seconds,
    head_shape,
    round_seconds,
    target_shape,
)
from hf_jetflow.simulate.simulate import expected_tokens, read_tokens, simulate
from hf_jetflow.target.target import Target
from hf_jetflow.training.blocks import measure_agreement


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "examples" / "results"

# 100 values/s, 1000 operations/s
DEVICE = Hardware("unit", 400.0, 2000.0, 0.5, 0.5, launch_seconds=0.0, runs_ahead=True)
DENSE = ModelShape(num_layers=2, dense=50, output=20)
ATTENTIVE = dataclasses.replace(DENSE, query_width=8, cache_width=4, windows=(None, 5))
EXPERTS = dataclasses.replace(DENSE, experts=80, num_experts=4, experts_per_token=1)
MIXED = dataclasses.replace(ATTENTIVE, experts=80, num_experts=4, experts_per_token=1)


def test_a_forward_takes_the_longer_of_reads_and_operations_part_by_part():
    # One row: 50 + 20 values read in 0.7 s, while 100 + 40 operations take 0.14 s.
    assert forward_seconds(DENSE, DEVICE, 1) == pytest.approx(0.7)
    # Ten rows: 1000 + 400 operations take 1.4 s.
    assert forward_seconds(DENSE, DEVICE, 10) == pytest.approx(1.4)
    # Ten rows of which two reach the output: 1.0 s, and its 20 values still take 0.2 s.
    assert forward_seconds(DENSE, DEVICE, 10, output_rows=2) == pytest.approx(1.2)
    # A batch of five rows twice is ten rows.
    assert forward_seconds(DENSE, DEVICE, 5, batch_size=2) == pytest.approx(1.4)


def test_attention_reads_the_cache_of_every_sequence_up_to_the_window_of_its_layer():
    # Two rows after ten positions see 12 and 5 + 2: 19 x 4 values in 0.76 s; 4 x 2 x 19 x 8 operations in 1.216 s.
    gained = forward_seconds(ATTENTIVE, DEVICE, 2, context=10) - forward_seconds(DENSE, DEVICE, 2)
    assert gained == pytest.approx(1.216)
    # One row sees 11 and 6: 17 x 4 values in 0.68 s, 4 x 17 x 8 operations in 0.544 s; twice that for two sequences.
    for batch_size in (1, 2):
        gained = forward_seconds(ATTENTIVE, DEVICE, 1, context=10, batch_size=batch_size)
        assert gained - forward_seconds(DENSE, DEVICE, 1, batch_size=batch_size) == pytest.approx(0.68 * batch_size)


def test_only_experts_that_rows_reach_are_read():
    assert expected_experts(4, 1, 1) == pytest.approx(1)
    assert expected_experts(4, 1, 2) == pytest.approx(1.75)  # the second row takes another one three times in four
    assert expected_experts(8, 8, 1) == 8
    # By counting all choices of two rows that take two experts of four each:
    pairs = list(itertools.combinations(range(4), 2))
    mean = sum(len({*first, *second}) for first in pairs for second in pairs) / len(pairs) ** 2
    assert expected_experts(4, 2, 2) == pytest.approx(mean)
    # One row reads 20 of 80 values and does 40 operations; two rows read 35.
    assert forward_seconds(EXPERTS, DEVICE, 1) == pytest.approx(0.7 + 0.2)
    assert forward_seconds(EXPERTS, DEVICE, 2) == pytest.approx(0.7 + 0.35)


def test_launches_overlap_with_the_device_or_add_to_it():
    slow_launch = dataclasses.replace(DEVICE, launch_seconds=0.4)
    assert forward_seconds(DENSE, slow_launch, 1) == pytest.approx(0.8)  # two layers launched; 0.7 s overlap
    assert forward_seconds(DENSE, slow_launch, 10) == pytest.approx(1.4)
    in_turn = dataclasses.replace(slow_launch, runs_ahead=False)
    assert forward_seconds(DENSE, in_turn, 1) == pytest.approx(1.5)


def test_wider_values_take_longer_to_read_but_not_to_multiply():
    wide = dataclasses.replace(DEVICE, bytes_per_value=4)
    assert forward_seconds(DENSE, wide, 1) == pytest.approx(1.4)
    assert forward_seconds(DENSE, wide, 100) == forward_seconds(DENSE, DEVICE, 100)


def test_a_round_is_the_sum_of_block_corrections_tree_and_host():
    hardware = dataclasses.replace(DEVICE, host_seconds=0.25, host_seconds_per_node=0.01)
    correction = ModelShape(num_layers=1, dense=30, output=0)
    head = HeadShape(ModelShape(num_layers=1, dense=10, output=20), correction, block_size=4)
    seconds = round_seconds(DENSE, head, hardware, 10)
    assert seconds.plain == pytest.approx(0.7)
    # Four rows of the block: 0.1 s of reads; three of them scored: 0.2 s of reads.
    assert seconds.draft == pytest.approx(0.3)
    # Depths 2 and 3 are corrected, five rows each of the nine after the root: 0.3 s of reads or of operations.
    assert seconds.correct == pytest.approx(2 * 0.3)
    assert seconds.verify == pytest.approx(1.4)
    assert seconds.host == pytest.approx(0.25 + 0.1)
    assert seconds.round == pytest.approx(0.3 + 0.6 + 1.4 + 0.35)
    (row,) = simulate(DENSE, head, hardware, {10: 3.0}, context=0)
    assert row["speedup"] == pytest.approx(3 * 0.7 / 2.65)
    assert row["tokens_per_second"] == pytest.approx(3 / 2.65)
    assert round_seconds(DENSE, head, hardware, 2).correct == 0  # a tree of one depth
    assert round_seconds(DENSE, dataclasses.replace(head, correction=None), hardware, 10).correct == 0


@pytest.mark.parametrize("shape", [ATTENTIVE, MIXED], ids=["attentive", "mixed"])
def test_more_rows_sequences_or_context_never_take_less_time_and_better_hardware_never_more(shape):
    def seconds(hardware=DEVICE, rows=4, batch_size=2, context=6):
        return forward_seconds(shape, hardware, rows, batch_size=batch_size, context=context)

    for name in ("rows", "batch_size", "context"):
        times = [seconds(**{name: value}) for value in (1, 2, 4, 8, 64, 512)]
        assert times == sorted(times)
        assert times[0] < times[-1], name
    for name in ("bandwidth", "flops", "memory_efficiency", "matrix_efficiency"):
        times = [seconds(dataclasses.replace(DEVICE, **{name: getattr(DEVICE, name) * f})) for f in (0.1, 0.5, 1, 2)]
        assert times == sorted(times, reverse=True)
        assert times[0] > times[-1], name


EXPERT_SIZES = dict(moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2)
SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)


@pytest.mark.parametrize(
    ("config", "experts_per_token"),
    [
        (LlamaConfig(**SIZES, num_hidden_layers=3, tie_word_embeddings=True), 0),
        (Gemma2Config(**SIZES, num_hidden_layers=4, head_dim=16, sliding_window=7), 0),
        (
            Qwen3MoeConfig(**SIZES, **EXPERT_SIZES, num_hidden_layers=3, mlp_only_layers=[0]),
            2,
        ),
        (GptOssConfig(**SIZES, num_hidden_layers=2, head_dim=8, num_local_experts=5, num_experts_per_tok=3), 3),
    ],
    ids=["llama", "gemma2", "qwen3_moe", "gpt_oss"],
)
def test_every_parameter_of_a_target_is_counted_once_without_input_embeddings(config, experts_per_token):
    shape = target_shape(config)
    model = AutoModelForCausalLM.from_config(config)
    embedding = model.get_input_embeddings().weight.numel()
    read = model.num_parameters() - (0 if config.tie_word_embeddings else embedding)
    assert shape.dense + shape.output + shape.experts == read
    assert shape.output == config.vocab_size * config.hidden_size
    assert shape.experts_per_token == experts_per_token
    assert bool(shape.experts) == bool(experts_per_token)
    # The cache as the model itself fills it, over one position.
    cache = model(torch.zeros(1, 1, dtype=torch.long)).past_key_values
    assert shape.cache_width == cache.layers[0].keys.numel() + cache.layers[0].values.numel()
    assert len(shape.windows) == shape.num_layers == config.num_hidden_layers
    sliding = [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or shape.num_layers * [""]]
    assert [window is not None for window in shape.windows] == sliding


def test_the_routed_experts_of_a_published_mixture_are_counted():
    fields = json.loads((ROOT / "examples" / "published_speeds.json").read_text())["models"]["Qwen3-30B-A3B"]
    shape = target_shape(Qwen3MoeConfig(**fields))
    assert shape.experts == 48 * 128 * 3 * 2048 * 768
    assert (shape.num_experts, shape.experts_per_token) == (128, 8)
    active = shape.dense + shape.output + shape.experts * 8 / 128
    assert active == pytest.approx(3.04e9, rel=0.01)  # the 3 B of its name, the input embedding left out
    assert shape.dense + 2 * shape.output + shape.experts == pytest.approx(30.5e9, rel=0.01)


@pytest.mark.parametrize("correction", [None, "parent", "path"])
def test_a_head_is_counted_with_its_correction_apart_and_its_draft_vocabulary(correction):
    config = tiny_config(branch_correction=correction, draft_vocab_size=40)
    shape = head_shape(config)
    parts = [shape.backbone.dense, 0 if shape.correction is None else shape.correction.dense]
    assert sum(parts) == JetFlowHead(config).num_parameters()
    assert (shape.correction is None) == (correction is None)
    assert shape.backbone.output == 40 * config.hidden_size
    assert shape.block_size == config.block_size


def test_expected_tokens_of_hand_worked_trees():
    two_ranks = [[0.6, 0.3], [0.5, 0.4]]
    assert expected_tokens(two_ranks, 1) == 1
    assert expected_tokens(two_ranks, 2) == pytest.approx(1 + 0.6)
    assert expected_tokens(two_ranks, 3) == pytest.approx(1 + 0.6 + 0.3)  # before 0.6 x 0.5 only by a tie
    assert expected_tokens(two_ranks, 4) == pytest.approx(1 + 0.6 + 0.3 + 0.3)
    assert expected_tokens(two_ranks, 5) == pytest.approx(1 + 0.6 + 0.3 + 0.3 + 0.24)
    assert expected_tokens(two_ranks, 99) == pytest.approx(1 + 0.9 + 0.9 * 0.9)
    assert expected_tokens([[0.5]] * 3, 4) == pytest.approx(1 + 0.5 + 0.25 + 0.125)  # a chain
    assert expected_tokens([[1.0]] * 3, 4) == 4
    assert expected_tokens([[0.0, 0.0]], 3) == 1
    assert expected_tokens([], 8) == 1
    assert expected_tokens([[0.2, 0.7]], 2) == pytest.approx(1.7)  # the better rank need not come first


@pytest.mark.parametrize("seed", range(4))
def test_expected_tokens_are_the_most_that_any_tree_of_the_budget_yields(seed):
    table = torch.rand(3, 2, generator=torch.Generator().manual_seed(seed)) / 2
    paths = [path for depth in (1, 2, 3) for path in itertools.product(range(2), repeat=depth)]
    gains = {path: table[range(len(path)), path].prod().item() for path in paths}
    for budget in (2, 3, 4, 5, 6):
        best = max(
            sum(gains[path] for path in tree)
            for tree in itertools.combinations(paths, budget - 1)
            if all(path[:-1] in tree or len(path) == 1 for path in tree)
        )
        assert expected_tokens(table.tolist(), budget) == pytest.approx(1 + best, abs=1e-5)


@pytest.mark.parametrize("kind", [None, "parent", "path"])
def test_measured_ranks_cover_all_tokens_and_the_first_agrees_with_the_bench(
    target, random_head, example_module, kind
):
    acceptance_by_rank = example_module("measure_ranks").acceptance_by_rank
    vocab_size = target.config.vocab_size
    head = random_head(target, branch_correction=kind, branch_candidates=vocab_size)
    alter(head)
    texts = []
    for prompt in ([5, 9, 11], [30, 2]):
        text = target.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
        texts.append((text[0].tolist(), len(prompt)))
    view = Target(target, head.config)
    table = acceptance_by_rank(view, head, texts, vocab_size)
    assert torch.tensor(table).sum(1).tolist() == pytest.approx([1.0] * len(table))
    rates = measure_agreement(view, head, texts).rates()
    assert [ranks[0] for ranks in table] == pytest.approx(rates["top1" if kind is None else "corrected_top1"])
    # With fewer ranks a depth counts only where the tokens before it were among them.
    few = acceptance_by_rank(view, head, texts, vocab_size // 2)
    assert few[0] == pytest.approx(table[0][: vocab_size // 2])
    assert few[1] != pytest.approx(table[1][: vocab_size // 2])


def bench_rows(hardware, target, head, budgets, context=100):
    """Rows of a bench on a machine that is exactly as the model has it."""
    plain = forward_seconds(target, hardware, 1, context=context)
    rows = [{"prompts": "a", "method": "plain", "node_budget": None, "tokens_per_second": 1 / plain}]
    for budget in budgets:
        seconds = round_seconds(target, head, hardware, budget, context=context)
        row = dict(prompts="a", method="jetflow", node_budget=budget, temperature=0.0, tokens_per_round=2.5)
        rows.append({**row, "tokens_per_second": 2.5 / seconds.round, "round_seconds": {"verify": seconds.verify}})
    return rows


def test_figures_are_fitted_from_a_bench_on_the_machine():
    config = LlamaConfig(num_hidden_layers=4, hidden_size=256, intermediate_size=512, num_attention_heads=4)
    target = target_shape(config)
    head = head_shape(JetFlowConfig.for_target(config, num_hidden_layers=2, branch_correction="path", mask_token_id=0))
    overheads = dict(launch_seconds=2e-4, host_seconds=1e-3, host_seconds_per_node=1e-5)
    machine = Hardware("cpu", 2e10, 3e11, 1.0, 1.0, runs_ahead=False, **overheads)
    rows = bench_rows(machine, target, head, (32, 16, 64))
    chosen = fitting_rows([*rows, {**rows[1], "prompts": "b", "node_budget": 8}])
    assert [row["node_budget"] for row in chosen] == [None, 16, 64]
    fitted = dataclasses.asdict(fit_hardware("cpu", target, head, *chosen, context=100))
    assert fitted.pop("source") == "fitted to plain decoding and 16 and 64 nodes on a"
    known = dataclasses.asdict(machine)
    assert {name: fitted[name] for name in known if name not in ("name", "source")} == pytest.approx(
        {name: known[name] for name in known if name not in ("name", "source")}, rel=1e-3
    )


def test_rows_that_cannot_be_fitted_are_refused_with_a_remedy():
    config = LlamaConfig(num_hidden_layers=4, hidden_size=256, intermediate_size=512, num_attention_heads=4)
    target, head = target_shape(config), head_shape(JetFlowConfig.for_target(config, mask_token_id=0))
    rows = bench_rows(PRESETS["h100"], target, head, (16, 64))  # launching takes longest: all rows cost the same
    with pytest.raises(ValueError, match=r"16 rows in .* a JSON file of hardware figures .*`launch_seconds`"):
        fit_hardware("gpu", target, head, *rows, context=100)
    with pytest.raises(
        ValueError,
        match=r"the first prompt set of this bench has plain decoding and 1 fixed node budget; run it again with two",
    ):
        fitting_rows(rows[:2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bandwidth": 0}, "`bandwidth` must be more than 0, got 0"),
        ({"matrix_efficiency": 1.2}, "`matrix_efficiency` must be more than 0 and at most 1, got 1.2"),
        ({"launch_seconds": -1e-3}, "`launch_seconds` must be 0 or more, got -0.001"),
        ({"flops": "989e12"}, "`flops`: expected a float, got '989e12'"),
        ({"runs_ahead": 1}, "`runs_ahead`: expected a bool, got 1"),
        ({"bandwith": 1e12}, r"unknown hardware figures \['bandwith'\]; expected name, bandwidth"),
        ({"flops": None}, r"hardware figures \['flops'\] are missing"),
    ],
)
def test_hardware_figures_out_of_range_are_refused(changes, message):
    figures = {**dataclasses.asdict(PRESETS["a100"]), **changes}
    with pytest.raises(ValueError, match=message):
        Hardware.from_dict({name: value for name, value in figures.items() if value is not None})


def test_hardware_survives_json():
    for preset in PRESETS.values():
        assert Hardware.from_dict(json.loads(json.dumps(dataclasses.asdict(preset)))) == preset
        assert preset.source


@pytest.mark.parametrize(
    ("table", "budget", "message"),
    [
        ([[0.5], []], 4, "acceptance at depth 2"),
        ([[0.7, 0.6]], 4, "sum to at most 1"),
        ([[-0.1]], 4, "acceptance at depth 1"),
        ([[0.5]], 0, "`node_budget` must be at least 1, got 0"),
    ],
)
def test_tables_of_invalid_probabilities_are_refused(table, budget, message):
    with pytest.raises(ValueError, match=message):
        expected_tokens(table, budget)


@pytest.mark.parametrize(("name", "value"), [("node_budget", 1), ("batch_size", 0), ("context", -1)])
def test_impossible_rounds_are_refused(name, value):
    head = HeadShape(DENSE, None, block_size=4)
    with pytest.raises(ValueError, match=f"`{name}` must be at least .*, got {value}"):
        round_seconds(DENSE, head, DEVICE, **{"node_budget": 4, name: value})


def test_a_target_without_attention_is_refused():
    with pytest.raises(ValueError, match="`mamba` has no attention heads"):
        target_shape(MambaConfig())


def test_tokens_per_round_are_read_from_a_bench_a_replay_and_a_table():
    bench = json.loads((RESULTS / "bench_earlier_loop.json").read_text())
    measured = {
        row["node_budget"]: row["tokens_per_round"]
        for row in bench["rows"]
        if row["prompts"] == "dev_math" and row["method"] == "jetflow"
    }
    assert read_tokens(bench, [64, 16])["dev_math"] == {64: measured[64], 16: measured[16]}
    assert list(read_tokens(bench, None)["dev_chat"]) == [8, 16, 32, 64]  # neither the chain nor "auto"
    replayed = json.loads((RESULTS / "correction_smollm2.json").read_text())
    (row,) = [row for row in replayed["rows"] if row["prompts"] == "dev_code" and row["node_budget"] == 32]
    assert read_tokens(replayed, [32])["dev_code"] == {32: row["tokens_per_round"]}
    sampled = json.loads((RESULTS / "bench_smollm2_bf16_sampled.json").read_text())
    hot = [{**row, "node_budget": 16} for row in sampled["rows"] if row["method"] == "jetflow"]
    assert {name.partition(", ")[2] for name in read_tokens({"rows": hot}, None)} == {"T = 0.7", "T = 1"}
    assert read_tokens({"acceptance_by_rank": {"x": [[0.5, 0.25]]}}, [2, 3]) == {"x": {2: 1.5, 3: 1.75}}
    with pytest.raises(ValueError, match=r"\[256\] were not measured on dev_math, only \[8, 16, 32, 64\]"):
        read_tokens(bench, [16, 256])
    with pytest.raises(ValueError, match="no `rows` with node budgets and no `acceptance_by_rank`"):
        read_tokens({"rows": []}, None)
    with pytest.raises(ValueError, match=r"has no \['tokens_per_round'\]"):
        read_tokens({"rows": [{"node_budget": 16, "prompts": "x"}]}, None)


def test_the_stored_checks_are_what_the_script_computes(example_module):
    found = json.loads(json.dumps(example_module("check_simulation").run_checks()))
    assert_same(found, json.loads((RESULTS / "simulation.json").read_text()))


def assert_same(found, stored):
    if isinstance(found, dict):
        assert found.keys() == stored.keys()
        for name in found:
            assert_same(found[name], stored[name])
    elif isinstance(found, list):
        assert len(found) == len(stored)
        for pair in zip(found, stored, strict=True):
            assert_same(*pair)
    elif isinstance(found, float):
        assert found == pytest.approx(stored, rel=1e-6, abs=0.11)  # a last digit may round either way
    else:
        assert found == stored


def simulate_command(*arguments):
    return run_command("simulate", *arguments)


@pytest.fixture
def folders(target, random_head, tmp_path):
    """Configurations of a target and its head, without weights, and a table of ranks."""
    target.config.save_pretrained(tmp_path / "target")
    random_head(target).config.save_pretrained(tmp_path / "head")
    (tmp_path / "ranks.json").write_text(json.dumps({"acceptance_by_rank": {"texts": [[0.6, 0.2], [0.5, 0.1]]}}))
    return tmp_path


def test_the_command_prints_a_table_and_writes_json_from_configurations_alone(folders):
    arguments = ["--target", folders / "target" / "config.json", "--head", folders / "head"]
    arguments += ["--acceptance", folders / "ranks.json", "--node-budgets", "2,5", "--batch-sizes", "1,8"]
    result = simulate_command(*arguments, "--json", folders / "out.json")
    assert result.exit_code == 0, result.output
    written = json.loads((folders / "out.json").read_text())
    assert [(row["node_budget"], row["batch_size"]) for row in written["rows"]] == [(2, 1), (2, 8), (5, 1), (5, 8)]
    assert [row["tokens_per_round"] for row in written["rows"]] == pytest.approx([1.6, 1.6, 2.2, 2.2])
    assert all(f"{row['speedup']:.2f}" in result.output for row in written["rows"])
    assert Hardware.from_dict(written["hardware"]) == PRESETS["h100"]
    (folders / "mine.json").write_text(json.dumps({**written["hardware"], "name": "mine", "host_seconds": 1.0}))
    slow = simulate_command(*arguments, "--hardware", folders / "mine.json", "--json", folders / "slow.json")
    assert "Predicted speedup on mine" in slow.output
    row = json.loads((folders / "slow.json").read_text())["rows"][2]
    assert 0 < row["speedup"] < 2.2 * row["seconds"]["plain"]  # the round takes over a second


def test_the_command_says_what_was_never_confirmed_and_why_batch_sizes_do_not_differ(folders):
    arguments = ["--target", folders / "target", "--head", folders / "head", "--acceptance", folders / "ranks.json"]

    def output(*options):
        return " ".join(simulate_command(*arguments, "--node-budgets", "4", *options).output.split())

    eager = output("--batch-sizes", "1,4,16")
    assert "Never confirmed by a measurement: the speed of hf_jetflow on a GPU, batches of several sequences." in eager
    assert "The batch sizes do not differ: in eager mode launching the layers takes longer" in eager
    graphed = output("--batch-sizes", "1,64", "--hardware", "a100-graphed", "--context", "4096")
    assert "any figure of an A100, graphed execution, batches" in graphed
    assert "do not differ" not in graphed
    alone = output("--batch-sizes", "1")
    assert "batches" not in alone
    assert "do not differ" not in alone
    (folders / "mine.json").write_text(json.dumps({**dataclasses.asdict(PRESETS["h100"]), "host_seconds": 1.0}))
    assert "Never confirmed" not in output("--batch-sizes", "1", "--hardware", folders / "mine.json")


def test_the_command_draws_a_figure_or_names_the_missing_package(folders, monkeypatch):
    arguments = ["--target", folders / "target", "--head", folders / "head", "--acceptance", folders / "ranks.json"]
    if importlib.util.find_spec("matplotlib"):
        result = simulate_command(*arguments, "--plot", folders / "out.svg")
        assert result.exit_code == 0, result.output
        assert "<svg" in (folders / "out.svg").read_text()
        refused = simulate_command(*arguments, "--plot", folders / "out.jpx")
        assert "expected a name that ends in .png, .svg, .pdf" in " ".join(refused.output.split())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = simulate_command(*arguments, "--plot", folders / "none.svg")
    assert result.exit_code == 1
    assert "plots need matplotlib, which is not installed; run `pip install" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"--hardware": "b200"}, "`--hardware` is 'b200', expected one of h100, h100-graphed"),
        ({"--hardware": "BAD"}, "not valid JSON"),
        ({"--acceptance": "BAD"}, "not valid JSON"),
        ({"--acceptance": "LIST"}, "expected a JSON object, got a list"),
        ({"--acceptance": "missing.json"}, "missing.json"),
        ({"--target": "missing.gguf"}, "`missing.gguf` does not exist"),
        ({"--head": "TARGET"}, "no draft head of a known layout"),
        ({"--target": "OTHER"}, "is for a target of width"),
        ({"--node-budgets": "1"}, "`--node-budgets` is 1, expected at least 2"),
        ({"--batch-sizes": "0"}, "`--batch-sizes` is 0, expected at least 1"),
    ],
)
def test_a_user_error_of_the_command_is_one_line_with_its_cause(folders, changes, cause):
    (folders / "bad.json").write_text("{not json")
    (folders / "list.json").write_text("[]")
    LlamaConfig(num_hidden_layers=2).save_pretrained(folders / "other")
    places = {"BAD": "bad.json", "LIST": "list.json", "TARGET": "target", "OTHER": "other"}
    options = {"--target": folders / "target", "--head": folders / "head", "--acceptance": folders / "ranks.json"}
    options |= {name: folders / places[value] if value in places else value for name, value in changes.items()}
    result = simulate_command(*(word for option in options.items() for word in option))
    assert result.exit_code == 1
    assert cause in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output
