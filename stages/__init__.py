"""The work: what to ask, how to judge, what to keep, how to train. One stage a file."""
