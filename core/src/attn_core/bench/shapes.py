"""The named shapes that every benchmark and `attn tune` use: what a step asks for, and its floor in bytes and flops."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from attn_core.errors import UsageError, nearest
from attn_core.planning.config import AttentionConfig, Kind, LayerKind, Phase

Bench = Literal["decode", "extend", "mla", "mixed"]


@dataclass(frozen=True, slots=True)
class Shape:
    """One step of one layer: ``query_lens[b]`` new tokens at the end of ``seq_lens[b]``, causal."""

    bench: Bench
    name: str
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    num_q_heads: int = 32
    num_kv_heads: int = 8
    qk_head_dim: int = 128
    v_head_dim: int = 128
    page_size: int = 16
    kind: Kind = "mha"

    @property
    def phase(self) -> Phase:
        return "decode" if max(self.query_lens) == 1 else "prefill"

    @property
    def flops(self) -> int:
        """Of the two products: 2 Hq (Dqk + Dv) for every pair of a query and a key that it sees."""
        pairs = sum(q * (s - q) + q * (q + 1) // 2 for q, s in zip(self.query_lens, self.seq_lens, strict=True))
        return 2 * self.num_q_heads * (self.qk_head_dim + self.v_head_dim) * pairs

    def cache_bytes(self, itemsize: int) -> int:
        """Of keys and values read once each; MLA reads one latent row a key."""
        width = self.num_kv_heads * (self.qk_head_dim + (0 if self.kind == "mla" else self.v_head_dim))
        return sum(self.seq_lens) * width * itemsize

    def config(
        self, dtype: str = "bfloat16", kv_cache_dtype: str = "auto", *, cuda_graph: bool = False
    ) -> AttentionConfig:
        """What planning needs to choose a backend for this shape."""
        scale = 192**-0.5 if self.kind == "mla" else None
        kind = LayerKind(
            self.num_q_heads,
            self.num_kv_heads,
            self.qk_head_dim,
            self.v_head_dim,
            kind=self.kind,
            scale=scale,
            layer_ids=(0,),
        )
        return AttentionConfig(
            layers=(kind,),
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            page_size=self.page_size,
            max_context_len=max(self.seq_lens),
            cuda_graph=cuda_graph,
            model=self.name,
        )


def _decode(batch: int, keys: int) -> Shape:
    return Shape("decode", f"decode bs{batch} kv{keys}", (1,) * batch, (keys,) * batch)


def _extend(batch: int, new: int, prefix: int) -> Shape:
    return Shape("extend", f"extend bs{batch} q{new} pre{prefix}", (new,) * batch, (new + prefix,) * batch)


def _mla(heads: int, batch: int, keys: int) -> Shape:
    name = f"mla H{heads} bs{batch} kv{keys}"
    return Shape("mla", name, (1,) * batch, (keys,) * batch, heads, 1, 576, 512, page_size=64, kind="mla")


def _log_uniform(batch: int, low: int, high: int) -> Shape:
    draw = random.Random(0)
    lengths = tuple(round(math.exp(draw.uniform(math.log(low), math.log(high)))) for _ in range(batch))
    return Shape("mixed", f"decode bs{batch} kv{low}-{high} log-uniform", (1,) * batch, lengths)


#: The shapes of the published tables.
SHAPES: Final[Mapping[str, Shape]] = {
    shape.name: shape
    for shape in (
        *(_decode(b, n) for b, n in ((1, 8192), (16, 4096), (64, 4096), (128, 2048), (256, 1024), (8, 65536))),
        *(_extend(b, q, p) for b, q, p in ((1, 8192, 0), (8, 1024, 0), (4, 512, 8192), (16, 128, 4096))),
        *(_mla(h, b, n) for h in (128, 16) for b, n in ((1, 8192), (32, 4096), (128, 4096))),
        _log_uniform(64, 128, 32768),
    )
}
#: Small enough for a CPU.
CPU_SHAPES: Final[Mapping[str, Shape]] = {
    shape.name: shape
    for shape in (_decode(1, 1024), _decode(8, 512), _extend(1, 512, 0), _extend(2, 64, 448), _mla(16, 4, 256))
}


def select(benches: tuple[str, ...], device: str) -> tuple[Shape, ...]:
    """The shapes of these benches (none named: all) that suit ``device``. Raises UsageError for an unknown bench."""
    pool = CPU_SHAPES if device == "cpu" else SHAPES
    known = {shape.bench for shape in SHAPES.values()}
    for name in benches:
        if name not in known:
            near = nearest(name, known)
            raise UsageError(
                f"no benchmark {name!r}", accepted=sorted(known), hint=f"did you mean {near!r}?" if near else None
            )
    return tuple(shape for shape in pool.values() if not benches or shape.bench in benches)
