"""`hf-jetflow simulate`: predicts rounds and speedups on other hardware from a roofline.

Start with `simulate.py`; `roofline.py` has the cost of one forward, `hardware.py` the figures of devices.
"""
