"""Where partial results lie between the attention kernel and the merge: one workspace, bounded by the chip."""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """fp32 rows and their LSE. Reserved once for what the chip bounds, not the batch or the context; a step of another
    form than the config says (more drafts) lets it grow.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._store = torch.empty(0, dtype=torch.float32, device=device)

    @property
    def nbytes(self) -> int:
        return self._store.nbytes

    def reserve(self, elements: int) -> None:
        """Grow to ``elements`` fp32, values and LSE together."""
        if self._store.numel() < elements:
            self._store = torch.empty(elements, dtype=torch.float32, device=self._device)

    def parts(self, rows: int, width: int) -> tuple[Tensor, Tensor]:
        """Room for ``rows`` partial results of ``width``, and as many LSE. What was given before must not be in use any
        more.
        """
        self.reserve(rows * (width + 1))
        return self._store, self._store[rows * width : rows * (width + 1)]
