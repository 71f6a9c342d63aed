"""The kit as pytest items, one a case: ``pytest -p attn_core.testing.plugin --attn-backend NAME``, or `conformance`.

The plugin is never loaded by itself: without ``-p`` nothing of it touches anybody's pytest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Final, cast

import pytest

from attn_core.planning.discovery import discover
from attn_core.testing import evidence
from attn_core.testing.agenda import agenda
from attn_core.testing.axes import TIERS, Tier
from attn_core.testing.cases import Case
from attn_core.testing.checks import Fault
from attn_core.testing.devices import Place, at
from attn_core.testing.report import Report
from attn_core.testing.rows import rows_of
from attn_core.testing.run import NOT_BEGUN, Result, Target
from attn_core.testing.runner import check_usable
from attn_core.testing.workers import Look, run_job

_PROPERTY: Final = "attn_case"


class Subject:
    """A backend under test in a pytest session, and its cases; the device is left at ``close``."""

    def __init__(self, name: str, tier: Tier, device: str, seed: int) -> None:
        self._stack = ExitStack()
        self.tier, self.seed = tier, seed
        self.ref = discover().find(name)
        self.place: Place = self._stack.enter_context(at(device))
        check_usable(self.ref, self.place)
        self.target = Target(self.ref, self.place.system, self.place.device)
        self.agenda = agenda(
            self.ref.manifest, tier, self.place.system, seed, max_cases=self.place.max_cases, examples=0,
            emulated=self.place.level != "silicon",
        )  # fmt: skip

    def close(self) -> None:
        """Leave the device."""
        self._stack.close()

    def run(self, case: Case) -> Result:
        """One case, of either direction."""
        (result,) = run_job(case, self.target, probe=False, deadline=None)
        if result.status == "failed" and not case.refused:
            (result,) = run_job(Look(case), self.target, probe=False, deadline=None)
        return result

    def report(self, results: list[Result]) -> Report:
        """What the session found, as `verify` reports it."""
        rows, blames = rows_of(
            self.ref.manifest, self.place.system, results, eager_graphs=self.place.device.type == "cpu"
        )
        facts = evidence.facts(self.ref, self.place)
        seconds = sum(result.seconds for result in results)
        begun = {result.case for result in results if not result.note.startswith(NOT_BEGUN)}
        return Report(
            self.ref.name, self.place.text, self.place.level, self.tier, self.seed, tuple(results), rows, blames,
            seconds, facts, done=self.agenda.done(begun, 0),
        )  # fmt: skip


def conformance(name: str, tier: Tier = "contract", device: str = "cpu", *, seed: int = 0) -> Callable[[Case], None]:
    """A parametrised test function, one item for each case of the kit, whose ids are the cases'.

        test_conformance = conformance("my_backend")

    Raises what `verify` raises for a backend or a device that cannot be used.
    """
    subject = Subject(name, tier, device, seed)

    @pytest.mark.parametrize("case", subject.agenda.cases, ids=lambda case: case.id)
    def test_conformance(case: Case) -> None:
        _settle(subject.run(case))

    return test_conformance


def _settle(result: Result) -> None:
    """Fail or skip the running test as the case ended."""
    if result.status == "not_run":
        pytest.skip(result.note)
    if result.faults:
        pytest.fail("\n".join(map(str, result.faults)), pytrace=False)


# -- the plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attn", "conformance of an attention backend")
    group.addoption("--attn-backend", metavar="NAME", help="run the conformance kit on this installed backend")
    group.addoption("--attn-tier", choices=TIERS, default=TIERS[0], help="which cases (default: %(default)s)")
    group.addoption("--attn-device", default="cpu", help="cpu, cuda, npu, xpu or emulated:NAME (default: %(default)s)")
    group.addoption("--attn-seed", type=int, default=0, help="seed of the cases (default: %(default)s)")


_SUBJECT: Final = pytest.StashKey[Subject]()


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("--attn-backend")
    if name is not None:
        tier = cast(Tier, config.getoption("--attn-tier"))
        subject = Subject(name, tier, config.getoption("--attn-device"), config.getoption("--attn-seed"))
        config.stash[_SUBJECT] = subject
        config.add_cleanup(subject.close)


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    if _SUBJECT in config.stash:
        subject = config.stash[_SUBJECT]
        items += [CaseItem.of(session, subject, case) for case in subject.agenda.cases]


class CaseItem(pytest.Item):
    """One case as a test."""

    subject: Subject
    case: Case

    @classmethod
    def of(cls, session: pytest.Session, subject: Subject, case: Case) -> CaseItem:
        """The item of ``case``, named by its id."""
        item: CaseItem = cls.from_parent(session, name=case.id, nodeid=f"{subject.ref.listed}::{case.id}")
        item.subject, item.case = subject, case
        return item

    def runtest(self) -> None:
        result = self.subject.run(self.case)
        self.user_properties.append((_PROPERTY, _packed(result)))
        _settle(result)

    def reportinfo(self) -> tuple[str, int | None, str]:
        return self.subject.ref.listed, None, self.case.id


def _packed(result: Result) -> dict[str, Any]:
    """A result as plain data, which travels between the processes of pytest-xdist."""
    return {
        "case": result.case.id,
        "status": result.status,
        "faults": [[fault.check, fault.message] for fault in result.faults],
        "note": result.note,
        "seconds": result.seconds,
    }


def _unpacked(data: dict[str, Any]) -> Result:
    faults = tuple(Fault(check, message) for check, message in data["faults"])
    return Result(Case.parse(data["case"]), data["status"], faults, data["note"], data["seconds"])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if _SUBJECT in config.stash:
        results = list(_results(terminalreporter))
        if results:
            terminalreporter.section("attn conformance")
            terminalreporter.write_line(config.stash[_SUBJECT].report(results).table())


def _results(terminalreporter: Any) -> Iterator[Result]:
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, data in report.user_properties:
                if name == _PROPERTY and report.when == "call":
                    yield _unpacked(data)
