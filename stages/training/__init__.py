"""Decides nothing: the parts of `recap run train`, which stages/train.py puts together."""
