"""Hooks of plugins: loaded from entry points, isolated from each other, and never able to break a plan."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from attn_core.planning import hooks as hooks_module
from attn_core.planning.config import AttentionConfig, Phase
from attn_core.planning.hooks import DoctorCheck, Hooks, HookWarning, load_hooks, registered_hooks
from attn_core.planning.hookspecs import hookimpl
from attn_core.planning.plan import plan
from attn_core.planning.system import System

from .building import HOPPER, config, installed, ref


class Ranker:
    def __init__(self, *order: str) -> None:
        self.order = order

    @hookimpl
    def attn_rank(
        self, config: AttentionConfig, phase: Phase, system: System, candidates: tuple[str, ...]
    ) -> Sequence[str] | None:
        assert system == HOPPER
        return self.order if phase == "decode" else None


class Raising:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    @hookimpl
    def attn_rank(self) -> None:
        raise self.error

    @hookimpl
    def attn_doctor_checks(self) -> None:
        raise self.error


def chosen(**phases: Any) -> dict[str, str]:
    found = plan(config(), system=HOPPER, installed=installed(ref("fa3"), ref("flashinfer"), ref("zebra")), **phases)
    return {phase: f"{planned.backend.listed}: {planned.why}" for phase, planned in found.phases.items()}


def test_an_opinion_ranks_before_the_table_and_what_it_leaves_out_follows() -> None:
    with registered_hooks(Ranker("zebra"), "mine"):
        assert chosen() == {
            "prefill": "fa3: preferred for cuda >=sm_90,<sm_100 mha",
            "decode": "zebra: ranked by hook mine",
        }


def test_measured_time_ranks_before_an_opinion() -> None:
    with registered_hooks(Ranker("zebra")):
        assert chosen(rankings=lambda *_: {"flashinfer": 1e-6})["decode"].startswith("flashinfer: measured")


def test_the_first_plugin_with_an_opinion_decides() -> None:
    hooks = Hooks()
    hooks.add(Ranker("flashinfer"), "first")
    hooks.add(Ranker("zebra"), "second")
    assert hooks.rank(config(), "decode", HOPPER, ("flashinfer", "zebra")) == ("second", ("zebra",))
    assert hooks.rank(config(), "prefill", HOPPER, ("flashinfer", "zebra")) is None


def test_names_that_are_no_candidates_are_left_out_with_a_warning() -> None:
    with (
        registered_hooks(Ranker("absent", "zebra"), "mine"),
        pytest.warns(HookWarning, match="named absent, which cannot run decode"),
    ):
        assert chosen()["decode"] == "zebra: ranked by hook mine"


@pytest.mark.parametrize("error", [RuntimeError("no"), SystemExit(3)])
def test_a_hook_that_raises_is_a_warning_and_silences_nobody(error: BaseException) -> None:
    with (
        registered_hooks(Ranker("zebra"), "good"),
        registered_hooks(Raising(error), "bad"),
        pytest.warns(HookWarning, match=f"hook plugin 'bad' was left out: {type(error).__name__}"),
    ):
        assert chosen()["decode"] == "zebra: ranked by hook good"


def test_what_was_left_out_is_a_note_of_the_plan() -> None:
    with registered_hooks(Raising(RuntimeError("no")), "bad"), pytest.warns(HookWarning):
        found = plan(config(), system=HOPPER, installed=installed(ref("fa3")))
    assert any("hook plugin 'bad' was left out" in note for note in found.notes)


def test_a_hook_of_another_signature_is_a_warning() -> None:
    class Wrong:
        @hookimpl
        def attn_doctor_checks(self) -> list[DoctorCheck]:
            return [DoctorCheck("x", "ok", "x")]

        @hookimpl
        def attn_rank(self, no_such_argument: int) -> None: ...

    hooks = Hooks()
    with pytest.warns(HookWarning, match=r"'wrong' was left out: .*no_such_argument"):
        hooks.add(Wrong(), "wrong")
    assert hooks.rank(config(), "decode", HOPPER, ("fa3",)) is None
    assert hooks.doctor_checks() == []


def test_doctor_checks_of_all_plugins_are_collected() -> None:
    class Doctor:
        @hookimpl
        def attn_doctor_checks(self) -> list[DoctorCheck]:
            return [DoctorCheck("driver", "warn", "is old", "update it")]

    hooks = Hooks()
    hooks.add(Doctor(), "one")
    hooks.add(Doctor(), "two")
    hooks.add(Raising(RuntimeError("no")), "bad")
    with pytest.warns(HookWarning):
        checks = hooks.doctor_checks()
    assert [check.name for check in checks] == ["driver", "driver"]


def install(folder: Path, dist: str, module: str, value: str, code: str) -> None:
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{dist}-1.0.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_text(f"[attn.hooks]\nmine = {value}\n")


GOOD = """
from attn_core.planning.hookspecs import hookimpl
print("noise")
class Plugin:
    @hookimpl
    def attn_rank(self, candidates):
        return candidates[-1:]
plugin = Plugin()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_hooks_are_loaded_from_entry_points_with_their_noise_kept_off_stdout(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(folder, "attn_good", "good_hooks_of_a_test", "good_hooks_of_a_test:plugin", GOOD)
    hooks = load_hooks([str(folder)], {})
    assert hooks.rank(config(), "decode", HOPPER, ("a", "b")) == ("mine of attn-good", ("b",))
    assert capsys.readouterr() == ("", "noise\n")


def test_who_waits_for_a_hook_plugin_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(folder, "attn_waited", "waited_hooks_of_a_test", "waited_hooks_of_a_test:plugin", GOOD)
    watched: list[tuple[str, str, str]] = []
    monkeypatch.setattr(hooks_module, "not_in_silence", lambda *about: watched.append(about) or nullcontext())
    load_hooks([str(folder)], {})
    assert watched == [("hook plugin 'mine of attn-waited'", "importing it", "attn-waited")]


def test_a_module_itself_may_be_the_plugin(folder: Path) -> None:
    code = "from attn_core.planning.hookspecs import hookimpl\n@hookimpl\ndef attn_rank(candidates): return candidates"
    install(folder, "attn_module", "module_hooks_of_a_test", "module_hooks_of_a_test", code)
    assert load_hooks([str(folder)], {}).rank(config(), "decode", HOPPER, ("a", "b")) is not None


@pytest.mark.parametrize(
    ("value", "code", "cause"),
    [
        ("gone_hooks_of_a_test", "", "ModuleNotFoundError"),
        ("exit_hooks_of_a_test", "raise SystemExit(1)", "SystemExit"),
        ("raise_hooks_of_a_test", "raise RuntimeError('no')", "RuntimeError: no"),
        ("attr_hooks_of_a_test:missing", "", "AttributeError"),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_a_warning(folder: Path, value: str, code: str, cause: str) -> None:
    module = "elsewhere" if value.startswith("gone") else value.partition(":")[0]
    install(folder, "attn_bad", module, value, code)
    with pytest.warns(HookWarning, match=f"'mine of attn-bad' was left out: {cause}"):
        hooks = load_hooks([str(folder)], {})
    assert len(hooks.problems) == 1


@pytest.mark.parametrize("environ", [{"ATTN_DISABLE": "attn-bad"}, {"ATTN_PLUGINS": ""}])
def test_a_distribution_that_is_left_out_has_no_hooks(folder: Path, environ: dict[str, str]) -> None:
    install(folder, "attn_bad", "left_out_of_a_test", "left_out_of_a_test", "raise RuntimeError")
    assert load_hooks([str(folder)], environ).problems == []


def test_without_hooks_pluggy_is_not_imported() -> None:
    script = (
        "import sys; before = set(sys.modules); from attn_core.planning.config import AttentionConfig, LayerKind\n"
        "from attn_core.planning import hooks, plan\n"
        "plan.load_hooks = lambda: hooks.load_hooks(path=[])\n"
        "plan.plan(AttentionConfig((LayerKind(1, 1, 64, 64),)))\n"
        "print(sorted({'pluggy', 'torch', 'click', 'rich'} & set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
