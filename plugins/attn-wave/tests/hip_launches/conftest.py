"""Only where Wave's own runtime is, over the fake libamdhip64 of `make test-wave-runtime`."""

from __future__ import annotations

import importlib.util

collect_ignore = [] if importlib.util.find_spec("wave_runtime") is not None else ["test_launches.py"]
