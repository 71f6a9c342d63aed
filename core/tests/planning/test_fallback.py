"""What a named backend lacks by design goes to its manifest's list: in order, over links, announced, no circles."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from attn_core.errors import BackendRefusedError, FallbackCycleError, NoCommonCacheError
from attn_core.planning import hooks
from attn_core.planning.config import AttentionConfig
from attn_core.planning.discovery import BackendRef, Problem
from attn_core.planning.hooks import FallbackEvent
from attn_core.planning.hookspecs import hookimpl
from attn_core.planning.plan import FallbackWarning, Plan, plan
from attn_core.planning.system import System

from .building import BLACKWELL, HOPPER, MLA, broken, config, installed, mla_clause, ref


def mla(
    name: str, *phases: str, fallback: list[str] | None = None, ambiguous: bool = False, **changes: Any
) -> BackendRef:
    made = mla_clause(phases=list(phases or ("prefill", "decode")), **changes)
    lists = {"prefill": fallback} if fallback else None
    return ref(name, made, fallback=lists, ambiguous=ambiguous)


def made(
    *items: BackendRef | Problem, backend: Any = "trtllm_mla", policy: Any = "allow", system: System = BLACKWELL,
    wanted: AttentionConfig | None = None,
) -> Plan:  # fmt: skip
    return plan(wanted or config(MLA), backend, system=system, installed=installed(*items), fallback=policy)


def walk(found: Plan) -> tuple[str, tuple[str, ...]]:
    return found.phases["prefill"].backend.listed, found.phases["prefill"].fallback


TRTLLM = mla("trtllm_mla", "decode", fallback=["flashinfer_mla", "triton"], arch=">=sm_100", page_sizes=[32, 64])
FLASHINFER = mla("flashinfer_mla", page_sizes=[1, 16, 32, 64])


def test_the_first_of_the_list_that_can_is_used_and_decode_stays() -> None:
    found = made(TRTLLM, FLASHINFER, mla("triton"))
    assert walk(found) == ("flashinfer_mla", ("trtllm_mla", "flashinfer_mla"))
    assert found.phases["decode"].backend.listed == "trtllm_mla"
    assert found.phases["decode"].fallback == ()
    assert found.phases["prefill"].why == "fallback of trtllm_mla"
    assert "fallback: trtllm_mla -> flashinfer_mla" in found.explain()


def test_auto_needs_no_fallback_since_every_phase_ranks_itself() -> None:
    found = made(TRTLLM, FLASHINFER, backend="auto", policy="error")
    assert walk(found) == ("flashinfer_mla", ())
    assert found.phases["decode"].backend.listed == "trtllm_mla"


def test_naming_the_phase_needs_no_fallback() -> None:
    assert walk(made(TRTLLM, FLASHINFER, backend={"decode": "trtllm_mla"}, policy="error"))[1] == ()


@pytest.mark.parametrize(
    ("first", "word"),
    [
        (broken("flashinfer_mla", "its module is gone"), "its module is gone"),
        (mla("flashinfer_mla", dtypes=["float32"]), "dtype_unsupported"),
        (mla("flashinfer_mla", "decode"), "has no prefill either"),
        (None, "no installed distribution has flashinfer_mla; pip install attn-flashinfer"),
    ],
)
def test_what_cannot_is_passed_over_and_the_trace_says_why(first: BackendRef | Problem | None, word: str) -> None:
    found = made(TRTLLM, *([first] if first else []), mla("triton"))
    assert walk(found) == ("triton", ("trtllm_mla", "triton"))
    (row,) = [c for c in found.trace["prefill"] if c.listed == "flashinfer_mla"]
    text = str(row) + row.note
    assert word in text
    assert "on the fallback list" in row.note


def test_a_list_is_followed_over_several_links_and_over_what_is_not_installed() -> None:
    found = made(
        mla("trtllm_mla", "decode", fallback=["absent", "middle"]),
        mla("middle", "decode", fallback=["gone", "deep"]),
        mla("deep", "decode", fallback=["last"]),
        mla("last"),
    )
    assert walk(found) == ("last", ("trtllm_mla", "middle", "deep", "last"))
    statuses = {c.listed: c.status for c in found.trace["prefill"]}
    assert (statuses["absent"], statuses["gone"], statuses["middle"]) == ("not_installed", "not_installed", "refused")


def test_a_list_of_an_ambiguous_name_passes_it_over() -> None:
    pair = [ref("flashinfer_mla", mla_clause(), dist=dist, ambiguous=True) for dist in ("attn-a", "attn-b")]
    assert walk(made(TRTLLM, *pair, mla("triton")))[0] == "triton"


@pytest.mark.parametrize(
    ("items", "circle"),
    [
        ([mla("a", "decode", fallback=["b"]), mla("b", "decode", fallback=["a"])], "a -> b -> a"),
        (
            [
                mla("a", "decode", fallback=["b"]),
                mla("b", "decode", fallback=["c"]),
                mla("c", "decode", fallback=["b"]),
            ],
            "a -> b -> c -> b",
        ),
        ([mla("a", "decode", fallback=["ok", "b"]), mla("ok"), mla("b", "decode", fallback=["a"])], "a -> b -> a"),
    ],
)
def test_lists_that_go_in_a_circle_are_refused(items: list[BackendRef], circle: str) -> None:
    with pytest.raises(FallbackCycleError, match=circle):
        made(*items, backend="a")


def test_two_ways_to_one_backend_are_no_circle() -> None:
    items = [
        mla("a", "decode", fallback=["b", "c"]),
        mla("b", "decode", fallback=["d"]),
        mla("c", "decode", fallback=["d"]),
        mla("d"),
    ]
    assert walk(made(*items, backend="a")) == ("d", ("a", "b", "d"))


def test_the_policy_error_refuses_what_the_list_would_give() -> None:
    with pytest.raises(
        BackendRefusedError, match=r"has no prefill\naccepted: its fallbacks for prefill: flashinfer_mla, triton"
    ):
        made(TRTLLM, FLASHINFER, policy="error")


def test_the_policy_warn_says_it_in_one_line_once() -> None:
    with pytest.warns(FallbackWarning) as caught:
        made(TRTLLM, FLASHINFER, policy="warn")
    (only,) = caught
    text = str(only.message)
    assert text == "prefill runs on flashinfer_mla: trtllm_mla has none, and its manifest names this fallback"
    assert only.filename == __file__


def test_a_longer_chain_is_told_in_full() -> None:
    event = FallbackEvent("prefill", "a", "c", ("a", "b", "c"))
    assert str(event) == "prefill runs on c (via a -> b -> c): a has none, and its manifest names this fallback"


def test_the_policy_allow_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(TRTLLM, FLASHINFER, policy="allow")


@pytest.mark.parametrize("policy", ["warn", "allow"])
@pytest.mark.filterwarnings("ignore::attn_core.planning.plan.FallbackWarning")
def test_hooks_are_told_whatever_the_policy(policy: str) -> None:
    events: list[FallbackEvent] = []

    class Listener:
        @hookimpl
        def attn_fallback(self, event: FallbackEvent) -> None:
            events.append(event)

    with hooks.registered_hooks(Listener()):
        made(TRTLLM, FLASHINFER, policy=policy)
    assert events == [FallbackEvent("prefill", "trtllm_mla", "flashinfer_mla", ("trtllm_mla", "flashinfer_mla"))]


def test_nothing_on_the_list_that_can_is_a_refusal_with_the_whole_walk() -> None:
    with pytest.raises(BackendRefusedError) as caught:
        made(TRTLLM, mla("flashinfer_mla", dtypes=["float32"]))
    text = str(caught.value)
    assert "nothing of its fallback list can run it" in text
    assert "flashinfer_mla: dtype_unsupported" in text
    assert "triton: not installed: pip install attn-triton" in text


def test_a_backend_without_a_list_is_refused_for_what_it_lacks() -> None:
    with pytest.raises(BackendRefusedError, match="has no prefill, and nothing"):
        made(mla("alone", "decode"), FLASHINFER, backend="alone")


def test_only_what_is_lacking_by_design_falls_back() -> None:
    wrong = mla("trtllm_mla", "prefill", "decode", fallback=["flashinfer_mla"], dtypes=["float32"])
    with pytest.raises(BackendRefusedError, match="cannot run prefill"):
        made(wrong, FLASHINFER)


def test_what_cannot_run_here_at_all_does_not_fall_back() -> None:
    with pytest.raises(BackendRefusedError, match="arch_mismatch"):
        made(TRTLLM, FLASHINFER, system=HOPPER)


def test_a_phase_that_it_lacks_does_not_hide_that_it_cannot_run_here() -> None:
    with pytest.raises(BackendRefusedError, match="arch_mismatch"):
        made(TRTLLM, FLASHINFER, system=HOPPER, backend={"prefill": "trtllm_mla"})


def test_a_fallback_shares_the_cache_with_the_backend_that_was_named() -> None:
    assert made(TRTLLM, FLASHINFER).config.page_size == 64
    converted = made(mla("trtllm_mla", "decode", fallback=["x"], page_sizes=[64]), mla("x", page_sizes=[1]))
    assert (converted.config.page_size, converted.phases["prefill"].native_page_size) == (64, 1)


def test_a_fallback_without_a_cache_in_common_leaves_the_next() -> None:
    odd = mla("flashinfer_mla", page_sizes=[128])
    given = config(MLA, page_size=64)
    assert walk(made(TRTLLM, odd, mla("triton"), wanted=given))[0] == "triton"
    with pytest.raises((NoCommonCacheError, BackendRefusedError)):
        made(TRTLLM, odd, wanted=given)
