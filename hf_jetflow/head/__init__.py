"""What a draft head is: its configuration, its network and its checkpoint files.

Start with `configuration_jetflow.py` (every field, every check), then `modeling_jetflow.py` (one forward).
`formats.py` recognizes the layout of a checkpoint and `layouts.py` reads it; `checkpoint_files.py` finds the files.
Nothing here knows a target, a tree or the decoding loop.
"""
