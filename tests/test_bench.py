"""The bench: rows, figures, continuing after a kill, and refusals."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import SIZES
from helpers import tiny_tokenizer, write_lines

import hf_jetflow.bench.bench
from hf_jetflow.bench.bench import run_bench
from hf_jetflow.bench.environment import weights_hash
from hf_jetflow.bench.log import BenchLog, read_result
from hf_jetflow.bench.prompts import padded_prompt
from hf_jetflow.bench.rows import make_row
from hf_jetflow.bench.runs import Run, Variant, cache_kwargs
from hf_jetflow.bench.settings import BenchSettings
from hf_jetflow.errors import JetFlowError
from hf_jetflow.files import write_json
from hf_jetflow.prompts import encode_chat, read_prompts
from hf_jetflow.target.caches import max_static_nodes


pytestmark = pytest.mark.usefixtures("short_measurements")


@pytest.fixture
def pair(target, head):
    return target, tiny_tokenizer(target.config.vocab_size), head


@pytest.fixture
def prompts(tmp_path):
    return write_lines(tmp_path / "few.jsonl", *({"id": i, "prompt": f"t0{i + 10} t020"} for i in range(3)))


@pytest.fixture
def assistant(pair, tmp_path):
    folder = tmp_path / "assistant"
    pair[0].save_pretrained(folder)
    pair[1].save_pretrained(folder)
    return f"assistant:{folder}"


def bench(pair, prompts, *, log_path=None, progress=None, **settings):
    """The result of a bench over prompt files."""
    settings = BenchSettings(prompts, **settings)
    return run_bench(*pair, settings, log_path=log_path, progress=progress)


def test_every_method_and_budget_has_one_row_with_the_documented_fields(pair, prompts):
    result = bench(pair, [prompts], node_budgets=(2, 8), temperatures=(0.0, 0.7), max_new_tokens=6, repeats=2)
    rows = result["rows"]
    assert [(row["method"], row["node_budget"]) for row in rows[:4]] == [
        ("plain", None),
        ("chain", None),
        ("jetflow", 2),
        ("jetflow", 8),
    ]
    assert [row["temperature"] for row in rows] == [0.0] * 4 + [0.7] * 4
    fields = {
        "prompts", "method", "node_budget", "dtype", "temperature", "num_prompts", "num_new_tokens",
        "tokens_per_round", "tokens_per_second", "speedup", "speedup_spread", "identical_to_plain", "round_seconds",
        "prefill_seconds", "decode_tokens_per_second", "decode_speedup", "decode_speedup_spread", "context_length",
        "loop_efficiency", "rounds_by_nodes", "acceptance_by_depth", "prompt_tokens", "seconds_per_round",
    }  # fmt: skip
    assert all(fields <= row.keys() for row in rows)
    assert all(row["identical_to_plain"] == 1.0 for row in rows), (
        "a method gave other text than plain decoding in fp32"
    )
    assert all(row["num_new_tokens"] == 3 * 2 * 6 for row in rows)
    assert (rows[0]["speedup"], rows[0]["decode_speedup"], rows[0]["tokens_per_round"]) == (1.0, 1.0, 1.0)
    assert set(rows[2]["round_seconds"]) >= {"draft", "tree", "verify", "walk", "commit"}
    found = result["environment"]
    assert (found["torch"], found["head_hash"]) == (torch.__version__, weights_hash(pair[2]))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])


def test_a_static_cache_can_be_measured(pair, prompts):
    result = bench(pair, [prompts], node_budgets=(4,), max_new_tokens=12, cache="static")
    assert all(row["identical_to_plain"] == 1.0 for row in result["rows"])
    assert result["settings"]["cache"] == "static"
    assert result["rows"][-1]["loop_efficiency"] is None


@pytest.mark.parametrize("num_tokens", [1, 255, 256, 1000])
def test_a_static_cache_has_room_for_the_largest_tree_behind_the_last_token(num_tokens):
    num_slots = cache_kwargs("static", num_tokens)["max_cache_len"]
    assert max_static_nodes(num_slots - num_tokens) == 256


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": "quantized"}, "unknown cache 'quantized'; choose from dynamic, static, compiled"),
        ({"cache": "compiled", "methods": ["prompt-lookup"]}, "prompt-lookup cannot use a compiled cache"),
    ],
)
def test_caches_that_cannot_be_measured_are_refused(settings, message, pair, prompts):
    with pytest.raises(ValueError, match=message):
        bench(pair, [prompts], **settings)


def test_rivals_have_rows_of_their_own_between_chain_and_trees(pair, prompts, assistant):
    methods = ["jetflow", "native-dflash", "prompt-lookup", assistant, "chain"]
    rows = bench(pair, [prompts], methods=methods, node_budgets=(4,), max_new_tokens=20, num_prompts=2)["rows"]
    assert [row["method"] for row in rows] == [
        "plain", "chain", "native-dflash", "prompt-lookup", assistant, "jetflow"
    ]  # fmt: skip
    assert all(row["identical_to_plain"] == 1.0 for row in rows)
    assert all(row["tokens_per_round"] >= 1 and row["decode_speedup"] > 0 for row in rows)
    assert rows[4]["tokens_per_round"] > 1.5, "the assistant is the target itself, so its drafts are accepted"
    assert rows[2]["round_seconds"] == rows[2]["rounds_by_nodes"] == {}


def test_loop_efficiency_is_reported_for_our_loop(pair, prompts):
    rows = bench(pair, [prompts], node_budgets=(4, "auto"), max_new_tokens=24, num_prompts=1)["rows"]
    plain, *ours = rows
    assert plain["loop_efficiency"] is plain["forward_seconds"] is None
    for row in ours:
        drafts = any(nodes != "1" for nodes in row["rounds_by_nodes"])
        *forwards, whole = row["forward_seconds"].values()
        assert [seconds > 0 for seconds in forwards] == [True, drafts, drafts]
        assert row["loop_efficiency"] == pytest.approx(sum(forwards) / whole, abs=2e-3)
        assert row["loop_efficiency"] < 1
        assert sum(row["rounds_by_nodes"].values()) == pytest.approx(1, abs=1e-3)
    assert max(ours[1]["rounds_by_nodes"], key=ours[1]["rounds_by_nodes"].get) == "4"


def test_a_bench_leaves_the_settings_of_the_head_unchanged(pair, prompts):
    head = pair[2]
    head.generation_config.node_budget = 5
    bench(pair, [prompts], node_budgets=(4,), max_new_tokens=3, num_prompts=1)
    assert head.generation_config.node_budget == 5
    head.generation_config.node_budget = 64


def fake_run(seconds, prefill_seconds, new_ids, num_first=1, num_forwards=None, stats=None):
    return Run("x", None, seconds, prefill_seconds, new_ids, num_first, num_forwards or len(new_ids), stats)


def test_prefill_and_decoding_are_measured_separately():
    plain = [fake_run(11.0, 1.0, [1] * 11), fake_run(12.0, 2.0, [1] * 11)]
    runs = [fake_run(6.0, 1.0, [1] * 11, num_forwards=6), fake_run(4.0, 2.0, [1] * 10 + [2], 3, 3)]
    row = make_row(Variant("prompt-lookup"), runs, plain, forwards=[[]] * len(runs))
    assert row["prefill_seconds"] == 1.5
    assert row["decode_tokens_per_second"] == round(18 / 7, 2)
    assert row["decode_speedup"] == round((10 / 5 + 1 / (2 / 8)) / 2, 3)  # a median of two
    assert row["speedup"] == round((11 / 6 + 12 / 4) / 2, 3)
    assert row["tokens_per_round"] == round(18 / 7, 3)
    assert row["identical_to_plain"] == 0.5
    assert (row["seconds_per_round"], row["loop_efficiency"]) == (1.0, None)


def test_answers_of_one_token_have_no_decoding_to_compare():
    runs = [fake_run(1.0, 1.0, [1])]
    row = make_row(Variant("plain"), runs, runs, forwards=[[]])
    assert row["decode_speedup"] is row["decode_tokens_per_second"] is row["seconds_per_round"] is None
    assert row["tokens_per_round"] == row["speedup"] == 1.0


@pytest.fixture
def killed(pair, prompts, tmp_path):
    """A bench of three prompts that was killed while it answered the second; returns its arguments and its log."""
    log_path = tmp_path / "out" / "bench.json.partial"
    settings = dict(methods=["chain", "prompt-lookup"], max_new_tokens=4, log_path=log_path)

    def kill(done, total, name):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(pair, [prompts], **settings, progress=kill)
    return settings, log_path


def test_a_killed_bench_continues_after_the_last_finished_prompt(pair, prompts, killed):
    settings, log_path = killed
    stored = [json.loads(line) for line in log_path.read_text().splitlines()]
    assert [line["key"][-1] for line in stored[1:]] == ["run 0 0", "forwards 0"]
    with open(log_path, "a") as file:
        file.write('{"key": ["few", null, 0.0, "run 0 1"], "rec')  # the kill fell into a line
    calls = []
    result = bench(pair, [prompts], **settings, progress=lambda *call: calls.append(call))
    assert calls[0][0] == 3, "the first prompt was answered again"
    lines = [json.loads(line) for line in log_path.read_text().splitlines()]
    assert lines[: len(stored)] == stored
    assert [line["key"][-1] for line in lines[1:]] == [
        f"{what} {number}" for number in range(3) for what in ("run 0", "forwards")
    ]
    whole = bench(pair, [prompts], **{**settings, "log_path": None})
    steady = ("prompts", "method", "num_prompts", "num_new_tokens", "tokens_per_round", "identical_to_plain")
    assert [[row[key] for key in steady] for row in result["rows"]] == [
        [row[key] for key in steady] for row in whole["rows"]
    ]
    assert result["agreement"] == whole["agreement"]
    assert set(map(tuple, (row.keys() for row in result["rows"]))) == set(
        map(tuple, (row.keys() for row in whole["rows"]))
    )


def test_a_finished_log_gives_the_result_without_measuring(pair, prompts, killed):
    settings, _ = killed
    first = bench(pair, [prompts], **settings)
    assert bench(pair, [prompts], **settings) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 5}, "`max_new_tokens` was 4 and is 5"),
        ({"temperatures": (1.0,)}, "`temperatures` was .0.0. and is .1.0."),
        ({"methods": ["chain"]}, "`methods` was"),
    ],
)
def test_a_bench_with_other_settings_does_not_continue_a_log(pair, prompts, killed, change, message):
    settings, log_path = killed
    before = log_path.read_bytes()
    with pytest.raises(ValueError, match=f"{message}.*finish it, or delete the file"):
        bench(pair, [prompts], **{**settings, **change})
    assert log_path.read_bytes() == before


def test_a_bench_with_other_weights_or_prompts_does_not_continue_a_log(pair, prompts, killed, random_head):
    settings, _ = killed
    target, tokenizer, _ = pair
    with pytest.raises(ValueError, match="`head_hash` was"):
        bench((target, tokenizer, random_head(target, num_hidden_layers=1)), [prompts], **settings)
    write_lines(prompts, {"prompt": "t099"})
    with pytest.raises(ValueError, match="`prompts` was"):
        bench(pair, [prompts], **settings)


def test_a_log_without_measurements_accepts_new_settings(tmp_path):
    path = tmp_path / "bench.json.partial"
    BenchLog(path, {"dtype": "float32"})
    BenchLog(path, {"dtype": "bfloat16"}).add([1], "a", 0.0)
    assert BenchLog(path, {"dtype": "bfloat16"}).get("a", 0.0) == [1]
    with pytest.raises(ValueError, match='`dtype` was "bfloat16" and is "float32"'):
        BenchLog(path, {"dtype": "float32"})


def test_a_log_without_a_file_stores_its_records_in_memory():
    log = BenchLog(None, {})
    log.add([1], "a", None, 0.0)
    assert (log.get("a", None, 0.0), log.get("b")) == ([1], None)


def test_prompts_are_padded_to_each_context_length_with_the_other_texts(pair, tmp_path):
    path = write_lines(tmp_path / "few.jsonl", *({"prompt": f"t0{i} t0{i} t0{i}"} for i in range(10, 13)))
    result = bench(pair, [path], methods=["jetflow"], node_budgets=(4,), context_lengths=(16, 30), max_new_tokens=4)
    rows = result["rows"]
    assert [(row["method"], row["context_length"], row["prompt_tokens"]) for row in rows] == [
        ("plain", 16, 16), ("jetflow", 16, 16), ("plain", 30, 30), ("jetflow", 30, 30)
    ]  # fmt: skip
    assert all(row["identical_to_plain"] == 1.0 for row in rows)
    assert set(result["agreement"]) == {"few, 16 tokens", "few, 30 tokens"}


def test_prompts_are_answered_in_batches_of_each_size(pair, tmp_path):
    lengths = (1, 4, 2, 3, 6)
    path = write_lines(tmp_path / "few.jsonl", *({"prompt": "t011 " * length} for length in lengths))
    settings = dict(methods=["jetflow"], node_budgets=(4,), batch_sizes=(1, 2), max_new_tokens=5)
    rows = bench(pair, [path], **settings)["rows"]
    assert [(row["method"], row["batch_size"], row["num_prompts"]) for row in rows] == [
        ("plain", 1, 5), ("jetflow", 1, 5), ("plain", 2, 4), ("jetflow", 2, 4)
    ]  # fmt: skip
    assert all(row["identical_to_plain"] == 1.0 for row in rows)
    assert [row["num_new_tokens"] for row in rows] == [25, 25, 20, 20]
    assert rows[2]["tokens_per_round"] == 1.0
    with pytest.raises(ValueError, match="gives 5 prompts, too few for batches of 6"):
        bench(pair, [path], **{**settings, "batch_sizes": (6,)})
    with pytest.raises(ValueError, match="prompt-lookup cannot answer batches"):
        bench(pair, [path], **{**settings, "methods": ["prompt-lookup"]})


def test_a_padded_prompt_ends_with_its_own_text(pair, tmp_path):
    path = write_lines(tmp_path / "few.jsonl", {"prompt": "t050 t051"}, {"prompt": "t060 t061"}, {"prompt": "t070"})
    conversations = [prompt["messages"] for prompt in read_prompts([path])]
    ids = padded_prompt(pair[1], conversations, 1, 12)
    assert ids == [3, 70, 50, 51, 60, 61, 70, 60, 61, 4, 5][:1] + ids[1:-4] + [60, 61, 4, 5]
    assert len(ids) == 12
    assert ids[1:6] == [70, 50, 51, 60, 61]
    assert padded_prompt(pair[1], conversations, 1, 4) == encode_chat(pair[1], conversations[1])


def test_a_context_longer_than_the_target_allows_is_refused(pair, prompts):
    most = SIZES["max_position_embeddings"]
    with pytest.raises(ValueError, match=rf"prompt of {most} tokens.*{most} positions.*at most {most - 4}"):
        bench(pair, [prompts], context_lengths=(64, most), max_new_tokens=4)


def test_the_json_file_holds_the_result_and_no_partial_file_is_left(pair, prompts, tmp_path):
    result = bench(pair, [prompts], methods=["jetflow"], node_budgets=(4,), max_new_tokens=4, num_prompts=1)
    write_json(result, tmp_path / "out" / "bench.json")
    assert read_result(tmp_path / "out" / "bench.json") == json.loads(json.dumps(result))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bench.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[1]", "expected a JSON object"), ("{}", "not the result of a bench; give the file")],
)
def test_a_file_that_is_no_result_is_refused(tmp_path, text, message):
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_result(path)


@pytest.mark.parametrize("method", ["warp", "assistant", "assistant:"])
def test_an_unknown_method_is_refused_by_name(method):
    with pytest.raises(JetFlowError, match=rf"unknown methods {method}; choose from plain, jetflow, chain"):
        BenchSettings([Path("few.jsonl")], ["plain", method])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"node_budgets": [0]}, "`--node-budgets` is '0', expected 'auto' or a number of at least 1"),
        ({"node_budgets": ["many"]}, "`--node-budgets` is 'many', expected 'auto' or a number"),
        ({"temperatures": [-1.0]}, "`--temperatures` is -1.0, expected at least 0"),
        ({"temperatures": [float("nan")]}, "`--temperatures` is nan, expected at least 0"),
        ({"temperatures": []}, "`--temperatures` is empty"),
        ({"node_budgets": []}, "`--node-budgets` is empty"),
        ({"json": Path(".")}, "`--json` is the folder ., expected a file such as result.json"),
        ({"num_prompts": 0}, "`--num-prompts` is 0, expected at least 1"),
        ({"context_lengths": [0]}, "`--context-lengths` is 0, expected at least 1"),
        ({"batch_sizes": [1, 0]}, "`--batch-sizes` is 0, expected at least 1"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(JetFlowError, match=message):
        BenchSettings([Path("few.jsonl")], **settings)


def test_prompt_files_of_one_name_and_empty_ones_are_refused(pair, prompts, tmp_path):
    (tmp_path / "other").mkdir()
    twin = write_lines(tmp_path / "other" / "few.jsonl", {"prompt": "t010"})
    with pytest.raises(ValueError, match=r"called \['few'\].*rename"):
        bench(pair, [prompts, twin])
    twin.write_text("")
    with pytest.raises(ValueError, match="holds no prompts"):
        bench(pair, [twin])


def test_the_control_compares_plain_texts_with_those_of_a_batch_of_four(pair, tmp_path, monkeypatch):
    path = write_lines(tmp_path / "six.jsonl", *({"id": i, "prompt": "t010 " * (i + 1)} for i in range(6)))
    settings = dict(methods=["plain"], max_new_tokens=5)
    calls = []
    result = bench(pair, [path], **settings, progress=lambda *call: calls.append(call))
    assert result["control"] == {"six": 1.0}, "in float32 padding and batch size change no text here"
    assert calls[-1][:2] == (7, 7), "six answers and one batch"
    real = hf_jetflow.bench.bench.new_answers
    monkeypatch.setattr(hf_jetflow.bench.bench, "new_answers", lambda *call: [[1], *real(*call)[1:]])
    assert bench(pair, [path], **settings)["control"] == {"six": 0.75}
    assert bench(pair, [path], **settings, num_prompts=3)["control"] == {"six": None}
    assert bench(pair, [path], **settings, temperatures=(0.7,))["control"] == {}


def test_progress_reaches_the_number_of_runs(pair, prompts):
    calls = []
    bench(pair, [prompts], node_budgets=(4,), max_new_tokens=3, progress=lambda *call: calls.append(call))
    answers = [call[0] for call in calls if call[2] == "answers, few"]
    assert (answers[-1], answers) == (9, sorted(answers))
    others = [call for call in calls if call[2] != "answers, few"]
    assert others == [(done, 3, "agreement of head and target, few") for done in (0, 3)]


@pytest.mark.parametrize("kind", [None, "path"])
def test_agreement_by_depth_is_reported_for_greedy_texts(kind, target, random_head, prompts):
    head = random_head(target, branch_correction=kind)
    tokenizer = tiny_tokenizer(target.config.vocab_size)
    result = bench(
        (target, tokenizer, head),
        [prompts],
        methods=["chain"],
        temperatures=(0.0, 1.0),
        max_new_tokens=9,
        num_prompts=2,
    )
    rates = result["agreement"][prompts.stem]
    names = {f"{group}{measure}" for group in ("", "spine_", "sibling_") for measure in ("top1", "corrected_top1")}
    assert rates.pop("kl")
    assert set(rates) == {name for name in names if kind or "corrected" not in name}
    assert all(len(values) == 7 and all(0 <= value <= 1 for value in values) for values in rates.values())
    if kind:  # a new correction changes nothing
        assert rates["corrected_top1"] == rates["top1"]


def test_no_agreement_is_reported_without_greedy_texts(pair, prompts):
    result = bench(pair, [prompts], methods=["chain"], temperatures=(1.0,), max_new_tokens=4, num_prompts=1)
    assert result["agreement"] == {}
