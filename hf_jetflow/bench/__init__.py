"""`hf-jetflow bench`: plain decoding, draft heads and rivals on the same prompts, interleaved in one process.

Start with `bench.py` (settings and runs). `rows.py` turns runs into figures, `report.py` and `plots.py` show them.
"""
