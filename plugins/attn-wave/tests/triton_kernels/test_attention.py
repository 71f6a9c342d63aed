"""The code object that tests without Triton run is what Triton makes of its source."""

from __future__ import annotations

import lzma

import pytest
import triton

from .attention import CODE, compiled

#: What it was made with; another one may make other code.
VERSION = "3.6.0"


def test_it_is_what_triton_makes_of_the_source() -> None:
    if triton.__version__ != VERSION:
        pytest.skip(f"Triton {triton.__version__} is here; {CODE.name} is of {VERSION}")
    assert lzma.decompress(CODE.read_bytes()) == compiled().kernel
