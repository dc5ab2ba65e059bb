"""The frozen target: its forward, its masks and positions, and everything that moves rows of its cache.

Start with `target.py` (prefill, verify, commit). `layer_kinds.py` says what each kind of layer sees; `caches.py`,
`batch_caches.py`, `growing_cache.py` and `recurrent.py` compact and roll back cached rows.
"""
