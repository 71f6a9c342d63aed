"""Without a GPU the kernels are tested on Triton's interpreter, which has to be chosen before they are defined."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> Iterator[str]:
    """Where the kernels run: cuda, or cpu with the interpreter's arithmetic mended."""
    if torch.cuda.is_available():
        yield "cuda"
        return
    from attn_triton.interpreter import TritonInterpreter

    with TritonInterpreter():
        yield "cpu"
