"""
Targets of another make: with adapters, quantized, compiled, over several processes.

`make targets-test` installs the packages that are not there; without them their tests are skipped.
"""

import copy
import json
import sys
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from helpers import ROOT, run_processes
from packaging.version import Version
from reference import assert_same_text
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig


GREEDY_AND_SAMPLED = pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])


def generate(target, input_ids, head=None, **kwargs):
    torch.manual_seed(5)
    settings = dict(max_new_tokens=24, do_sample=False, assistant_model=head)
    return target.generate(input_ids=input_ids, **{**settings, **kwargs})


def needs(*packages):
    """Skips a test whose packages are not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)} (make targets-test)")


@pytest.fixture
def target(tiny_target):
    """A target of our own, of sizes that blocks of 64 divide."""
    return copy.deepcopy(tiny_target("llama", vocab_size=256, intermediate_size=128))


@pytest.fixture
def plain(target, prompt):
    """The text before anything was done to the target."""
    return generate(target, prompt)


def assert_plain(target, head, input_ids, do_sample, **kwargs):
    """The head leaves the text alone; returns it."""
    expected = generate(target, input_ids, do_sample=do_sample, **kwargs)
    assert_same_text(expected, generate(target, input_ids, head, do_sample=do_sample, **kwargs))
    assert head.last_stats.num_drafted > 0
    return expected


def fits_peft():
    """Whether the installed peft is one that the installed transformers takes."""
    if find_spec("peft") is None:
        return False
    from transformers.integrations.peft import MIN_PEFT_VERSION

    return Version(version("peft")) >= Version(MIN_PEFT_VERSION)


NEEDS_PEFT = pytest.mark.skipif(
    not fits_peft(), reason="not installed: a peft that this transformers takes (make targets-test)"
)

# --- adapters --------------------------------------------------------------------------------------------------------


def lora(**settings):
    from peft import LoraConfig

    modules = dict(target_modules=["q_proj", "v_proj"])
    return LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **{**modules, **settings})


def wrapped(target):
    from peft import get_peft_model

    return get_peft_model(target, lora())


def wrapped_to_the_ends(target):
    from peft import get_peft_model

    return get_peft_model(target, lora(target_modules=["down_proj", "embed_tokens", "lm_head"]))


def with_a_trained_output(target):
    from peft import get_peft_model

    return get_peft_model(target, lora(modules_to_save=["lm_head"]))


def merged(target):
    return wrapped(target).merge_and_unload()


def added(target):
    target.add_adapter(lora())
    return target


def prompt_tuned(target):
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(target, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def prefix_tuned(target):
    from peft import PrefixTuningConfig, get_peft_model

    return get_peft_model(target, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


ADAPTED = [wrapped, wrapped_to_the_ends, with_a_trained_output, merged, added, prompt_tuned, prefix_tuned]


@NEEDS_PEFT
@GREEDY_AND_SAMPLED
@pytest.mark.parametrize("adapt", ADAPTED, ids=lambda adapt: adapt.__name__)
def test_an_adapted_target_gives_its_own_text(adapt, do_sample, target, random_head, prompt, plain):
    head = random_head(target)
    torch.manual_seed(11)
    adapted = adapt(target).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5).add_(torch.randn_like(parameter))
    assert not torch.equal(plain, assert_plain(adapted, head, prompt, do_sample)), "the adapter does nothing"


@NEEDS_PEFT
@pytest.mark.parametrize("adapt", [wrapped, prompt_tuned, prefix_tuned], ids=lambda adapt: adapt.__name__)
def test_padding_in_front_of_an_adapted_target_s_prompt(adapt, target, random_head, prompt):
    head = random_head(target)
    torch.manual_seed(11)
    adapted = adapt(target).eval()
    padded = torch.cat([prompt.new_zeros(1, 5), prompt], dim=1)
    mask = (torch.arange(17) >= 5).long()[None]
    assert_plain(adapted, head, padded, False, attention_mask=mask)


@NEEDS_PEFT
def test_an_adapter_is_switched_off_between_calls(target, random_head, prompt, plain):
    head = random_head(target)
    torch.manual_seed(11)
    adapted = wrapped(target).eval()
    assert_plain(adapted, head, prompt, False)
    with adapted.disable_adapter():
        assert_same_text(plain, generate(adapted, prompt, head))
    assert_plain(adapted, head, prompt, False)


# --- quantized targets -----------------------------------------------------------------------------------------------


def torchao_config(name, **settings):
    from torchao import quantization

    return TorchAoConfig(getattr(quantization, name)(), **settings)


QUANTIZED = {
    "torchao-int8": (lambda: torchao_config("Int8WeightOnlyConfig"), "torchao"),
    "torchao-int8-all": (
        lambda: torchao_config("Int8WeightOnlyConfig", include_input_output_embeddings=True),
        "torchao",
    ),
    "torchao-float8": (lambda: torchao_config("Float8WeightOnlyConfig"), "torchao"),
    "bitsandbytes-nf4": (lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "bitsandbytes"),
    "bitsandbytes-fp4-all": (
        lambda: BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["none"]),
        "bitsandbytes",
    ),
    "bitsandbytes-int8": (lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0), "bitsandbytes"),
    "quanto-int8-all": (lambda: QuantoConfig(weights="int8", modules_to_not_convert=["none"]), "optimum"),
    "quanto-float8": (lambda: QuantoConfig(weights="float8"), "optimum"),
}


def by_package(makers):
    return [pytest.param(make, marks=needs(package), id=name) for name, (make, package) in makers.items()]


def quantized(target, config, folder):
    target.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    loaded.generation_config.eos_token_id = None
    return loaded.eval()


@pytest.mark.parametrize(("kind", "do_sample"), [("random", False), ("random", True), ("path", False)])
@pytest.mark.parametrize(
    "make", [pytest.param(make, marks=needs(name), id=key) for key, (make, name) in QUANTIZED.items()]
)
def test_a_quantized_target_gives_its_own_text(make, kind, do_sample, target, head_of_kind, prompt, plain, tmp_path):
    head = head_of_kind(kind, target, plain)
    text = assert_plain(quantized(target, make(), tmp_path), head, prompt, do_sample)
    assert not torch.equal(plain, text), "quantization did nothing"


ROUNDED = {
    "torchao-int8-activations": (lambda: torchao_config("Int8DynamicActivationInt8WeightConfig"), "torchao"),
    "bitsandbytes-llm-int8": (lambda: BitsAndBytesConfig(load_in_8bit=True), "bitsandbytes"),
}


@torch.no_grad()
@pytest.mark.parametrize(
    "make", [pytest.param(make, marks=needs(name), id=key) for key, (make, name) in ROUNDED.items()]
)
def test_rounded_activations_let_near_ties_fall_either_way(make, target, random_head, prompt, tmp_path):
    """
    Rounding activations to 8 bits, a target computes other logits over many rows than over one, head or no head.

    So texts may part, as they do in bfloat16: where the two best tokens are no further apart than these logits.
    """
    head = random_head(target)
    target = quantized(target, make(), tmp_path)
    plain, drafted = generate(target, prompt), generate(target, prompt, head)
    whole, steps, cache = target(plain).logits[0], [], None
    for token in plain[0]:
        output = target(token.view(1, 1), past_key_values=cache)
        cache = output.past_key_values
        steps.append(output.logits[0])
    noise = (whole - torch.cat(steps)).abs().max()
    spread = (whole.max(dim=-1).values - whole.median(dim=-1).values).mean()
    assert 1e-3 < noise < spread / 8
    chosen = target(drafted).logits[0, 11:-1]
    lost = chosen.max(dim=-1).values - chosen.gather(1, drafted[0, 12:, None])[:, 0]
    assert lost.max() <= noise


# --- compiled targets ------------------------------------------------------------------------------------------------


def compiled_forward(target, backend):
    target.forward = torch.compile(target.forward, backend=backend)
    return target


def compiled_module(target, backend):
    return torch.compile(target, backend=backend)


def compiled_in_place(target, backend):
    target.compile(backend=backend)
    return target


@pytest.mark.parametrize(
    ("compiled", "backend"),
    [
        pytest.param(compiled_forward, "eager", marks=pytest.mark.slow),
        (compiled_module, "aot_eager"),
        pytest.param(compiled_forward, "aot_eager", marks=pytest.mark.slow),
        pytest.param(compiled_in_place, "aot_eager", marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_compiled_target_gives_the_plain_text(compiled, backend, tiny_target, echo_head, prompt):
    """Twice, as a second call meets what the first one compiled."""
    target = copy.deepcopy(tiny_target("llama", num_hidden_layers=1))
    plain = generate(target, prompt, max_new_tokens=6)
    head = echo_head(target, plain)
    head.generation_config.node_budget = 4
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    target = compiled(target, backend)
    for _ in range(2):
        assert_same_text(plain, generate(target, prompt, head, max_new_tokens=6))
    assert head.last_stats.tokens_per_round > 2
    breaks = list(torch._dynamo.utils.counters["graph_break"])
    assert not any("Data pointer" in reason for reason in breaks), "our cache layers break the graph"


# --- several processes -----------------------------------------------------------------------------------------------


LIMIT = 120  # seconds; a quiet machine needs about ten


@pytest.mark.slow
def test_a_target_split_over_two_processes_gives_the_plain_text(tiny_target, tmp_path):
    tiny_target("llama", vocab_size=258).save_pretrained(tmp_path / "target")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", ROOT / "tests" / "tensor_parallel_worker.py", tmp_path, LIMIT]
    run_processes(command, tmp_path, LIMIT)
    facts = [json.loads((tmp_path / f"facts-{rank}.json").read_text()) for rank in (0, 1)]
    for fact in facts:
        assert fact["tp_size"] == 2
        assert "node_budget" in fact["refusal"]
        for texts in fact["texts"]:
            assert texts["plain"] == texts["split"] == texts["drafted"]
            assert texts["tokens_per_round"] > 1.5
    assert facts[0] == facts[1]
