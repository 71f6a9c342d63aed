"""The cache: writing through any strides, saturation, what -1 means, smaller pages, and the allocator's books."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attn_core.errors import CacheFullError, ConfigError
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.runtime.kv_cache import KVCache, PageAllocator
from attn_core.runtime.layer import AttentionLayer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .scenes import GQA3, MLA, poison

KIND = replace(GQA3, layer_ids=(0, 3))


def config(layout: str = "NHD", *, kind: LayerKind = KIND, page_size: int = 4, **serving: Any) -> AttentionConfig:
    return AttentionConfig((kind,), dtype="float32", page_size=page_size, kv_layout=layout, **serving)


def cache(layout: str = "NHD", num_pages: int = 5, **options: Any) -> KVCache:
    return KVCache.allocate(config(layout, **options), num_pages=num_pages)


def rows(count: int, heads: int = 2, width: int = 32) -> Tensor:
    return torch.randn(count, heads, width, generator=torch.Generator().manual_seed(count))


SLOTS = torch.tensor([4, 19, 7, 8])


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_what_is_written_is_read_at_its_slot(layout: str) -> None:
    pool = cache(layout)
    k, v = rows(4), rows(4) + 1
    pool.write(AttentionLayer.of_kind(KIND, 3), SLOTS, k, v)
    assert torch.equal(pool.k_nhd(3)[SLOTS // 4, SLOTS % 4], k)
    assert torch.equal(pool.v_nhd(3)[SLOTS // 4, SLOTS % 4], v)
    assert not pool.k(0).any(), "another layer's pool is untouched"
    untouched = torch.ones(20, dtype=torch.bool)
    untouched[SLOTS] = False
    assert not pool.k_nhd(3).reshape(20, 2, 32)[untouched].any()


def test_mla_rows_hold_keys_whose_beginning_is_the_value() -> None:
    kind = replace(MLA, layer_ids=(0,))
    pool = cache("MLA", kind=kind)
    k = rows(4, 1, 40)
    pool.write(AttentionLayer.of_kind(kind, 0), SLOTS, k, None)
    assert pool.v(0) is None
    assert torch.equal(pool.k_nhd(0)[SLOTS // 4, SLOTS % 4], k)
    assert torch.equal(pool.v_nhd(0, 32)[SLOTS // 4, SLOTS % 4], k[..., :32])


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_minus_one_is_not_written_and_the_null_page_keeps_its_bits(layout: str) -> None:
    pool = cache(layout)
    poison(pool)
    pool.write(AttentionLayer.of_kind(KIND, 0), torch.tensor([-1, 5, -1]), rows(3), rows(3))
    assert pool.k_nhd(0)[0].isnan().all()
    written = ~pool.k_nhd(0).isnan().all(-1).all(-1).flatten()
    assert written.nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize(("dtype", "largest"), [("fp8_e4m3", 448.0), ("fp8_e5m2", 57344.0)])
def test_an_fp8_cache_stores_the_quotient_and_saturates(dtype: str, largest: float) -> None:
    pool = cache(kv_cache_dtype=dtype)
    layer = AttentionLayer.of_kind(KIND, 0, k_scale=0.5, v_scale=2.0)
    k, v = torch.full((1, 2, 32), 3.0), torch.full((1, 2, 32), 3.0)
    k[0, 0, 0], v[0, 0, 0] = 1e9, -1e9
    pool.write(layer, torch.tensor([4]), k, v)
    stored_k, stored_v = pool.k(0)[1, 0].float(), pool.v_nhd(0)[1, 0].float()
    assert stored_k[0, 0] == largest
    assert stored_v[0, 0] == -largest
    assert stored_k[1, 0] == 6.0
    assert stored_v[1, 0] == 1.5


def test_an_fp8_write_skips_minus_one() -> None:
    pool = cache(kv_cache_dtype="fp8_e4m3")
    pool.write(AttentionLayer.of_kind(KIND, 0), torch.tensor([-1]), rows(1), rows(1))
    assert not pool.k(0).view(torch.uint8).any()


def test_an_engines_views_are_wrapped_without_a_copy() -> None:
    wide = torch.zeros(5, 2, 4, 64)  # [pages, heads, tokens, K|V], as vLLM has it
    pool = KVCache({0: wide[..., :32]}, {0: wide[..., 32:]}, page_size=4, layout="HND")
    assert pool.k(0).data_ptr() == wide.data_ptr()
    k, v = rows(1), rows(1) + 1
    pool.write(AttentionLayer.of_kind(KIND, 0), torch.tensor([6]), k, v)
    assert torch.equal(wide[1, :, 2, :32], k[0])
    assert torch.equal(wide[1, :, 2, 32:], v[0])


@pytest.mark.parametrize("layout", ["NHD", "MLA"])
@pytest.mark.parametrize("page_size", [1, 2, 4])
def test_smaller_pages_are_the_same_memory(layout: str, page_size: int) -> None:
    kind = KIND if layout == "NHD" else replace(MLA, layer_ids=(0,))
    pool = cache(layout, kind=kind)
    smaller = pool.with_page_size(page_size)
    assert smaller.num_pages == 5 * 4 // page_size
    assert smaller.k(0).data_ptr() == pool.k(0).data_ptr()
    k, v = rows(4, kind.num_kv_heads, kind.qk_head_dim), None if layout == "MLA" else rows(4)
    smaller.write(AttentionLayer.of_kind(kind, 0), SLOTS, k, v)
    assert torch.equal(pool.k_nhd(0)[SLOTS // 4, SLOTS % 4], k), "a slot means the same in both"


def test_smaller_pages_through_strides() -> None:
    wide = torch.zeros(5, 4, 2, 64)
    pool = KVCache({0: wide[..., :32]}, {0: wide[..., 32:]}, page_size=4, layout="NHD").with_page_size(2)
    pool.write(AttentionLayer.of_kind(KIND, 0), torch.tensor([7]), rows(1), rows(1))
    assert torch.equal(wide[1, 3, :, :32], rows(1)[0])


def test_pages_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(ConfigError, match="a HND cache of pages of 4"):
        cache("HND").with_page_size(2)
    with pytest.raises(ConfigError, match="seen in pages of 3"):
        cache("NHD").with_page_size(3)
    apart = torch.zeros(5, 2, 4, 2, 32)  # K and V alternate page by page: pages do not follow each other
    pool = KVCache({0: apart[:, 0]}, {0: apart[:, 1]}, page_size=4, layout="NHD")
    with pytest.raises(ConfigError, match="cannot be seen in smaller pages"):
        pool.with_page_size(2)


MISSHAPEN: list[tuple[str, dict[str, Any], str]] = [
    ("no layers", {"k": {}, "v": {}}, "layers with keys"),
    ("keys without values", {"v": {0: None}}, "v missing"),
    ("other layers", {"v": {1: torch.zeros(5, 4, 2, 32)}}, "layers with keys"),
    ("another page size", {"page_size": 8}, "as NHD pages of 8"),
    ("a layout that is none", {"layout": "DHN"}, "layout 'DHN'"),
    ("scattered rows", {"k": {0: torch.zeros(5, 4, 32, 2).transpose(2, 3)}}, "last stride 1"),
    ("page size 0", {"page_size": 0}, "page size 0"),
    ("page size of three billion", {"page_size": 3_000_000_000}, "page size 3000000000"),
]


@pytest.mark.parametrize(("why", "changes", "message"), MISSHAPEN, ids=[row[0] for row in MISSHAPEN])
def test_tensors_that_do_not_fit_are_refused(why: str, changes: dict[str, Any], message: str) -> None:
    tensors = {"k": {0: torch.zeros(5, 4, 2, 32)}, "v": {0: torch.zeros(5, 4, 2, 32)}}
    with pytest.raises(ConfigError, match=message):
        KVCache(**{**tensors, "page_size": 4, "layout": "NHD", **changes})


def test_a_cache_is_allocated_only_from_what_is_decided() -> None:
    with pytest.raises(ConfigError, match="a page size and a layout"):
        KVCache.allocate(AttentionConfig((KIND,)), num_pages=5)
    with pytest.raises(ConfigError, match="num_pages is 1"):
        cache(num_pages=1)
    with pytest.raises(ConfigError, match="layout MLA for mha layers"):
        cache("MLA")


def test_bytes_per_page_are_what_is_allocated() -> None:
    pool = cache(num_pages=7)
    held = sum(t.nbytes for i in pool.layer_ids for t in (pool.k(i), pool.v(i)) if t is not None)
    assert held == 7 * KVCache.bytes_per_page(config())


def test_ragged_kinds_have_no_cache() -> None:
    tower = LayerKind(4, 4, 72, 72, ragged=True, causal=False, layer_ids=(9,))
    both = AttentionConfig((KIND, tower), dtype="float32", page_size=4, kv_layout="NHD")
    assert KVCache.allocate(both, num_pages=2).layer_ids == (0, 3)


# -- the allocator


def test_page_zero_is_never_handed_out() -> None:
    allocator = PageAllocator(5)
    assert sorted(allocator.allocate(4)) == [1, 2, 3, 4]


def test_a_full_cache_says_so_and_takes_nothing() -> None:
    allocator = PageAllocator(5)
    allocator.allocate(2)
    with pytest.raises(CacheFullError, match="3 pages wanted, 2 of 4 are free"):
        allocator.allocate(3)
    assert allocator.num_free == 2


def test_a_shared_page_is_free_when_the_last_reference_goes() -> None:
    allocator = PageAllocator(3)
    (page,) = allocator.allocate(1)
    allocator.share([page])
    assert allocator.references(page) == 2
    allocator.release([page])
    assert allocator.num_free == 1
    allocator.release([page])
    assert allocator.num_free == 2
    with pytest.raises(AssertionError, match="is free already"):
        allocator.release([page])
    with pytest.raises(AssertionError, match="is free"):
        allocator.share([page])


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 5)), max_size=40))
def test_the_books_balance(moves: list[tuple[str, int]]) -> None:
    allocator = PageAllocator(9)
    held: list[int] = []
    for move, n in moves:
        if move == "allocate" and n <= allocator.num_free:
            pages = allocator.allocate(n)
            assert not set(pages) & set(held)
            held += pages
        elif move == "share" and held:
            page = held[n % len(held)]
            allocator.share([page])
            held.append(page)
        elif move == "release" and held:
            allocator.release([held.pop(n % len(held))])
        assert allocator.num_free == 8 - len(set(held))
        assert all(allocator.references(page) == held.count(page) for page in range(1, 9))


def test_a_pool_needs_a_page_beside_the_null_page() -> None:
    with pytest.raises(ConfigError, match="num_pages is 1"):
        PageAllocator(1)
