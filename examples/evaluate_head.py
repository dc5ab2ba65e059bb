r"""Score a model with lm-evaluation-harness, plainly and with its draft head, in batches: the same scores, faster.

    pip install lm-eval
    python examples/evaluate_head.py --tasks gsm8k --limit 100 --batch-size 8
    python examples/evaluate_head.py --questions questions.jsonl --batch-size 4

A file of questions has one object per line: {"question": "...", "answer": "42"}. The last number of an answer counts.
The default is SmolLM2-135M-Instruct with the head of this repository. In bfloat16, scores can differ by near-ties, as
they do between any two batch sizes.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from smollm2 import HEAD, gguf_path
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_jetflow import JetFlowHead
from hf_jetflow.target.loading import load_target


class DraftingLM(HFLM):
    """A model of the harness whose answers a head drafts. Its stopping criterion and batches need no change."""

    def __init__(
        self, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, head: JetFlowHead | None, batch_size: int
    ):
        super().__init__(pretrained=target, tokenizer=tokenizer, batch_size=batch_size)
        self._head = head
        self.num_rounds = self.num_accepted = 0

    def _model_generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = super()._model_generate(*args, **kwargs, assistant_model=self._head)
        if self._head is not None:
            self.num_rounds += self._head.last_stats.num_rounds
            self.num_accepted += self._head.last_stats.num_accepted
        return output


def questions_task(path: Path, max_new_tokens: int) -> dict[str, Any]:
    """A task of the harness that asks the questions of a file."""
    last_number = [
        {"function": "regex", "regex_pattern": r"(-?\d[\d,]*\.?\d*)", "group_select": -1},
        {"function": "take_first"},
    ]
    return {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": max_new_tokens, "do_sample": False},
        "filter_list": [{"name": "last-number", "filter": last_number}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def evaluate(lm: DraftingLM, tasks: list[Any], limit: int | None) -> tuple[dict[str, float], list[Any], float]:
    """Scores by task and metric, all answers, and seconds."""
    start = time.perf_counter()
    found = simple_evaluate(lm, tasks=tasks, limit=limit, apply_chat_template=True, bootstrap_iters=0)
    seconds = time.perf_counter() - start
    scores = {
        f"{task}, {metric}": value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    }
    return scores, [each["resps"] for samples in found["samples"].values() for each in samples], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="Hub id, folder or .gguf file")
    parser.add_argument("--head", default=HEAD, help="Hub id or folder")
    parser.add_argument("--tasks", nargs="+", default=[], help="tasks of the harness that generate text")
    parser.add_argument("--questions", type=Path, nargs="+", default=[], help="JSON lines files of questions")
    parser.add_argument("--limit", type=int, help="questions of each task; all if not given")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of an answer to a question of a file")
    parser.add_argument("--dtype", default="auto", help="float32 gives equal scores on every machine")
    args = parser.parse_args()
    tasks = [*args.tasks, *(questions_task(path, args.max_new_tokens) for path in args.questions)]
    if not tasks:
        parser.error("give --tasks or --questions")

    target, tokenizer = load_target(args.target or gguf_path(), args.dtype)
    head = JetFlowHead.from_pretrained(args.head, dtype=target.dtype).to(target.device)
    answers = []
    for name, assistant in (("plain", None), ("with the head", head)):
        lm = DraftingLM(target, tokenizer, assistant, args.batch_size)
        scores, new_answers, seconds = evaluate(lm, tasks, args.limit)
        answers.append(new_answers)
        rounds = f", {1 + lm.num_accepted / lm.num_rounds:.2f} tokens per round" if lm.num_rounds else ""
        print(f"{name}: {seconds:.0f} s{rounds}")
        print(*(f"  {metric}: {value:.4f}" for metric, value in scores.items()), sep="\n")
    num_same = sum(plain == drafted for plain, drafted in zip(*answers, strict=True))
    print(f"same answers: {num_same} of {len(answers[0])}")


if __name__ == "__main__":
    main()
