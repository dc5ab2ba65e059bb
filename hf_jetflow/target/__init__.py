"""The frozen target: its forward, its masks and positions, and everything that moves rows of its cache.

Start with `target.py` (prefill, verify, commit). `layer_kinds.py` says what each kind of layer sees; `caches.py`,
`batch_caches.py` and `growing_cache.py` compact and roll back cached rows. Recurrent layers read trees by
`tree_mixers.py` (the math) and `mixer_adapters.py` (the layers); `recurrent.py` is for those of unknown classes.
"""
