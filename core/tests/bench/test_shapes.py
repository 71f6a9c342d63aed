"""Shapes: their floors in bytes and flops, as the published tables count them."""

import pytest
from attn_core.bench.results import Results, Row, device_slug, table
from attn_core.bench.shapes import SHAPES, select
from attn_core.errors import UsageError


def test_extend_flops_are_four_hq_d_times_the_causal_pairs() -> None:
    shape = SHAPES["extend bs4 q512 pre8192"]
    assert shape.flops == 4 * 4 * 32 * 128 * (512 * 8192 + 512 * 513 // 2)


def test_decode_bytes_count_keys_and_values_once() -> None:
    assert SHAPES["decode bs64 kv4096"].cache_bytes(2) == 64 * 4096 * 8 * (128 + 128) * 2


def test_mla_bytes_count_the_latent_row_once() -> None:
    assert SHAPES["mla H128 bs32 kv4096"].cache_bytes(2) == 32 * 4096 * 576 * 2


def test_the_mixed_shape_has_64_requests_within_its_bounds() -> None:
    (shape,) = select(("mixed",), "cuda")
    assert len(shape.seq_lens) == 64
    assert min(shape.seq_lens) >= 128
    assert max(shape.seq_lens) <= 32768


def test_an_unknown_bench_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="decode"):
        select(("decod",), "cpu")


def test_results_survive_the_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    rows = (Row("decode", "s", "attn:x", 0.5, 2.0, None, 1e-3), Row("decode", "s", "y", 0.25))
    found = Results("NVIDIA H100 80GB HBM3", {"torch": "2"}, rows, date="2026-01-02")
    assert Results.load(found.write(tmp_path / "d" / "r.json")) == found
    assert device_slug(found.device) == "nvidia-h100-80gb-hbm3"
    assert "attn:x" in table(rows)


def test_another_file_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    other = tmp_path / "other.json"
    other.write_text('{"schema": "attn/else"}')
    with pytest.raises(UsageError, match="attn/else"):
        Results.load(other)
