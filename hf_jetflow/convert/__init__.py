"""Writes a head in the checkpoint layouts of other projects. Start with `convert.py`; `writers.py` has the layouts."""
