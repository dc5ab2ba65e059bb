"""Branch scorers of other projects behind one head's rows, as chains and as trees, beside its own.

A DFlash 2 selector and DSpark's Markov heads are fitted on answers of the target; target and block stay frozen. All
are then replayed over the target's greedy answers without n-grams, so that the scorers alone differ.

    python examples/fit_scorers.py --target model.gguf --head examples/heads/smollm2-135m-instruct \
        --answers answers.jsonl --prompts dev_math.jsonl dev_code.jsonl dev_chat.jsonl --texts runs/texts \
        --json scorers.json
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from replayed import make_parser, text_sets
from transformers import PreTrainedModel

from hf_jetflow import JetFlowConfig, JetFlowHead
from hf_jetflow.bench.environment import environment
from hf_jetflow.decoding.drafter import JetFlowCandidateGenerator
from hf_jetflow.files import write_json
from hf_jetflow.head.scorers import TableScorer
from hf_jetflow.target.loading import load_target
from hf_jetflow.target.target import Target
from hf_jetflow.training.data import read_answers
from hf_jetflow.training.replay import _rows_of_all_anchors, replay
from hf_jetflow.trees.tree import corrected_logprobs, with_rest


KINDS = {"selector": dict(branch_top_k=16), "markov": {}, "gated": {}}  # configuration beside the rank
WIDTH = 64  # candidates of a pair
Pairs = tuple[torch.Tensor, ...]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--answers", type=Path, required=True, help="answers of the target to fit on, JSON lines")
    parser.add_argument("--num-answers", type=int, default=300)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--node-budgets", type=int, nargs="+", default=[16, 32, 64])
    args = parser.parse_args()

    torch.manual_seed(0)
    target, tokenizer = load_target(args.target, "float32")
    trained = JetFlowHead.from_pretrained(args.head, dtype=torch.float32)
    trained.config.ngram_weights = []
    answers = itertools.islice(read_answers([args.answers]), args.num_answers)
    pairs = collect(target, trained, [record["prompt_ids"] + record["answer_ids"] for record in answers])
    print(f"{len(pairs[0])} pairs of {args.num_answers} answers")
    heads = {"no scorer": rebuilt(trained, None), f"own ({trained.config.branch_correction})": trained}
    for kind, fields in KINDS.items():
        heads[kind] = rebuilt(trained, kind, branch_rank=args.rank, first_corrected_depth=1, **fields)
        fit(heads[kind], pairs, args.epochs, args.batch_size, args.learning_rate)
    rows = []
    for name, texts in text_sets(args, target, tokenizer):
        for scorer, head in heads.items():
            side = Target(target, head.config)
            chain = replay(side, head, texts, [head.config.block_size], width=1)
            trees = replay(side, head, texts, args.node_budgets)
            figures = {"chain": chain[head.config.block_size], **trees}
            rates = {str(budget): round(stats.tokens_per_round, 3) for budget, stats in figures.items()}
            rows.append({"prompts": name, "num_prompts": len(texts), "scorer": scorer, "tokens_per_round": rates})
            print(f"{name}, {scorer}: {rates}", flush=True)
    settings = {name: getattr(args, name) for name in ("num_answers", "rank", "epochs", "batch_size", "learning_rate")}
    write_json({"environment": environment(trained), "settings": settings, "rows": rows}, args.json)


def rebuilt(trained: JetFlowHead, kind: str | None, **fields: int) -> JetFlowHead:
    """The same block with an untrained scorer, or with none."""
    head = JetFlowHead(JetFlowConfig(**{**trained.config.to_dict(), "branch_correction": kind, **fields})).eval()
    block = {name: tensor for name, tensor in trained.state_dict().items() if "branch_correction" not in name}
    head.load_state_dict(block, strict=False)
    head.generation_config = trained.generation_config
    return head


@torch.no_grad()
def collect(target: PreTrainedModel, head: JetFlowHead, texts: list[list[int]]) -> Pairs:
    """
    Rows that draft depth 1 and deeper, with the token before and the token itself.

    Returns:
        Rows (pairs, hidden), parents (pairs,), candidates as indices (pairs, WIDTH), their log-probabilities, and the
        column of the right one (pairs,). Pairs whose token is no candidate are left out.
    """
    drafter = JetFlowCandidateGenerator(head, Target(target, head.config))
    parts = []
    for ids in texts:
        rows = _rows_of_all_anchors(drafter, ids, 1)[:, 1:]
        num_anchors, num_depths = rows.shape[:2]
        known = torch.tensor(ids + [-1] * num_depths)
        before, following = (known[start:].unfold(0, num_depths, 1)[:num_anchors].flatten() for start in (2, 3))
        rows = rows.flatten(0, 1)
        logprobs, indices = drafter.ranker.logprobs(rows).topk(WIDTH)
        tokens = indices if head.draft_token_ids is None else head.draft_token_ids[indices]
        is_right = tokens == following[:, None]
        is_pair = (before >= 0) & is_right.any(-1)
        parts.append(
            [part[is_pair] for part in (rows.half(), before, indices.int(), logprobs, is_right.int().argmax(-1))]
        )
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def fit(head: JetFlowHead, pairs: Pairs, epochs: int, batch_size: int, learning_rate: float) -> None:
    """Cross-entropy of the right token among the corrected candidates."""
    scorer = head.branch_correction
    assert isinstance(scorer, TableScorer)
    for name, parameter in scorer.named_parameters():  # products start at zero, their gradients do not
        is_output = name.startswith(("markov_w2", "successor"))
        torch.nn.init.zeros_(parameter) if is_output or parameter.ndim == 1 else torch.nn.init.normal_(
            parameter, 0, 0.02
        )
    if hasattr(scorer, "predecessor_codebook"):
        torch.nn.init.normal_(scorer.predecessor_codebook, 0, 1)
    else:
        torch.nn.init.normal_(scorer.markov_w1.weight, 0, 1)
    scorer.train()
    optimizer = torch.optim.Adam(scorer.parameters(), lr=learning_rate)
    num_steps = epochs * (len(pairs[0]) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, num_steps)
    for step, index in zip(range(num_steps), batches(len(pairs[0]), batch_size), strict=False):
        rows, parents, indices, logprobs, right = (part[index] for part in pairs)
        tokens = indices.long() if head.draft_token_ids is None else head.draft_token_ids[indices.long()]
        table = scorer.table(rows.float(), parents[:, None], tokens, indices.long(), logprobs)[:, 0]
        scores = corrected_logprobs(with_rest(logprobs), table)
        loss = -scores.gather(1, right[:, None]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == num_steps - 1:
            before = -logprobs.gather(1, right[:, None]).mean()
            print(
                f"{head.config.branch_correction}, step {step}: {float(before):.3f} -> {loss.item():.3f}", flush=True
            )
    scorer.eval().requires_grad_(False)


def batches(num_pairs: int, size: int) -> Iterator[torch.Tensor]:
    while True:
        order = torch.randperm(num_pairs)
        yield from order[: num_pairs // size * size].split(size)


if __name__ == "__main__":
    main()
