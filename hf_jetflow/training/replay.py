"""Replay: the rounds of greedy decoding over a text of the target, computed without decoding it again.

The text is known, so one target forward and one head forward per text cover every round of every node budget. In exact
arithmetic the figures equal those of greedy decoding without recycled choices, which only a verify of each tree gives.
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from ..decoding.drafter import JetFlowCandidateGenerator
from ..decoding.policy import TreeLimits, plan_round, read_limits
from ..head.configuration_jetflow import READ_CORRECTIONS
from ..head.modeling_jetflow import JetFlowHead
from ..stats import GenerationStats
from ..target.target import Target
from ..trees.tree import DraftTree
from .blocks import make_blocks


@torch.no_grad()
def replay(
    target: Target,
    head: JetFlowHead,
    texts: Iterable[tuple[Sequence[int], int]],
    node_budgets: Sequence[int],
    *,
    width: int | None = None,
    tree_builder: Callable[..., DraftTree] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[int, GenerationStats]:
    """
    Statistics of greedy decoding over known texts.

    Args:
        texts: Token ids of each text (prompt and greedy answer of the target), and the length of its prompt.
        node_budgets: Node budgets to replay, each from 2.
        width (`int`, *optional*): Children considered per node; 1 is a chain.
        tree_builder (*optional*): Builds the trees instead of the drafter, for comparisons.
        progress: Called with the number of texts done.

    Returns:
        `GenerationStats` by node budget, without times.
    """
    block_size = head.config.block_size
    stats = {budget: GenerationStats() for budget in node_budgets}
    for number, (ids, num_prompt) in enumerate(texts, 1):
        drafter = JetFlowCandidateGenerator(head, target)
        blocks = _rows_of_all_anchors(drafter, ids, num_prompt)
        for budget in node_budgets:
            settings = {**head.generation_config.to_dict(), "node_budget": budget, "width": width}
            limits = read_limits(type(head.generation_config)(**settings), block_size)
            _replay_text(drafter, blocks, list(ids), num_prompt, limits, tree_builder, stats[budget])
        if progress is not None:
            progress(number)
    return stats


@torch.no_grad()
def answer_logprobs(target: Target, head: JetFlowHead, ids: Sequence[int], num_prompt: int) -> torch.Tensor:
    """
    Log-probabilities of the head for a text of the target, with every answer token but the last as anchor.

    Args:
        ids: Token ids of prompt and answer; the first `num_prompt` are the prompt.

    Returns:
        `torch.Tensor`, (tokens,): One per depth and anchor. Tokens outside the draft vocabulary are skipped. The
        scorers of other layouts count, behind the text itself; the corrections trained here do not.
    """
    drafter = JetFlowCandidateGenerator(head, target)
    rows = _rows_of_all_anchors(drafter, ids, num_prompt)
    num_depths = rows.shape[1]
    answer = torch.tensor(list(ids[num_prompt:]) + [-1] * num_depths, device=rows.device)
    tokens = answer.unfold(0, num_depths, 1)[1 : len(rows) + 1]
    is_scored, indices = tokens >= 0, tokens
    if head.draft_token_ids is not None:
        is_scored = is_scored & torch.isin(tokens, head.draft_token_ids)
        indices = torch.searchsorted(head.draft_token_ids, tokens.contiguous())
    logprobs = drafter.ranker.logprobs(rows).gather(-1, indices.where(is_scored, 0)[..., None].to(rows.device))[..., 0]
    if head.config.branch_correction in READ_CORRECTIONS:
        before = torch.tensor(list(ids[num_prompt - 1 : num_prompt - 1 + len(rows)]), device=rows.device)
        newest_ids = torch.stack([before, answer[: len(rows)]], dim=1)
        logprobs = _corrected_logprobs(drafter, rows, newest_ids, tokens, logprobs)
    return logprobs[is_scored]


def _corrected_logprobs(
    drafter: JetFlowCandidateGenerator,
    rows: torch.Tensor,
    newest_ids: torch.Tensor,
    tokens: torch.Tensor,
    logprobs: torch.Tensor,
) -> torch.Tensor:
    """Log-probabilities (anchors, depth) of tokens behind the tokens before them. `logprobs` stay for tokens that
    are no candidates and for all below these."""
    draft = drafter.ranker.rank(rows, newest_ids, tokens.shape[1])
    assert draft.score_branches is not None
    parents, is_reached = torch.zeros_like(tokens[:, :1]), torch.ones_like(tokens[:, 0], dtype=torch.bool)
    token, corrected = newest_ids[:, -1:], logprobs.clone()
    for depth in range(tokens.shape[1]):
        scores = draft.score_branches(depth, parents, token)[:, 0].to(logprobs.device)
        candidates = draft.candidates.tokens[:, depth]
        is_token = candidates == tokens[:, depth, None]
        is_reached = is_reached & is_token.any(-1)
        found = scores.gather(-1, is_token.int().argmax(-1, keepdim=True))[:, 0]
        corrected[:, depth] = torch.where(is_reached, found, logprobs[:, depth])
        token = torch.where(is_reached, tokens[:, depth], candidates[:, 0])[:, None]
    return corrected


def _rows_of_all_anchors(drafter: JetFlowCandidateGenerator, ids: Sequence[int], num_prompt: int) -> torch.Tensor:
    """Drafted rows behind every answer token but the last, (anchors, block_size - 1, hidden)."""
    head, target = drafter.head, drafter.target
    input_ids = torch.tensor([list(ids)], device=target.model.device)
    anchors = torch.arange(num_prompt, len(ids) - 1, device=input_ids.device)[None]
    lengths = torch.tensor([len(ids)], device=input_ids.device)
    blocks = make_blocks({"anchors": anchors, "lengths": lengths}, head.config.num_rows)
    embeds = drafter.embed_block(input_ids.gather(1, blocks.anchor_position_ids), blocks.depths == 0)
    features, _ = target.states(input_ids)
    rows = head(
        inputs_embeds=embeds.to(head.device, head.dtype),
        features=features.to(head.device, head.dtype),
        position_ids=blocks.position_ids.to(head.device),
        context_position_ids=torch.arange(len(ids), device=head.device)[None],
        anchor_position_ids=blocks.anchor_position_ids.to(head.device),
    )
    first = 0 if head.config.anchor_predicts else 1  # row that drafts depth 1
    return rows.view(-1, head.config.num_rows, rows.shape[-1])[:, first:]


def _replay_text(
    drafter: JetFlowCandidateGenerator,
    blocks: torch.Tensor,
    ids: list[int],
    num_prompt: int,
    limits: TreeLimits,
    tree_builder: Callable[..., DraftTree] | None,
    stats: GenerationStats,
) -> None:
    position = num_prompt  # of the anchor
    while position < len(ids) - 1:
        plan = plan_round(limits, len(ids) - 1 - position)
        newest_ids = torch.tensor(ids[: position + 1], device=blocks.device)
        draft = drafter.ranker.rank(blocks[position - num_prompt, : plan.max_depth], newest_ids, plan.width)
        if tree_builder is not None:
            tree = tree_builder(newest_ids[-1:], draft.candidates, plan.node_budget, draft.score_branches, plan.width)
        else:
            tree = draft.best_tree(plan.node_budget, plan.width, max_continued=plan.max_continued)
        parents, tokens = tree.parents.tolist(), tree.tokens.tolist()
        children = {pair: node for node, pair in enumerate(zip(parents, tokens, strict=True))}
        node, num_accepted = 0, 0
        while (child := children.get((node, ids[position + num_accepted + 1]))) is not None:
            node, num_accepted = child, num_accepted + 1
            if position + num_accepted + 1 == len(ids):
                break
        stats.count_round(len(tokens) - 1, tree.max_depth, [num_accepted])
        position += num_accepted + 1
    stats.num_new_tokens += len(ids) - num_prompt
