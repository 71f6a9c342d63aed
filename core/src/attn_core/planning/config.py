"""What a model needs of its attention, as facts: AttentionConfig and its distinct layer kinds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from attn_core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from pathlib import Path  # 5 ms, and listing backends needs no path

Phase = Literal["prefill", "decode", "verify", "draft"]
Kind = Literal["mha", "mla"]

PHASES: Final[tuple[Phase, ...]] = ("prefill", "decode", "verify", "draft")
DTYPES: Final = ("float16", "bfloat16", "float32")
KV_DTYPES: Final = ("auto", "fp8_e4m3", "fp8_e5m2")
KV_LAYOUTS: Final = ("NHD", "HND", "MLA")
MAX_PAGE_SIZE: Final = 65536

#: The closed set of features, each with its definition in one line (the contract is DESIGN section 4).
FEATURES: Final[Mapping[str, str]] = {
    "sliding_window": "a query at position p sees the W keys max(0, p-W+1)..p",
    "softcap": "scores become cap * tanh(score / cap) before the mask",
    "sinks": "one more logit per query head in the softmax denominator, with no value",
    "lse": "returns the natural-log sum of exponentials, fp32 [T, Hq]",
    "cuda_graph": "the three graph functions; replay without host sync or allocation",
    "verify_chain": "several draft tokens per request, each after the other",
    "verify_tree": "draft tokens that form a tree, given as a mask",
    "bidirectional_spans": "tokens of one span see each other both ways (image tokens)",
    "cross": "keys are an encoder's, not causal",
    "ragged": "keys and values are given, not cached; causal or not",
    "deterministic": "the same batch gives the same bits every time",
    "batch_invariant": "a request gives the same bits whatever else is in the batch",
}


@dataclass(frozen=True, slots=True)
class LayerKind:
    """One distinct kind of attention layer of a model, and which layers are of it.

    Dimensions are per head. For ``kind="mla"`` they are those of absorbed attention: ``num_kv_heads`` is 1,
    ``qk_head_dim`` is kv_lora_rank + rope (512 + 64) and ``v_head_dim`` is kv_lora_rank (512).
    ``scale`` None means ``qk_head_dim ** -0.5``; MLA models must give theirs, which counts the unabsorbed width.
    ``ragged`` kinds take their keys as arguments and no cache (vision encoders, expanded MLA prefill): they are
    asked of the prefill phase only. Layer ids are unique over a config's kinds: a decoder layer with self and cross
    attention is two attention layers with an id each.
    """

    num_q_heads: int
    num_kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    kind: Kind = "mha"
    scale: float | None = None
    sliding_window: int | None = None
    softcap: float = 0.0
    sinks: bool = False
    cross: bool = False
    ragged: bool = False
    causal: bool = True
    layer_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_q_heads", "num_kv_heads", "qk_head_dim", "v_head_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}", given=value, accepted="an integer from 1")
        if self.num_q_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_q_heads {self.num_q_heads} is not a multiple of num_kv_heads {self.num_kv_heads}",
                accepted="a whole number of query heads for each KV head",
            )
        if self.kind not in ("mha", "mla"):
            raise ConfigError(f"kind is {self.kind!r}", given=self.kind, accepted=("mha", "mla"))
        if self.kind == "mla" and (self.num_kv_heads != 1 or self.v_head_dim >= self.qk_head_dim):
            raise ConfigError(
                f"an MLA layer has one latent KV head, and values narrower than keys; given {self.num_kv_heads} heads,"
                f" {self.qk_head_dim}/{self.v_head_dim}",
                accepted="num_kv_heads=1, qk_head_dim=kv_lora_rank+rope, v_head_dim=kv_lora_rank",
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(f"sliding_window is {self.sliding_window}", accepted="None, or the number of keys from 1")
        if not math.isfinite(self.softcap) or self.softcap < 0:
            raise ConfigError(f"softcap is {self.softcap}", accepted="0 (off) or a positive cap")

    @property
    def group_size(self) -> int:
        """Query heads for each KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def softmax_scale(self) -> float:
        """The factor on q.k, with the default filled in."""
        return self.qk_head_dim**-0.5 if self.scale is None else self.scale


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """What a model, and the way it is served, needs of its attention: the whole input of planning.

    ``page_size`` and ``kv_layout`` None leave the choice to the planner; a value that was given is never changed.
    ``speculative_num_draft_tokens`` 0 means no speculation: the verify and draft phases are then not planned.
    """

    layers: tuple[LayerKind, ...]
    dtype: str = "bfloat16"
    kv_cache_dtype: str = "auto"
    page_size: int | None = None
    kv_layout: str | None = None
    max_context_len: int | None = None
    bidirectional_spans: bool = False
    multimodal: bool = False
    lse: bool = False
    cuda_graph: bool = False
    deterministic: bool = False
    batch_invariant: bool = False
    speculative_num_draft_tokens: int = 0
    speculative_eagle_topk: int = 1
    model: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ConfigError("a config without layers", accepted="at least one LayerKind")
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("kv_cache_dtype", self.kv_cache_dtype, KV_DTYPES)
        if self.page_size is not None:
            check_page_size(self.page_size)
        if self.kv_layout is not None:
            _one_of("kv_layout", self.kv_layout, KV_LAYOUTS)
        self._check_layers()
        if self.max_context_len is not None and self.max_context_len < 1:
            raise ConfigError(f"max_context_len is {self.max_context_len}", accepted="None, or tokens from 1")
        if self.speculative_num_draft_tokens < 0:
            raise ConfigError(
                f"speculative_num_draft_tokens is {self.speculative_num_draft_tokens}", accepted="0 (off) or more"
            )
        if self.speculative_eagle_topk < 1:
            raise ConfigError(f"speculative_eagle_topk is {self.speculative_eagle_topk}", accepted="1 (chain) or more")
        if self.speculative_eagle_topk > 1 and not self.speculative_num_draft_tokens:
            raise ConfigError(
                f"speculative_eagle_topk is {self.speculative_eagle_topk}, with no draft tokens to make a tree of",
                accepted="with it speculative_num_draft_tokens from 1",
            )

    def _check_layers(self) -> None:
        ids = [i for kind in self.layers for i in kind.layer_ids]
        if len(ids) != len(set(ids)):
            twice = sorted({i for i in ids if ids.count(i) > 1})
            raise ConfigError(f"layer ids {twice} are named by two layer kinds", accepted="each attention layer once")
        for kind in self.layers:
            if kind.kind == "mla" and kind.scale is None:
                raise ConfigError(
                    "an MLA layer without a scale",
                    accepted="the scale of the unabsorbed width, such as (qk_nope + qk_rope) ** -0.5",
                )
            if not (kind.causal or kind.cross or kind.ragged):
                raise ConfigError(
                    "a cached layer that is not causal", accepted="causal=True, cross=True or ragged=True",
                    hint="for tokens that see each other both ways set bidirectional_spans",
                )  # fmt: skip

    def without_towers(self) -> AttentionConfig:
        """The same without ragged layers, for engines that run the encoders. Raises ConfigError if none is left."""
        return replace(self, layers=self.cached_kinds)

    def replace(self, **changes: Any) -> AttentionConfig:
        """A copy with these fields changed, checked like a new one."""
        return replace(self, **changes)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases that must be planned, in the order prefill, decode, verify, draft."""
        return PHASES if self.speculative_num_draft_tokens else PHASES[:2]

    @property
    def cached_kinds(self) -> tuple[LayerKind, ...]:
        """The layer kinds that live in the paged cache."""
        return tuple(kind for kind in self.layers if not kind.ragged)

    def kinds(self, phase: Phase) -> tuple[LayerKind, ...]:
        """The layer kinds that run in ``phase``: ragged ones only in prefill."""
        return self.layers if phase == "prefill" else self.cached_kinds

    def features(self, kind: LayerKind, phase: Phase) -> frozenset[str]:
        """The features of the closed set that a backend must have for layers of ``kind`` in ``phase``."""
        wanted = {
            "sliding_window": kind.sliding_window is not None,
            "softcap": kind.softcap > 0,
            "sinks": kind.sinks,
            "cross": kind.cross,
            "ragged": kind.ragged,
            "lse": self.lse,
            "deterministic": self.deterministic,
            "batch_invariant": self.batch_invariant,
            "bidirectional_spans": self.bidirectional_spans and phase == "prefill" and not (kind.cross or kind.ragged),
            "cuda_graph": self.cuda_graph and phase != "prefill",
            "verify_chain": phase == "verify" and self.speculative_eagle_topk == 1 and not kind.cross,
            "verify_tree": phase == "verify" and self.speculative_eagle_topk > 1 and not kind.cross,
        }
        return frozenset(name for name, needed in wanted.items() if needed)

    def kind_of(self, layer_id: int) -> LayerKind:
        """The kind that layer ``layer_id`` is of; with one kind that lists no ids, that one.

        Raises ConfigError for a layer that no kind names.
        """
        for kind in self.layers:
            if layer_id in kind.layer_ids or (len(self.layers) == 1 and not kind.layer_ids):
                return kind
        raise ConfigError(
            f"layer {layer_id} is of no layer kind", given=layer_id, hint="name it in LayerKind.layer_ids"
        )

    @property
    def num_layers(self) -> int:
        """Layers with attention, or 1 if no kind lists its layers."""
        ids = [i for kind in self.layers for i in kind.layer_ids]
        return max(ids) + 1 if ids else 1

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | Path, **serving: Any) -> AttentionConfig:
        """From a Hugging Face config: a parsed config.json, its path, or a model folder.

        ``serving`` are further fields of AttentionConfig (page_size, kv_cache_dtype, ...).
        Raises UnknownModelError for an architecture that is not known, ModelFolderError for an unreadable source.
        """
        from attn_core.planning.from_hf import config_from_hf

        return config_from_hf(source).replace(**serving)

    @classmethod
    def preset(cls, name: str, **serving: Any) -> AttentionConfig:
        """One of the models that ship as data files (``attn explain`` lists them). Raises UnknownModelError."""
        from attn_core.planning.presets import load_preset

        return load_preset(name).replace(**serving)


def check_page_size(value: object) -> int:
    """``value`` if it can be a page size, else ConfigError."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_PAGE_SIZE:
        raise ConfigError(
            f"page size {value!r}",
            given=value,
            accepted=f"an integer from 1 to {MAX_PAGE_SIZE}",
            hint="16 is a usual choice",
        )
    return value


#: What other engines call a cache of that dtype.
_ALSO_CALLED: Final = {"fp8": "fp8_e4m3"}


def _one_of(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        near = _ALSO_CALLED.get(value) or nearest(str(value), accepted)
        raise ConfigError(
            f"{name} is {value!r}", given=value, accepted=accepted, hint=f"did you mean {near!r}?" if near else None
        )
