"""What a draft head is: its configuration, its network and its checkpoint files.

Start with `configuration_jetflow.py` (every field, every check), then `modeling_jetflow.py` (one forward). `cache.py`
stores what the head was shown of the text; `scorers.py` says how a node is scored after its branch. `formats.py`
recognizes the layout of a checkpoint, `layouts.py` and `scored_layouts.py` read it; `checkpoint_files.py` finds the
files. Nothing here knows a target, a tree or the decoding loop.
"""
