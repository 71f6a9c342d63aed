"""Writes the evidence of `trtllm_mla` at the level schema: each call it can make binds to the real library's signature.

Nothing is computed here and no chip is needed; the kernels are for sm_100, where nobody of us has run them.

    python plugins/attn-mla/tools/schema_evidence.py [evidence]
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch

ROOT: Final = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "plugins" / "attn-mla" / "tests"))

from attn_core.planning.config import AttentionConfig, LayerKind  # noqa: E402
from attn_core.planning.discovery import discover  # noqa: E402
from attn_core.planning.distributions import scan  # noqa: E402
from attn_core.runtime.batch import ForwardBatch, ForwardMode  # noqa: E402
from attn_core.runtime.kv_cache import KVCache  # noqa: E402
from attn_core.runtime.layer import AttentionLayer  # noqa: E402
from attn_core.testing.evidence import write_evidence  # noqa: E402
from attn_core.testing.fingerprint import code_hashes  # noqa: E402
from attn_core.testing.proof import EVIDENCE_SCHEMA, EVIDENCE_VERSION  # noqa: E402
from real_wheel import signature_of, source  # noqa: E402

WHEEL: Final = "flashinfer-python==0.7.2.post1"
MEMBER: Final = "flashinfer/mla/_core.py"
FUNCTION: Final = "trtllm_batch_decode_with_kv_cache_mla"


def bound_calls() -> Iterator[tuple[str, ...]]:
    """The features of each call that binds: every mode, page size, with LSE and without. Raises TypeError at one that
    does not."""
    real = signature_of(source(WHEEL, MEMBER), FUNCTION)

    def decode(**arguments: Any) -> Any:
        real.bind(**arguments)
        query, width = arguments["query"], arguments["kv_lora_rank"]
        out = arguments["out"]
        out = query.new_zeros(*query.shape[:-1], width) if out is None else out
        return (out, arguments["lse"]) if arguments["return_lse"] else out

    mla = ModuleType("flashinfer.mla")
    mla.trtllm_batch_decode_with_kv_cache_mla = decode  # type: ignore[attr-defined]
    sys.modules["flashinfer.mla"] = mla
    from attn_mla import trtllm

    trtllm.WORKSPACE_BYTES = 1024  # type: ignore[misc]
    for page, kv_dtype in product((32, 64), ("auto", "fp8_e4m3")):
        for mode, query in ((ForwardMode.DECODE, 1), (ForwardMode.TARGET_VERIFY, 4)):
            for lse in (False, True):
                _run(trtllm.TRTLLMMLABackend, page, mode, query, lse, kv_dtype)
                phase = ("decode",) if query == 1 else ("verify", "verify_chain")
                fp8 = () if kv_dtype == "auto" else ("kv_fp8_e4m3",)
                yield (*phase, "mla", "page_size_gt_1", *fp8, *(("lse",) if lse else ()))


def _run(backend_class: Any, page: int, mode: ForwardMode, query: int, lse: bool, kv_dtype: str) -> None:
    kind = LayerKind(128, 1, 576, 512, kind="mla", scale=192**-0.5)
    config = AttentionConfig(layers=(kind,), page_size=page, kv_layout="MLA", lse=lse, kv_cache_dtype=kv_dtype)
    cache = KVCache.allocate(config, num_pages=8)
    backend = backend_class(config, cache)
    batch = ForwardBatch.build(
        mode, query_lens=[query] * 2, seq_lens=[9, 40], pages=[[1, 2], [3, 4]], page_size=page
    )  # fmt: skip
    backend.init_forward_metadata(batch)
    q, k = torch.zeros(2 * query, 128, 576).bfloat16(), torch.zeros(2 * query, 1, 576).bfloat16()
    backend.forward(q, k, None, AttentionLayer.of_kind(kind, 0), batch, return_lse=lse)


def evidence(date: str) -> dict[str, Any]:
    """The evidence as JSON data."""
    calls = list(bound_calls())
    count = Counter(feature for call in calls for feature in call)
    dists = {d.name: d.version for d in scan(None).values()}
    return {
        "schema": EVIDENCE_SCHEMA,
        "version": EVIDENCE_VERSION,
        "backend": "trtllm_mla",
        "distribution": {"name": "attn-mla", "version": dists["attn-mla"]},
        "device": {"name": "sm_100, signatures alone", "system": "cuda"},
        "versions": {"flashinfer-python": WHEEL.partition("==")[2], "attn-core": dists["attn-core"]},
        "code": code_hashes(discover().find("trtllm_mla")),
        "level": "schema",
        "date": date,
        "tiers": [],
        "seed": 0,
        "duration_s": 0.0,
        "cases": {"passed": len(calls), "failed": 0, "not_run": 0},
        "features": {
            name: {"outcome": "proved", "passed": n, "failed": 0, "note": "calls bind to the real signature; never run"}
            for name, n in sorted(count.items())
        },
        "failures": [],
    }


def main() -> None:
    from datetime import UTC, datetime

    folder = Path(sys.argv[1]) if sys.argv[1:] else ROOT / "evidence"
    print(write_evidence(folder, evidence(datetime.now(UTC).date().isoformat())))


if __name__ == "__main__":
    main()
