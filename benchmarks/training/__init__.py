"""Whole models: time, memory and share of batch norm of a training step."""
