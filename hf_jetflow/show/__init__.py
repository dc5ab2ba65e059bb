"""`hf-jetflow show`: the draft trees of a generation as a page or a picture.

Start with `show.py`; `tree_layout.py` places the nodes, `tree_page.py` and `tree_plot.py` draw them.
"""
