"""DecodeGraphs: decode steps captured once for each batch size and replayed, the model's own modules among them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attn_core.errors import AttnError, ConfigError
from attn_core.generate.model import PagedModel
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.graph_batch import GraphShape
from attn_core.runtime.graphs import GraphRunner


class DecodeGraphs:
    """Runs DECODE batches of up to ``max_batch_size`` requests and ``max_seq_len`` tokens as graphs."""

    def __init__(self, model: PagedModel, *, max_batch_size: int, max_seq_len: int) -> None:
        """Capture all sizes. Raises BackendRefusedError for a backend without graphs, ConfigError for a model that
        cannot be captured, because its code waits for the device."""
        shape = GraphShape(ForwardMode.DECODE, max_seq_len=max_seq_len)
        self._runner = GraphRunner(model.backend, self._run, shape, batch_sizes=batch_sizes(max_batch_size))
        self._model = model
        tokens = torch.zeros(1, dtype=torch.int64, device=model.device)
        try:
            self._runner.capture({"tokens": tokens})
        except AttnError:
            raise
        except RuntimeError as error:
            raise ConfigError(
                f"a decode step of this model cannot be captured: {str(error).splitlines()[0]}",
                accepted="models whose code does not wait for the device in a decode step",
                hint="run it without --cuda-graph",
            ) from error

    def forward(self, tokens: Tensor, batch: ForwardBatch) -> Tensor:
        """Logits [B, V] after ``tokens`` [B]: a view that the next step fills again. Raises CapacityError."""
        return self._runner.replay(batch, {"tokens": tokens})[0]

    def _run(self, inputs: Mapping[str, Tensor], batch: ForwardBatch) -> tuple[Tensor, ...]:
        return (self._model.run(inputs["tokens"], batch),)


def batch_sizes(largest: int) -> list[int]:
    """The powers of two below ``largest``, and ``largest``."""
    return [*(1 << i for i in range(largest.bit_length()) if 1 << i < largest), largest]
