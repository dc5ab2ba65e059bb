"""`hf-jetflow simulate`: predicts rounds and speedups on other hardware from a roofline.

Start with `simulate.py`. `roofline.py` computes the cost of a forward and of a round, `hardware.py` has the figures of
devices, `fitting.py` derives them from a bench.
"""
