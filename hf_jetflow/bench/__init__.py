"""`hf-jetflow bench`: plain decoding, draft heads and rivals on the same prompts, interleaved in one process.

Start with `settings.py` and `bench.py`, which plans the runs; `runs.py` times one of them. `rows.py` turns runs into
figures, `report.py` and `plots.py` show them.
"""
