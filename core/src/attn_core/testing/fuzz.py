"""Random configurations and batches: each is refused with a reason that fits, or right. A failure is made small first.

Needs hypothesis (``pip install attn-core[testing]``); the other tiers do not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from attn_core.errors import UsageError
from attn_core.testing.cases import Case
from attn_core.testing.claimed import is_claimed
from attn_core.testing.draws import cases
from attn_core.testing.refusals import check_refusal
from attn_core.testing.run import Result, Target, run_case

#: Cases of a run that proves something.
EXAMPLES: Final = 2000
#: Cases of one share: hypothesis varies what it has found, so several searches see more than one long one.
SHARE: Final = 100


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
    @hypothesis.given(cases(target.ref.manifest, target.system))
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
