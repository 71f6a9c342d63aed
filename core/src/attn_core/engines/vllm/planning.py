"""Plans for a model that vLLM loads: once for its whole, then cut to each group of layers that share a cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from attn_core.engines.facts import dtype_name, system_of
from attn_core.engines.vllm.layers import UNTRANSLATED, kv_dtype_name
from attn_core.errors import AttnError, PlanError
from attn_core.planning.config import AttentionConfig, LayerKind, Phase
from attn_core.planning.explain import describe_kind
from attn_core.planning.plan import Plan, plan
from attn_core.planning.reasons import LAYOUT_ORDER, evaluate
from attn_core.planning.system import System

#: block sizes that vLLM is told about, in tokens
_LARGEST_BLOCK: Final = 1024
_AUTO: Final = "ATTN_BACKEND=auto takes what can; attn explain MODEL shows what that is"
_BLOCKS: Final = range(1, _LARGEST_BLOCK + 1)


def system_here() -> System:
    """The machine as vLLM uses it. Raises UsageError where ATTN_FORCE_SYSTEM names another one."""
    from vllm.platforms import current_platform

    return system_of(current_platform.device_type)


def draft_tokens(vllm_config: Any) -> int:
    """How many tokens of a request a verify step has: the guesses, and the token before them; 0 without guesses."""
    speculative = vllm_config.speculative_config
    guesses = None if speculative is None else speculative.num_speculative_tokens
    return 0 if not guesses else int(guesses) + 1


def serving_config(vllm_config: Any, kinds: tuple[LayerKind, ...], cache_dtype: str | None) -> AttentionConfig:
    """What ``kinds`` of layers need as vLLM serves them; page size and layout are free."""
    import vllm.envs as envs

    model, drafts = vllm_config.model_config, draft_tokens(vllm_config)
    return AttentionConfig(
        layers=kinds,
        dtype=dtype_name(model.dtype),
        kv_cache_dtype=kv_dtype_name(cache_dtype, model.dtype),
        max_context_len=int(model.max_model_len) + drafts,
        bidirectional_spans=bool(model.is_mm_prefix_lm),
        multimodal=bool(model.is_mm_prefix_lm),
        cuda_graph=vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs(),
        batch_invariant=bool(envs.VLLM_BATCH_INVARIANT),
        speculative_num_draft_tokens=drafts,
        model=str(model.model),
    )


def prefills_expanded(vllm_config: Any) -> bool:
    """Whether MLA prefill goes to vLLM's registry of those, which the user named an entry of."""
    return bool(vllm_config.model_config.use_mla) and vllm_config.attention_config.mla_prefill_backend is not None


def phases_of(vllm_config: Any) -> tuple[Phase, ...]:
    """What is planned. vLLM drafts with layers of its own, which are planned like any others: `draft` is not."""
    if prefills_expanded(vllm_config):
        return ("decode",)
    return ("prefill", "decode", "verify") if draft_tokens(vllm_config) else ("prefill", "decode")


def make_plan(
    config: AttentionConfig, backend: str, phases: tuple[Phase, ...], system: System, *, quiet: bool = False
) -> Plan:
    """The plan; with CUDA graphs where a plan with them can be made, else without. Raises what ``plan`` raises."""

    def planned(wanted: AttentionConfig) -> Plan:
        return plan(wanted, backend, system=system, phases=phases, fallback="allow" if quiet else "warn")

    if not config.cuda_graph:
        return planned(config)
    try:
        return planned(config)
    except PlanError:
        without = planned(config.replace(cuda_graph=False))
    note = f"no CUDA graphs of whole steps: nothing has the feature cuda_graph for this with {backend}"
    return replace(without, notes=(*without.notes, note))


def refusals(vllm_config: Any, backend: str, facts: Mapping[str, Any]) -> list[str]:
    """Why attn cannot run a layer of which vLLM's selector knows ``facts``, each reason with its values.

    What only the layer knows (its window, soft cap, number of heads) is judged again when the whole model is planned.
    """
    found = [f"attn translates no {name}" for flag, name in UNTRANSLATED.items() if facts.get(flag)]
    if facts["attn_type"] != "decoder":
        found.append(f"attn translates no layers of attention type {facts['attn_type']}, only decoder")
    if found:
        return found
    try:
        config = serving_config(vllm_config, (_guessed_kind(vllm_config, facts),), facts["kv_cache_dtype"])
        made = make_plan(config, backend, phases_of(vllm_config), system_here(), quiet=True)
        blocks = blocks_of(made)
    except AttnError as error:
        hint = _AUTO if isinstance(error, PlanError) else error.hint
        accepted = [f"accepted: {error.accepted}"] if error.accepted else []
        return [error.message, *accepted, *(line.strip() for line in error.trace), *([f"next: {hint}"] if hint else [])]
    asked = facts["block_size"]
    if asked is not None and not any(asked % size == 0 for size in blocks.sizes):
        return [f"block_size {asked}, accepted: multiples of {blocks}"]
    return []


def _guessed_kind(vllm_config: Any, facts: Mapping[str, Any]) -> LayerKind:
    """The layer as far as vLLM's selector knows it: the number of heads is the model's."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    heads, width = int(model.get_num_attention_heads(parallel)), int(facts["head_size"])
    window = int(model.get_sliding_window() or model.max_model_len) if facts["has_sliding_window"] else None
    if facts["use_mla"]:
        latent = int(model.hf_text_config.kv_lora_rank)
        return LayerKind(heads, 1, width, latent, kind="mla", scale=width**-0.5, sliding_window=window)
    kv_heads = int(model.get_num_kv_heads(parallel))
    return LayerKind(heads, kv_heads, width, width, sliding_window=window, sinks=bool(facts["has_sink"]))


def group_plan(whole: Plan, kinds: tuple[LayerKind, ...], *, page_size: int, layout: str) -> Plan:
    """``whole`` for the layers of one cache: the same backends, on its page size and layout."""
    named: dict[Phase, str] = {
        phase: chosen.fallback[0] if chosen.fallback else chosen.backend.listed
        for phase, chosen in whole.phases.items()
    }
    config = whole.config.replace(layers=kinds, page_size=page_size, kv_layout=layout)
    return plan(config, named, system=whole.system, fallback="allow", phases=tuple(whole.phases))


@dataclass(frozen=True, slots=True)
class Blocks:
    """What vLLM's cache may look like: block sizes in tokens, ascending, and layouts, the plan's first.

    vLLM splits blocks by itself, so a size stands for its multiples too. Sizes are those that every phase has natively;
    where they have none in common, those that the page table is rewritten for.
    """

    sizes: tuple[int, ...]
    layouts: tuple[str, ...]

    @property
    def multiple(self) -> int | None:
        """The smallest size whose every multiple is among the sizes, None if there is none."""
        known = set(self.sizes)
        return next((n for n in self.sizes if all(m in known for m in range(n, _LARGEST_BLOCK + 1, n))), None)

    @property
    def others(self) -> tuple[int, ...]:
        """The sizes that are no multiples of ``multiple``."""
        return tuple(n for n in self.sizes if self.multiple is None or n % self.multiple)

    def __str__(self) -> str:
        return ", ".join(map(str, (*self.others, *filter(None, [self.multiple]))))


def blocks_of(whole: Plan) -> Blocks:
    """The caches that all phases of ``whole`` can share."""
    free, first = whole.config.replace(page_size=None, kv_layout=None), str(whole.config.kv_layout)
    decisions = [evaluate(chosen.backend.manifest, free, phase, whole.system) for phase, chosen in whole.phases.items()]

    def native(layout: str) -> set[int]:
        return {n for n in _BLOCKS if all(decision.native_for(n, layout) == n for decision in decisions)}

    sizes = native(first) or {n for n in _BLOCKS if all(decision.allows(n, first) for decision in decisions)}
    others = [layout for layout in LAYOUT_ORDER if layout != first and native(layout) >= sizes]
    return Blocks(tuple(sorted(sizes)), (first, *others))


def summary(whole: Plan) -> str:
    """The plan in a few lines, for the log: what runs each phase, over which layers; and what should be known."""
    rows = [
        f"  {name:8} {phase.backend.listed} ({phase.backend.dist} {phase.backend.version}),"
        f" {'fallback: ' + ' -> '.join(phase.fallback) if phase.fallback else phase.why}"
        for name, phase in whole.phases.items()
    ]
    kinds = [f"  layers   {describe_kind(kind)}" for kind in whole.config.layers]
    return "\n".join([f"attn plan on {whole.system}:", *rows, *kinds, *(f"  note: {note}" for note in whole.notes)])
