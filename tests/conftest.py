"""Tiny random targets of every supported family, and stub heads whose drafts are known in advance.

Most fixtures hand out functions, so that a test says in its own words which target and head it needs. Targets are
shared between tests: do not change them.
"""

import functools
import importlib
import os
import sys
import zlib
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_jetflow import JetFlowConfig, JetFlowHead


NUM_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if NUM_WORKERS > 1:  # they share the cores, and so does what they start
    torch.set_num_threads(max((os.cpu_count() or 1) // NUM_WORKERS, 1))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
if "PYTEST_XDIST_WORKER" in os.environ:  # its folders have long names, which must not break what commands say
    os.environ["COLUMNS"] = "500"

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
VOCAB_SIZE = 257
BLOCK_SIZE = 8
WINDOW = 9

SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
EXPERTS: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(model_type="llama"),
    "qwen2": dict(model_type="qwen2"),
    "qwen3": dict(model_type="qwen3", head_dim=16),
    "qwen3_moe": dict(model_type="qwen3_moe", head_dim=16, **EXPERTS),
    "mistral": dict(model_type="mistral", sliding_window=None),
    "mistral-sliding": dict(model_type="mistral", sliding_window=WINDOW),
    "olmo2": dict(model_type="olmo2"),
    "gpt_neox": dict(model_type="gpt_neox"),
    "phi3": dict(model_type="phi3"),
    "gemma2": dict(model_type="gemma2", head_dim=16, sliding_window=WINDOW),
    "gemma3_text": dict(
        model_type="gemma3_text",
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        num_hidden_layers=6,
    ),
    "gpt_oss": dict(
        model_type="gpt_oss",
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pretend-cuda", action="store_true", help="run every `generate` on a CUDA device that the CPU pretends"
    )
    parser.addoption("--every", type=int, default=1, help="run about every n-th case of each parametrized test")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--pretend-cuda"):
        from pretended_cuda.suite import run_on_device

        config.pretended_calls = run_on_device()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--every`, select the first case of each test, and of the others a share that no parameter decides."""
    every, tests = config.getoption("--every"), set()
    selected, others = [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        is_selected = test not in tests or zlib.crc32(item.nodeid.encode()) % every == 0
        (selected if is_selected else others).append(item)
        tests.add(test)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = selected


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.getoption("--pretend-cuda"):
        terminalreporter.write_line(f"`generate` calls on the pretended device: {dict(config.pretended_calls)}")


class OracleHead(JetFlowHead):
    """A head whose output rows are fixed, one per absolute position, whatever it is shown."""

    def __init__(self, config: JetFlowConfig, rows: torch.Tensor):
        super().__init__(config)
        self.rows = rows  # (positions, hidden); the row at a position drafts the token there

    def forward(
        self, inputs_embeds: torch.Tensor, features: Any, position_ids: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        return self.rows[position_ids.clamp(max=len(self.rows) - 1)].to(inputs_embeds.dtype)


@functools.cache
def build_target(family: str, **overrides: Any) -> PreTrainedModel:
    settings = {**SIZES, **FAMILIES.get(family, {"model_type": family}), **overrides}
    attention = settings.pop("attn_implementation", None)
    torch.manual_seed(1)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    target = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    # At their usual scale random weights repeat one token; at this one the text depends on the whole context.
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3 if "embed" in name else 10)
    target.generation_config.eos_token_id = None
    return target


def build_oracle(target: PreTrainedModel, rows: torch.Tensor, **config: Any) -> OracleHead:
    settings = dict(num_hidden_layers=1, block_size=BLOCK_SIZE, mask_token_id=0)
    return OracleHead(JetFlowConfig.for_target(target.config, **{**settings, **config}), rows).eval()


def answer_rows(target: PreTrainedModel, continuation: torch.Tensor) -> torch.Tensor:
    """Rows whose best token under the target's output embedding is the one of the continuation at each position."""
    weight = target.get_output_embeddings().weight.detach().float()
    rows = weight[continuation[0]] * (100 / weight.square().sum(dim=-1).mean())
    best = (rows @ weight.T).argmax(dim=-1)
    assert torch.equal(best, continuation[0]), "the stub head cannot tell its tokens apart: choose another target seed"
    return rows


def build_random(target: PreTrainedModel, **config: Any) -> JetFlowHead:
    settings = dict(num_hidden_layers=2, block_size=BLOCK_SIZE, mask_token_id=0)
    torch.manual_seed(2)
    return JetFlowHead(JetFlowConfig.for_target(target.config, **{**settings, **config})).eval()


def build_noisy(target: PreTrainedModel, continuation: torch.Tensor, **config: Any) -> OracleHead:
    right = answer_rows(target, continuation)
    generator = torch.Generator().manual_seed(3)
    decoys = right[torch.randperm(len(right), generator=generator)]
    weights = torch.tensor([0.0, 0.97, 1.03])[torch.randint(3, (len(right), 1), generator=generator)]
    lost = torch.rand(len(right), 1, generator=generator) < 0.1
    return build_oracle(target, torch.where(lost, -right, right + weights * decoys), **config)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=FAMILIES)
def family(request):
    """Every family in turn; a test that parametrizes `family` itself chooses its own."""
    return request.param


@pytest.fixture(scope="session")
def tiny_target():
    """`tiny_target(family or model type, **config)`: a random causal LM that knows no EOS token of its own."""
    return build_target


@pytest.fixture(scope="session")
def target(tiny_target) -> PreTrainedModel:
    """The target of tests for which its family is no matter."""
    return tiny_target("llama")


@pytest.fixture
def head(target, random_head) -> JetFlowHead:
    """An untrained head of `target`."""
    return random_head(target)


@pytest.fixture(scope="session")
def random_head():
    """`random_head(target, **config)`: an untrained head, right by chance only."""
    return build_random


@pytest.fixture(scope="session")
def echo_head():
    """`echo_head(target, continuation)`: drafts the tokens of `continuation` (1, seq), so all are accepted."""
    return lambda target, continuation, **config: build_oracle(target, answer_rows(target, continuation), **config)


@pytest.fixture(scope="session")
def wrong_head():
    """`wrong_head(target, continuation)`: ranks the right token last, so none is ever accepted."""
    return lambda target, continuation, **config: build_oracle(target, -answer_rows(target, continuation), **config)


@pytest.fixture(scope="session")
def noisy_head():
    """
    `noisy_head(target, continuation)`: now right, now wrong, and often right with its second or third choice.

    Its accepted paths leave the best branch of the tree and end at every depth.
    """
    return build_noisy


@pytest.fixture(scope="session")
def corrected_head(noisy_head):
    """`corrected_head(kind, target, continuation)`: a noisy head whose branch correction re-ranks what it drafts."""

    def build(kind: str, target: PreTrainedModel, continuation: torch.Tensor, **config: Any) -> OracleHead:
        head = noisy_head(target, continuation, branch_correction=kind, **config)
        generator = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for name, parameter in head.branch_correction.named_parameters():
                if parameter.ndim == 2:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
                if "down_proj" in name:
                    parameter.mul_(4)
        return head

    return build


@pytest.fixture(scope="session")
def head_of_kind(random_head, echo_head, wrong_head, noisy_head, corrected_head):
    """`head_of_kind(kind, target, continuation)`: one of the heads above by its first word, or by its correction."""
    heads = {"echo": echo_head, "wrong": wrong_head, "noisy": noisy_head}
    heads |= {kind: partial(corrected_head, kind) for kind in ("parent", "path")}

    def build(kind: str, target: PreTrainedModel, continuation: torch.Tensor, **config: Any) -> JetFlowHead:
        return random_head(target, **config) if kind == "random" else heads[kind](target, continuation, **config)

    return build


@pytest.fixture
def example_module(monkeypatch):
    """`example_module(name)`: a script of examples/, imported for this test only, so it may be changed."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def load(name: str) -> ModuleType:
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
        return importlib.import_module(name)

    return load


@pytest.fixture
def example(example_module, monkeypatch):
    """`example(name, *arguments)` runs the `main` of a script in examples/ in this process."""

    def run(name: str, *arguments: Any) -> None:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        (sys.modules.get(name) or example_module(name)).main()

    return run


@pytest.fixture
def short_measurements(monkeypatch) -> None:
    """A bench times few forwards, and training evaluates its head with few tokens."""
    monkeypatch.setattr("hf_jetflow.bench.forward_times.MAX_TOKENS", 8)
    monkeypatch.setattr("hf_jetflow.bench.forward_times.MIN_SHARE", 0.3)
    monkeypatch.setattr("hf_jetflow.training.recipe.FINAL_NEW_TOKENS", 8)


@pytest.fixture
def prompt() -> torch.Tensor:
    """Twelve token ids, (1, 12), more than the windows of the sliding targets."""
    return make_prompt(12)


def make_prompt(length: int, seed: int = 4) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(seed))
