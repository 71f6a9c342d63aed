"""Leaves out of a FlashInfer module the kernels for mask modes that our backends never ask of it.

A module has four mask modes for paged keys and four for given ones, each a source file that takes minutes to compile.
What is left out answers a call with cudaErrorNotSupported, which is a KernelError here: never a wrong number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from attn_flashinfer.modules import Module

#: FlashInfer's numbers of mask modes; a fourth, 3, is for scoring many items and never asked for.
NOT_CAUSAL, CAUSAL, CUSTOM = 0, 1, 2
DECLARED = "}  // namespace flashinfer\n\nusing namespace flashinfer;"
INSTANCE = re.compile(r"template cudaError_t (\w+)\s*(<.*?>)\s*\(([^()]*)\);", re.DOTALL)


def used_masks(module: Module) -> dict[str, tuple[int, ...]]:
    """By keys, ``paged`` or ``ragged``: the mask modes that `choice.route` and `ragged` can come to ask for.

    Decode and cross layers ask for keys of any position, prompts and chains for causal ones, trees and spans for a mask
    of bits, always without FlashInfer's own window; given keys with a window are causal. fa3 serves plain prompts and
    given keys, and given keys are never in fp8.
    """
    if module.kernels.startswith("mla"):
        return {}
    if module.kernels == "fa3":
        return {"paged": (CAUSAL,) if module.qk == module.v else (), "ragged": (NOT_CAUSAL, CAUSAL)}
    paged = (NOT_CAUSAL, CAUSAL) if module.window else (NOT_CAUSAL, CAUSAL, CUSTOM)
    given = (CAUSAL,) if module.window else (NOT_CAUSAL, CAUSAL)
    return {"paged": paged, "ragged": given if module.kv_dtype == "auto" else ()}


def leave_out(module: Module, sources: Sequence[Path]) -> int:
    """Empty the sources of unused mask modes, as FlashInfer generated them; the number of files left to compile."""
    used = used_masks(module)
    if not used:
        return len(sources)
    answers, left = [], 0
    host = next(path for path in sources if path.name in ("batch_prefill.cu", "batch_prefill_sm90.cu"))
    for path in sources:
        found = re.fullmatch(r"batch_prefill_(paged|ragged)(?:_sm90)?_kernel_mask_(\d)\.cu", path.name)
        if found is None:
            continue
        if int(found[2]) in used[found[1]]:
            left += 1
            continue
        text = path.read_text()
        mask = re.search(r"MaskMode::k\w+", text)
        assert mask is not None, path
        text = text.replace("use_custom_mask,", f"{str(mask[0].endswith('kCustom')).lower()},")
        instances = INSTANCE.findall(text)
        assert instances, path
        answers += [f"template <> cudaError_t {n}{t}({p}) {{ return cudaErrorNotSupported; }}" for n, t, p in instances]
        path.write_text("// not asked for by attn-flashinfer\n")
    text = host.read_text()
    assert text.count(DECLARED) == 1, host
    host.write_text(text.replace(DECLARED, "\n".join(answers) + "\n" + DECLARED))
    return left
