"""The frozen target: its forward, its masks and positions, and everything that moves rows of its cache.

Start with `target.py` (reads the prompt), then `prefilled.py` (verifies a tree) and `strategies.py` (commit and roll
back, by kind of cache; the work is in `caches.py`, `batch_caches.py`, `growing_cache.py`). A verify's forward takes
`masks.py`, `step_inputs.py` (its other keywords) and `attention.py`; `slots.py` maps batch slots to sequences,
`layer_kinds.py` says what each kind of layer sees, `positions.py` and `position_limits.py` where tokens are and where
positions end. Recurrent layers read trees by `tree_mixers.py` (the math) and `mixer_layers.py` (the layers);
`recurrent.py` is for others. `embeddings.py` is what a head borrows, `adapters.py` is for peft.
"""
