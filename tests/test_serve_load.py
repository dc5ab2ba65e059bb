"""The parts of the load measurement that need no vLLM; `make serve-load` runs all of it."""

import json
import sys
from pathlib import Path

import pytest
from helpers import write_lines

from hf_jetflow.bench.log import BenchLog
from hf_jetflow.errors import JetFlowError


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import serve_load


SETTINGS = {"num_prompts": 2, "max_new_tokens": 8, "loads": [0.5, 1.5], "dtype": "float32"}
LATENCY = ("ttft", "tpot", "e2el")


def client_result(texts=("a", "b"), failed=0, rate=2.0, accepted=None):
    """What vLLM's client writes, with the fields that are read here."""
    result = {
        "completed": len(texts) - failed,
        "failed": failed,
        "errors": ["", "Traceback ...\nserver disconnected"] if failed else ["", ""],
        "total_output_tokens": 16,
        "duration": 1.25,
        "request_throughput": rate,
        "output_throughput": 12.8,
        "max_concurrent_requests": 2,
        "generated_texts": list(texts),
        "itls": [[0.1], [0.1]],
    }
    result |= {f"p{p}_{name}_ms": p + place for place, name in enumerate(LATENCY) for p in (50, 90, 99)}
    return result if accepted is None else result | {"spec_decode_acceptance_length": accepted}


def test_a_client_s_result_is_read_by_name():
    record = serve_load.read_result(client_result(accepted=1.8284))
    assert record["request_latency_ms"] == {"p50": 52, "p90": 92, "p99": 101}
    assert record["time_to_first_token_ms"]["p50"] == 50
    assert record["tokens_per_pass"] == 1.828
    assert (record["num_requests"], record["num_tokens"], record["texts"]) == (2, 16, ["a", "b"])
    assert "tokens_per_pass" not in serve_load.read_result(client_result())


def test_a_failed_request_stops_the_measurement_with_its_cause():
    with pytest.raises(JetFlowError, match=r"1 requests failed, the first with: .*\nserver disconnected"):
        serve_load.read_result(client_result(failed=1))


@pytest.fixture
def asked(monkeypatch):
    """Requests for measurements, in place of vLLM's client; the server at port 2 has a head."""
    calls = []

    def ask(port, target, prompts, rate, settings):
        calls.append((prompts.stem, port, rate))
        if len(calls) == ask.killed_at:
            raise KeyboardInterrupt
        return client_result(accepted=2.0 if port == 2 else None, rate=4.0)

    ask.killed_at = None
    monkeypatch.setattr(serve_load, "ask", ask)
    return calls, ask


def measure(path, names=("math", "chat")):
    log = BenchLog(path, SETTINGS)
    serve_load.measure(
        {"plain": 1, "head": 2}, Path("target"), [Path(f"{name}.jsonl") for name in names], log, SETTINGS
    )
    return log


def test_rates_are_shares_of_the_plain_server_s_saturation_and_servers_take_turns(asked, tmp_path):
    measure(tmp_path / "log", names=("math",))
    assert asked[0] == [
        *[("math", 1, None), ("math", 2, None)],
        *[("math", 1, 2.0), ("math", 2, 2.0)],
        *[("math", 1, 6.0), ("math", 2, 6.0)],
    ]


def test_a_killed_run_continues_after_the_last_finished_measurement(asked, tmp_path, capsys):
    calls, ask = asked
    ask.killed_at = 5
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "log")
    assert not serve_load.is_finished(["math", "chat"], BenchLog(tmp_path / "log", SETTINGS), SETTINGS)
    log = measure(tmp_path / "log")
    assert calls[5] == calls[4]
    assert len(calls) == 12 + 1
    assert serve_load.is_finished(["math", "chat"], log, SETTINGS)
    assert "12/12  chat         150 %  head" in capsys.readouterr().out
    with pytest.raises(JetFlowError, match="`num_prompts` was 2 and is 3"):
        BenchLog(tmp_path / "log", SETTINGS | {"num_prompts": 3})


def test_rows_count_equal_texts_against_the_plain_server_at_the_lowest_rate(asked, tmp_path):
    log = measure(tmp_path / "log", names=("math",))
    log.add(serve_load.read_result(client_result(texts=("a", "other"))), "math", 1.5, "head")
    rows = serve_load.make_rows(["math"], log, SETTINGS)
    shown = [(row["load"], row["rate"], row["method"], row["same_text"]) for row in rows]
    assert shown == [
        *[(0.5, 2.0, "plain", 2), (0.5, 2.0, "head", 2)],
        *[(1.5, 6.0, "plain", 2), (1.5, 6.0, "head", 1)],
        *[("at once", None, "plain", 2), ("at once", None, "head", 2)],
    ]
    assert not any("texts" in row for row in rows)


def test_the_plot_is_drawn_from_the_rows(asked, tmp_path):
    pytest.importorskip("matplotlib")
    rows = serve_load.make_rows(["math", "chat"], measure(tmp_path / "log"), SETTINGS)
    serve_load.draw(json.loads(json.dumps(rows)), tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 1000


def test_the_table_of_the_documents_shows_each_load_once_and_both_servers(asked, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(serve_load.__file__).parents[1] / "tools"))
    import tables

    rows = serve_load.make_rows(["dev_math"], measure(tmp_path / "log", names=("dev_math",)), SETTINGS)
    facts = {"date": "2026-01-02", "transformers": "5.17.0", "torch": "2.13.0"}
    (tmp_path / "serving.json").write_text(json.dumps({"environment": facts, "rows": rows}))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    lines = tables.serving().splitlines()
    assert (
        lines[2] == "| math | 50 %: 2.00/s | plain | 50 / 90 / 99 | 51 / 91 / 100 | 0.1 / 0.1 / 0.1 | 13 | | 2 of 2 |"
    )
    assert lines[3].startswith("| | | with the head | 50 / 90 / 99 |")
    assert "| 2.00 | 2 of 2 |" in lines[3]
    assert lines[6].startswith("| math | at once | plain |")
    assert lines[-1].startswith("Measured 2026-01-02 with transformers 5.17.0")


def test_prompts_are_the_first_user_turns(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    path = write_lines(
        tmp_path / "chat.jsonl",
        {"turns": ["one", "two"]},
        {"messages": [system, {"role": "user", "content": "three"}]},
    )
    (tmp_path / "out").mkdir()
    written = serve_load.write_prompts(path, tmp_path / "out", 2)
    assert [json.loads(line) for line in written.read_text().splitlines()] == [{"prompt": "one"}, {"prompt": "three"}]
    with pytest.raises(JetFlowError, match="holds 2 prompts, expected 3; lower --num-prompts"):
        serve_load.write_prompts(path, tmp_path / "out", 3)


def test_a_server_that_does_not_start_shows_the_end_of_its_log(monkeypatch, tmp_path):
    script = tmp_path / "serve_vllm.sh"
    script.write_text('echo "HEAD is $HEAD, options $*"; exit 3')
    monkeypatch.setattr(serve_load, "__file__", str(tmp_path / "serve_load.py"))
    settings = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 4, "kv_cache_mib": 1}
    with (
        pytest.raises(SystemExit, match=r"did not start; the end of its log:\nHEAD is none, options .*--port"),
        serve_load.server(tmp_path / "target", "none", tmp_path / "log", settings),
    ):
        pass


def test_without_vllm_the_measurement_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr("vllm_check.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["serve_load.py", "--prompts", "x.jsonl", "--json", str(tmp_path / "x.json")])
    with pytest.raises(SystemExit, match="make vllm-check"):
        serve_load.main()
