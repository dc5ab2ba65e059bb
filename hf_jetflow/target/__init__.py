"""The frozen target: its forward, its masks and positions, and everything that moves rows of its cache.

Start with `target.py` (prefill, verify), then `strategies.py` (commit and roll back, by kind of cache; the work is in
`caches.py`, `batch_caches.py`, `growing_cache.py`). `layer_kinds.py` says what each kind of layer sees. Recurrent
layers read trees by `tree_mixers.py` (the math) and `mixer_adapters.py` (the layers); `recurrent.py` is for others.
"""
