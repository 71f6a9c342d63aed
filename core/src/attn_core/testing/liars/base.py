"""What all liars are made of: torch_native, with places to plant a fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.torch_native.backend import TorchNativeBackend

Result = Tensor | tuple[Tensor, Tensor]

#: The power of two beyond which the pages of a liar's case are far, as those of others are beyond 2**31: what its
#: addresses lose shows without the memory.
FAR_OF_LIARS: Final = 20


class Mutant(TorchNativeBackend):
    """torch_native, which writes as it should and then attends to what the fault makes of the layer and the batch."""

    #: the fault in one line
    __doc__: str

    _inside = False

    def alter_layer(self, layer: AttentionLayer, batch: ForwardBatch) -> AttentionLayer:
        """The layer that is computed in place of ``layer``."""
        return layer

    def alter_batch(self, batch: ForwardBatch) -> ForwardBatch:
        """The batch that is prepared in place of ``batch``; changes a copy."""
        return batch

    def attend(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` of queries q; keys and values are in the cache."""
        return self.honest(q, self.alter_layer(layer, batch), batch)

    def store(self, k: Tensor, v: Tensor | None, layer: AttentionLayer, slots: Tensor) -> None:
        """Write the step's keys and values."""
        self.write_kv(k, v, layer, slots)

    # -- the honest rest

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        seen = replace(self.alter_batch(batch), plan_state=None)
        super().init_forward_metadata(seen)
        batch.plan_state = seen

    def forward_extend(self, q: Tensor, k: Any, v: Any, layer: AttentionLayer, batch: ForwardBatch, **o: Any) -> Result:
        if self._inside:
            return super().forward_extend(q, k, v, layer, batch, **o)
        return self._mutated(q, k, v, layer, batch, **o)

    def forward_decode(self, q: Tensor, k: Any, v: Any, layer: AttentionLayer, batch: ForwardBatch, **o: Any) -> Result:
        if self._inside:
            return super().forward_decode(q, k, v, layer, batch, **o)
        return self._mutated(q, k, v, layer, batch, **o)

    def _mutated(
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
        slots = batch.encoder_slot_mapping if layer.cross else batch.slot_mapping
        if save_kv_cache and k is not None and slots is not None:
            self.store(k, v, layer, slots)
        values, lse = self.attend(q, layer, batch.plan_state)
        return self.give(values, lse, return_lse, out)

    def give(self, values: Tensor, lse: Tensor, return_lse: bool, out: Tensor | None) -> Result:
        """The result in the form that was asked for."""
        if out is not None:
            values = out.copy_(values)
        return (values, lse) if return_lse else values

    def honest(self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` as torch_native computes them for a prepared batch, from the cache."""
        self._inside = True
        try:
            forward = self.forward_decode if batch.mode is ForwardMode.DECODE else self.forward_extend
            result = forward(q, None, None, layer, batch, save_kv_cache=False, return_lse=True)
        finally:
            self._inside = False
        assert isinstance(result, tuple)
        return result

    def honest_with_lengths(
        self, q: Tensor, layer: AttentionLayer, batch: ForwardBatch, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` where token t sees the first ``lengths[t]`` keys of its request: each a decode of its own."""
        owner = request_of_token(batch)
        table, encoder = batch.page_table, batch.encoder_page_table
        tokens = q.shape[0]
        starts = torch.arange(tokens + 1, dtype=torch.int32, device=q.device)
        single = replace(
            batch,
            mode=ForwardMode.DECODE,
            seq_lens=lengths.int(),
            seq_lens_cpu=lengths.int().cpu(),
            query_start_loc=starts,
            query_start_loc_cpu=starts.cpu(),
            page_table=table[owner],
            max_query_len=1,
            num_decodes=0,
            tree=None,
            spans=None,
            encoder_seq_lens=None if encoder is None else lengths.int(),
            encoder_seq_lens_cpu=None if encoder is None else lengths.int().cpu(),
            encoder_page_table=None if encoder is None else encoder[owner],
            plan_state=None,
        )
        TorchNativeBackend.init_forward_metadata(self, single)
        return self.honest(q, layer, single)


def request_of_token(batch: ForwardBatch) -> Tensor:
    """[T] int64: the number of the request that each new token is of."""
    counts = batch.query_start_loc.diff()
    return torch.repeat_interleave(torch.arange(batch.batch_size, device=batch.device), counts.long())


def position_of_token(batch: ForwardBatch) -> Tensor:
    """[T] int64: where each new token stands in its sequence."""
    owner = request_of_token(batch)
    place = torch.arange(batch.num_tokens, device=batch.device) - batch.query_start_loc[owner]
    return (batch.seq_lens - batch.query_start_loc.diff())[owner] + place


@dataclass(frozen=True, slots=True)
class Liar:
    """A backend with one fault. ``breaks`` are the names by which the kit may call what it breaks."""

    cls: type[Mutant]
    breaks: tuple[str, ...]
    clause: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.cls.name

    @property
    def modes(self) -> frozenset[str]:
        """The modes of the cases that show the fault and what it leaves alone: prompts, decodes, and its own."""
        own = {"verify" for name in self.breaks if name.startswith("verify")}
        return frozenset({"extend", "decode"} | own | ({"ragged"} & {*self.breaks}))

    @property
    def fault(self) -> str:
        """What is wrong with it, in one line."""
        return (self.cls.__doc__ or "").strip().splitlines()[0]


#: Every liar, by name, as its module was imported.
LIARS: dict[str, Liar] = {}

_Class = TypeVar("_Class", bound=type[Mutant])


def breaks(*names: str, **clause: Any) -> Callable[[_Class], _Class]:
    """Registers a liar under the snake-case name of its class. ``clause`` overrides keys of its manifest's clause."""

    def registered(cls: _Class) -> _Class:
        snake = "".join(f"_{c.lower()}" if c.isupper() else c for c in cls.__name__).lstrip("_")
        cls.name = f"liar_{snake}"
        LIARS[cls.name] = Liar(cls, names, clause)
        return cls

    return registered
