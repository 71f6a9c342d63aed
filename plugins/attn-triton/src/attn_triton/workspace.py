"""Where partial results lie between the attention kernel and the merge: one workspace, bounded by the chip."""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """fp32 rows and their LSE. Grows to the largest demand seen, which the chip bounds and not the batch or the context."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out = torch.empty(0, dtype=torch.float32, device=device)
        self._lse = torch.empty(0, dtype=torch.float32, device=device)

    @property
    def nbytes(self) -> int:
        return self._out.nbytes + self._lse.nbytes

    def parts(self, rows: int, width: int) -> tuple[Tensor, Tensor]:
        """Room for ``rows`` partial results of ``width``, and as many LSE. What was given before must not be in use any more."""
        if self._out.numel() < rows * width:
            self._out = torch.empty(rows * width, dtype=torch.float32, device=self._device)
        if self._lse.numel() < rows:
            self._lse = torch.empty(rows, dtype=torch.float32, device=self._device)
        return self._out, self._lse
