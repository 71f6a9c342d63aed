"""Ways of serving that are not translated are refused before anything runs, with what to do instead."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import sglang.srt.runtime_context as context
from attn_core.engines.sglang.registration import register_names
from attn_core.engines.sglang.served import speculation_of
from attn_core.engines.sglang.settings import check_served, check_speculation
from attn_core.errors import ConfigError
from sglang.srt.arg_groups import choices
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

from .runners import Layers, runner


@pytest.fixture
def parallel(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """SGLang's parallel settings: one rank of each kind."""
    sizes = SimpleNamespace(attn_cp_size=1, attn_dcp_size=1)
    monkeypatch.setattr(context, "get_parallel", lambda: sizes)
    return sizes


NOT_SERVED: dict[str, tuple[dict[str, Any], str]] = {
    "draft": ({"is_draft_worker": True}, "--speculative-draft-attention-backend"),
    "unified": ({"kv_index_translator": SimpleNamespace(is_translating=True)}, "unified"),
    "chunks": ({"model_config": SimpleNamespace(is_local_attention_model=True)}, "local chunks"),
}


@pytest.mark.parametrize("what", NOT_SERVED)
def test_what_is_not_translated_is_refused(what: str, parallel: SimpleNamespace) -> None:
    changes, message = NOT_SERVED[what]
    of = runner(Layers())
    check_served(of)
    for name, value in changes.items():
        setattr(of, name, value)
    with pytest.raises(ConfigError, match=message):
        check_served(of)


def test_models_whose_images_need_masks_of_triton_are_refused(parallel: SimpleNamespace) -> None:
    of = runner(Layers())
    of.model.prepare_attn_masks = lambda *args: None
    with pytest.raises(ConfigError, match="--attention-backend triton"):
        check_served(of)


def test_guesses_over_pages_of_several_tokens_are_refused_on_a_cpu() -> None:
    spec = SimpleNamespace(speculative_algorithm="NGRAM")
    check_speculation(runner(Layers()), spec)
    check_speculation(runner(Layers(), page_size=4), SimpleNamespace(speculative_algorithm=None))
    with pytest.raises(ConfigError, match="pages of 4 on a CPU"):
        check_speculation(runner(Layers(), page_size=4), spec)


def test_context_parallelism_is_refused(parallel: SimpleNamespace) -> None:
    parallel.attn_dcp_size = 2
    with pytest.raises(ConfigError, match="context parallelism"):
        check_served(runner(Layers()))


@pytest.mark.parametrize(
    ("algorithm", "topk", "tree"),
    [("EAGLE", 1, False), ("EAGLE", 4, True), ("NGRAM", None, True), ("EAGLE3", 1, False)],
)
def test_drafts_are_chains_or_trees(algorithm: str, topk: int | None, tree: bool) -> None:
    spec = SimpleNamespace(speculative_algorithm=algorithm, speculative_eagle_topk=topk, speculative_num_draft_tokens=4)
    found = speculation_of(spec)
    assert found is not None
    assert (found.tokens, found.tree) == (4, tree)


def test_names_are_registered_once_and_can_be_chosen() -> None:
    names = register_names()
    assert names == register_names()
    assert {"attn", "attn-torch_native", "attn-triton"} <= set(names) <= set(ATTENTION_BACKENDS)
    for accepted in (choices.ATTENTION_BACKEND_CHOICES, choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES):
        assert all(accepted.count(name) == 1 for name in names)
