"""NPU graphs: the fused operator as a task group of a captured graph, with new host lengths before each replay.

Sequence, as the vendor documents it. At capture, for each call: the graph waits for an external event and resets it,
then a task group begins, the operator's `.out` form is called, the group ends and leaves a handle. Before each replay,
on another stream: the update of that handle begins, the same call is made with the new lengths, the update ends, and
the event is recorded, which lets the replayed graph go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from attn_core.errors import ConfigError
from torch import Tensor

from attn_ascend.attend import Output
from attn_ascend.operators import Operators

GraphKey = tuple[str, int, int]
_PLACEHOLDER: Final = 1  # elements of the LSE that the `.out` form wants and does not fill


class NpuApi(Protocol):
    """The functions of ``torch.npu`` that are used here."""

    def is_current_stream_capturing(self) -> bool: ...
    def current_stream(self) -> Any: ...
    def stream(self, stream: Any) -> Any: ...
    def Stream(self) -> Any: ...  # noqa: N802 - the vendor's name
    def ExternalEvent(self) -> Any: ...  # noqa: N802 - the vendor's name
    def graph_task_group_begin(self, stream: Any) -> None: ...
    def graph_task_group_end(self, stream: Any) -> Any: ...
    def graph_task_update_begin(self, stream: Any, handle: Any) -> None: ...
    def graph_task_update_end(self, stream: Any) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One captured call: what to call again with other lengths, and the handle and event of its place in the graph."""

    tensors: tuple[Tensor, Tensor, Tensor]
    arguments: dict[str, Any]
    workspace: Tensor
    out: tuple[Tensor, Tensor]
    handle: Any
    event: Any


class GraphTasks:
    """All calls captured by one backend, by graph. Their buffers live as long as this object.

    ``npu`` None: the tensors are on no card, and nothing is ever being captured.
    """

    def __init__(self, operators: Operators, npu: NpuApi | None) -> None:
        self._operators = operators
        self._npu = npu
        self._tasks: dict[GraphKey, list[Task]] = {}
        self._workspaces: dict[tuple[object, ...], Tensor] = {}
        self._update_stream: Any = None

    def forget(self, key: GraphKey) -> None:
        """Drop what an earlier capture under ``key`` left."""
        self._tasks[key] = []

    def capturing(self) -> bool:
        """Whether the current stream is being captured now."""
        return self._npu is not None and self._npu.is_current_stream_capturing()

    def capture(
        self,
        key: GraphKey,
        query: Tensor,
        key_: Tensor,
        value: Tensor,
        *,
        shape: tuple[int, ...],
        lse: bool,
        **arguments: Any,
    ) -> Output:
        """The fused operator as a task group of the graph being captured; out is allocated from the graph's pool."""
        if lse:
            raise ConfigError(
                "an LSE in a captured graph", accepted="none: the operator's `.out` form does not fill it"
            )
        assert self._npu is not None
        stream = self._npu.current_stream()
        workspace = self._workspace(key, shape, query, key_, value, arguments)
        out = (query.new_empty(shape), query.new_empty(_PLACEHOLDER, dtype=torch.float32))
        event = self._npu.ExternalEvent()
        event.wait(stream)
        event.reset(stream)
        self._npu.graph_task_group_begin(stream)
        self._operators.fused_attention_out(query, key_, value, workspace=workspace, out=out, **arguments)
        handle = self._npu.graph_task_group_end(stream)
        self._tasks[key].append(Task((query, key_, value), arguments, workspace, out, handle, event))
        return out[0], None

    def renew(self, key: GraphKey, key_lengths: list[int]) -> None:
        """Give every captured call of graph ``key`` new key lengths, and let its next replay go on."""
        tasks = self._tasks.get(key)
        if not tasks:
            return
        assert self._npu is not None
        if self._update_stream is None:
            self._update_stream = self._npu.Stream()
        update = self._update_stream
        # the replay before this one must have passed its tasks before they change under it
        update.wait_stream(self._npu.current_stream())
        with self._npu.stream(update):
            for task in tasks:
                self._npu.graph_task_update_begin(update, task.handle)
                self._operators.fused_attention_out(
                    *task.tensors,
                    workspace=task.workspace,
                    out=task.out,
                    **{**task.arguments, "actual_seq_kvlen": key_lengths},
                )
                self._npu.graph_task_update_end(update)
                task.event.record(update)

    def _workspace(
        self,
        key: GraphKey,
        shape: tuple[int, ...],
        query: Tensor,
        key_: Tensor,
        value: Tensor,
        arguments: dict[str, Any],
    ) -> Tensor:
        """One buffer for all calls of a shape in one graph: they run one after the other."""
        name = (key, shape, tuple(query.shape), tuple(key_.shape), arguments["sparse_mode"])
        if name not in self._workspaces:
            self._workspaces[name] = self._operators.fused_workspace(query, key_, value, **arguments)
        return self._workspaces[name]
