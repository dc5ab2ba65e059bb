"""Compare the cost model with a bench on a CPU, published tables and decoded trees; predict graphed rounds.

python examples/check_simulation.py --json examples/results/simulation.json
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hf_jetflow import JetFlowConfig
from hf_jetflow.files import write_json
from hf_jetflow.simulate.fitting import fit_hardware
from hf_jetflow.simulate.hardware import PRESETS
from hf_jetflow.simulate.roofline import (
    HeadShape,
    ModelShape,
    forward_seconds,
    head_shape,
    round_seconds,
    target_shape,
)
from hf_jetflow.simulate.simulate import expected_tokens, simulate


EXAMPLES = Path(__file__).resolve().parent
BENCH_CONTEXT = 200  # about the tokens of a prompt and half of its answer
H100_CONTEXT = 512  # assumed: the paper gives none
LATENCY_NODES = 64  # of published latencies: assumed, the model's times hardly depend on it
MATRIX_EFFICIENCIES = (0.3, 0.5, 0.7)  # unknown, so the graphed prediction is made for each
BUDGETS, BATCH_SIZES = (16, 64, 256), (1, 4, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    result = run_checks()
    for lines in tables(result).values():
        print(*lines, sep="\n")
    for name, check in result.items():
        if "errors_percent" in check:
            print(f"{name}: {json.dumps(check['errors_percent'])}")
    write_json(result, args.json)


def run_checks() -> dict[str, Any]:
    """All checks and predictions. Nothing is timed, so the result is deterministic."""
    published = _read("published_speeds.json")
    shapes = {name: _target(fields) for name, fields in published["models"].items()}
    heads = {name: _head(published["models"][name], fields) for name, fields in published["heads"].items()}
    return {
        "this_cpu": _check_cpu(shapes["SmolLM2-135M-Instruct"]),
        "eager_plain_h20": _check_eager_plain(published["eager_plain"], shapes),
        "published_h100_eager": _check_published(published["speedups"], shapes, heads),
        "mean_h100_eager": _check_means(published["mean_speedups"], shapes, heads),
        "latencies_h100": _check_latencies(published["latencies"], shapes, heads),
        "trees_from_ranks": _check_ranks(),
        "predicted_h100_graphed": _predict_graphed(published["speedups"], shapes, heads),
    }


def _read(name: str) -> Any:
    return json.loads((EXAMPLES / name).read_text(encoding="utf-8"))


def _target(fields: dict[str, Any]) -> ModelShape:
    return target_shape(AutoConfig.for_model(**fields))


def _head(target_fields: dict[str, Any], fields: dict[str, Any]) -> HeadShape:
    settings = {name: value for name, value in fields.items() if name not in ("parameters", "source")}
    shape = head_shape(JetFlowConfig.for_target(AutoConfig.for_model(**target_fields), **settings))
    if shape.backbone.dense != fields["parameters"]:
        raise ValueError(f"the head has {shape.backbone.dense} parameters, but {fields['parameters']} were published")
    return shape


def _check_cpu(target: ModelShape) -> dict[str, Any]:
    """Fit three rows of one prompt set, and predict every other row from its tokens per round."""
    bench = _read("results/bench_earlier_loop.json")["rows"]
    head_config = JetFlowConfig.from_pretrained(EXAMPLES / "heads" / "smollm2-135m-instruct")
    head = head_shape(head_config)
    by_name = {(row["prompts"], row["method"], row["node_budget"]): row for row in bench}
    fitted_to = [("dev_math", "plain", None), ("dev_math", "jetflow", 16), ("dev_math", "jetflow", 64)]
    fit_rows = [by_name[name] for name in fitted_to]
    hardware = fit_hardware("AMD EPYC, 2 cores, bf16", target, head, *fit_rows, context=BENCH_CONTEXT)
    rows = []
    for name, row in by_name.items():
        if row["method"] not in ("chain", "jetflow") or row["node_budget"] == "auto":
            continue
        nodes = row["node_budget"] or head_config.block_size
        seconds = round_seconds(target, head, hardware, nodes, context=BENCH_CONTEXT)
        plain = by_name[row["prompts"], "plain", None]
        measured = row["tokens_per_second"] / plain["tokens_per_second"]
        predicted = row["tokens_per_round"] * seconds.plain / seconds.round
        rows.append(
            {
                "prompts": row["prompts"],
                "method": row["method"],
                "node_budget": nodes,
                "is_fitted": name in fitted_to,
                "tokens_per_round": row["tokens_per_round"],
                "predicted_speedup": round(predicted, 3),
                "measured_speedup": round(measured, 3),
                "error_percent": _error(predicted, measured),
                "median_of_prompts": row["speedup"],
                "error_percent_of_median": _error(predicted, row["speedup"]),
                "verify_error_percent": _error(seconds.verify, row["round_seconds"]["verify"]),
            }
        )
    held_out = [row for row in rows if not row["is_fitted"]]
    groups = {
        "held out, same prompts": [row for row in held_out if row["prompts"] == "dev_math"],
        "held out, other prompts": [row for row in held_out if row["prompts"] != "dev_math"],
    }
    return {
        "hardware": dataclasses.asdict(hardware),
        "context": BENCH_CONTEXT,
        "rows": rows,
        "errors_percent": _errors(groups),
    }


def _check_eager_plain(published: dict[str, Any], shapes: dict[str, ModelShape]) -> dict[str, Any]:
    """Predict plain steps of other models from the launch time of a layer of Qwen3-8B."""
    hardware = dataclasses.replace(PRESETS["h100"], name="H20, eager", **published["hardware"])
    rows = []
    for name, measured in published["tokens_per_second"].items():
        predicted = 1 / forward_seconds(shapes[name], hardware, 1, context=1024)
        rows.append(
            {
                "target": name,
                "num_layers": shapes[name].num_layers,
                "is_fitted": name == "Qwen3-8B",
                "predicted_tokens_per_second": round(predicted, 2),
                "published_tokens_per_second": measured,
                "error_percent": _error(predicted, measured),
            }
        )
    held_out = [row for row in rows if not row["is_fitted"]]
    return {"source": published["source"], "rows": rows, "errors_percent": _errors({"held out": held_out})}


def _check_published(
    published: dict[str, Any], shapes: dict[str, ModelShape], heads: dict[str, HeadShape]
) -> dict[str, Any]:
    """Predict the paper's speedups from its tokens per round; nothing is fitted to them."""
    rows: list[dict[str, Any]] = []
    for table in published["tables"]:
        target, budget = table["target"], table["node_budget"]
        for prompts, (speedup, tokens) in table["rows"].items():
            (line,) = simulate(shapes[target], heads[target], PRESETS["h100"], {budget: tokens}, context=H100_CONTEXT)
            rows.append(
                {
                    **{name: table[name] for name in ("target", "method", "node_budget", "temperature")},
                    "prompts": prompts,
                    "tokens_per_round": tokens,
                    "predicted_speedup": round(line["speedup"], 2),
                    "published_speedup": speedup,
                    "error_percent": _error(line["speedup"], speedup),
                }
            )
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kind = "MT-Bench" if row["prompts"] == "MT-Bench" else "math and code"
        groups.setdefault(f"{row['method']} on {row['target']}, {kind}", []).append(row)
    return {
        "source": published["source"],
        "hardware": dataclasses.asdict(PRESETS["h100"]),
        "context": H100_CONTEXT,
        "rows": rows,
        "errors_percent": _errors(groups),
    }


def _check_means(
    published: dict[str, Any], shapes: dict[str, ModelShape], heads: dict[str, HeadShape]
) -> dict[str, Any]:
    """Predict a speedup over several prompt sets from the mean of their tokens per round."""
    rows = []
    for row in published["rows"]:
        target, budget, tokens = row["target"], row["node_budget"], statistics.mean(row["tokens_per_round"])
        (line,) = simulate(shapes[target], heads[target], PRESETS["h100"], {budget: tokens}, context=H100_CONTEXT)
        rows.append(
            {
                **{name: row[name] for name in ("target", "method", "node_budget", "temperature")},
                "prompts": f"mean of {len(row['tokens_per_round'])} sets",
                "tokens_per_round": round(tokens, 2),
                "predicted_speedup": round(line["speedup"], 2),
                "published_speedup": row["speedup"],
                "error_percent": _error(line["speedup"], row["speedup"]),
            }
        )
    return {"source": published["source"], "rows": rows, "errors_percent": _errors({"CAST": rows})}


def _check_latencies(
    published: dict[str, Any], shapes: dict[str, ModelShape], heads: dict[str, HeadShape]
) -> dict[str, Any]:
    """Predict published times of single steps, eager and compiled apart."""
    target, rows = published["target"], []
    for point in published["points"]:
        hardware = PRESETS["h100" if point["mode"] == "eager" else "h100-graphed"]
        context = point.get("context", H100_CONTEXT)
        seconds = round_seconds(shapes[target], heads[target], hardware, LATENCY_NODES, context=context)
        predicted, (least, most) = 1e3 * getattr(seconds, point["step"]), point["milliseconds"]
        rows.append(
            {
                **{name: point[name] for name in ("mode", "step")},
                "context": point.get("context"),
                "predicted_milliseconds": round(predicted, 1),
                "published_milliseconds": [least, most],
                "error_percent": _error(predicted, min(max(predicted, least), most)),
            }
        )
    groups = {
        f"H100, {mode}": [row for row in rows if row["mode"] == mode and row["context"] is None]
        for mode in ("eager", "compiled")
    }
    groups["H100, eager, long contexts"] = [row for row in rows if row["context"] is not None]
    return {"source": published["source"], "nodes": LATENCY_NODES, "rows": rows, "errors_percent": _errors(groups)}


def _check_ranks() -> dict[str, Any]:
    """Compare `expected_tokens` with the tokens per round of decoding the same prompts."""
    tables = _read("results/ranks_smollm2.json")["acceptance_by_rank"]
    rows = []
    for row in _read("results/bench_earlier_loop.json")["rows"]:
        if row["method"] == "jetflow" and isinstance(row["node_budget"], int):
            predicted = expected_tokens(tables[row["prompts"]], row["node_budget"])
            rows.append(
                {
                    "prompts": row["prompts"],
                    "node_budget": row["node_budget"],
                    "predicted_tokens_per_round": round(predicted, 3),
                    "measured_tokens_per_round": row["tokens_per_round"],
                    "error_percent": _error(predicted, row["tokens_per_round"]),
                }
            )
    return {"rows": rows, "errors_percent": _errors({"all": rows})}


def _predict_graphed(
    published: dict[str, Any], shapes: dict[str, ModelShape], heads: dict[str, HeadShape]
) -> dict[str, Any]:
    """Seconds of a plain step over those of a round without launches: speedup per token of a round."""
    rows = []
    for target, head in heads.items():
        for efficiency in MATRIX_EFFICIENCIES:
            hardware = dataclasses.replace(PRESETS["h100-graphed"], matrix_efficiency=efficiency)
            ones = dict.fromkeys(BUDGETS, 1.0)
            lines = simulate(shapes[target], head, hardware, ones, batch_sizes=BATCH_SIZES, context=H100_CONTEXT)
            rows += [
                {
                    "target": target,
                    "matrix_efficiency": efficiency,
                    "node_budget": line["node_budget"],
                    "batch_size": line["batch_size"],
                    "speedup_per_token_of_a_round": round(line["speedup"], 3),
                    "plain_milliseconds": round(1e3 * line["seconds"]["plain"], 2),
                    "verify_milliseconds": round(1e3 * line["seconds"]["verify"], 2),
                    "draft_milliseconds": round(1e3 * line["seconds"]["draft"], 2),
                }
                for line in lines
            ]
    return {"hardware": dataclasses.asdict(PRESETS["h100-graphed"]), "context": H100_CONTEXT, "rows": rows}


def _error(predicted: float, measured: float) -> float:
    return round(100 * (predicted / measured - 1), 1)


def _errors(groups: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Mean absolute, minimum and maximum error by group."""
    errors = {name: [row["error_percent"] for row in rows] for name, rows in groups.items()}
    return {
        name: {"mean_absolute": round(statistics.mean(map(abs, values)), 1), "from": min(values), "to": max(values)}
        for name, values in errors.items()
    }


def tables(result: dict[str, Any]) -> dict[str, list[str]]:
    """Rows of the tables of docs/cost-model.md, by the check that they belong to."""
    return {
        "this_cpu": [_cpu_line(row) for row in result["this_cpu"]["rows"]],
        "eager_plain_h20": [_plain_line(row) for row in result["eager_plain_h20"]["rows"]],
        "published_h100_eager": [
            _published_line(row)
            for name in ("published_h100_eager", "mean_h100_eager")
            for row in result[name]["rows"]
        ],
        "latencies_h100": [_latency_line(row) for row in result["latencies_h100"]["rows"]],
        "trees_from_ranks": [_ranks_line(row) for row in result["trees_from_ranks"]["rows"]],
        "predicted_h100_graphed": _graphed_lines(result["predicted_h100_graphed"]["rows"]),
    }


def _cpu_line(row: dict[str, Any]) -> str:
    kind = "chain of 8" if row["method"] == "chain" else row["node_budget"]
    errors = f"{row['error_percent']:+.1f} % | {row['error_percent_of_median']:+.1f} %"
    speedups = f"{row['predicted_speedup']:.2f} | {row['measured_speedup']:.2f} | {row['median_of_prompts']:.2f}"
    errors = "fitted | " if row["is_fitted"] else errors
    return f"| {row['prompts']} | {kind} | {row['tokens_per_round']:.2f} | {speedups} | {errors} |"


def _plain_line(row: dict[str, Any]) -> str:
    error = "fitted" if row["is_fitted"] else f"{row['error_percent']:+.1f} %"
    rates = f"{row['predicted_tokens_per_second']:.2f} | {row['published_tokens_per_second']:.2f}"
    return f"| {row['target']} | {row['num_layers']} | {rates} | {error} |"


def _published_line(row: dict[str, Any]) -> str:
    method = f"{row['method']} ({row['node_budget']}), T = {row['temperature']}"
    speedups = f"{row['predicted_speedup']:.2f} | {row['published_speedup']:.2f} | {row['error_percent']:+.1f} %"
    return f"| {row['target']} | {method} | {row['prompts']} | {row['tokens_per_round']:.2f} | {speedups} |"


def _latency_line(row: dict[str, Any]) -> str:
    published = " to ".join(f"{each:g}" for each in dict.fromkeys(row["published_milliseconds"]))
    times = f"{row['predicted_milliseconds']:.1f} | {published} | {row['error_percent']:+.1f} %"
    return f"| {row['mode']} | {row['step']} | {row['context'] or 'not stated'} | {times} |"


def _ranks_line(row: dict[str, Any]) -> str:
    tokens = f"{row['predicted_tokens_per_round']:.2f} | {row['measured_tokens_per_round']:.2f}"
    return f"| {row['prompts']} | {row['node_budget']} | {tokens} | {row['error_percent']:+.1f} % |"


def _graphed_lines(rows: list[dict[str, Any]]) -> list[str]:
    """One line for the middle matrix efficiency, with the gains of the lowest and the highest."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["target"], row["batch_size"], row["node_budget"]), []).append(row)
    lines = []
    for key, group in groups.items():
        low, middle, high = (row["speedup_per_token_of_a_round"] for row in group)
        times = " | ".join(f"{group[1][name]:.1f}" for name in ("plain_milliseconds", "verify_milliseconds"))
        lines.append(f"| {' | '.join(map(str, key))} | {times} | {middle:.2f} | {low:.2f} - {high:.2f} |")
    return lines


if __name__ == "__main__":
    main()
