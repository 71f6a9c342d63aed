"""One attention layer, as a backend sees it: dimensions, scale and everything that changes the maths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from attn_core.planning.config import Kind, LayerKind

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, eq=False)
class AttentionLayer:
    """The facts of one layer. Score = softcap(scale * q.k), masked, softmax in fp32 with the sink, times v.

    ``sliding_window`` W: a query at position p sees keys max(0, p-W+1)..p; None sees all.
    ``softcap`` 0 is off. ``sinks`` [Hq], any float dtype: one more logit in the denominator, with no value, not scaled
    and not capped. ``k_scale``, ``v_scale``: stored value times scale is the key (value) of an fp8 cache; 1.0
    for others.
    ``kind="mla"``: absorbed; q and the one latent key are ``qk_head_dim`` wide, values are its first ``v_head_dim``.
    """

    layer_id: int
    num_q_heads: int
    num_kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    scale: float
    kind: Kind = "mha"
    cross: bool = False
    sliding_window: int | None = None
    softcap: float = 0.0
    sinks: Tensor | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0

    @classmethod
    def of_kind(
        cls, kind: LayerKind, layer_id: int, *, sinks: Tensor | None = None, k_scale: float = 1.0, v_scale: float = 1.0
    ) -> AttentionLayer:
        """A layer with the dimensions and the maths of ``kind``. ``sinks`` [Hq] must be given if the kind has them."""
        if kind.sinks != (sinks is not None):
            from attn_core.errors import ConfigError

            raise ConfigError(
                f"layer {layer_id}: its kind has sinks={kind.sinks},"
                f" and sinks are {'' if sinks is not None else 'not '}given",
                accepted="a [Hq] tensor exactly when the kind has sinks",
            )
        return cls(
            layer_id=layer_id,
            num_q_heads=kind.num_q_heads,
            num_kv_heads=kind.num_kv_heads,
            qk_head_dim=kind.qk_head_dim,
            v_head_dim=kind.v_head_dim,
            scale=kind.softmax_scale,
            kind=kind.kind,
            cross=kind.cross,
            sliding_window=kind.sliding_window,
            softcap=kind.softcap,
            sinks=sinks,
            k_scale=k_scale,
            v_scale=v_scale,
        )

    @property
    def group_size(self) -> int:
        """Query heads for each KV head; query head h reads KV head h // group_size."""
        return self.num_q_heads // self.num_kv_heads
