"""Kernels are interpreted here, on a CPU."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))

import interpreted_kernels  # noqa: F401 - before the kernels are defined
