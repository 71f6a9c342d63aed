"""What Triton's compiler makes of the kernels, with no GPU: for a process in which nothing is interpreted."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
torch.set_num_threads(1)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.exit("kernels are compiled here: run without TRITON_INTERPRET", returncode=4)
