"""Tests of the launch through the real wave_runtime."""
