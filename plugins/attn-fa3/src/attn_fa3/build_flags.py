"""What the installed FlashAttention 3 was built with, read from its own flags: a manifest cannot know it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module

from attn_core.planning.config import AttentionConfig, LayerKind, Phase
from attn_core.planning.reasons import Reason, reason

#: Head widths that have kernels of their own; a width between two runs in the larger one.
WIDTHS = (64, 96, 128, 192, 256)
_UPGRADE = "install a flash_attn_interface built with it"


@dataclass(frozen=True, slots=True)
class BuildFlags:
    """The features compiled into one build of ``flash_attn_interface``.

    ``widths`` are the head widths that have kernels. ``wide_values_64``: keys up to 64 wide with values up to 512 (and
    so ``qv``, absorbed MLA). ``wide_values_192``: keys of 192 with values of 128 have a kernel of their own; without it
    they run in the kernel for 192/192, which is right but slower.
    """

    paged: bool
    local: bool
    split: bool
    varlen: bool
    float16: bool
    fp8: bool
    softcap: bool
    widths: tuple[int, ...]
    wide_values_64: bool
    wide_values_192: bool

    @classmethod
    def of(cls, build_flags: Mapping[str, bool]) -> BuildFlags:
        """From ``flash_attn_config.CONFIG["build_flags"]``. Raises KeyError for a flag that is not there."""

        def has(name: str) -> bool:
            return not build_flags[f"FLASHATTENTION_DISABLE_{name}"]

        return cls(
            paged=has("PAGEDKV"),
            local=has("LOCAL"),
            split=has("SPLIT"),
            varlen=has("VARLEN"),
            float16=has("FP16"),
            fp8=has("FP8"),
            softcap=has("SOFTCAP"),
            widths=tuple(width for width in WIDTHS if has(f"HDIM{width}")),
            wide_values_64=not build_flags["FLASH_ATTENTION_DISABLE_HDIMDIFF64"],
            wide_values_192=not build_flags["FLASH_ATTENTION_DISABLE_HDIMDIFF192"],
        )

    @classmethod
    def installed(cls) -> BuildFlags:
        """Of the build that would be imported; reads its configuration module, not its kernels.

        Raises ImportError if there is none, KeyError if it does not say how it was built.
        """
        return cls.of(import_module("flash_attn_config").CONFIG["build_flags"])

    def refusals(self, config: AttentionConfig, phase: Phase) -> Iterator[Reason]:
        """Why this build cannot run ``phase`` of ``config``: one reason for each thing that is compiled out."""
        for i, kind in enumerate(config.layers):
            if kind in config.kinds(phase):
                yield from self._refusals_of_kind(config, kind, i)

    def _refusals_of_kind(self, config: AttentionConfig, kind: LayerKind, i: int) -> Iterator[Reason]:
        checks = (
            (self.varlen, "varlen", "sequences of different lengths", "only equal lengths"),
            (self.paged or kind.ragged, "paged", "a paged cache", "no paged cache"),
            (
                self.local or kind.sliding_window is None,
                "sliding_window",
                f"window {kind.sliding_window}",
                "no windows",
            ),
            (self.softcap or not kind.softcap, "softcap", f"softcap {kind.softcap}", "no softcap"),
            (self.fp8 or config.kv_cache_dtype == "auto", "kv_dtype", config.kv_cache_dtype, "auto"),
            (self.float16 or config.dtype != "float16", "dtype", "float16", "bfloat16"),
        )
        for compiled_in, name, wanted, have in checks:
            if not compiled_in:
                yield reason("build_unsupported", name, wanted, have, _UPGRADE, kind=i)
        if not self._takes_widths(kind):
            widths = f"{kind.qk_head_dim}/{kind.v_head_dim}"
            yield reason("build_unsupported", "head_dim", widths, self._widths_text(), _UPGRADE, kind=i)

    def _takes_widths(self, kind: LayerKind) -> bool:
        """Whether a kernel of this build really computes these widths.

        A build without the kernel for wide values answers keys up to 64 with values above 256 from the kernel for 64,
        and ``qv`` from one that ignores it: wrong numbers and no error.
        """
        if kind.kind == "mla":
            return self.wide_values_64 and 64 in self.widths
        if kind.qk_head_dim == kind.v_head_dim:
            return kind.qk_head_dim <= max(self.widths, default=0)
        if kind.qk_head_dim <= 64:
            return self.wide_values_64
        return 192 in self.widths

    def _widths_text(self) -> str:
        square = f"up to {max(self.widths, default=0)} (qk = v)"
        return f"{square}, 192/128" + (", keys of 64 with values up to 512, MLA" if self.wide_values_64 else "")
