"""`hf-jetflow doctor`: checks a head with its target, and names the mistake if acceptance is low.

Start with `doctor.py`. `mistakes.py` lists common mistakes and reverts each, `verdict.py` draws the conclusions.
"""
