"""Tests of the real torch-npu wheel, over stub libraries."""
