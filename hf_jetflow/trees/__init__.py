"""Draft trees as pure functions of tensors: the best tree, its ancestor mask, the walk, context n-grams.

Start with `tree.py` (`Candidates`, `DraftTree`, `build_tree`), then `walk.py` (which nodes the target accepts).
Nothing here knows a model or a cache.
"""
