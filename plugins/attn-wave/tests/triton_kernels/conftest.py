"""Only where Triton is: `make test-wave-triton`."""

from __future__ import annotations

import importlib.util

collect_ignore = [] if importlib.util.find_spec("triton") is not None else ["test_attn_triton.py", "test_attention.py"]
