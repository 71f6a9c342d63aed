"""What the driver is given: a first launch looks at its arguments, later ones do not, and give the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_triton.ahead import CHIPS
from attn_triton.backend import TritonBackend
from attn_triton.chip import Chip
from attn_triton.kernels.write import tree_depth_kernel
from attn_triton.kinds import LOG2E
from attn_triton.launch import Bound, Direct, Launcher, Launchers

DEVICE = torch.device("cpu")


class Recording(Launcher):
    """A launcher whose driver keeps what it is given; ``built`` are the patterns that were compiled."""

    __slots__ = ("built", "given")

    def __init__(self) -> None:
        super().__init__(tree_depth_kernel, {"Q_PADDED": 4}, {"num_warps": 1}, DEVICE)
        self.built: list[frozenset[int]] = []
        self.given: list[tuple[Any, ...]] = []

    def build(self, args: Sequence[Any], odd: frozenset[int]) -> Direct:
        self.built.append(odd)
        return Direct(lambda *given: self.given.append(given), ("function", "flags"))


def test_every_launch_gives_the_driver_what_is_bound_now() -> None:
    launcher, depths = Recording(), torch.zeros(4, dtype=torch.int32)
    trees = [torch.zeros(1, 4, 4, dtype=torch.uint8) for _ in range(3)]
    bound = Bound(launcher, [trees[0], depths, 4], moving=(0,))
    for tree in trees:
        bound.place(tree)
        bound.launch(4, 2)
    stream = 0
    assert launcher.given == [
        (4, 2, 1, stream, "function", "flags", tree.data_ptr(), depths.data_ptr(), 4, 4) for tree in trees
    ]
    assert launcher.built == [frozenset()]


def test_an_address_that_is_no_multiple_of_16_has_a_kernel_of_its_own() -> None:
    launcher, depths = Recording(), torch.zeros(4, dtype=torch.int32)
    room = torch.zeros(33, dtype=torch.uint8)
    even, odd = room[:16].view(1, 4, 4), room[1:17].view(1, 4, 4)
    bound = Bound(launcher, [even, depths, 4], moving=(0,))
    for tree in (even, odd, even, odd):
        bound.place(tree)
        bound.launch(4)
    assert launcher.built == [frozenset(), frozenset({0})]
    assert [given[6] for given in launcher.given] == [tree.data_ptr() for tree in (even, odd, even, odd)]


def test_no_programs_are_no_launch() -> None:
    launcher = Recording()
    Bound(launcher, [torch.zeros(16, dtype=torch.uint8), torch.zeros(4, dtype=torch.int32), 4]).launch(0)
    assert launcher.given == []


class Named(Launcher):
    """A launcher whose driver keeps arguments by name."""

    __slots__ = ("into",)

    def build(self, args: Sequence[Any], odd: frozenset[int]) -> Direct:
        names = [name for name in self.kernel.arg_names if name not in self.constants]

        def launched(x: int, y: int, z: int, stream: int, *given: Any) -> None:
            LAUNCHED[self.name] = dict(zip(names, given, strict=False))

        return Direct(launched, ())


class NamedLaunchers(Launchers):
    launcher = Named


LAUNCHED: dict[str, dict[str, Any]] = {}
HOPPER = Chip("sm_90", *CHIPS["sm_90"])


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8_e4m3"])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("known", [False, True], ids=["lengths on the device", "lengths on the host"])
def test_layers_of_a_step_are_given_what_is_theirs(kv_dtype: str, sinks: bool, lse: bool, known: bool) -> None:
    """Two layers of one kind share what was bound; the second has tensors at other strides."""
    kind = LayerKind(8, 2, 128, 64, scale=0.1, softcap=20.0, sinks=sinks, layer_ids=(0, 1))
    config = AttentionConfig(
        layers=(kind,), dtype="bfloat16", kv_cache_dtype=kv_dtype, page_size=16, kv_layout="NHD"
    )  # fmt: skip
    cache = KVCache.allocate(config, num_pages=40)
    backend = TritonBackend(config, cache, chip=HOPPER, launchers=NamedLaunchers(DEVICE, dependent=True))
    batch = ForwardBatch.build(
        ForwardMode.DECODE, query_lens=(1, 1, 1), seq_lens=(300, 40, 9), pages=[[*range(1, 20)], [20, 21, 22], [23]],
        page_size=16,
    )  # fmt: skip
    batch.seq_lens_cpu = batch.seq_lens_cpu if known else None
    backend.init_forward_metadata(batch)
    for i in (0, 1):
        logits = torch.randn(8) if sinks else None
        layer = AttentionLayer.of_kind(kind, i, sinks=logits, k_scale=0.5 + i, v_scale=2.0 + i)
        q = torch.randn(3, 8, 128 * (1 + i), dtype=torch.bfloat16)[..., :128]
        k, v = (torch.randn(3, 2, width, dtype=torch.bfloat16) for width in (128, 64))
        out = torch.empty(3, 8, 64 * (1 + i), dtype=torch.bfloat16)[..., :64]
        LAUNCHED.clear()
        found = backend.forward(q, k, v, layer, batch, return_lse=lse, out=out)
        found_lse = found[1].data_ptr() if isinstance(found, tuple) else 0
        scales = {"k_scale": 0.5 + i, "v_scale": 2.0 + i}
        rows = {"K": k, "V": v, "K_POOL": cache.k(i), "V_POOL": cache.v(i), "SLOTS": batch.slot_mapping}
        strides = {"k_token": 256, "k_head": 128, "v_token": 128, "v_head": 64, "count": 3}
        assert LAUNCHED.pop("write_kernel") == {**addresses(rows), **scales, **strides}
        merge = LAUNCHED.pop("merge_kernel")
        assert (merge["OUT"], merge["out_token"], merge["out_head"]) == (out.data_ptr(), 512 * (1 + i), 64 * (1 + i))
        assert merge["LSE"] == found_lse
        attend = LAUNCHED.pop("decode_kernel" if kv_dtype == "auto" else "gluon_decode_kernel")
        assert not LAUNCHED.keys() - {"schedule_kernel"}
        expected = {"Q": q, "K": cache.k(i), "V": cache.v(i), "OUT": out, "PAGES": batch.page_table}
        expected |= {"LENGTHS": batch.seq_lens, **({"SINK_LOGITS": logits} if logits is not None else {})}
        numbers = {"q_token": 1024 * (1 + i), "q_head": 128 * (1 + i), "out_token": 512 * (1 + i)}
        numbers |= {"out_head": 64 * (1 + i), "LSE": found_lse, "v_scale": 2.0 + i, "cap": 20.0 * LOG2E}
        numbers |= {"scale": 0.1 * (0.5 + i) / 20.0, "page_stride": batch.page_table.stride(0)}
        given = {name: attend[name] for name in [*expected, *numbers]}
        assert given == pytest.approx({**addresses(expected), **numbers}, rel=1e-12)


def addresses(tensors: dict[str, torch.Tensor | None]) -> dict[str, int]:
    return {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}
