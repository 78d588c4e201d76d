"""Benchmarks of bn_ext against torch.nn; `python -m benchmarks` runs them and prints the ratios."""
