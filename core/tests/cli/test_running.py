"""The commands that run backends: verify, bench, tune, warmup. In this process, since each would import torch anew."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attn_core import cli
from attn_core.cli import INTERRUPTED
from attn_core.planning.system import FORCE_VARIABLE

from .conftest import BACKEND, MANIFEST, Result, Site

Attn = Callable[..., Result]

WARM = (
    BACKEND
    + """
    def warmup(self, config):
        from attn_core.planning.system import detect
        open("warm.txt", "w").write(f"{config.model} {config.page_size} {detect()}")
"""
)


@pytest.fixture
def attn(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Attn:
    """`attn` in this process, beside the plugins of ``site``."""
    monkeypatch.syspath_prepend(str(site.folder))
    monkeypatch.chdir(site.folder)
    monkeypatch.setenv("ATTN_NUM_THREADS", "1")
    monkeypatch.setenv("ATTN_CACHE_DIR", str(site.folder / "cache"))
    monkeypatch.setenv(FORCE_VARIABLE, "")  # so that what a command sets is taken back

    def run(*args: str) -> Result:
        code = cli.main(args)
        return Result(code, *capsys.readouterr())

    return run


PLAIN_CASE = "decode/8x2x64/1@31/dtype=float32"


def a_case(attn: Attn, text: str) -> str:
    """The id of a case of torch_native with ``text`` in it."""
    from attn_core.planning.discovery import discover
    from attn_core.planning.system import detect
    from attn_core.testing.generation import generate_cases

    cases = generate_cases(discover().find("torch_native").manifest, "contract", detect("cpu"))
    return next(case.id for case in cases if text in case.id)


def test_verify_prints_the_table_and_reproduces_a_case(attn: Attn) -> None:
    case = a_case(attn, "decode")
    done = attn("verify", "torch_native", "--device", "cpu", "--case", case)
    assert done.code == 0, done.err
    assert "1 passed, 0 failed" in done.out


def test_verify_of_a_false_claim_is_exit_code_1_and_names_it(attn: Attn, site: Site, tmp_path: Path) -> None:
    site.plugin("wrong", package="attn_wrong_claim")
    report = tmp_path / "report.xml"
    done = attn("verify", "wrong", "--device", "cpu", "--select", "decode/", "--junit", str(report))
    assert done.code == 1
    assert "over-claimed" in done.out
    assert "attn verify wrong --device cpu --case" in done.out
    assert "FAILED decode/" in done.err
    assert "<failure" in report.read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["torch_nativ"], 2, "unknown_backend"),
        (["torch_native", "--case", "no such case"], 2, "[usage]"),
        (["torch_native", "--device", "gpu"], 2, "[usage]"),
        (["torch_native", "--device", "emulated:none"], 2, "[usage]"),
        (["torch_native", "--tier", "everything"], 2, "contract"),
        (["torch_native", "--select", "decode/", "--evidence", "somewhere"], 2, "evidence of a part"),
    ],
)
def test_verify_of_bad_input(attn: Attn, arguments: list[str], code: int, what: str) -> None:
    done = attn("verify", *arguments)
    assert done.code == code
    assert done.out == ""
    assert what in done.err


def test_a_run_of_verify_that_is_interrupted_says_how_far_it_was(site: Site) -> None:
    command = [sys.executable, "-m", "attn_core", "verify", "torch_native", "--device", "cpu", "--select", "decode/"]
    with subprocess.Popen(
        [*command, "--junit", "report.xml", "--max-seconds", "60"],
        cwd=site.folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell has what it runs in the background ignore Ctrl-C, and so would this
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "attn: verifying torch_native\n"  # a case has ended
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert re.fullmatch(r"interrupted: \d+ of \d+ cases, 0 failed; --max-seconds ends a run with its table\n\n", err)
    assert out == ""
    assert not (site.folder / "report.xml").exists()


@pytest.mark.parametrize(("name", "options"), [("raises", ["--select", "decode/"]), ("lacks_its_class", ["--case"])])
def test_verify_of_what_cannot_be_loaded_says_so_once(attn: Attn, site: Site, name: str, options: list[str]) -> None:
    """Not once for each case, in processes of its own or in this one."""
    code, exit_code, said = LOADING[name]
    site.plugin(name, package=f"attn_{name}_here", code=code)
    done = attn("verify", name, "--device", "cpu", *options, *([PLAIN_CASE] if options == ["--case"] else []))
    assert done.code == exit_code
    assert done.err.count(said) == 1
    assert "[plugin_load_failed]" in done.err
    assert done.out == ""


EMULATOR = """
class Chip:
    level, name = "contract-emulated", "a chip"

    def __enter__(self):
        import no_such_library.parts

    def __exit__(self, *error): ...
"""


@pytest.mark.parametrize("command", [["verify", "emulated_here"], ["generate", "hi", "--device", "emulated:chip9"]])
def test_an_emulator_whose_library_is_not_here_says_which(attn: Attn, site: Site, command: list[str]) -> None:
    manifest = MANIFEST.replace('device = "any"', 'device = "npu"')
    top = site.plugin("emulated_here", code=EMULATOR, manifest=manifest)
    points = site.folder / "attn_emulated_here-1.2.3.dist-info" / "entry_points.txt"
    points.write_text(points.read_text() + f"[attn.emulators]\nchip9 = {top.name}.backend:Chip\n")
    done = attn(*command)
    assert done.code == 4
    assert "emulator 'chip9' needs what is not here: No module named 'no_such_library'" in done.err
    assert "next: pip install no_such_library" in done.err


def test_bench_times_and_checks_a_shape(attn: Attn, tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    shape = ("--shape", "decode bs1 kv1024")
    done = attn("bench", "torch_native", *shape, "--dtype", "float32", "--seconds", "0.01", "--output", str(output))
    assert done.code == 0
    assert "attn:torch_native" in done.out
    (row,) = json.loads(output.read_text())["rows"]
    assert row["err"] < 1e-5
    assert row["ms"] > 0


@pytest.mark.parametrize("device", ["cuda", "cdua", "npu", "emulated:gfx942"])
def test_bench_on_a_device_that_is_not_here_is_a_usage_error(attn: Attn, device: str) -> None:
    if device in ("cuda", "npu") and hasattr(torch, device) and torch.get_device_module(device).is_available():
        pytest.skip(f"this machine has {device}")
    done = attn("bench", "torch_native", "--shape", "decode bs1 kv1024", "--device", device)
    assert (done.code, done.out) == (2, "")
    assert device in done.err
    assert "[usage]" in done.err


def test_bench_of_an_unknown_shape_suggests_the_nearest(attn: Attn) -> None:
    done = attn("bench", "torch_native", "--shape", "decode bs1 kv1023")
    assert done.code == 2
    assert "did you mean 'decode bs1 kv1024'" in done.err


def test_what_tune_measured_is_what_auto_ranks_by(attn: Attn) -> None:
    done = attn("tune", "smollm2-135m", "--dtype", "float32", "--seconds", "0.01", "--json")
    assert done.code == 0
    assert {each["backend"] for each in done.json["timings"]} >= {"torch_native"}
    plan = attn("explain", "smollm2-135m", "--dtype", "float32", "--json").json
    assert "measured" in plan["phases"]["decode"]["why"]


def test_warmup_calls_the_backend_with_the_planned_config(attn: Attn, site: Site) -> None:
    site.plugin("warm", code=WARM, package="attn_warm_here")
    done = attn("warmup", "warm", "--model", "llama-3.1-8b", "--page-size", "16")
    assert done.code == 0, done.err
    assert (site.folder / "warm.txt").read_text().startswith("llama-3.1-8b 16 ")
    assert "warm is warm for llama-3.1-8b" in done.err


def test_warmup_for_a_chip_that_is_not_here(attn: Attn, site: Site) -> None:
    site.plugin("warm", code=WARM, package="attn_warm_there")
    assert attn("warmup", "warm", "--model", "llama-3.1-8b", "--arch", "gfx942").code == 0
    assert (site.folder / "warm.txt").read_text().endswith(" rocm:gfx942")


def test_warmup_of_a_phase_that_a_backend_lacks_asks_it_for_the_others(attn: Attn, site: Site) -> None:
    site.plugin(
        "half", code=WARM, package="attn_half", manifest=MANIFEST.replace('["prefill", "decode"]', '["decode"]')
    )
    assert attn("warmup", "half", "--model", "llama-3.1-8b").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["torch_native", "--model", "lama"], 2, "unknown_model"),
        (["torch_nativ", "--model", "llama-3.1-8b"], 2, "unknown_backend"),
        (["torch_native"], 2, "--model"),
        (["torch_native", "--model", "llama-3.1-8b", "--arch", "sm90"], 2, "chip 'sm90' is not known"),
    ],
)
def test_warmup_of_bad_input(attn: Attn, arguments: list[str], code: int, what: str) -> None:
    done = attn("warmup", *arguments)
    assert done.code == code
    assert what in done.err


def test_threads_are_those_of_the_environment(attn: Attn) -> None:
    attn("bench", "torch_native", "--shape", "decode bs1 kv1024", "--dtype", "float32", "--seconds", "0.01")
    assert torch.get_num_threads() == 1


#: what a chosen plugin does when it is loaded -> what its user is told
LOADING = {
    "raises": ("raise RuntimeError('no luck today')", 4, "no luck today"),
    "exits": ("import sys; sys.exit(0)", 4, "sys.exit"),
    "lacks_a_module": ("import no_such_module_at_all", 4, "no_such_module_at_all"),
    "lacks_its_class": ("Other = 1", 4, "Backend"),
    "is_no_backend": ("Backend = dict", 4, "AttentionBackend"),
    "other_torch": ("raise ImportError('x.so: undefined symbol: _ZN3c10')", 4, "undefined symbol"),
    "fails_to_build": (BACKEND + "    def __init__(self, config, kv_cache): raise ValueError('too odd')", 4, "too odd"),
}


@pytest.mark.parametrize("name", LOADING)
def test_a_chosen_plugin_that_cannot_be_loaded_is_a_typed_error(attn: Attn, site: Site, name: str) -> None:
    code, exit_code, said = LOADING[name]
    site.plugin(name, code=code)
    done = attn("warmup", name, "--model", "llama-3.1-8b")
    assert done.code == exit_code
    assert "plugin_load_failed" in done.err
    assert said in done.err
    assert f"attn-{name.replace('_', '-')}" in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_what_a_chosen_plugin_prints_is_no_data(attn: Attn, site: Site) -> None:
    site.plugin("chatty", code="print('hello from a plugin')\n" + BACKEND)
    done = attn("warmup", "chatty", "--model", "llama-3.1-8b")
    assert done.code == 0
    assert done.out == ""
