"""What a GPU can do at most, in the ways that bn_ext uses it: `python -m benchmarks.device_limits`."""
