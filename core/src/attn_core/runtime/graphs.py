"""GraphRunner: captures a step once for each batch size and replays it, smaller batches padded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from attn_core.errors import BackendRefusedError, BatchError, CapacityError, ConfigError
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.graph_batch import GraphShape, StaticBatch
from attn_core.runtime.router import PhaseRouter

#: What is captured: inputs by name, each [T, ...], and the batch -> outputs, each [T, ...].
Run = Callable[[Mapping[str, Tensor], ForwardBatch], tuple[Tensor, ...]]

#: The devices that torch captures graphs on, and what its class of them is called there.
_GRAPHS: Final = {"cuda": "CUDAGraph", "npu": "NPUGraph"}

#: Eager runs before a capture: kernels that compile or choose an algorithm do so in the first ones.
_WARMUP_RUNS: Final = 2


class GraphRunner:
    """Replays captured steps of ``run`` over buffers that stay where they are.

    A batch is copied into the buffers of the smallest captured size that holds it; the requests that are missing get
    the backend's fill value as length, null pages and slots of -1. On CUDA, ROCm and NPUs a replay is one graph launch;
    elsewhere ``run`` runs again over the same buffers, so that the same bookkeeping is tested without a GPU.
    """

    def __init__(self, backend: AttentionBackend, run: Run, shape: GraphShape, *, batch_sizes: Iterable[int]) -> None:
        """Make all buffers. Raises BackendRefusedError for a backend without graphs, ConfigError for bad sizes."""
        sizes = sorted(set(batch_sizes))
        if not sizes or sizes[0] < 1:
            raise ConfigError(f"batch sizes {sizes} to capture", accepted="at least one, each from 1")
        self.backend, self.shape, self.batch_sizes = backend, shape, tuple(sizes)
        runs = backend.backend_of(shape.mode) if isinstance(backend, PhaseRouter) else backend
        try:
            backend.init_cuda_graph_state(sizes[-1], sizes[-1] * shape.query_len)
        except ConfigError as error:
            name = runs.name or type(runs).__name__
            raise BackendRefusedError(
                f"{name} cannot capture {shape.mode.name}: {error.message}", given=name, hint=error.hint
            ) from error
        self._run = run
        self._device = backend.kv_cache.device
        self._buffers = StaticBatch(
            shape,
            sizes[-1],
            page_size=backend.kv_cache.page_size,
            fill_value=runs.cuda_graph_seq_len_fill_value,
            device=self._device,
        )
        self._inputs: dict[str, Tensor] = {}
        self._captured: dict[int, tuple[ForwardBatch, _Graph]] = {}

    def capture(self, inputs: Mapping[str, Tensor]) -> None:
        """Capture every size, the largest first, so that the others fit into its memory.

        ``inputs`` are examples, each [n, ...]: only their dtypes and their shapes past the first dimension count.
        """
        tokens = self.batch_sizes[-1] * self.shape.query_len
        self._inputs = {name: x.new_zeros(tokens, *x.shape[1:], device=self._device) for name, x in inputs.items()}
        pool: Any = None
        for size in reversed(self.batch_sizes):
            batch = self._buffers.of_size(size)
            self.backend.init_forward_metadata_capture_cuda_graph(batch)
            graph = _capture(self._run, self._views(size), batch, pool)
            pool = graph.pool
            self._captured[size] = batch, graph

    def replay(self, batch: ForwardBatch, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The outputs of ``batch``, each [T, ...]: views of buffers that the next replay fills again.

        Raises BatchError for a batch of another form than was captured, CapacityError for one that is too large.
        """
        self.shape.check(batch)
        if inputs.keys() != self._inputs.keys():
            raise BatchError(f"a replay with inputs {sorted(inputs)}", accepted=f"{sorted(self._inputs)}, as captured")
        for name, value in inputs.items():
            if value.shape[0] != batch.num_tokens:  # fewer would leave those of an earlier replay
                raise BatchError(
                    f"a replay with {value.shape[0]} rows of {name}", accepted=f"{batch.num_tokens}, one for each token"
                )
        captured, graph = self._captured[self.size_for(batch.batch_size)]
        self._buffers.fill(captured, batch)
        for name, value in inputs.items():
            self._inputs[name][: value.shape[0]].copy_(value)
        self.backend.init_forward_metadata_replay_cuda_graph(captured)
        return tuple(out[: batch.num_tokens] for out in graph.replay())

    def size_for(self, batch_size: int) -> int:
        """The smallest captured size that holds ``batch_size`` requests. Raises CapacityError if none does."""
        for size in self.batch_sizes:
            if size >= batch_size and size in self._captured:
                return size
        raise CapacityError(
            f"{batch_size} requests in a replay",
            given=batch_size,
            accepted=f"up to {max(self._captured, default=0)}, the largest captured size",
            hint="capture larger sizes, or run this step without a graph",
        )

    def _views(self, size: int) -> dict[str, Tensor]:
        return {name: x[: size * self.shape.query_len] for name, x in self._inputs.items()}


class _Graph(Protocol):
    """A captured step."""

    #: the memory that graphs share
    pool: Any

    def replay(self) -> tuple[Tensor, ...]:
        """Run it again; the outputs are the same tensors every time."""
        ...


def _capture(run: Run, inputs: Mapping[str, Tensor], batch: ForwardBatch, pool: Any) -> _Graph:
    name = _GRAPHS.get(batch.device.type)
    if name is None:
        return _EagerGraph(run, inputs, batch)
    return _DeviceGraph(getattr(torch, batch.device.type), name, run, inputs, batch, pool)


class _EagerGraph:
    """A recorded call: a replay runs it again, into the outputs of the first run."""

    pool: Any = None

    def __init__(self, run: Run, inputs: Mapping[str, Tensor], batch: ForwardBatch) -> None:
        self._call = functools.partial(run, inputs, batch)
        self._outputs = tuple(out.clone() for out in self._call())

    def replay(self) -> tuple[Tensor, ...]:
        for kept, new in zip(self._outputs, self._call(), strict=True):
            kept.copy_(new)
        return self._outputs


class _DeviceGraph:
    """A graph of the device, captured after warm-up runs on another stream, as torch asks for.

    ``library`` is torch.cuda or what has the same functions for another device, ``name`` that of its graph class.
    """

    def __init__(
        self, library: Any, name: str, run: Run, inputs: Mapping[str, Tensor], batch: ForwardBatch, pool: Any
    ) -> None:
        stream = library.Stream()
        stream.wait_stream(library.current_stream())
        with library.stream(stream):
            for _ in range(_WARMUP_RUNS):
                run(inputs, batch)
        library.current_stream().wait_stream(stream)
        self._graph = getattr(library, name)()
        with library.graph(self._graph, pool=pool):
            self._outputs = run(inputs, batch)
        self.pool = self._graph.pool() if pool is None else pool

    def replay(self) -> tuple[Tensor, ...]:
        self._graph.replay()
        return self._outputs
