"""The backend `flashmla`: FlashMLA's dense decode over pages of 64."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Final

from attn_core.errors import PluginLoadError
from attn_core.planning.config import AttentionConfig, Phase
from attn_core.planning.reasons import Reason, reason
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from torch import Tensor

from attn_mla.latent_decode import LatentDecodeBackend
from attn_mla.latent_step import LatentStep
from attn_mla.library_errors import raised
from attn_mla.queries import quantize

_INSTALL: Final = "install sgl-flash-mla's wheel"


@dataclass(frozen=True, slots=True)
class Library:
    """The functions of ``flash_mla``, and the option that reaches the Hopper kernels where a fork asks for one.

    ``fp8_schedule`` makes the schedule of the dense kernel for fp8, which only the fork has.
    """

    decode: Callable[..., tuple[Tensor, Tensor]]
    new_schedule: Callable[..., tuple[Any, None]]
    hopper: dict[str, bool]
    fp8_schedule: Callable[..., tuple[Tensor, Tensor]] | None


@cache
def load() -> Library:
    """The installed library. Raises PluginLoadError if it cannot be imported or is older than its schedule objects."""
    try:
        flash_mla = import_module("flash_mla")
    except (ImportError, OSError) as error:
        raise PluginLoadError(
            f"flash_mla cannot be imported: {error}", hint="pip install sgl-flash-mla, for this Python and CUDA"
        ) from error
    decode, new_schedule = flash_mla.flash_mla_with_kvcache, flash_mla.get_mla_metadata
    arguments = inspect.signature(decode).parameters
    if "tile_scheduler_metadata" not in arguments or arguments["num_splits"].default is inspect.Parameter.empty:
        raise PluginLoadError(
            "this flash_mla wants its schedule as two tensors",
            accepted="a version whose get_mla_metadata() gives one schedule object",
            hint="pip install 'sgl-flash-mla>=1.0.0'",
        )
    hopper = {"use_legacy": True} if "use_legacy" in arguments else {}
    fp8_schedule = getattr(flash_mla, "get_mla_decoding_metadata", None) if "descale_q" in arguments else None
    return Library(decode, new_schedule, hopper, fp8_schedule)


def _has_dense_decode(library: Library) -> bool:
    """The fork says so itself; upstream's extension has the function or it has not."""
    if library.hopper:
        has_legacy = getattr(import_module("flash_mla"), "has_legacy", None)
        return has_legacy is None or bool(has_legacy())
    try:
        return hasattr(import_module("flash_mla.cuda"), "dense_decode_fwd")
    except (ImportError, OSError):
        return False


class FlashMLABackend(LatentDecodeBackend):
    """FlashMLA dense decode. The tile schedule is made once a step by the first layer, and shared by the others."""

    name = "flashmla"

    def __init__(self, config: AttentionConfig, kv_cache: KVCache) -> None:
        super().__init__(config, kv_cache)
        self._library = load()
        self._plain = bool(self._library.hopper) and not self._fp8
        self._pools: dict[int, Tensor] = {}

    def _new_schedule(self, step: LatentStep, num_heads: int) -> Any:
        """Empty, for the first call to fill in; for an fp8 cache the kernel wants it made."""
        library = self._library
        schedule = library.new_schedule()[0]
        if self._fp8:
            assert library.fp8_schedule is not None, "build_reasons refuses fp8"
            schedule.tile_scheduler_metadata, schedule.num_splits = library.fp8_schedule(
                step.seq_lens, step.query_len * num_heads, 1, is_fp8_kvcache=True, **library.hopper
            )
        return schedule

    def _options(self, q: Tensor, layer: AttentionLayer, step: LatentStep) -> tuple[Tensor, dict[str, Any]]:
        """The queries as the kernel takes them, and what the fork and an fp8 latent add to the call."""
        options: dict[str, Any] = dict(self._library.hopper)
        if self._fp8:
            rows, options["descale_q"] = quantize(q.flatten(0, 1), step.page_table)
            q, options["descale_k"] = rows.view(q.shape), self._on_device(layer.k_scale)
        return q, options

    @classmethod
    def build_reasons(cls, config: AttentionConfig, phase: Phase) -> Sequence[Reason]:
        """The fork has the Hopper kernels in an extension that a build can leave out; upstream dropped them."""
        library, wanted = load(), ""
        if not _has_dense_decode(library):
            forks = "a build without FLASH_MLA_BUILD_LEGACY"
            wanted, have = "dense decode on Hopper", forks if library.hopper else "a version that has dropped it"
        elif config.kv_cache_dtype != "auto" and library.fp8_schedule is None:
            wanted, have = f"dense decode over {config.kv_cache_dtype}", "a flash_mla without that kernel"
        return (reason("build_unsupported", "flash_mla", wanted, have, _INSTALL),) if wanted else ()

    def attend(
        self, q: Tensor, layer: AttentionLayer, step: LatentStep, return_lse: bool, out: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        pool = self._pools.get(layer.layer_id)
        if pool is None:
            pool = self._pools[layer.layer_id] = self.kv_cache.k_nhd(layer.layer_id)
        heads = layer.num_q_heads
        made = None if step.in_graph else step.shared.get(heads)
        schedule = step.once(heads, layer.layer_id, self._new_schedule, step, heads) if made is None else made[1]
        causal, scale = step.query_len > 1, layer.scale
        try:
            if self._plain:  # without dictionaries of options
                found, lse = self._library.decode(
                    q, pool, step.page_table, step.seq_lens, layer.v_head_dim, schedule,
                    softmax_scale=scale, causal=causal, is_fp8_kvcache=False, use_legacy=True,
                )  # fmt: skip
            else:
                q, options = self._options(q, layer, step)
                found, lse = self._library.decode(
                    q, pool, step.page_table, step.seq_lens, layer.v_head_dim, schedule,
                    softmax_scale=scale, causal=causal, is_fp8_kvcache=self._fp8, **options,
                )  # fmt: skip
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise raised(error, "FlashMLA", layer, "`attn verify flashmla` shows whether it works here") from error
        return found, _natural(lse) if return_lse else None


def _natural(lse: Tensor) -> Tensor:
    """[B, H, S] as [B * S, H], one row after the other, with -inf for the +inf of a row without keys."""
    batch, heads, queries = lse.shape
    rows = lse.new_empty(batch, queries, heads)
    rows.copy_(lse.transpose(1, 2))
    rows.masked_fill_(rows == float("inf"), float("-inf"))
    return rows.view(batch * queries, heads)
