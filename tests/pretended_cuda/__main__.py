"""Print launches and host waits of a round by step, on a tiny target with the depth of Qwen3-8B.

cd tests && python -m pretended_cuda --nodes 64 --json counts.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from conftest import OracleHead, build_noisy, build_target, make_prompt
from transformers import CompileConfig

from hf_jetflow import JetFlowHead

from .counting import FORWARD, STEPS, Counts, count
from .device import install
from .prediction import ASSUMPTIONS, predict


HEADS: dict[str, dict[str, Any]] = {
    "plain": dict(ngram_weights=[]),
    "path": dict(ngram_weights=[], branch_correction="path"),
    "ngrams": dict(branch_correction="path"),
}
CACHES: dict[str, dict[str, Any]] = {
    "growing": {},
    "static": dict(cache_implementation="static", disable_compile=True, max_cache_len=512),
    "compiled": dict(cache_implementation="static", compile_config=CompileConfig(), max_cache_len=512),
}
USUAL = dict(temperature=0.7, top_k=50, top_p=0.95, min_p=0.02)
MODES: dict[str, dict[str, Any]] = {
    "greedy": dict(do_sample=False),
    "sampled": dict(do_sample=True, top_k=0),
    **{name: dict(do_sample=True, **({"top_k": 0} | {name: value})) for name, value in USUAL.items()},
    "usual": dict(do_sample=True, **USUAL),
    "all": dict(
        do_sample=True,
        **USUAL,
        typical_p=0.95,
        epsilon_cutoff=1e-3,
        remove_invalid_values=True,
        renormalize_logits=True,
    ),
}


class WorkingOracle(OracleHead):
    """An oracle that runs the head's forward, too."""

    def forward(self, **inputs: Any) -> torch.Tensor:
        return super().forward(**inputs) + 0 * JetFlowHead.forward(self, **inputs)


def counts_of(head_settings: dict[str, Any], nodes: int | str, batch: int, num_layers: int, **kwargs: Any) -> Counts:
    """Counts of one `generate` call, whose prompt has no repetitions."""
    target = build_target("qwen3", num_hidden_layers=num_layers)
    prompt = torch.cat([make_prompt(24, seed) for seed in range(batch)])
    settings = dict(max_new_tokens=48, pad_token_id=0, **kwargs)
    torch.manual_seed(5)
    plain = target.generate(prompt, **settings)
    head = build_noisy(target, plain[:1], num_hidden_layers=5, block_size=16, **head_settings)
    head.__class__ = WorkingOracle
    head.rows = head.rows.cuda()
    head.generation_config.node_budget = nodes
    torch.manual_seed(5)
    with count() as counts:
        drafted = target.cuda().generate(prompt.cuda(), assistant_model=head.cuda(), **settings)
    target.cpu()
    assert torch.equal(plain, drafted.cpu()), "the text is not the plain one"
    return counts


def table(counts: Counts) -> dict[str, dict[str, float]]:
    """Launches and waits per round, by step."""
    steps: dict[str, tuple[str, ...]] = {step: (step,) for step in STEPS[:-1]} | {"round": STEPS}
    return {
        name: {
            "launches": round(counts.per_round(counts.launches, where), 1),
            "captured": round(counts.per_round(counts.captured, where), 1),
            "forward": round(
                sum(n for (step, of), n in counts.captured.items() if step in where and of == FORWARD)
                / counts.num_rounds,
                1,
            ),
            "waits": round(counts.per_round(counts.waits, where), 2),
        }
        for name, where in steps.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", default="64", help="a number, or auto, whose time is computed as of 64")
    parser.add_argument("--layers", type=int, default=36, help="layers of the target")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--heads",
        nargs="+",
        choices=HEADS,
        default=list(HEADS),
        help="without branch scores, with the path correction, or with n-grams as well",
    )
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["greedy"])
    parser.add_argument("--places", type=int, default=0, help="print as many source lines with most waits, launches")
    parser.add_argument("--tau", type=float, default=6.56, help="tokens per round, for the computed speedup")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    install()
    rows = []
    for head, cache, mode in [(h, c, m) for h in args.heads for c in args.caches for m in args.modes]:
        nodes = args.nodes if args.nodes == "auto" else int(args.nodes)
        counts = counts_of(HEADS[head], nodes, args.batch, args.layers, **CACHES[cache], **MODES[mode])
        steps = table(counts)
        times = predict(steps, 64 if nodes == "auto" else nodes, **HEADS[head])
        facts = {"head": head, "cache": cache, "mode": mode, "nodes": nodes}
        rows.append(facts | {"steps": steps, "computed_ms": times})
        print(f"{head}; {cache} cache; {mode}; {args.nodes} nodes; {counts.num_rounds} rounds")
        for step, numbers in steps.items():
            print(
                f"  {step:10} {numbers['launches']:7.1f} launches {numbers['captured']:7.1f} captured "
                f"{numbers['waits']:6.2f} waits"
            )
        speedup = args.tau * times["plain"] / times["round"]
        print(
            f"  computed: {times['round']:.1f} ms a round, {times['plain']:.1f} ms a plain step, speedup {speedup:.1f}"
        )
        for events in (counts.waits, counts.launches):
            for step, place, number in counts.places(events)[: args.places]:
                print(f"    {number:6.2f} {step:10} {place}")
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))
    print(ASSUMPTIONS)


if __name__ == "__main__":
    main()
