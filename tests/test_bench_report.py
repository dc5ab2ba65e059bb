"""Output of a bench: tables, closing sentences, one figure."""

import copy
import io
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from rich.console import Console

from hf_jetflow.bench.plots import draw_bench, make_figure, plot_path
from hf_jetflow.bench.report import closing_sentences, print_tables


needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
STEPS = {"draft": 0.002, "tree": 0.001, "verify": 0.02, "walk": 0.0001, "commit": 0.001}


def row(method="jetflow", node_budget=16, speedup=1.5, spread=(1.2, 1.8), **more):
    is_ours = method in ("jetflow", "chain")
    return {
        "prompts": "math", "context_length": None, "dtype": "bfloat16", "temperature": 0.0, "num_prompts": 4,
        "prompt_tokens": 60, "method": method, "node_budget": node_budget, "num_new_tokens": 400,
        "tokens_per_round": 2.5, "tokens_per_round_spread": [2.0, 3.0], "tokens_per_second": 40.0,
        "speedup": speedup, "speedup_spread": list(spread), "prefill_seconds": 0.05, "decode_tokens_per_second": 45.0,
        "decode_speedup": speedup + 0.1, "decode_speedup_spread": [1.3, 1.9], "identical_to_plain": 1.0,
        "seconds_per_round": 0.03, "round_seconds": STEPS if is_ours else {},
        "forward_seconds": {"target": 0.01, "block": 0.01, "scores": 0.001, "round": 0.03} if is_ours else None,
        "loop_efficiency": 0.7 if is_ours else None,
        "rounds_by_nodes": {"16": 0.75, "1": 0.25} if is_ours else {},
        "acceptance_by_depth": [0.8, 0.5, 0.2] if is_ours else [], **more,
    }  # fmt: skip


def plain(**more):
    return row("plain", None, 1.0, (1.0, 1.0), **more)


@pytest.fixture
def result():
    rows = [
        method_row
        for prompts in ("math", "chat")
        for method_row in (
            plain(prompts=prompts),
            row("chain", None, prompts=prompts),
            row("native-dflash", None, prompts=prompts),
            row(prompts=prompts),
            row(node_budget="auto", prompts=prompts),
        )
    ]
    environment = {"processor": "Some CPU", "num_threads": 2, "torch": "2.13.0", "transformers": "5.23.0"}
    return {"environment": environment, "rows": rows, "agreement": {"math": {"spine_top1": [0.7, 0.5]}}}


def test_a_plain_speed_that_varied_is_said():
    rows = [plain(decode_tokens_per_second_spread=[20.0, 31.0]), row()]
    sentence = "plain decoding ran at 20.0 to 31.0 tokens/s (quartiles): other work slowed it down"
    assert sentence in closing_sentences(rows)[0]
    for quiet in ({"decode_tokens_per_second_spread": [20.0, 22.0]}, {"decode_tokens_per_second_spread": None}, {}):
        assert not any("other work" in sentence for sentence in closing_sentences([plain(**quiet), row()]))


def test_each_prompt_set_has_a_table_with_all_methods(result):
    file = io.StringIO()
    print_tables(result, Console(file=file, width=120))
    text = file.getvalue()
    assert text.index("math, greedy (4 prompts of 60 tokens, bfloat16)") < text.index("chat, greedy")
    for words in ("native-dflash", "jetflow, 16 nodes", "jetflow, auto", "1.20 - 1.80", "50 ms", "70 %", "100 %"):
        assert text.count(words) >= 2, words
    assert "auto chose 16 nodes in 75 %, 1 node in 25 %" in text
    assert "on the greedy spine" in text
    assert "batch of 4" not in text
    print_tables({**result, "control": {"math": 0.375, "chat": None}}, Console(file=file, width=120))
    (line,) = [line for line in file.getvalue().splitlines() if "plain, batch of 4" in line]
    assert line.split("│")[-2].strip() == "38 %"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row(), row(node_budget=8, speedup=1.7)], "jetflow, 8 nodes is best: 1.70 times plain decoding"),
        ([row("prompt-lookup", None, 1.9), row()], "prompt-lookup is best: 1.90 times"),
        ([row(speedup=1.1, spread=(0.9, 1.3))], "but a quarter of the answers gained nothing"),
        ([row(speedup=0.8), row(speedup=0.6)], "no method helps; the best, jetflow, 16 nodes, runs at 0.80"),
        ([row("assistant:/a/long/path/to/some/small/model.gguf", None)], "assistant:model.gguf is best"),
    ],
)  # fmt: skip
def test_the_closing_sentence_names_the_best_method_or_that_none_helps(rows, words):
    (sentence,) = closing_sentences([plain(), *rows])
    assert sentence.startswith("math, greedy: ")
    assert words in sentence


def test_closing_sentences_go_by_prompt_set_context_and_temperature():
    groups = [{}, {"context_length": 512}, {"temperature": 0.7}, {"prompts": "chat"}]
    sentences = closing_sentences([each for group in groups for each in (plain(**group), row(**group))])
    assert [sentence.split(":")[0] for sentence in sentences] == [
        "math, greedy", "math, 512 tokens, greedy", "math, temperature 0.7", "chat, greedy"
    ]  # fmt: skip
    assert closing_sentences([plain()]) == []


@pytest.mark.parametrize(
    ("changes", "is_reported"),
    [
        ({"dtype": "float32"}, True),
        ({"dtype": "bfloat16"}, False),
        ({"dtype": "float32", "temperature": 1.0}, True),
        ({"dtype": "float32", "temperature": 1.0, "method": "native-dflash"}, False),
    ],
)
def test_wrong_text_in_float32_is_reported(changes, is_reported):
    other = {**row(), **changes, "identical_to_plain": 0.75}
    assert any("must not happen" in sentence for sentence in closing_sentences([other])) == is_reported


def test_a_table_fits_80_columns_without_cut_cells(result):
    file = io.StringIO()
    rates = {"math": {"sibling_corrected_top1": [0.5] * 7}, "chat": {"spine_top1": [0.7] * 7}}
    print_tables({**result, "agreement": rates, "control": {"math": 0.375}}, Console(file=file, width=80))
    text = file.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    for words in ("native-dflash", "plain, batch of 4", "1.20 - 1.80", "identical"):
        assert words in text
    assert "prefill" not in text


def test_a_speedup_that_drafting_cannot_give_is_reported():
    assert closing_sentences([plain(), row(speedup=2.4)])[1:] == []
    _, sentence = closing_sentences([plain(), row(speedup=2.6)])
    assert "jetflow, 16 nodes shows a speedup above its tokens per round" in sentence


@needs_matplotlib
@pytest.mark.parametrize(("name", "start"), [("x.png", b"\x89PNG"), ("x.svg", b"<?xml")])
def test_a_figure_is_written_atomically(result, tmp_path, name, start):
    path = draw_bench(json.loads(json.dumps(result)), tmp_path / "new" / name)
    assert path.read_bytes().startswith(start)
    assert path.stat().st_size > 10_000
    assert [each.name for each in path.parent.iterdir()] == [name]


@needs_matplotlib
def test_an_existing_figure_survives_a_failing_drawing(result, tmp_path, monkeypatch):
    path = draw_bench(result, tmp_path / "x.png")
    before = path.read_bytes()

    def fail(self, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="no space"):
        draw_bench(result, path)
    assert path.read_bytes() == before


@needs_matplotlib
def test_panels_show_each_prompt_set_and_measurement(result):
    figure = make_figure(result)
    assert [ax.get_title() for ax in figure.axes[:2]] == ["math, greedy", "chat, greedy"]
    assert len(figure.axes) == 4 * 2
    speedups, acceptance, times = figure.axes[0], figure.axes[4], figure.axes[6]
    assert [label.get_text() for label in speedups.get_xticklabels()] == ["16", "auto"]
    assert {"plain", "chain", "native-dflash", "tree"} == set(speedups.get_legend_handles_labels()[1])
    assert [list(line.get_ydata()) for line in acceptance.lines] == [[0.8, 0.5, 0.2]] * 3
    assert sum(bar.get_height() for bar in times.patches) == pytest.approx(5 * 30)  # five methods, 30 ms a round each


@needs_matplotlib
def test_each_row_of_panels_shows_all_of_its_values_from_zero(result):
    for each in result["rows"]:
        if each["prompts"] == "chat":
            each |= {"speedup": 3 * each["speedup"], "speedup_spread": [1.0, 9.0]}
    for ax in make_figure(result).axes[:2]:
        low, high = ax.get_ylim()
        assert low == 0
        assert high >= 9


@needs_matplotlib
def test_context_lengths_add_panels_of_growth(result):
    rows = [{**each, "context_length": length} for length in (512, 2048) for each in copy.deepcopy(result["rows"])]
    figure = make_figure({**result, "rows": rows})
    assert len(figure.axes) == 6 * 2
    growth = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[8].lines}
    assert growth["jetflow, auto"] == ([512, 2048], [1.6, 1.6])
    assert growth.keys() == {"plain", "chain", "native-dflash", "jetflow, 16 nodes", "jetflow, auto"}


@needs_matplotlib
def test_batch_sizes_add_panels_of_speedup_and_throughput(result):
    rows = [{**each, "batch_size": size} for size in (1, 8) for each in copy.deepcopy(result["rows"])]
    figure = make_figure({**result, "rows": rows})
    assert len(figure.axes) == 6 * 2
    throughput = {line.get_label(): list(line.get_xdata()) for line in figure.axes[10].lines}
    assert throughput["plain"] == [1, 8]
    assert [ax.get_xlabel() for ax in figure.axes[8:]] == ["batch size"] * 4


@needs_matplotlib
def test_results_without_trees_or_with_fewer_fields_are_drawn(result, tmp_path):
    keys = ("context_length", "seconds_per_round", "tokens_per_round_spread", "decode_speedup")
    earlier = [{key: each[key] for key in each.keys() - set(keys)} for each in result["rows"]]
    draw_bench({**result, "rows": earlier}, tmp_path / "earlier.png")
    draw_bench({**result, "rows": [plain(), row("prompt-lookup", None)]}, tmp_path / "lookup.png")
    with pytest.raises(ValueError, match="no rows"):
        draw_bench({**result, "rows": []}, tmp_path / "none.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier.png", "lookup.png"]


@needs_matplotlib
def test_the_path_of_a_figure_is_checked(tmp_path, monkeypatch):
    assert plot_path(tmp_path) == tmp_path / "bench.png"
    assert plot_path(tmp_path / "new") == tmp_path / "new" / "bench.png"
    with pytest.raises(ValueError, match=r"expected a folder or a name that ends in \.png or \.svg"):
        plot_path(tmp_path / "x.pdf")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"need matplotlib.*pip install matplotlib"):
        plot_path(tmp_path / "x.png")
