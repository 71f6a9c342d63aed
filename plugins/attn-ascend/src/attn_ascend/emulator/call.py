"""One call of the fused operator, version 1 or 2, in one set of names, and the checks of its tensors and mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from attn_ascend.emulator.rules import need

#: name here -> (version 1, version 2)
_NAMES: Final = {
    "mask": ("atten_mask", "atten_mask"),
    "query_lengths": ("actual_seq_lengths", "actual_seq_qlen"),
    "key_lengths": ("actual_seq_lengths_kv", "actual_seq_kvlen"),
    "table": ("block_table", "block_table"),
    "query_rope": ("query_rope", "query_rope"),
    "key_rope": ("key_rope", "key_rope"),
    "sink": ("", "learnable_sink"),
    "heads": ("num_heads", "num_query_heads"),
    "kv_heads": ("num_key_value_heads", "num_key_value_heads"),
    "scale": ("scale", "softmax_scale"),
    "pre_tokens": ("pre_tokens", "pre_tokens"),
    "next_tokens": ("next_tokens", "next_tokens"),
    "layout": ("input_layout", "input_layout"),
    "mode": ("sparse_mode", "sparse_mode"),
    "block_size": ("block_size", "block_size"),
    "precise": ("inner_precise", "inner_precise"),
    "lse": ("softmax_lse_flag", "return_softmax_lse"),
}
_UNBOUNDED: Final = 2147483647
_DEFAULTS: Final[Mapping[str, Any]] = {
    "heads": 1, "kv_heads": 0, "scale": 1.0, "pre_tokens": _UNBOUNDED, "next_tokens": _UNBOUNDED, "layout": "BSH",
    "mode": 0, "block_size": 0, "precise": 0, "lse": False,
}  # fmt: skip
_DTYPES: Final = (torch.float16, torch.bfloat16)
_masks_seen: dict[tuple[int, int], Tensor] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """Arguments with defaults filled in; ``kv_heads`` 0 has become ``heads``."""

    version: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    query_lengths: list[int] | None
    key_lengths: list[int] | None
    table: Tensor | None
    query_rope: Tensor | None
    key_rope: Tensor | None
    sink: Tensor | None
    heads: int
    kv_heads: int
    scale: float
    pre_tokens: int
    next_tokens: int
    layout: str
    mode: int
    block_size: int
    precise: int
    lse: bool

    @property
    def tokens(self) -> bool:
        return self.layout == "TND"

    @property
    def paged(self) -> bool:
        return self.table is not None

    @property
    def width(self) -> int:
        return self.query.shape[-1]

    @property
    def single(self) -> bool:
        """One query a request, in a layout that shows it."""
        return not self.tokens and self.query.shape[1] == 1

    @property
    def value_width(self) -> int:
        return self.value.shape[-1] // (self.kv_heads if self.paged and self.value.dim() == 3 else 1)

    @property
    def key_width(self) -> int:
        return self.key.shape[-1] // (self.kv_heads if self.paged and self.key.dim() == 3 else 1)


def call_of(version: int, query: Tensor, key: Tensor, value: Tensor, arguments: Mapping[str, Any]) -> Call:
    """The call, with everything that is not emulated refused."""
    given = dict(arguments)
    fields: dict[str, Any] = {}
    for name, spellings in _NAMES.items():
        fields[name] = given.pop(spellings[version - 1], None)
        if fields[name] is None:
            fields[name] = _DEFAULTS.get(name)
    rest = {name: value for name, value in given.items() if isinstance(value, Tensor) or value not in (None, 0, False)}
    need(not rest, "quantised", f"{', '.join(rest)} given")
    fields["kv_heads"] = fields["kv_heads"] or fields["heads"]
    for name in ("query_lengths", "key_lengths"):
        fields[name] = None if fields[name] is None else [int(n) for n in fields[name]]
    return Call(version, query, key, value, **fields)


def check_tensors(call: Call) -> None:
    """dtypes, contiguity, heads, mask and mode."""
    tensors = {
        name: getattr(call, name)
        for name in ("query", "key", "value", "query_rope", "key_rope", "table", "mask", "sink")
    }
    for name, tensor in tensors.items():
        need(
            tensor is None or tensor.is_contiguous(),
            "contiguous",
            f"{name} of strides {tensor is not None and tensor.stride()}",
        )
    floats = [
        t
        for name, t in tensors.items()
        if name in ("query", "key", "value", "query_rope", "key_rope") and t is not None
    ]
    dtypes = {t.dtype for t in floats}
    need(len(dtypes) == 1 and call.query.dtype in _DTYPES, "dtype", f"dtypes {sorted(map(str, dtypes))}")
    need(call.layout in ("BSND", "TND"), "layout", f"input_layout {call.layout}")
    latent = call.query_rope is not None
    grouped = call.heads % call.kv_heads == 0 and (latent or call.heads // call.kv_heads <= 64)
    need(0 < call.heads <= 256 and grouped, "heads", f"{call.heads} query heads, {call.kv_heads} key heads")
    need(call.precise in ((0, 1) if call.single else (0, 1, 2, 3)), "precise", f"inner_precise {call.precise}")
    _check_mode(call)
    if call.sink is not None:
        _check_sink(call, call.sink)


def _check_mode(call: Call) -> None:
    modes = (0, 3, 4) if call.tokens else (0, 1, 2, 3, 4)
    need(call.mode in modes, "mode", f"sparse_mode {call.mode} in {call.layout}")
    need(call.mode not in (0, 1) or call.mask is None or call.single, "full_mask", f"a mask in mode {call.mode}")
    if call.single and call.query_rope is None:
        untouched = (call.mode, call.pre_tokens, call.next_tokens, call.mask) == (0, _UNBOUNDED, _UNBOUNDED, None)
        need(
            untouched,
            "single_mode",
            f"mode {call.mode}, tokens {call.pre_tokens}/{call.next_tokens} for single queries",
        )
        return
    need(not (call.tokens and call.mode == 0), "unmasked_tokens", "TND in mode 0")
    if call.mode in (2, 3, 4):
        need(call.mask is not None, "mask_needed", f"mode {call.mode} without a mask")
        assert call.mask is not None
        _check_mask(call.mask)


def _check_mask(mask: Tensor) -> None:
    form = (
        mask.dtype in (torch.bool, torch.int8, torch.uint8)
        and mask.shape[-2:] == (2048, 2048)
        and mask.numel() == 2048**2
    )
    need(form, "mask_form", f"mask {mask.dtype} {tuple(mask.shape)}")
    # a tensor of inference mode has no version: it is looked at each time
    name = (mask.data_ptr(), -1 if mask.is_inference() else mask._version)
    if name not in _masks_seen or mask.is_inference():
        upper = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
        need(bool(torch.equal(mask.reshape(2048, 2048).bool(), upper)), "mask_form", "a mask of another pattern")
        _masks_seen[name] = mask  # kept, so that its address stays its own


def _check_sink(call: Call, sink: Tensor) -> None:
    bf16 = sink.dtype == call.query.dtype == torch.bfloat16
    need(
        bf16 and sink.shape == (call.heads,),
        "sink_dtype",
        f"sink {sink.dtype} {tuple(sink.shape)}, query {call.query.dtype}",
    )
    need(
        call.tokens and call.value_width <= 128, "sink_layout", f"a sink in {call.layout}, values of {call.value_width}"
    )
    need(call.precise == 0, "precise", f"a sink with inner_precise {call.precise}")
