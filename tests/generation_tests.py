"""Runs the generation tests of transformers with a random draft head in every greedy and sampled call.

    make generation-tests SOURCES=../transformers                                  # all families of FAMILIES
    python tests/generation_tests.py ../transformers --families llama gpt2 -k inputs_embeds

`SOURCES` is a checkout of transformers at the installed release: its `tests/` are not part of the wheel. Every
float32 call is also decoded plainly, and both texts must be equal. Calls that the head refuses by name run without
it and are counted. A test that fails without a head, too, says nothing about heads and is listed apart.
"""

import argparse
import copy
import fnmatch
import functools
import sys
import weakref
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationMixin, PreTrainedModel

from hf_jetflow import JetFlowConfig, JetFlowHead


FAMILIES = [
    "bloom",
    "falcon",
    "gemma",
    "gemma2",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "lfm2",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_next",
    "stablelm",
]
BATCH_SIZES = (1, 2)  # a batch that records its scores is decoded plainly, a single sequence drafts
LEFT_OUT = ("compil",)  # part of a test's name: compiling a forward takes minutes on a CPU
NODE_BUDGET = 120  # more than the tokens of the tests' vocabularies, so that drafts of a random head are accepted

# Tests that fail with a head for a good reason: pattern of FAMILY::TEST -> reason.
EXPECTED_FAILURES: dict[str, str] = {}


class Heads:
    """Adds a head to every `generate` call that has no assistant, and counts what became of it."""

    def __init__(self) -> None:
        self.family = self.test = ""
        self.is_on = True
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)  # of each family
        self.messages: Counter[str] = Counter()  # why calls were refused or decoded plainly
        self.drafting_tests: set[str] = set()
        self._heads: weakref.WeakKeyDictionary[PreTrainedModel, JetFlowHead] = weakref.WeakKeyDictionary()

    def wrap(self, plain: Any) -> Any:
        @functools.wraps(plain)
        def generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            own = ("assistant_model", "custom_generate", "prompt_lookup_num_tokens")
            if not self.is_on or any(kwargs.get(name) is not None for name in own):
                return plain(model, *args, **kwargs)
            expected, state = None, torch.get_rng_state()
            if model.dtype == torch.float32:
                copies = {name: _copied(value) for name, value in kwargs.items()}
                expected = _sequences(plain(model, *map(_copied, args), **copies))
                torch.set_rng_state(state)
            head = self._head_of(model)
            if head is not None:
                try:
                    output = plain(model, *args, **kwargs, assistant_model=head)
                except ValueError as error:
                    if "assistant_model" not in str(error):
                        raise
                    self._count("refused", str(error))
                else:
                    self._count_stats(head)
                    assert expected is None or torch.equal(_sequences(output), expected), (
                        f"another text than plain decoding: {_sequences(output).tolist()} for {expected.tolist()}"
                    )
                    return output
            torch.set_rng_state(state)
            return plain(model, *args, **kwargs)

        return generate

    def _head_of(self, model: PreTrainedModel) -> JetFlowHead | None:
        if model not in self._heads:
            try:
                config = JetFlowConfig.for_target(model.config, num_hidden_layers=1, block_size=4, mask_token_id=0)
            except ValueError as error:
                self._count("refused", str(error))
                return None
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self._heads[model] = JetFlowHead(config).eval()
            self._heads[model].generation_config.node_budget = NODE_BUDGET
        return self._heads[model].to(device=model.device, dtype=model.dtype)

    def _count(self, outcome: str, message: str) -> None:
        self.counts[self.family][outcome] += 1
        self.messages[f"{outcome}: {message}"] += 1

    def _count_stats(self, head: JetFlowHead) -> None:
        stats = head.last_stats
        num_rounds = sum(rounds for nodes, rounds in stats.rounds_by_nodes.items() if nodes > 1)
        if not num_rounds:
            self._count("plain", str(stats.policy.get("plain", "nothing was left to draft")))
            return
        self.counts[self.family].update(drafted=1, rounds=num_rounds, accepted=stats.num_accepted)
        self.drafting_tests.add(self.test)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def _sequences(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.sequences


class Plugin:
    """Selects the mixin's tests, sets their batch size, tells `Heads` which one runs, and records the outcomes."""

    def __init__(self, heads: Heads, batch_size: int):
        self.heads, self.batch_size = heads, batch_size
        self.outcomes: dict[str, str] = {}  # of FAMILY::TEST
        self.node_ids: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if _is_mixin_test(item) and not any(part in item.name for part in LEFT_OUT)]
        for test_class in {item.cls for item in items}:
            prepare = functools.partialmethod(
                test_class.prepare_config_and_inputs_for_generate, batch_size=self.batch_size
            )
            test_class.prepare_config_and_inputs_for_generate = prepare
        for item in items:
            for pattern, reason in EXPECTED_FAILURES.items():
                if fnmatch.fnmatch(self._name(item), pattern):
                    item.add_marker(pytest.mark.xfail(reason=reason))

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.heads.family, self.heads.test = item.path.parent.name, self._name(item)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Any:
        report = yield
        if report.when == "call" or report.failed or report.skipped:
            outcome = "expected" if report.skipped and hasattr(report, "wasxfail") else report.outcome
            self.outcomes[self._name(item)], self.node_ids[self._name(item)] = outcome, item.nodeid
        return report

    def _name(self, item: pytest.Item) -> str:
        return f"{item.path.parent.name}::{item.name}, batch {self.batch_size}"


def _is_mixin_test(item: pytest.Item) -> bool:
    bases = getattr(getattr(item, "cls", None), "__mro__", ())
    return any(base.__name__ == "GenerationTesterMixin" and hasattr(base, item.name) for base in bases)


def report(outcomes: dict[str, str], without_head: dict[str, str], heads: Heads, families: list[str]) -> list[str]:
    """Print what was drafted and what failed; return the reasons why the run counts as failed."""
    by_family: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for name, outcome in outcomes.items():
        is_empty = outcome == "passed" and name not in heads.drafting_tests
        by_family[name.split("::")[0]]["no draft" if is_empty else outcome] += 1
    print(f"\n{'':14}tests: with draft  no draft  failed  expected  skipped | calls: drafted  refused  plain | rounds")
    for family in families:
        tests, calls = by_family[family], heads.counts[family]
        cells = [tests[name] for name in ("passed", "no draft", "failed", "expected", "skipped")]
        cells += [calls[name] for name in ("drafted", "refused", "plain", "rounds")]
        print("{:14}{:17}{:10}{:8}{:10}{:9} |{:15}{:9}{:7} |{:7}".format(family, *cells))
    for message, count in heads.messages.most_common():
        print(f"{count:5} calls {message}")
    for name, outcome in without_head.items():
        if outcome != "passed":
            print(f"fails without a head, too: {name}")
    problems = [f"failed: {name}" for name, outcome in without_head.items() if outcome == "passed"]
    return problems + [f"nothing was drafted: {family}" for family in families if not heads.counts[family]["rounds"]]


def run(sources: Path, families: list[str], pytest_args: list[str]) -> list[str]:
    """Run the tests, then those that failed once more without a head; return the reasons why the run failed."""
    heads, plain = Heads(), GenerationMixin.generate
    options = [
        "--noconftest",
        f"--rootdir={sources}",
        "-c",
        "/dev/null",
        "-p",
        "no:cacheprovider",
        "-q",
        "-W",
        "ignore",
    ]
    files = [
        str(file) for family in families for file in (sources / "tests/models" / family).glob("test_modeling_*.py")
    ]
    outcomes: dict[str, str] = {}
    without_head: dict[str, str] = {}
    sys.path.insert(0, str(sources))
    GenerationMixin.generate = heads.wrap(plain)
    try:
        for batch_size in BATCH_SIZES:
            heads.is_on, plugin, again = True, Plugin(heads, batch_size), Plugin(heads, batch_size)
            pytest.main([*options, "-rxX", "--tb=short", *pytest_args, *files], plugins=[plugin])
            failed = [plugin.node_ids[name] for name, outcome in plugin.outcomes.items() if outcome == "failed"]
            if failed:
                heads.is_on = False
                pytest.main([*options, "--tb=no", *(str(sources / node_id) for node_id in failed)], plugins=[again])
            outcomes |= plugin.outcomes
            without_head |= again.outcomes
    finally:
        GenerationMixin.generate = plain
        sys.path.remove(str(sources))
    return report(outcomes, without_head, heads, families)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, help="folder that holds transformers' `tests/`")
    parser.add_argument("--families", nargs="+", default=FAMILIES, help="folders of `tests/models`")
    args, pytest_args = parser.parse_known_args()
    problems = run(args.sources.resolve(), args.families, pytest_args)
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
