"""TritonBackend: the contract over our kernels."""

from __future__ import annotations

from typing import ClassVar

import torch
from attn_core.errors import BatchError, ConfigError
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.kv_cache import TORCH_DTYPES, KVCache
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

from attn_triton.chip import Chip
from attn_triton.decode import BoundDecode, DecodeKernels
from attn_triton.extend import BoundExtend, ExtendKernels
from attn_triton.graphs import GraphBuffers
from attn_triton.hopper_extend import BoundGluonExtend
from attn_triton.kinds import BoundLayer, Kind, bind_layer, score_scale
from attn_triton.launch import Launchers, current_stream
from attn_triton.ragged import attend_rows
from attn_triton.route import FEW_ROWS, by_split
from attn_triton.step import Step, prepare_tree, step_of
from attn_triton.warm import layers_of, warm_batches, warm_layer
from attn_triton.workspace import Workspace
from attn_triton.write import BoundWrite, bind_write, check_rows

Result = Tensor | tuple[Tensor, Tensor]


class TritonBackend(AttentionBackend):
    """Paged attention in Triton: every feature of the contract, on NVIDIA and AMD.

    Everything is deterministic. With ``config.batch_invariant`` every request runs through one kernel with one tile
    shape, unsplit: its bits do not depend on what else is in the batch, at the price of slower decoding.
    The current device must be the cache's; steps of one backend may be in flight on several streams.
    """

    name: ClassVar[str] = "triton"
    cuda_graph_seq_len_fill_value: ClassVar[int] = 0

    def __init__(
        self,
        config: AttentionConfig,
        kv_cache: KVCache,
        *,
        chip: Chip | None = None,
        launchers: Launchers | None = None,
    ) -> None:
        """``chip`` and ``launchers`` stand in for the cache's device where kernels are compiled for another one."""
        super().__init__(config, kv_cache)
        device = kv_cache.device
        self.device = device
        self.chip = chip or Chip.of(device)
        self.launchers = launchers or Launchers(device, dependent=self.chip.dependent_launch)
        self.decode = DecodeKernels(self.chip, self.launchers)
        self.extend = ExtendKernels(self.chip, self.launchers, invariant=config.batch_invariant)
        self._layers: dict[AttentionLayer, BoundLayer] = {}
        self._kinds: dict[Kind, int] = {}
        self._workspaces: dict[int, Workspace] = {}
        self._stream = current_stream(device)
        self._examples: list[BoundLayer] | None = None
        self._graphs: GraphBuffers | None = None

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        self._check_device()
        step = step_of(batch)
        prepare_tree(step, self.launchers)
        batch.plan_state = step

    def warmup(self, config: AttentionConfig) -> None:
        """Compile what ``config`` needs, at the usual batch sizes, by running steps over the null page."""
        for batch in warm_batches(config, self.kv_cache.page_size, self.device):
            self.init_forward_metadata(batch)
            for kind in config.layers:
                warm_layer(self, config, kind, batch)

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: AttentionLayer,
        batch: ForwardBatch,
        *,
        save_kv_cache: bool = True,
        return_lse: bool = False,
        out: Tensor | None = None,
    ) -> Result:
        return self._forward(q, k, v, layer, batch, save_kv_cache, return_lse, out)

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: AttentionLayer,
        batch: ForwardBatch,
        *,
        save_kv_cache: bool = True,
        return_lse: bool = False,
        out: Tensor | None = None,
    ) -> Result:
        return self._forward(q, k, v, layer, batch, save_kv_cache, return_lse, out)

    def forward_ragged(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: AttentionLayer,
        *,
        query_start_loc: Tensor,
        key_start_loc: Tensor,
        max_query_len: int,
        max_key_len: int,
        causal: bool,
        return_lse: bool = False,
        out: Tensor | None = None,
    ) -> Result:
        q, out, lse = self._outputs(q, layer, return_lse, out)
        attend_rows(self.extend, q, k, v, layer, query_start_loc, key_start_loc, max_query_len, causal, out, lse)
        return out if lse is None else (out, lse)

    def write_kv(self, k: Tensor, v: Tensor | None, layer: AttentionLayer, slot_mapping: Tensor) -> None:
        bound = self._bound(layer, k.dtype)
        check_rows(k, v, bound.kind.geometry, slot_mapping)
        bind_write(self.launchers, bound, k, v, slot_mapping).run(k, v, bound)

    def init_cuda_graph_state(self, max_batch_size: int, max_num_tokens: int) -> None:
        parts = self._most_parts(-(-max_num_tokens // max(1, max_batch_size)))
        self._graphs = GraphBuffers(self.config, self.kv_cache, max_batch_size, max_num_tokens, parts)

    def init_forward_metadata_capture_cuda_graph(self, batch: ForwardBatch) -> None:
        self._check_device()
        step = self._shared().capture(batch, self.launchers)
        for bound in self._of_config():
            if by_split(step, bound.kind, invariant=self.config.batch_invariant):
                self.decode.partitions.prepare(step, bound.kind)
        batch.plan_state = step

    def init_forward_metadata_replay_cuda_graph(self, batch: ForwardBatch) -> None:
        batch.plan_state = self._shared().replay(batch)

    def _of_config(self) -> list[BoundLayer]:
        """A layer of each cached kind of the config, bound."""
        if self._examples is None:
            self._examples = [self._bind(layer, TORCH_DTYPES[self.config.dtype]) for layer in layers_of(self.config)]
        return self._examples

    def _most_parts(self, query_len: int) -> int:
        """Elements of partial results that a step of one or ``query_len`` new tokens a request can need, or one whose
        prompts have few rows, which are split too.
        """
        most = self.decode.partitions.most_part_elements
        kinds = [bound.kind for bound in self._of_config()]
        lengths = {kind: {1, query_len, FEW_ROWS // kind.geometry.group} - {0} for kind in kinds}
        return max((most(kind, n) for kind in kinds for n in lengths[kind]), default=0)

    def _shared(self) -> GraphBuffers:
        if self._graphs is None:
            raise ConfigError(
                "no buffers for CUDA graphs", hint="call init_cuda_graph_state(max_batch_size, max_num_tokens) once"
            )
        return self._graphs

    def _forward(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: AttentionLayer,
        batch: ForwardBatch,
        save: bool,
        return_lse: bool,
        out: Tensor | None,
    ) -> Result:
        step: Step = batch.plan_state
        bound = self._layers.get(layer)
        if bound is None or not bound.still_fits(q.dtype):
            bound = self._bind(layer, q.dtype)
        q, out, lse = self._outputs(q, layer, return_lse, out)
        if q.shape[0] != step.num_tokens:
            raise BatchError(f"q has {q.shape[0]} rows for {step.num_tokens} tokens", accepted="one row a token")
        if save:
            self._save(k, v, bound, step)
        scale = score_scale(layer)
        if not step.num_tokens:
            return out if lse is None else (out, lse)
        key = (bound.number, return_lse, out.dtype)
        ready: BoundDecode | BoundExtend | BoundGluonExtend | None = step.bound.get(key)
        if ready is None:
            ready = step.bound[key] = self._ready(step, bound, q, out, lse)
        ready.run(q, out, lse, bound, scale)
        return out if lse is None else (out, lse)

    def _ready(
        self, step: Step, bound: BoundLayer, q: Tensor, out: Tensor, lse: Tensor | None
    ) -> BoundDecode | BoundExtend | BoundGluonExtend:
        if by_split(step, bound.kind, invariant=self.config.batch_invariant):
            return self.decode.bind(step, bound, self._workspace(step), q, out, lse)
        return self.extend.bind(step, bound, q, out, lse)

    def _save(self, k: Tensor | None, v: Tensor | None, bound: BoundLayer, step: Step) -> None:
        """Write k, v to the cache where the step asks for it. Raises BatchError for what cannot be meant."""
        slots: Tensor | None = step.slots
        if bound.kind.cross:
            if k is None:
                return
            slots = step.encoder_slots
        if k is None or slots is None:
            raise BatchError(
                f"layer {bound.layer.layer_id}: {'no keys to store' if k is None else 'keys, and no slots for them'}",
                accepted="k and v with their slots (a cross layer's: encoder_slot_mapping), or save_kv_cache=False",
            )
        key = (bound.number, k.dtype, None if v is None else v.dtype)
        ready: BoundWrite | None = step.bound.get(key)
        if ready is None:
            check_rows(k, v, bound.kind.geometry, slots)
            ready = step.bound[key] = bind_write(self.launchers, bound, k, v, slots)
        ready.run(k, v, bound)

    def _outputs(
        self, q: Tensor, layer: AttentionLayer, return_lse: bool, out: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """q with a contiguous last dimension, out [T, Hq, Dv] made if not given, and lse [T, Hq] if it is asked for."""
        whole = q.is_contiguous()
        if not whole and q.stride(-1) != 1:
            q = q.contiguous()
            whole = True
        if out is None:  # an empty_like costs two thirds of a new_empty
            same = whole and q.shape[-1] == layer.v_head_dim
            out = torch.empty_like(q) if same else q.new_empty((q.shape[0], layer.num_q_heads, layer.v_head_dim))
        else:
            if out.dim() != 3:
                out = out.view(q.shape[0], layer.num_q_heads, layer.v_head_dim)
            if out.stride(-1) != 1:
                raise BatchError(f"out with strides {out.stride()}", accepted="a contiguous last dimension")
        lse = q.new_empty((q.shape[0], layer.num_q_heads), dtype=torch.float32) if return_lse else None
        return q, out, lse

    def _bound(self, layer: AttentionLayer, dtype: torch.dtype) -> BoundLayer:
        bound = self._layers.get(layer)
        return bound if bound is not None and bound.still_fits(dtype) else self._bind(layer, dtype)

    def _bind(self, layer: AttentionLayer, dtype: torch.dtype) -> BoundLayer:
        bound = self._layers[layer] = bind_layer(layer, self.kv_cache, dtype, self._kinds)
        return bound

    def _workspace(self, step: Step) -> Workspace:
        """The workspace of the current stream, or the one that graphs share."""
        if step.captured:
            return self._shared().workspace
        stream = self._stream()
        found = self._workspaces.get(stream)
        if found is None:
            found = self._workspaces[stream] = Workspace(self.device)
            found.reserve(self._most_parts(self.config.speculative_num_draft_tokens or 1))
        return found

    def _check_device(self) -> None:
        if self.device.type == "cuda" and torch.cuda.current_device() != self.device.index:
            raise ConfigError(
                f"the current device is cuda:{torch.cuda.current_device()}, the cache lies on {self.device}",
                accepted="the cache's device as the current one",
                hint=f"torch.cuda.set_device({self.device.index})",
            )
