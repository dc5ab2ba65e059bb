"""Calls of random settings, each compared with plain decoding: text, random numbers and the returned cache's length.

    python tests/fuzz.py --calls 2000 --seed 0                 # a soak; ends with counts, and fails at any mismatch
    python tests/fuzz.py --calls 200 --dimensions rope table   # some of the dimensions of DIMENSIONS only
    python tests/fuzz.py --seed 0 --only 137                   # one call again, with its settings

Two logits of a float32 target can be so near to each other that a forward over more rows orders them otherwise. A
mismatch is therefore decoded once more in float64, where such ties do not happen: if it vanishes, it counts as one.
"""

import argparse
import contextlib
import copy
import functools
import gc
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import support_matrix
import torch
from conftest import build_random
from rich.progress import track
from transformers import LlamaForCausalLM, LogitsProcessor, PreTrainedModel, StoppingCriteria, logging

from hf_jetflow import JetFlowConfig, JetFlowHead
from hf_jetflow._compat import CACHE_NAME


VOCAB = support_matrix.COMMON["vocab_size"]
NAMES = [
    name
    for name, cells in support_matrix.read_table().items()
    if not cells["refused because"] and support_matrix.is_known(name) and not support_matrix.FAMILIES[name].image
]
MOST_GROWTH = 64 * 2**20  # bytes of memory that a soak may gain once every family was built


class BoostRecent(LogitsProcessor):
    """A caller's own processor: tokens of the latest past score higher."""

    is_row_wise = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter_add(1, input_ids[:, -3:], torch.full_like(scores[:, :3], 0.3)[:, : input_ids.shape[1]])


class StopAt(StoppingCriteria):
    """A caller's own criterion: a text ends where its tokens sum to a multiple of 11, or at a length."""

    def __init__(self, kind: str = "rows", length: int | None = None):
        self.kind, self.length, self.is_row_wise = kind, length, kind == "rows"

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor | bool:
        is_done = input_ids.sum(dim=1) % 11 == 0
        if self.length is not None:
            is_done = torch.full_like(is_done, input_ids.shape[1] >= self.length)
        return {"rows": is_done, "scalar": is_done.any(), "bool": bool(is_done.any())}[self.kind]


class Steered(LlamaForCausalLM):
    """A target whose forward has a keyword of its own, as in remote code: it moves the logits of every step."""

    def forward(self, *args: Any, steer: float = 0.0, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits + steer * torch.arange(VOCAB).to(outputs.logits).cos()
        return outputs


@functools.lru_cache(maxsize=256)
def target_of(name: str, dtype: torch.dtype, attention: str, config: str) -> PreTrainedModel:
    """The target of a family; `config` is JSON of values that differ from the family's own."""
    target = support_matrix.build("llama" if name == "steered" else name, **json.loads(config)).to(dtype)
    if name == "steered":
        target.__class__ = Steered
    if attention == "eager":
        target.set_attn_implementation("eager")
    return target


@functools.lru_cache(maxsize=16)
def head_of(name: str, dtype: torch.dtype, target_config: str, config: tuple[tuple[str, Any], ...]) -> JetFlowHead:
    head = build_random(target_of(name, torch.float32, "sdpa", target_config), **dict(config))
    generator = torch.Generator().manual_seed(6)
    if head.branch_correction is not None:  # it starts at zero, where it would change nothing
        with torch.no_grad():
            for parameter in head.branch_correction.parameters():
                if parameter.ndim == 2:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
    return head.to(dtype)


class CribHead(JetFlowHead):
    """Knows the texts: behind an anchor at its position it drafts what follows there, now and then something else."""

    def __init__(self, target: PreTrainedModel, block_size: int, texts: list[list[int]], num_pads: list[int]):
        super().__init__(JetFlowConfig.for_target(target.config, num_hidden_layers=1, block_size=block_size))
        self._embeds = target.get_input_embeddings()(torch.arange(VOCAB)).detach()
        weight = target.get_output_embeddings().weight.detach()
        self._rows = weight * (100 / weight.square().sum(dim=-1).mean())
        self._crib = {
            (place - pads, token): text[place + 1 : place + block_size]
            for text, pads in zip(texts, num_pads, strict=True)
            for place, token in enumerate(text)
        }

    def forward(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        anchors = torch.cdist(inputs_embeds[:, 0].to(self._embeds), self._embeds).argmin(dim=-1).tolist()
        rows = self._rows[:1].expand(*position_ids.shape, -1).clone()
        for index, (position, anchor) in enumerate(zip(position_ids[:, 0].tolist(), anchors, strict=True)):
            for depth, token in enumerate(self._crib.get((position, anchor), [])[: rows.shape[1] - 1], start=1):
                decoy = 1.03 if (position + 3 * depth) % 5 == 0 else 0.97
                rows[index, depth] = self._rows[token] + decoy * self._rows[(7 * token + depth) % VOCAB]
        return rows.to(inputs_embeds.dtype)


def crib_head(case: dict[str, Any], dtype: torch.dtype, plain: list[Any]) -> JetFlowHead:
    """A head that knows what plain decoding wrote."""
    width, repeats = max(case["lengths"]), case["settings"].get("num_return_sequences", 1)
    num_pads = [width - length for length in case["lengths"] for _ in range(repeats)]
    target = target_of(case["name"], dtype, case["attention"], case["config"])
    return CribHead(target, dict(case["head"])["block_size"], plain[-1][0], num_pads).to(dtype).eval()


LEARNED_POSITIONS = ["biogpt", "gpt2", "gpt_bigcode", "gpt_neo", "opt"]
TAKE_TOKEN_TYPES = ["codegen", "gpt2", "gpt_bigcode", "gpt_neo", "gptj"]


def draw_keywords(rng: random.Random, case: dict[str, Any]) -> None:
    """What plain decoding hands to every forward: token types, or a keyword of the target's own."""
    case["name"] = rng.choice(["steered", *TAKE_TOKEN_TYPES])
    if case["name"] == "steered":
        case["settings"]["steer"] = 5.0
    else:
        case["has_token_types"] = True


def draw_rope(rng: random.Random, case: dict[str, Any]) -> None:
    """Rotary frequencies that a text's length changes, or that are scaled, with a border that the texts cross."""
    border, kind = (
        rng.choice([8, 16, 24]),
        rng.choice(["dynamic", "dynamic", "longrope", "longrope", "yarn", "llama3"]),
    )
    rope: dict[str, Any] = dict(rope_type=kind, rope_theta=10_000.0, factor=4.0)
    config: dict[str, Any] = dict(rope_parameters=rope, max_position_embeddings=border if kind == "dynamic" else 128)
    case["name"] = "llama"
    if kind != "dynamic":
        rope["original_max_position_embeddings"] = border
    if kind == "llama3":
        rope |= dict(low_freq_factor=1.0, high_freq_factor=4.0)
    if kind == "longrope":
        rope |= dict(short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 3.0, 4.0, 5.0])
        config["original_max_position_embeddings"] = border
        case["name"] = rng.choice(["llama", "phi3"])
    case["config"] = json.dumps(config)


def draw_table(rng: random.Random, case: dict[str, Any]) -> None:
    """Learned positions that end where a criterion ends the text, well before its token limit."""
    num_positions = max(case["lengths"]) + rng.randint(1, 12)
    case |= dict(name=rng.choice(LEARNED_POSITIONS), turns=1, criterion="rows", stop_length=num_positions + 1)
    case["config"] = json.dumps(dict(max_position_embeddings=num_positions))
    case["settings"] |= dict(max_new_tokens=40)


def draw_criterion(rng: random.Random, case: dict[str, Any]) -> None:
    """A criterion that answers once for the whole batch."""
    case["criterion"] = rng.choice(["bool", "scalar"])


def draw_half(rng: random.Random, case: dict[str, Any]) -> None:
    """A half-precision type, in which forwards of one row alone give the same text."""
    case["half"] = rng.choice(["float16", "bfloat16"])
    if rng.random() < 0.5:
        case |= dict(lengths=case["lengths"][:1], node_budget=1)
        case["settings"].pop("num_return_sequences", None)


# Dimensions that a call has besides its settings; each draws for itself, so that a new one leaves the others alone.
DIMENSIONS = dict(
    keywords=draw_keywords,
    rope=draw_rope,
    table=draw_table,
    criterion=draw_criterion,
    default_device=lambda _, case: case.update(default_device="meta"),  # where no host tensor may land
    int32=lambda _, case: case.update(prompt_dtype=torch.int32),
    embeds=lambda _, case: case.update(is_embedded=True),
    half=draw_half,
)
TARGET_DIMENSIONS = {"keywords", "rope", "table"}  # they choose the target: a call has one of them at most
CHANCE = 0.12  # of each dimension


def draw_case(seed: int, number: int, dimensions: Iterable[str] = DIMENSIONS) -> dict[str, Any]:
    """The settings of a call, drawn from its number."""
    case = draw_settings(seed, number)
    for name in dimensions:
        rng = random.Random(f"{seed} {number} {name}")
        is_taken = name in TARGET_DIMENSIONS and TARGET_DIMENSIONS.intersection(case["dimensions"])
        if rng.random() < CHANCE and not is_taken:
            DIMENSIONS[name](rng, case)
            case["dimensions"].append(name)
    return case


def draw_settings(seed: int, number: int) -> dict[str, Any]:
    """A call of one of the families, without the dimensions."""
    rng = random.Random(f"{seed} {number}")
    some = lambda chance: rng.random() < chance  # noqa: E731
    batch = rng.choice([1, 1, 2, 3, 5])
    lengths = [rng.randint(1, 18) for _ in range(batch)]
    settings: dict[str, Any] = dict(max_new_tokens=rng.randint(1, 40), do_sample=some(0.5), pad_token_id=0)
    if settings["do_sample"]:
        settings |= dict(temperature=rng.choice([0.3, 0.7, 1.0, 1.5]), top_k=rng.choice([0, 0, 5, 20]))
        settings |= dict(top_p=0.8) if some(0.3) else {}
        settings |= dict(min_p=0.05) if some(0.2) else {}
        settings |= dict(typical_p=0.9) if some(0.1) else {}
        settings |= dict(num_return_sequences=rng.randint(2, 3)) if some(0.2) else {}
    settings |= dict(repetition_penalty=1.3) if some(0.2) else {}
    settings |= dict(no_repeat_ngram_size=rng.randint(2, 3)) if some(0.2) else {}
    settings |= dict(eos_token_id=rng.sample(range(3, VOCAB), rng.choice([1, 3, 12]))) if some(0.6) else {}
    settings |= dict(min_new_tokens=rng.randint(1, 10)) if some(0.2) and "eos_token_id" in settings else {}
    settings |= dict(suppress_tokens=rng.sample(range(VOCAB), 9)) if some(0.15) else {}
    settings |= dict(bad_words_ids=[rng.sample(range(3, VOCAB), 2), [rng.randrange(3, VOCAB)]]) if some(0.15) else {}
    settings |= dict(prefill_chunk_size=rng.randint(1, 7)) if some(0.1) else {}
    settings |= dict(return_dict_in_generate=True) if some(0.4) else {}
    turns = 2 if "return_dict_in_generate" in settings and "num_return_sequences" not in settings else 1
    if turns > 1:  # early releases read a chunked prompt whole, behind the cache that holds its beginning
        settings.pop("prefill_chunk_size", None)
    head = dict(block_size=rng.choice([2, 4, 8]))
    head |= dict(branch_correction=rng.choice(["parent", "path"]), branch_intermediate_size=16) if some(0.4) else {}
    return dict(
        dimensions=[],
        name=rng.choice(NAMES),
        config="{}",
        attention="eager" if some(0.15) else "sdpa",
        lengths=lengths,
        prompt_seed=rng.randrange(10**6),
        settings=settings,
        own_processor=some(0.15),
        criterion="rows" if some(0.1) else None,
        knows_the_text=some(0.6),
        turns=turns,
        head=tuple(head.items()),
        node_budget=rng.choice(["auto", 1, 2, 7, 16, 40, 80]),
        max_depth=rng.randint(1, head["block_size"] - 1),
        width=rng.choice([None, None, 1, 3]),
        door=rng.choice(["assistant_model", "assistant_model", "custom_generate"]),
    )


def decode(case: dict[str, Any], dtype: torch.dtype, head: JetFlowHead | None) -> list[Any]:
    """What a call returns, turn by turn: ids, state of the random generator, type of the ids, length of the cache."""
    target = target_of(case["name"], dtype, case["attention"], case["config"])
    if case["config"] != "{}":
        target = copy.deepcopy(target)  # a rotary embedding may remember the longest text that it has seen
    door = {} if head is None else {"assistant_model": head}
    if head is not None and case["door"] == "custom_generate":
        door = {"custom_generate": head.custom_generate}
    generator = torch.Generator().manual_seed(case["prompt_seed"])
    width = max(case["lengths"])
    mask = torch.stack([torch.arange(width) >= width - length for length in case["lengths"]]).long()
    ids = torch.randint(3, VOCAB, mask.shape, generator=generator).masked_fill(mask == 0, 0)
    ids = ids.to(case.get("prompt_dtype", torch.long))
    seen, cache = [], None
    torch.manual_seed(case["prompt_seed"])
    for _ in range(case["turns"]):
        settings = copy.deepcopy(case["settings"]) | dict(attention_mask=mask)
        settings |= dict(logits_processor=[BoostRecent()]) if case["own_processor"] else {}
        settings |= {CACHE_NAME: cache} if cache is not None else {}
        if case["criterion"] is not None:
            settings["stopping_criteria"] = [StopAt(case["criterion"], case.get("stop_length"))]
        if case.get("has_token_types"):
            settings["token_type_ids"] = (torch.arange(ids.shape[1]) // 3 % VOCAB).expand_as(ids).contiguous()
        is_embedded = case.get("is_embedded", False)
        prompt = (
            dict(inputs_embeds=target.get_input_embeddings()(ids).detach()) if is_embedded else dict(input_ids=ids)
        )
        with torch.device(case["default_device"]) if "default_device" in case else contextlib.nullcontext():
            output = target.generate(**prompt, **settings, **door)
        text = output if isinstance(output, torch.Tensor) else output.sequences
        ids_dtype = str(text.dtype)
        if is_embedded:  # the output has the new tokens only
            text = torch.cat([ids.repeat_interleave(len(text) // len(ids), dim=0), text], dim=1)
        seen.append([text.tolist(), torch.get_rng_state().sum().item(), ids_dtype])
        if not isinstance(output, torch.Tensor) and output.past_key_values is not None:
            cache = output.past_key_values
            seen[-1].append(int(cache.get_seq_length()))
        if case["turns"] > 1:
            more = torch.randint(3, VOCAB, (len(text), 3), generator=generator)
            mask = torch.cat([mask, torch.ones(len(text), text.shape[1] + 3 - ids.shape[1], dtype=torch.long)], dim=1)
            ids = torch.cat([text, more], dim=1).to(ids.dtype)
    return seen


def run_case(case: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[str, Counter[str]]:
    """`same`, or what differs; and counts of what the head did."""
    try:
        plain = decode(case, dtype, None)
    except Exception as error:  # such as a family whose own forward does not work with a default device
        return "same", Counter({f"calls that plain decoding refuses ({type(error).__name__})": 1})
    head_config = (case["config"], case["head"])
    head = crib_head(case, dtype, plain) if case["knows_the_text"] else head_of(case["name"], dtype, *head_config)
    config = head.generation_config
    config.node_budget, config.max_depth, config.width = case["node_budget"], case["max_depth"], case["width"]
    try:
        drafted = decode(case, dtype, head)
    except ValueError as error:
        if "assistant_model" not in str(error):
            raise
        return "same", Counter({f"calls refused ({error})": 1})
    stats = head.last_stats
    counts = Counter(tokens=stats.num_new_tokens, drafted=stats.num_drafted, accepted=stats.num_accepted)
    counts["calls decoded plainly"] = int("plain" in stats.policy)
    # In half precision more rows in a forward round differently: then the call must only work.
    is_compared = dtype not in (torch.float16, torch.bfloat16) or (case["node_budget"] == 1 and len(plain[0][0]) == 1)
    if is_compared and plain != drafted:
        return f"plain {plain}, with the head {drafted}", counts
    return "same", counts


def check_case(case: dict[str, Any]) -> tuple[str, Counter[str]]:
    """`same`, or what went wrong in any of the number types; a near tie of float32 counts as one."""
    counts: Counter[str] = Counter({f"calls with {name}": 1 for name in case["dimensions"]}, calls=1)
    try:
        if "half" in case:
            verdict, _ = run_case(case, getattr(torch, case["half"]))
            if verdict != "same":
                return f"{case['half']}: {verdict}", counts
        verdict, of_call = run_case(case)
        if verdict != "same":
            verdict, _ = run_case(case, torch.float64)
            counts["near ties"] += verdict == "same"
    except Exception as error:
        return f"{type(error).__name__}: {error}", counts
    return verdict, counts + of_call


def memory_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(seed: int, numbers: range, dimensions: Iterable[str] = DIMENSIONS) -> Counter[str]:
    """
    Run many calls.

    Raises:
        AssertionError: At mismatches that are no near ties, with the commands that repeat them, or growing memory.
    """
    counts: Counter[str] = Counter()
    failures = []
    settled = 0
    for number in track(numbers, description="calls", disable=not sys.stderr.isatty()):
        case = draw_case(seed, number, dimensions)
        verdict, of_case = check_case(case)
        if verdict != "same":
            replay = f"python tests/fuzz.py --seed {seed} --only {number} --dimensions {' '.join(dimensions)}"
            failures.append(f"{case['name']}, {case['dimensions']}: {verdict[:2000]}\n    {replay}")
            print(failures[-1], flush=True)
        counts += of_case
        if number - numbers.start == len(numbers) // 2:
            settled = memory_bytes()
    if len(numbers) > 500:
        growth = memory_bytes() - settled
        counts["memory gained in the second half (MiB)"] = growth // 2**20
        print(dict(counts), flush=True)
        assert growth < MOST_GROWTH, f"memory grew by {growth / 2**20:.0f} MiB in the second half of the calls"
    assert not failures, f"{len(failures)} of {len(numbers)} calls failed ({dict(counts)}):\n" + "\n".join(failures)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one call")
    parser.add_argument("--dimensions", nargs="*", choices=DIMENSIONS, default=list(DIMENSIONS))
    args = parser.parse_args()
    logging.set_verbosity_error()
    if args.only is not None:
        case = draw_case(args.seed, args.only, args.dimensions)
        print(case)
        print(*check_case(case), sep="\n")
        return
    for name, count in soak(args.seed, range(args.calls), args.dimensions).items():
        print(f"{name}: {count:,}")


if __name__ == "__main__":
    main()
