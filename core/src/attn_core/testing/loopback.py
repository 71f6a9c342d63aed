"""LoopbackBackend: forwards every call to torch_native and remembers it, for tests of routers and engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from attn_core.planning.config import AttentionConfig
from attn_core.planning.discovery import BackendRef, Installed, discover, register
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.torch_native.backend import TorchNativeBackend

Result = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Call:
    """One call that a loopback backend was given: which function, the batch's mode and sizes, the layer."""

    function: str
    mode: ForwardMode | None
    batch_size: int = 0
    num_tokens: int = 0
    layer_id: int | None = None


class LoopbackBackend(TorchNativeBackend):
    """Gives right answers on any device and keeps ``calls``, so that a test can see what was asked of whom.

    A subclass with another ``name`` is another backend: two of them show where a router sends what.
    """

    name: ClassVar[str] = "loopback"

    def __init__(self, config: AttentionConfig, kv_cache: KVCache) -> None:
        super().__init__(config, kv_cache)
        self.calls: list[Call] = []

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        self._note("init_forward_metadata", batch)
        super().init_forward_metadata(batch)

    def forward_extend(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: AttentionLayer, batch: ForwardBatch, **options: Any
    ) -> Result:
        self._note("forward_extend", batch, layer)
        return super().forward_extend(q, k, v, layer, batch, **options)

    def forward_decode(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: AttentionLayer, batch: ForwardBatch, **options: Any
    ) -> Result:
        self._note("forward_decode", batch, layer)
        return super().forward_extend(q, k, v, layer, batch, **options)

    def forward_ragged(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer, **options: Any) -> Result:
        self.calls.append(Call("forward_ragged", None, num_tokens=q.shape[0], layer_id=layer.layer_id))
        return super().forward_ragged(q, k, v, layer, **options)

    def write_kv(self, k: Tensor, v: Tensor | None, layer: AttentionLayer, slot_mapping: Tensor) -> None:
        self.calls.append(Call("write_kv", None, num_tokens=slot_mapping.shape[0], layer_id=layer.layer_id))
        super().write_kv(k, v, layer, slot_mapping)

    def init_forward_metadata_capture_cuda_graph(self, batch: ForwardBatch) -> None:
        self._note("init_forward_metadata_capture_cuda_graph", batch)
        super().init_forward_metadata_capture_cuda_graph(batch)

    def init_forward_metadata_replay_cuda_graph(self, batch: ForwardBatch) -> None:
        self._note("init_forward_metadata_replay_cuda_graph", batch)
        super().init_forward_metadata_replay_cuda_graph(batch)

    def _call(self, function: str, batch: ForwardBatch, layer: AttentionLayer | None = None) -> Call:
        layer_id = None if layer is None else layer.layer_id
        return Call(function, batch.mode, batch.batch_size, batch.num_tokens, layer_id)

    def _note(self, function: str, batch: ForwardBatch, layer: AttentionLayer | None = None) -> None:
        self.calls.append(self._call(function, batch, layer))


@contextmanager
def loopback(
    name: str = "loopback", phases: tuple[str, ...] = ("prefill", "decode", "verify", "draft")
) -> Iterator[tuple[BackendRef, Installed]]:
    """A loopback backend of this name and these phases, registered in the context, with what is then installed.

    It claims what torch_native claims, graphs too.
    """
    cls = type(name.title().replace("_", ""), (LoopbackBackend,), {"name": name})
    clause = {
        "phases": [*phases],
        "device": "any",
        "dtypes": ["float16", "bfloat16", "float32"],
        "kv_dtypes": ["auto", "fp8_e4m3", "fp8_e5m2"],
        "head_dims": "any",
        "page_sizes": "any",
    }
    features = ["sliding_window", "softcap", "sinks", "lse", "cross"]
    features += ["verify_chain", "verify_tree", "bidirectional_spans"]
    kinds = [
        {**clause, "kind": "mha", "kv_layouts": ["NHD", "HND"], "features": [*features, "ragged", "cuda_graph"]},
        {**clause, "kind": "mla", "kv_layouts": ["MLA"], "features": [*features, "cuda_graph"]},
    ]
    manifest = {
        "schema": 1,
        "name": name,
        "protocol": ">=1.0,<2",
        "summary": "Forwards to torch_native",
        "supports": kinds,
    }
    with register(cls, manifest) as ref:
        yield ref, discover()
