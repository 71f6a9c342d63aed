"""Whether a replayed decode step gives the bits of a launched one: attention of a model's layers, and its products.

    python benchmarks/triton_replay.py [--model smollm2-135m] [--dtype bfloat16] [--longest 74]

Launched steps know the lengths on the host, captured ones do not, so another variant of the kernel runs, and with many
keys another cut. For each set of lengths both attend to the same random keys; what differs is counted, and both are
compared with the oracle. Products of the model's widths are computed in a graph and outside of one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import torch
from attn_core.planning.config import AttentionConfig
from attn_core.planning.plan import plan
from attn_core.planning.system import System
from attn_core.runtime.batch import ForwardBatch, ForwardMode
from attn_core.runtime.graph_batch import GraphShape
from attn_core.runtime.graphs import GraphRunner
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.testing.reference import reference
from attn_triton.backend import TritonBackend
from torch import Tensor

MOST = 3
#: Widths of SmolLM2's products: queries, keys, the MLP, the vocabulary, from 576.
WIDTHS, HIDDEN = (576, 192, 1536, 49152), 576


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a preset")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--longest", type=int, default=74)
    parser.add_argument("--step", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    torch.manual_seed(0)
    print(json.dumps(attention(given)), flush=True)
    if given.device == "cuda":
        print(json.dumps(products(getattr(torch, given.dtype))), flush=True)


def lengths(longest: int, step: int) -> Iterator[tuple[int, ...]]:
    """Of three requests, two and one; alike and not."""
    for n in range(30, longest, step):
        yield from ((n, n, n), (n, max(30, n - 5), max(30, n - 13)), (n, n - 1), (n,))


def attention(given: argparse.Namespace) -> dict[str, object]:
    """How many numbers differ, by how much at most, and the worst errors of both against the oracle."""
    device = torch.device(given.device, 0) if given.device == "cuda" else torch.device(given.device)
    asked = AttentionConfig.preset(given.model).replace(dtype=given.dtype, cuda_graph=True)
    config = plan(asked, backend="triton", system=System.parse("cuda:sm_90")).config
    cache = KVCache.allocate(config, num_pages=MOST * -(-given.longest // (config.page_size or 1)) + 1, device=device)
    kind = config.layers[0]
    layer = AttentionLayer.of_kind(kind, kind.layer_ids[0])
    for pool in (cache.k(layer.layer_id), cache.v(layer.layer_id)):
        if pool is not None:
            pool.copy_(torch.randn(pool.shape, device=device))
    launched, captured = TritonBackend(config, cache), TritonBackend(config, cache)

    def random(batch: int) -> dict[str, Tensor]:
        shapes = {"q": (kind.num_q_heads, kind.qk_head_dim), "k": (kind.num_kv_heads, kind.qk_head_dim)}
        shapes["v"] = (kind.num_kv_heads, kind.v_head_dim)
        return {n: torch.randn(batch, *shape, device=device).to(cache.dtype) for n, shape in shapes.items()}

    runner = GraphRunner(
        captured,
        lambda x, batch: (_of(captured.forward(x["q"], x["k"], x["v"], layer, batch)),),
        GraphShape(ForwardMode.DECODE, max_seq_len=given.longest),
        batch_sizes=list(range(1, MOST + 1)),
    )
    runner.capture(random(1))
    numbers = differing = twice = 0
    largest, errors = 0.0, [0.0, 0.0]
    for seq_lens in lengths(given.longest, given.step):
        batch, x = _batch(seq_lens, cache.page_size, device), random(len(seq_lens))
        launched.init_forward_metadata(batch)
        one, again = (_of(launched.forward(x["q"], x["k"], x["v"], layer, batch)).clone() for _ in range(2))
        replayed = runner.replay(batch, x)[0].clone()
        expected, _ = reference(x["q"], layer, batch, cache)
        off = (one.double() - replayed.double()).abs()
        numbers, differing, twice = (
            numbers + off.numel(), differing + int((off > 0).sum()), twice + int((one != again).sum())
        )  # fmt: skip
        largest = max(largest, float((off / one.double().abs().clamp_min(1e-6)).max()))
        for i, out in enumerate((one, replayed)):
            errors[i] = max(errors[i], float((out.cpu().double() - expected).norm() / expected.norm()))
    return {
        "what": "attention", "dtype": given.dtype, "numbers": numbers, "differ": differing, "largest relative": largest,
        "differ when launched twice": twice, "error launched": errors[0], "error replayed": errors[1],
    }  # fmt: skip


def products(dtype: torch.dtype) -> dict[str, object]:
    """How many numbers of each product are others in a graph."""
    x = torch.randn(MOST, HIDDEN, device="cuda", dtype=dtype)
    weights = [torch.randn(width, HIDDEN, device="cuda", dtype=dtype) / HIDDEN**0.5 for width in WIDTHS]
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for weight in weights:
            torch.nn.functional.linear(x, weight)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [torch.nn.functional.linear(x, weight) for weight in weights]
    graph.replay()
    other = [int((a != torch.nn.functional.linear(x, w)).sum()) for a, w in zip(found, weights, strict=True)]
    return {"what": "products", "dtype": str(dtype), "differ": dict(zip(map(str, WIDTHS), other, strict=True))}


def _batch(seq_lens: tuple[int, ...], page_size: int, device: torch.device) -> ForwardBatch:
    pages: list[list[int]] = []
    for length in seq_lens:
        first = sum(map(len, pages)) + 1
        pages.append(list(range(first, first + -(-length // page_size))))
    return ForwardBatch.build(
        ForwardMode.DECODE,
        query_lens=(1,) * len(seq_lens),
        seq_lens=seq_lens,
        pages=pages,
        page_size=page_size,
        device=device,
    )


def _of(out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    assert isinstance(out, Tensor)
    return out


if __name__ == "__main__":
    main()
