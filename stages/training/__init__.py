"""The parts of a training, which stages/train.py puts together."""
