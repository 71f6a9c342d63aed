"""From transformers' padded rows to packed tokens and back."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor


class Packing:
    """Which of B x Q padded places hold tokens, and the lengths that follow.

    valid: [B, columns] bool on the host, None where every place holds a token; of the ``columns`` the last Q are given.
    """

    def __init__(self, batch_size: int, length: int, valid: Tensor | None, device: torch.device) -> None:
        self.batch_size = batch_size
        self.length = length
        self.device = device
        self._rows: Tensor | None = None
        self._tokens: Tensor | None = None
        if valid is None:
            self.lens = [length] * batch_size
        else:
            last = valid[:, valid.shape[1] - length :]
            self.lens = last.sum(1).tolist()
            if not bool(last.all()):
                self._tokens = last
                self._rows = last.flatten().nonzero()[:, 0].to(device)

    @property
    def starts(self) -> Tensor:
        """[B + 1] int32: where the tokens of each request begin."""
        return torch.tensor([0, *accumulate(self.lens)], dtype=torch.int32, device=self.device)

    def rows_of(self, values: Tensor) -> list[list[int]]:
        """What ``values`` [B, Q] on the host have for each token, padding left out."""
        if self._tokens is None:
            return values.tolist()
        return [row[tokens].tolist() for row, tokens in zip(values, self._tokens, strict=True)]

    def pack(self, states: Tensor) -> Tensor:
        """[B, H, Q, D] -> [T, H, D]."""
        rows = states.squeeze(2) if self.length == 1 else states.transpose(1, 2).flatten(0, 1)
        return rows.contiguous() if self._rows is None else rows[self._rows]

    def pack_all(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``pack`` of each."""
        return self.pack(q), self.pack(k), self.pack(v)

    def unpack(self, rows: Tensor) -> Tensor:
        """[T, H, D] -> [B, Q, H, D]; places without a token are zero."""
        if self._rows is not None:
            padded = rows.new_zeros(self.batch_size * self.length, *rows.shape[1:])
            padded[self._rows] = rows
            rows = padded
        if self.length == 1:
            return rows.unsqueeze(1)
        return rows.view(self.batch_size, self.length, *rows.shape[1:])
