"""Calls of random settings, each compared with plain decoding: text, random numbers and the returned cache's length.

    python tests/fuzz.py --calls 2000 --seed 0        # a soak; ends with what was seen, and fails at any mismatch
    python tests/fuzz.py --seed 0 --only 137          # one call again, with its settings

Two logits of a float32 target can be so near to each other that a forward over more rows orders them otherwise. A
mismatch is therefore decoded once more in float64, where such ties do not happen: if it vanishes, it counts as one.
"""

import argparse
import copy
import functools
import gc
import os
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import support_matrix
import torch
from conftest import build_random
from rich.progress import track
from transformers import LogitsProcessor, PreTrainedModel, StoppingCriteria

from hf_jetflow import JetFlowConfig, JetFlowHead


VOCAB = support_matrix.COMMON["vocab_size"]
NAMES = [
    name
    for name, cells in support_matrix.read_table().items()
    if not cells["refused because"] and support_matrix.is_known(name) and not support_matrix.FAMILIES[name].image
]
MOST_GROWTH = 64 * 2**20  # bytes of memory that a soak may gain once every family was built


class FavourRecent(LogitsProcessor):
    """A caller's own processor: tokens of the latest past are favoured."""

    is_row_wise = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter_add(1, input_ids[:, -3:], torch.full_like(scores[:, :3], 0.3)[:, : input_ids.shape[1]])


class StopAt(StoppingCriteria):
    """A caller's own criterion: the text ends where its tokens sum to a multiple of 11."""

    is_row_wise = True

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids.sum(dim=1) % 11 == 0


@functools.cache
def target_of(name: str, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    target = support_matrix.build(name).to(dtype)
    if attention == "eager":
        target.set_attn_implementation("eager")
    return target


@functools.lru_cache(maxsize=16)
def head_of(name: str, dtype: torch.dtype, config: tuple[tuple[str, Any], ...]) -> JetFlowHead:
    head = build_random(target_of(name, torch.float32, "sdpa"), **dict(config))
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
    target = target_of(case["name"], dtype, case["attention"])
    return CribHead(target, dict(case["head"])["block_size"], plain[-1][0], num_pads).to(dtype).eval()


def draw_case(seed: int, number: int) -> dict[str, Any]:
    """The settings of a call, drawn from its number."""
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
        name=rng.choice(NAMES),
        attention="eager" if some(0.15) else "sdpa",
        lengths=lengths,
        prompt_seed=rng.randrange(10**6),
        settings=settings,
        own_processor=some(0.15),
        own_criterion=some(0.1),
        knows_the_text=some(0.6),
        turns=turns,
        head=tuple(head.items()),
        node_budget=rng.choice(["auto", 1, 2, 7, 16, 40, 80]),
        max_depth=rng.randint(1, head["block_size"] - 1),
        width=rng.choice([None, None, 1, 3]),
        door=rng.choice(["assistant_model", "assistant_model", "custom_generate"]),
    )


def decode(case: dict[str, Any], dtype: torch.dtype, head: JetFlowHead | None) -> list[Any]:
    """What a call hands out, turn by turn: ids, length of the cache, state of the random generator."""
    target = target_of(case["name"], dtype, case["attention"])
    door = {} if head is None else {"assistant_model": head}
    if head is not None and case["door"] == "custom_generate":
        door = {"custom_generate": head.custom_generate}
    generator = torch.Generator().manual_seed(case["prompt_seed"])
    width = max(case["lengths"])
    mask = torch.stack([torch.arange(width) >= width - length for length in case["lengths"]]).long()
    ids = torch.randint(3, VOCAB, mask.shape, generator=generator).masked_fill(mask == 0, 0)
    seen, cache = [], None
    torch.manual_seed(case["prompt_seed"])
    for _ in range(case["turns"]):
        settings = copy.deepcopy(case["settings"])
        settings |= dict(logits_processor=[FavourRecent()]) if case["own_processor"] else {}
        settings |= dict(stopping_criteria=[StopAt()]) if case["own_criterion"] else {}
        settings |= dict(past_key_values=cache) if cache is not None else {}
        output = target.generate(input_ids=ids, attention_mask=mask, **settings, **door)
        text = output if isinstance(output, torch.Tensor) else output.sequences
        seen.append([text.tolist(), torch.get_rng_state().sum().item()])
        if not isinstance(output, torch.Tensor) and output.past_key_values is not None:
            cache = output.past_key_values
            seen[-1].append(int(cache.get_seq_length()))
        if case["turns"] > 1:
            more = torch.randint(3, VOCAB, (len(text), 3), generator=generator)
            mask = torch.cat([mask, torch.ones(len(text), text.shape[1] + 3 - ids.shape[1], dtype=torch.long)], dim=1)
            ids = torch.cat([text, more], dim=1)
    return seen


def run_case(case: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[str, Counter[str]]:
    """`same`, or what differs; and counts of what the head did."""
    plain = decode(case, dtype, None)
    head = crib_head(case, dtype, plain) if case["knows_the_text"] else head_of(case["name"], dtype, case["head"])
    config = head.generation_config
    config.node_budget, config.max_depth, config.width = case["node_budget"], case["max_depth"], case["width"]
    drafted = decode(case, dtype, head)
    stats = head.last_stats
    counts = Counter(tokens=stats.num_new_tokens, drafted=stats.num_drafted, accepted=stats.num_accepted)
    counts["calls decoded plainly"] = int("plain" in stats.policy)
    return ("same" if plain == drafted else f"plain {plain}, with the head {drafted}"), counts


def memory_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(seed: int, numbers: range) -> Counter[str]:
    """
    Run many calls.

    Raises:
        AssertionError: At a mismatch that is no near tie, or memory that grows.
    """
    counts: Counter[str] = Counter()
    settled = 0
    for number in track(numbers, description="calls", disable=not sys.stderr.isatty()):
        case = draw_case(seed, number)
        verdict, of_case = run_case(case)
        if verdict != "same":
            again, _ = run_case(case, torch.float64)
            assert again == "same", f"call {number} of seed {seed}: {again}\n{case}"
            counts["near ties"] += 1
            print(f"call {number}: a near tie in float32 ({case['name']})", flush=True)
        counts += of_case
        counts["calls"] += 1
        if number - numbers.start == len(numbers) // 2:
            settled = memory_bytes()
    if len(numbers) > 500:
        growth = memory_bytes() - settled
        counts["memory gained in the second half (MiB)"] = growth // 2**20
        print(dict(counts), flush=True)
        assert growth < MOST_GROWTH, f"memory grew by {growth / 2**20:.0f} MiB in the second half of the calls"
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one call")
    args = parser.parse_args()
    if args.only is not None:
        case = draw_case(args.seed, args.only)
        print(case)
        print(run_case(case))
        return
    for name, count in soak(args.seed, range(args.calls)).items():
        print(f"{name}: {count:,}")


if __name__ == "__main__":
    main()
