"""Benchmarks of installed backends: named shapes, timing, the result format, the plot."""
