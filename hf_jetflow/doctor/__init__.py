"""`hf-jetflow doctor`: checks a head with its target, and names the mistake when acceptance is low.

Start with `doctor.py`; `mistakes.py` injects the usual mistakes, `verdict.py` reads the result.
"""
