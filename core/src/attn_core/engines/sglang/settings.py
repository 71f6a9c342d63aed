"""SGLang's settings of this process, as far as they decide what attention must do."""

from __future__ import annotations

from typing import Any

from attn_core.errors import ConfigError


def speculative_settings() -> tuple[Any, str]:
    """SGLang's settings of speculative decoding, and whether prefill's or decode's backend verifies."""
    from sglang.srt.runtime_context import get_spec

    spec = get_spec()
    return spec, str(spec.speculative_attention_mode or "prefill")


def deterministic() -> bool:
    """Whether --enable-deterministic-inference was given."""
    from sglang.srt.runtime_context import get_exec

    return bool(get_exec().deterministic.enable_deterministic_inference)


def graphs_of_decode(runner: Any) -> bool:
    """Whether decode steps are going to be captured: SGLang does by default, but on the CPU."""
    from sglang.srt.model_executor.cuda_graph_config import Backend
    from sglang.srt.runtime_context import get_exec

    config = get_exec().graph.cuda_graph_config
    return str(runner.device) != "cpu" and config is not None and config.decode.backend != Backend.DISABLED


def check_served(runner: Any) -> None:
    """Raise ConfigError for a way of serving that is not translated."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    not_served = {
        "a draft model": (
            runner.is_draft_worker,
            "--speculative-draft-attention-backend triton (or another of its own)",
        ),
        "context parallelism": (
            parallel.attn_cp_size > 1 or parallel.attn_dcp_size > 1,
            "leave context parallelism off",
        ),
        "unified KV memory": (runner.kv_index_translator.is_translating, "leave --enable-unified-memory off"),
        "attention in local chunks": (runner.model_config.is_local_attention_model, "another attention backend"),
        "images whose tokens see each other": (
            hasattr(runner.model, "prepare_attn_masks"),
            "--attention-backend triton: SGLang makes their masks for that one alone",
        ),
    }
    for what, (asked, hint) in not_served.items():
        if asked:
            raise ConfigError(f"{what}: not translated from SGLang", hint=hint)


def check_speculation(runner: Any, spec: Any) -> None:
    """Raise ConfigError where SGLang itself fails in the first step with guesses."""
    if spec.speculative_algorithm is not None and str(runner.device) == "cpu" and int(runner.page_size) > 1:
        raise ConfigError(
            f"speculation over pages of {runner.page_size} on a CPU: SGLang's allocation runs a Triton kernel there",
            accepted="--page-size 1",
        )
