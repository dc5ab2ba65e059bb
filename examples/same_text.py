"""Speed of every node budget on the very same texts: what `"auto"` loses or gains against fixed budgets.

In bfloat16 trees of different sizes round differently, so that texts part where two tokens are nearly equal, and a
text that happens to be easy makes its budget look good. Here every budget has to write the target's own answer. All of
them write it at once, a round each in turn, whichever has come least far: a machine whose speed changes from second to
second is as slow for one as for the other. Needs `pip install greenlet`.

    python examples/same_text.py --target model.gguf --head examples/heads/smollm2-135m-instruct \
        --prompts dev_math.jsonl dev_code.jsonl dev_chat.jsonl --texts runs/texts --json same_text.json
"""

import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from greenlet import getcurrent, greenlet
from replayed import load_pair, make_parser, text_sets
from transformers import LogitsProcessor, PreTrainedModel

from hf_jetflow import JetFlowHead, decoding
from hf_jetflow.bench import environment, write_json


class Writer(LogitsProcessor):
    """
    One node budget writing one text; 1 node is plain `generate`.

    As a logits processor it allows the text's next token only. `write_on` does a round's work.
    """

    def __init__(self, target: PreTrainedModel, head: JetFlowHead, text: tuple[list[int], int], budget: Any):
        self._target, self._head, self._budget = target, head, budget
        self._ids, self._num_prompt = text
        self.length = 0  # of the text so far
        self.seconds = 0.0
        self.num_rounds = 0
        self._work = greenlet(self._write)

    @property
    def is_done(self) -> bool:
        return self._work.dead

    def write_on(self) -> None:
        start = time.perf_counter()
        with patch.object(decoding, "choose_policy", self._stopping_before_rounds(decoding.choose_policy)):
            self._work.switch()
        self.seconds += time.perf_counter() - start

    def _write(self) -> None:
        prompt = torch.tensor([self._ids[: self._num_prompt]], device=self._target.device)
        self._head.generation_config.node_budget = self._budget
        output = self._target.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(self._ids) - self._num_prompt,
            do_sample=False,
            logits_processor=[self],
            assistant_model=None if self._budget == 1 else self._head,
        )
        assert output[0].tolist() == self._ids

    def _stop(self) -> None:
        """Let the others write."""
        self.num_rounds += 1
        getcurrent().parent.switch()

    def _stopping_before_rounds(self, choose_policy: Callable[..., Any]) -> Callable[..., Any]:
        def chosen(*args: Any) -> Any:
            policy = choose_policy(*args)
            plan = policy.plan

            def plan_after_the_others(*limits: Any) -> Any:
                self._stop()
                return plan(*limits)

            policy.plan = plan_after_the_others
            return policy

        return chosen

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        length = input_ids.shape[1]
        if self._budget == 1 and length > self._num_prompt:
            self._stop()
        self.length = max(self.length, length)
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, self._ids[length]] = 0
        return allowed


@torch.no_grad()  # a writer that is done restores what it found
def write_together(writers: list[Writer]) -> None:
    while waiting := [writer for writer in writers if not writer.is_done]:
        min(waiting, key=lambda writer: writer.length).write_on()


def measure(
    target: PreTrainedModel, head: JetFlowHead, texts: list[tuple[list[int], int]], budgets: list[Any]
) -> list[dict[str, Any]]:
    """A row for each budget; the first text is written twice, of which the first time is warm-up."""
    written: dict[Any, list[Writer]] = {budget: [] for budget in budgets}
    for number, text in enumerate([texts[0], *texts]):
        writers = {budget: Writer(target, head, text, budget) for budget in budgets}
        write_together(list(writers.values()))
        if number:
            for budget, writer in writers.items():
                written[budget].append(writer)
    num_tokens = sum(len(ids) - num_prompt for ids, num_prompt in texts)
    rows = []
    for budget, writers_of in written.items():
        pairs = zip(written[1], writers_of, strict=True)
        rows.append(
            {
                "node_budget": budget,
                "tokens_per_second": round(num_tokens / sum(writer.seconds for writer in writers_of), 2),
                "tokens_per_round": round((num_tokens - len(texts)) / sum(w.num_rounds for w in writers_of), 3),
                "speedup": round(statistics.median(plain.seconds / writer.seconds for plain, writer in pairs), 3),
            }
        )
    return rows


def margin_of_auto(rows: list[dict[str, Any]]) -> float | None:
    """Per cent by which `"auto"` writes more tokens per second than the best fixed budget."""
    speeds = {row["node_budget"]: row["tokens_per_second"] for row in rows}
    auto = speeds.pop("auto", None)
    return None if auto is None else round(100 * (auto / max(speeds.values()) - 1), 1)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--node-budgets", nargs="+", default=["8", "16", "32", "64", "auto"])
    args = parser.parse_args()

    target, tokenizer, head = load_pair(args)
    budgets = [1] + [budget if budget == "auto" else int(budget) for budget in args.node_budgets]
    rows, margins = [], {}
    for name, texts in text_sets(args, target, tokenizer):
        of_set = measure(target, head, [text for text in texts if len(text[0]) - text[1] > 1], budgets)
        rows += [{"prompts": name, **row} for row in of_set]
        for row in of_set:
            print(f"{name:12} {row['node_budget']!s:>5} nodes  {row['tokens_per_second']:6.1f} tokens/s", end="  ")
            print(f"{row['tokens_per_round']:5.2f} tokens per round  speedup {row['speedup']:.2f}")
        margins[name] = margin_of_auto(of_set)
        if margins[name] is not None:
            print(f"{name:12}  auto against the best fixed budget: {margins[name]:+.1f} %")
    facts = {"environment": environment(), "head": args.head, "num_prompts": args.num_prompts}
    write_json({**facts, "auto_against_best_fixed_percent": margins, "rows": rows}, args.json)


if __name__ == "__main__":
    main()
