"""One decoding round after another: plan, draft, build the tree, verify, walk, commit.

Start with `loop.py`, then `session.py`. `drafter.py` runs the head (compiled: `captured_draft.py`), `ranking.py` ranks
candidates with the weights of `draft_weights.py`, `branch_scores.py` scores branches, `policy.py` picks the tree size
by `round_costs.py`, `emitter.py` hands tokens to the caller, `tree_log.py` records trees. `reuse.py` stores what a
follow-up call needs. `batching.py` and `noise.py` treat each sequence of a batch as if it were alone.
"""
