"""Generative modelling in the plane, small enough to understand: `python -m launch.toy`.

Read `laws.py` (data whose density and perfect field are known), `network.py`, `train.py` (one scan), `measure.py`.
"""
