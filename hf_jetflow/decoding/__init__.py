"""One decoding round after another: plan, draft, build the tree, verify, walk, commit.

Start with `loop.py`. `drafter.py` runs the head, `ranking.py` ranks candidates, `branch_scores.py` scores branches,
`policy.py` picks the tree size, `emitter.py` hands tokens to the caller. `batching.py` and `noise.py` treat each
sequence of a batch as if it were alone.
"""
