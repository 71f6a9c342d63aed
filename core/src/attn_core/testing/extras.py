"""Cases that a tier has besides its ladders and covering arrays, and after them: few, each for one thing.

Nothing else is combined with them, so that they leave the choice and the order of all other cases as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from attn_core.planning.config import Kind, LayerKind
from attn_core.planning.manifest import Manifest
from attn_core.planning.system import System
from attn_core.testing.axes import Tier
from attn_core.testing.cases import Case, Request
from attn_core.testing.claimed import is_claimed
from attn_core.testing.generation import Ground, grounds_of, several_requests

#: A later stage of a pipeline; odd, so that it is no multiple of the layers of a case.
FIRST_LAYER: Final = 13
#: Beyond element 2**31 no signed index of 32 bits reaches; nor an unsigned one where keys and values lie together.
FAR: Final = 31
#: dtypes of which a pool that is far takes little memory; those that models have most come first.
_SMALL: Final = ("bfloat16", "float16")
#: Layers, pages and prompts as models and engines have them: backends choose kernels of their own for these.
_OF_MODELS: Final[dict[Kind, LayerKind]] = {
    "mha": LayerKind(32, 8, 128, 128),
    "mla": LayerKind(16, 1, 576, 512, kind="mla", scale=0.125),
}
_PAGE_OF_MODELS: Final = 64
_PROMPTS: Final = (Request(300), Request(200, 150), Request(65, 64))
_MODES_OF_KERNELS: Final = ("extend", "decode", "verify")


def extra_cases(manifest: Manifest, tier: Tier, system: System, seed: int = 0, *, far: int = FAR) -> list[Case]:
    """The extra cases of this tier alone: of the contract, layer ids and sinks; of stress, far pages.

    far: the power of two beyond which those pages lie; a small one tries the same without the memory.
    """
    made: list[Case] = []
    for ground in grounds_of(manifest, tier, system, seed):
        if tier == "contract":
            made += [*_later_layers(ground), *_narrow_sinks(ground)]
        elif tier == "stress":
            made += _far_pages(ground, far)
    return [case for case in dict.fromkeys(made) if is_claimed(manifest, case, system)]


def _later_layers(ground: Ground) -> Iterator[Case]:
    """Two layers whose ids do not begin at 0."""
    plain = ground.plain()
    if ground.mode == "ragged":
        yield replace(plain, first_layer=FIRST_LAYER)
    else:
        yield several_requests(replace(plain, kinds=plain.kinds * 2, memory="shuffled", first_layer=FIRST_LAYER))


def _narrow_sinks(ground: Ground) -> Iterator[Case]:
    """Sinks that are not float32."""
    plain = ground.plain()
    if "sinks" in ground.clause.features:
        kinds = (*plain.kinds[:-1], replace(plain.kinds[-1], sinks=True))
        yield replace(plain, kinds=kinds, options=plain.options | {"sinks16"})


def _far_pages(ground: Ground, far: int) -> Iterator[Case]:
    """Every form of the cache and every phase with a kernel of its own, keys that `write_kv` writes, shapes of models.

    Where keys and values have pools, these are some of their own and some in one tensor, whose pages are twice as wide.
    """
    clause = ground.clause
    dtype = next((name for name in _SMALL if name in clause.dtypes), None)
    trees = ("",) if "verify_chain" in clause.features else ("", "top2")
    if dtype is None or ground.mode not in _MODES_OF_KERNELS or ground.tree not in trees:
        return
    narrow = next((name for name in ("fp8_e4m3", "fp8_e5m2") if name in clause.kv_dtypes), None)
    for layout in clause.kv_layouts:
        case = several_requests(replace(ground.plain(), dtype=dtype, layout=layout, memory="shuffled", far=far))
        yield from _ways_to_store(case, ground, narrow)
        if ground.mode == "extend" and "auto" in clause.kv_dtypes:
            yield replace(case, kv_dtype="auto", options=case.options | {"nosave"})
    if not clause.pages.allows(_PAGE_OF_MODELS):
        return
    case = replace(ground.plain(), dtype=dtype, memory="shuffled", far=far, page_size=_PAGE_OF_MODELS)
    case = several_requests(replace(case, kinds=(_OF_MODELS[clause.kind],)))
    if ground.mode == "extend":
        case = replace(case, pattern=_PROMPTS, batch=len(_PROMPTS))
    yield from _ways_to_store(case, ground, narrow)


def _ways_to_store(case: Case, ground: Ground, narrow: str | None) -> Iterator[Case]:
    """The case with a cache of the working dtype, and with the ``narrow`` one."""
    one_tensor = ground.mode != "decode" and ground.clause.kind == "mha"
    case = replace(case, options=case.options | ({"stacked"} if one_tensor else set()))
    if "auto" in ground.clause.kv_dtypes:
        yield replace(case, kv_dtype="auto")
    if narrow is not None and (ground.mode != "verify" or ground.clause.kind == "mla"):
        yield replace(case, kv_dtype=narrow)
