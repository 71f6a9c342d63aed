"""Triton kernels of ours; imported where a GPU is used."""
