"""torch_native on this CPU against loops over `scaled_dot_product_attention`, in decode and in prefill, from one run.

    python benchmarks/torch_native_cpu.py [--rounds N] [--write]

Decode: 32 requests of 100 to 2000 tokens, their pages scattered over the pool, 9 query heads, 3 KV heads, width 64.
What is compared, each for one layer on one thread, in CPU time, the median of interleaved rounds:

- torch_native: `forward_decode`, which writes the new keys and values, with the step's metadata made before (it is
  shared by all layers); and the same with the metadata made every time.
- loop, paged by indexing: for every request its pages of K and of V as `pool[pages]`, then one SDPA call.
- loop, paged: the same, gathered with `index_select`, which is faster. Both gather into new memory for each request:
  how long that takes depends on what the allocator kept, and differs between runs by up to a factor of two.
- loop, contiguous: SDPA alone; K and V of each request lie apart in [len, heads, width], as a gather leaves them.
- loop, contiguous by head: the same in [heads, len, width]: what SDPA likes best, and no paged cache has.
- padded: gathered into [B, longest, heads, width], one SDPA call with a mask.

Prefill: one prompt of 2048 tokens through `forward_extend` (write, read back from the pages, attend) against one causal
SDPA call on the same q, k, v.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from attn_core.bench.results import Results, Row, device_slug
from attn_core.planning.config import AttentionConfig, LayerKind
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.kv_cache import TORCH_DTYPES, KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.torch_native.backend import TorchNativeBackend
from attn_core.testing.devices import device_name
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

KIND = LayerKind(num_q_heads=9, num_kv_heads=3, qk_head_dim=64, v_head_dim=64, layer_ids=(0,))
MLA = LayerKind(
    num_q_heads=16, num_kv_heads=1, qk_head_dim=576, v_head_dim=512, kind="mla", scale=192**-0.5, layer_ids=(0,)
)
REQUESTS, SHORTEST, LONGEST, PROMPT = 32, 100, 2000, 2048
PAGE_SIZE = 16

Call = Callable[[], object]
Gather = Callable[[Tensor, Tensor], Tensor]


class Workload:
    """A cache filled with random keys and values, and one step over it."""

    def __init__(self, kind: LayerKind, dtype: str, mode: ForwardMode, new: list[int], lens: list[int]) -> None:
        rng = torch.Generator().manual_seed(0)
        layout = "MLA" if kind.kind == "mla" else "NHD"
        config = AttentionConfig((kind,), dtype=dtype, page_size=PAGE_SIZE, kv_layout=layout)
        counts = [-(-n // PAGE_SIZE) for n in lens]
        ids = iter((torch.randperm(sum(counts), generator=rng) + 1).tolist())
        self.pages = [[next(ids) for _ in range(count)] for count in counts]
        self.lens = lens
        self.cache = KVCache.allocate(config, num_pages=sum(counts) + 1)
        self.cache.k(0).normal_(generator=rng)
        if kind.kind == "mha":
            self.cache.v_nhd(0).normal_(generator=rng)
        self.backend = TorchNativeBackend(config, self.cache)
        self.layer = AttentionLayer.of_kind(kind, 0)
        self.batch = ForwardBatch.build(mode, query_lens=new, seq_lens=lens, pages=self.pages, page_size=PAGE_SIZE)
        tokens = sum(new)
        working = TORCH_DTYPES[dtype]
        self.q = torch.randn(tokens, kind.num_q_heads, kind.qk_head_dim, generator=rng).to(working)
        self.k = torch.randn(tokens, kind.num_kv_heads, kind.qk_head_dim, generator=rng).to(working)
        self.v = (
            None
            if kind.kind == "mla"
            else torch.randn(tokens, kind.num_kv_heads, kind.v_head_dim, generator=rng).to(working)
        )

    def plan(self) -> None:
        self.backend.init_forward_metadata(self.batch)

    def attend(self) -> Tensor:
        out = self.backend.forward(self.q, self.k, self.v, self.layer, self.batch)
        assert isinstance(out, Tensor)
        return out

    def keys_of(self, b: int, ids: Tensor, gather: Gather = torch.Tensor.__getitem__) -> tuple[Tensor, Tensor]:
        """Request b's keys and values out of the pages ``ids``, each [len, heads, width]."""
        k, v = gather(self.cache.k(0), ids), gather(self.cache.v_nhd(0), ids)
        return k.flatten(0, 1)[: self.lens[b]], v.flatten(0, 1)[: self.lens[b]]


def attend_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One request's decode: q [Hq, D], k and v [H, len, D]."""
    return scaled_dot_product_attention(q[None, :, None], k[None], v[None], enable_gqa=True)[0, :, 0]


def decode_calls(work: Workload) -> dict[str, Call]:
    """What is compared in decode, by name."""
    work.plan()
    work.attend()
    ids = [torch.tensor(pages) for pages in work.pages]
    apart = [work.keys_of(b, pages) for b, pages in enumerate(ids)]
    by_head = [(k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()) for k, v in apart]
    longest = max(work.lens)
    columns = -(-longest // PAGE_SIZE)
    table = torch.stack([pad(pages, (0, columns - pages.shape[0])) for pages in ids])
    hidden = torch.arange(columns * PAGE_SIZE)[None] >= torch.tensor(work.lens)[:, None]
    mask = torch.zeros(hidden.shape, dtype=work.q.dtype).masked_fill_(hidden, float("-inf"))[:, None, None]

    def with_metadata() -> None:
        work.plan()
        work.attend()

    def paged(gather: Gather = torch.Tensor.__getitem__) -> None:
        for b, pages in enumerate(ids):
            k, v = work.keys_of(b, pages, gather)
            attend_one(work.q[b], k.transpose(0, 1), v.transpose(0, 1))

    def contiguous() -> None:
        for b, (k, v) in enumerate(apart):
            attend_one(work.q[b], k.transpose(0, 1), v.transpose(0, 1))

    def contiguous_by_head() -> None:
        for b, (k, v) in enumerate(by_head):
            attend_one(work.q[b], k, v)

    def padded() -> None:
        k, v = (pool[table].flatten(1, 2).transpose(1, 2) for pool in (work.cache.k(0), work.cache.v_nhd(0)))
        scaled_dot_product_attention(work.q[:, :, None], k, v, attn_mask=mask, enable_gqa=True)

    wanted = torch.stack([attend_one(work.q[b], k, v) for b, (k, v) in enumerate(by_head)])
    torch.testing.assert_close(work.attend(), wanted, rtol=2e-2, atol=2e-2)
    return {
        "attn:torch_native": work.attend,
        "attn:torch_native, metadata too": with_metadata,
        "loop, paged": lambda: paged(lambda pool, pages: pool.index_select(0, pages)),
        "loop, paged by indexing": paged,
        "loop, contiguous": contiguous,
        "loop, contiguous by head": contiguous_by_head,
        "padded": padded,
    }


def prefill_calls(work: Workload) -> dict[str, Call]:
    """What is compared in prefill, by name."""
    work.plan()
    assert work.v is not None
    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (work.q, work.k, work.v))

    def sdpa() -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    torch.testing.assert_close(work.attend(), sdpa()[0].transpose(0, 1), rtol=2e-2, atol=2e-2)
    return {"attn:torch_native": work.attend, "one SDPA call": sdpa}


def medians_of(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Milliseconds of each call: the median of ``rounds``, one after the other in every round, so that noise hits all.

    Each is called once before it is timed: in a model the call before is that of the layer before.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            start = time.thread_time()
            call()
            times[name].append(1e3 * (time.thread_time() - start))
    return {name: median(each) for name, each in times.items()}


def measure(rounds: int) -> list[Row]:
    """All rows; prints the ratios on the way."""
    rng = torch.Generator().manual_seed(1)
    lens = torch.randint(SHORTEST, LONGEST + 1, (REQUESTS,), generator=rng).tolist()
    rows: list[Row] = []

    def add(bench: str, shape: str, calls: dict[str, Call], count: int) -> None:
        times = medians_of(calls, count)
        mine = times["attn:torch_native"]
        print(f"\n{shape}")
        for name, ms in times.items():
            print(f"  {name:34s} {ms:9.3f} ms   {ms / mine:6.2f} x torch_native")
            rows.append(Row(bench, shape, name, round(ms, 4)))

    for dtype in ("float32", "bfloat16", "float16"):
        work = Workload(KIND, dtype, ForwardMode.DECODE, [1] * REQUESTS, lens)
        shape = f"decode {dtype}, {REQUESTS} requests, {sum(lens)} keys"
        add("decode", shape, decode_calls(work), rounds if dtype == "float32" else max(3, rounds // 10))
    for dtype in ("float32", "bfloat16"):
        work = Workload(KIND, dtype, ForwardMode.EXTEND, [PROMPT], [PROMPT])
        add("prefill", f"prefill {dtype}, one prompt of {PROMPT}", prefill_calls(work), max(5, rounds // 5))
    latent = Workload(MLA, "float32", ForwardMode.DECODE, [1] * REQUESTS, lens)
    latent.plan()
    shape = f"decode MLA float32, 16 heads, {sum(lens)} keys"
    add("decode", shape, {"attn:torch_native": latent.attend}, max(3, rounds // 10))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="how often each call is timed")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/DEVICE/torch_native_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.rounds)
    times = {(row.shape.split(",")[0], row.impl): row.ms for row in rows}
    mine = times["decode float32", "attn:torch_native"]
    print("\ndecode: torch_native is", end=" ")
    against = ("loop, paged by indexing", "loop, paged", "loop, contiguous", "loop, contiguous by head")
    print(", ".join(f"{times['decode float32', name] / mine:.2f} times as fast as {name}" for name in against))
    ratio = times["prefill float32", "attn:torch_native"] / times["prefill float32", "one SDPA call"]
    print(f"prefill: torch_native takes {ratio:.3f} times one SDPA call")
    if options.write:
        versions = {"torch": torch.__version__, "blas": "MKL" if torch.backends.mkl.is_available() else "other"}
        found = Results(device_name("cpu"), {**versions, "threads": "1"}, tuple(rows))
        path = Path(__file__).parent / "results" / device_slug(found.device) / "torch_native_cpu.json"
        print(f"written to {found.write(path).relative_to(Path(__file__).parent.parent)}")


if __name__ == "__main__":
    main()
