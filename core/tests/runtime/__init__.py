"""Tests of what runs: the contract's data, build and router, graphs, and torch_native."""
