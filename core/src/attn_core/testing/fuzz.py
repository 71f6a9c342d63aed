"""Random configurations and batches: each is refused with a reason that fits, or right. A failure is made small first.

Needs hypothesis (``pip install attn-core[testing]``); the other tiers do not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

from attn_core.errors import ConfigError, UsageError
from attn_core.planning.config import LayerKind
from attn_core.testing.cases import MEMORIES, MODES, Case, Request
from attn_core.testing.claimed import is_claimed
from attn_core.testing.refusals import check_refusal
from attn_core.testing.run import Result, Target, run_case

#: Cases of a run that proves something.
EXAMPLES: Final = 2000
#: Cases of one share: hypothesis varies what it has found, so several searches see more than one long one.
SHARE: Final = 50

_WIDTHS: Final = (1, 8, 16, 24, 40, 64, 80, 96, 128)
_PAGES: Final = (1, 2, 3, 5, 8, 16, 17, 32, 48, 64)
_TREES: Final = ("", "top2", "top2dead", "top3")
_WRAPPED: Final = ("", "stacked", "joined")
_WRITES: Final = ("", "nosave", "decoy", "holes")
_FLAGS: Final = ("lse", "out", "hot", "fused", "nohost", "loose")
#: What is done beyond the one step; a mode that cannot do all of it has its own.
_AGAIN: Final = ("", "twice", "alone", "steps", "flight")
_AGAIN_OF: Final = {
    "decode": (*_AGAIN, "graph"),
    "verify": (*_AGAIN, "graph"),
    "ragged": ("", "twice", "alone"),
}


@dataclass(frozen=True, slots=True)
class Share:
    """A search of its own: ``examples`` random cases, which ``seed`` alone decides."""

    seed: int
    examples: int = SHARE


def shares(seed: int, examples: int = EXAMPLES) -> list[Share]:
    """The searches that make ``examples`` cases together."""
    whole, rest = divmod(examples, SHARE)
    sizes = [SHARE] * whole + ([rest] if rest else [])
    return [Share(seed * 100_003 + i, size) for i, size in enumerate(sizes)]


class _WrongError(AssertionError):
    """A case that failed, for hypothesis to make smaller."""


class _Stop(BaseException):
    """The end of a search before its examples are: no exception that hypothesis would look into."""


def run_share(
    share: Share,
    target: Target,
    *,
    deadline: float | None = None,
    begins: Callable[[Case], None] | None = None,
    is_lost: Callable[[Result], bool] = lambda result: False,
) -> tuple[Result, ...]:
    """The cases of a share that ran. A failure ends the search: the last result is then the smallest one that fails.

    deadline: in the time of ``time.time()``. begins: told of each case before it runs. is_lost: whether nothing can run
    after this result, so that nothing can be made smaller. Raises UsageError without hypothesis.
    """
    try:
        import hypothesis
        from hypothesis import HealthCheck, Phase
    except ImportError as error:
        raise UsageError(
            "fuzzing needs hypothesis", hint="pip install 'attn-core[testing]', or run the tier numerics"
        ) from error
    passed: list[Result] = []
    failed: list[Result] = []

    @hypothesis.seed(share.seed)
    @hypothesis.settings(
        max_examples=share.examples,
        deadline=None,
        database=None,
        derandomize=False,
        print_blob=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(cases())
    def every_case_is_right_or_refused(case: Case) -> None:
        if deadline is not None and time.time() > deadline:
            raise _Stop
        if begins is not None:
            begins(case)
        result = try_one(case, target)
        if result.status != "failed":
            if not failed:
                passed.append(result)
            return
        failed[:] = [result]
        raise _Stop if is_lost(result) else _WrongError(result.case.id)

    with suppress(_WrongError, _Stop):
        every_case_is_right_or_refused()
    return (*passed, *failed)


def try_one(case: Case, target: Target) -> Result:
    """The case as the manifest has it: right if it is claimed, refused if not."""
    if is_claimed(target.ref.manifest, case, target.system):
        return run_case(case, target)
    return check_refusal(replace(case, refused="any"), target, probe=False)


def _one_of(values: Sequence[Any]) -> Any:
    """Each value as likely as the others: hypothesis likes the ends of a list, so every value stands in it often."""
    from hypothesis import strategies as st

    return st.sampled_from([*values] * 8)


def cases() -> Any:
    """The strategy: cases of every mode, with lengths that hypothesis shrinks towards one token of one request."""
    from hypothesis import strategies as st

    @st.composite
    def drawn(draw: Any) -> Case:
        mode = draw(_one_of(MODES))
        tree = draw(_one_of(_TREES)) if mode == "verify" else ""
        latent = mode != "ragged" and draw(st.booleans())
        kinds = tuple(draw(_kinds(mode, latent)))
        crosses = any(kind.cross for kind in kinds)
        pattern = _ordered(draw(_requests(mode, crosses)), mode)
        options = {name for name in _FLAGS if draw(st.booleans())}
        again = draw(_one_of(_AGAIN_OF.get(mode, _AGAIN)))
        if mode == "ragged":
            options -= {"nohost", "loose"}
        else:
            options.add(draw(_one_of(_WRAPPED[::2] if latent else _WRAPPED)))
            options.add(draw(_one_of(_writes(crosses, again))))
            options |= {"spans"} if mode in ("extend", "mixed") and draw(st.booleans()) else set()
        return Case(
            mode=mode,
            kinds=kinds,
            pattern=pattern,
            batch=len(pattern),
            dtype=draw(_one_of(("float32", "float16", "bfloat16"))),
            kv_dtype=draw(_one_of(("auto", "fp8_e4m3", "fp8_e5m2"))),
            page_size=draw(_one_of(_PAGES)),
            layout="MLA" if latent else draw(_one_of(("NHD", "HND"))),
            memory=draw(_one_of(MEMORIES)),
            tree=tree,
            options=frozenset(options | {again}) - {""},
            seed=draw(st.integers(0, 3)),
        )

    return drawn().filter(_is_possible)


def _writes(crosses: bool, again: str) -> tuple[str, ...]:
    """The ways to write that mean something: an encoder's keys have no holes, a graph writes what it is given."""
    writes = _WRITES[:3] if crosses else _WRITES
    return tuple(name for name in writes if again != "graph" or name not in ("nosave", "decoy"))


def _kinds(mode: str, latent: bool) -> Any:
    """One to three layer kinds; a ragged case has a cached kind beside the ragged one."""
    from hypothesis import strategies as st

    @st.composite
    def kind(draw: Any, ragged: bool) -> LayerKind:
        width, values = draw(_one_of(_WIDTHS)), draw(_one_of(_WIDTHS))
        kv_heads = 1 if latent else draw(st.integers(1, 3))
        cross = not ragged and mode not in ("verify", "draft_extend") and draw(st.booleans())
        causal = not ragged or draw(st.booleans())
        return LayerKind(
            num_q_heads=kv_heads * draw(st.integers(1, 9)),
            num_kv_heads=kv_heads,
            qk_head_dim=width + values if latent else width,
            v_head_dim=values,
            kind="mla" if latent else "mha",
            scale=draw(_one_of((0.125, 0.3) if latent else (None, 0.2))),
            sliding_window=None if cross or not causal else draw(_one_of((None, 1, 2, 7, 16, 1 << 20))),
            softcap=draw(_one_of((0.0, 1.5, 20.0))),
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
