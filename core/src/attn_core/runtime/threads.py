"""How many threads torch computes with on a CPU."""

from __future__ import annotations

import os
from typing import Final

import torch

from attn_core.errors import UsageError

THREADS_VARIABLE: Final = "ATTN_NUM_THREADS"


def set_threads() -> None:
    """As many threads as ATTN_NUM_THREADS says; else one on a machine of up to two cores, torch's choice on others.

    With two cores a second thread, which spins while it waits, takes the core from everything else: much slower when
    the machine is busy, hardly faster when it is idle. Raises UsageError for a variable that is no number from 1.
    """
    named = os.environ.get(THREADS_VARIABLE)
    if named is None:
        if (os.cpu_count() or 1) <= 2:
            torch.set_num_threads(1)
    elif named.isdigit() and int(named) > 0:
        torch.set_num_threads(int(named))
    else:
        raise UsageError(f"{THREADS_VARIABLE} is {named!r}", given=named, accepted="an integer from 1")
