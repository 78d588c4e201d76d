"""Runs CUDA kernels on the CPU: build.py compiles them with g++, device.py is the simulated device."""
