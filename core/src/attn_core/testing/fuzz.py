"""Random configurations and batches: each is refused with a reason that fits, or right. A failure is made small first.

Needs hypothesis (``pip install attn-core[testing]``); the other tiers do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

from attn_core.errors import ConfigError, UsageError
from attn_core.planning.config import LayerKind
from attn_core.testing.cases import MEMORIES, MODES, Case, Request
from attn_core.testing.claimed import is_claimed
from attn_core.testing.refusals import check_refusal
from attn_core.testing.run import Result, Target, run_case

Progress = Callable[[int, int, Result], None]

#: Cases of a run that proves something.
EXAMPLES: Final = 2000
_WIDTHS: Final = (1, 8, 16, 24, 40, 64, 80, 96, 128)
_PAGES: Final = (1, 2, 3, 5, 8, 16, 17, 32, 48, 64)
_TREES: Final = ("", "top2", "top2dead", "top3")
_WRAPPED: Final = ("", "stacked", "joined")
_WRITES: Final = ("", "nosave", "decoy", "holes")
_FLAGS: Final = ("lse", "out", "hot", "fused", "nohost", "loose")

_AGAIN: Final = ("", "", "twice", "alone", "", "")


@dataclass(slots=True)
class Fuzzed:
    """What fuzzing found: the cases that ran, and the smallest one that failed, if any did."""

    results: list[Result] = field(default_factory=list)
    refused: int = 0
    smallest: Result | None = None


class _WrongError(AssertionError):
    """A case that failed, for hypothesis to make smaller."""


def fuzz(target: Target, *, examples: int = EXAMPLES, seed: int = 0, progress: Progress | None = None) -> Fuzzed:
    """``examples`` random cases on the target; the first failure is shrunk and ends the search.

    The results hold every case that ran, but of a failure only its smallest form. Raises UsageError without hypothesis.
    """
    try:
        import hypothesis
        from hypothesis import HealthCheck, Phase
    except ImportError as error:
        raise UsageError(
            "fuzzing needs hypothesis", hint="pip install 'attn-core[testing]', or run the tier numerics"
        ) from error
    found = Fuzzed()
    failed: dict[str, Result] = {}

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=False,
        print_blob=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(cases())
    def every_case_is_right_or_refused(case: Case) -> None:
        result = try_one(case, target)
        if result.status == "failed":
            failed["smallest"] = result
            raise _WrongError(result.case.id)
        if not failed:
            found.results.append(result)
            found.refused += bool(result.case.refused)
            if progress is not None:
                progress(len(found.results), examples, result)

    try:
        every_case_is_right_or_refused()
    except _WrongError:
        found.smallest = failed["smallest"]
        found.results.append(found.smallest)
        if progress is not None:
            progress(len(found.results), examples, found.smallest)
    return found


def try_one(case: Case, target: Target) -> Result:
    """The case as the manifest has it: right if it is claimed, refused if not."""
    if is_claimed(target.ref.manifest, case, target.system):
        return run_case(case, target)
    return check_refusal(replace(case, refused="any"), target, probe=False)


def cases() -> Any:
    """The strategy: cases of every mode, with lengths that hypothesis shrinks towards one token of one request."""
    from hypothesis import strategies as st

    @st.composite
    def drawn(draw: Any) -> Case:
        mode = draw(st.sampled_from(MODES))
        tree = draw(st.sampled_from(_TREES)) if mode == "verify" else ""
        latent = mode != "ragged" and draw(st.booleans())
        kinds = tuple(draw(_kinds(mode, latent)))
        crosses = any(kind.cross for kind in kinds)
        pattern = _ordered(draw(_requests(mode, crosses)), mode)
        options = set(draw(st.sets(st.sampled_from(_FLAGS))))
        options |= {draw(st.sampled_from(_AGAIN[:3] if mode == "ragged" else _AGAIN))} - {""}
        if mode != "ragged":
            wrapped = draw(st.sampled_from(_WRAPPED[::2] if latent else _WRAPPED))
            written = draw(st.sampled_from(_WRITES[:3] if crosses else _WRITES))
            options |= {wrapped, written} - {""}
            options |= {"spans"} if mode in ("extend", "mixed") and draw(st.booleans()) else set()
        else:
            options -= {"nohost", "loose"}
        return Case(
            mode=mode,
            kinds=kinds,
            pattern=pattern,
            batch=len(pattern),
            dtype=draw(st.sampled_from(("float32", "float16", "bfloat16"))),
            kv_dtype=draw(st.sampled_from(("auto", "fp8_e4m3", "fp8_e5m2"))),
            page_size=draw(st.sampled_from(_PAGES)),
            layout="MLA" if latent else draw(st.sampled_from(("NHD", "HND"))),
            memory=draw(st.sampled_from(MEMORIES)),
            tree=tree,
            options=frozenset(options),
            seed=draw(st.integers(0, 3)),
        )

    return drawn().filter(_is_possible)


def _kinds(mode: str, latent: bool) -> Any:
    """One to three layer kinds; a ragged case has a cached kind beside the ragged one."""
    from hypothesis import strategies as st

    @st.composite
    def kind(draw: Any, ragged: bool) -> LayerKind:
        width, values = draw(st.sampled_from(_WIDTHS)), draw(st.sampled_from(_WIDTHS))
        kv_heads = 1 if latent else draw(st.integers(1, 3))
        cross = not ragged and mode not in ("verify", "draft_extend") and draw(st.booleans())
        causal = not ragged or draw(st.booleans())
        return LayerKind(
            num_q_heads=kv_heads * draw(st.integers(1, 9)),
            num_kv_heads=kv_heads,
            qk_head_dim=width + values if latent else width,
            v_head_dim=values,
            kind="mla" if latent else "mha",
            scale=draw(st.sampled_from((0.125, 0.3))) if latent else draw(st.sampled_from((None, 0.2))),
            sliding_window=None if cross or not causal else draw(st.sampled_from((None, 1, 2, 7, 16, 1 << 20))),
            softcap=draw(st.sampled_from((0.0, 1.5, 20.0))),
            sinks=draw(st.booleans()),
            cross=cross,
            ragged=ragged,
            causal=causal,
        )

    if mode == "ragged":
        return st.tuples(st.just(LayerKind(2, 1, 16, 16)), kind(True))
    return st.lists(kind(False), min_size=1, max_size=3)


def _requests(mode: str, crosses: bool) -> Any:
    from hypothesis import strategies as st

    new = {"decode": st.just(1), "verify": st.integers(1, 6)}.get(mode, st.integers(0, 40))
    encoder = st.integers(1, 40) if crosses else st.just(0)
    requests = st.lists(st.builds(Request, new, st.integers(0, 90), encoder), min_size=1, max_size=6)
    if mode != "verify":
        return requests
    # as many draft tokens for every request
    return requests.map(lambda rows: [Request(rows[0].new, row.prefix, row.encoder) for row in rows])


def _ordered(requests: list[Request], mode: str) -> tuple[Request, ...]:
    """A mixed step has its decodes in front."""
    return tuple(sorted(requests, key=lambda r: r.new != 1)) if mode == "mixed" else tuple(requests)


def _is_possible(case: Case) -> bool:
    """Whether the case asks for something that has a meaning: at least one token, and a config that can be."""
    if not any(r.new for r in case.pattern) or (case.mode == "draft_extend" and not case.draft_tokens):
        return False
    if case.tree and case.draft_tokens < 3:
        return False
    try:
        case.config()
    except ConfigError:
        return False
    return True
