"""Listing: every backend a row, every broken plugin a row with its problem, and nothing imported for it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from .conftest import BACKEND, MANIFEST, Site

#: What listing must not load: frameworks, plugins, and libraries that cost more than the listing itself.
FORBIDDEN = (
    *("torch", "numpy", "click", "rich", "pluggy", "email", "typing_extensions"),
    *("importlib.metadata", "importlib_metadata"),
)


def rows(text: str) -> dict[str, str]:
    return {line.split()[0]: line for line in text.splitlines()[1:]}


@pytest.mark.parametrize("flag", ["--json", "--names", "--strict"])
def test_it_loads_neither_torch_nor_a_plugin_nor_what_is_slow(site: Site, flag: str) -> None:
    site.plugin("good", code="raise AssertionError('imported')")
    site.folder.joinpath("attn_good/__init__.py").write_text("raise AssertionError('imported')")
    script = (
        "import sys; from attn_core.cli import main; before = set(sys.modules); code = main(sys.argv[1:]);"
        "print('\\n'.join(sys.modules), file=sys.stderr); sys.exit(code)"
    )
    # -I -S would lose the site; coverage measures subprocesses by importing itself, so it stays out of this one
    done = site.python("-c", script, "list-backends", flag, COVERAGE_PROCESS_START="", COVERAGE_PROCESS_CONFIG="")
    assert done.code == 0
    loaded = set(done.err.split())
    assert "attn_core.planning.discovery" in loaded
    assert not {name for name in loaded if name.split(".")[0] in FORBIDDEN or name in FORBIDDEN}
    assert not {name for name in loaded if name.startswith("attn_") and not name.startswith("attn_core")}
    assert not {name for name in loaded if name.startswith(("attn_core.runtime", "attn_core.generate"))}


def test_a_backend_is_a_row_with_its_distribution_flags_and_evidence(site: Site) -> None:
    site.plugin("good")
    done = site.attn("list-backends")
    assert done.code == 0
    header, *_ = done.out.splitlines()
    assert header.split()[:2] == ["backend", "distribution"]
    assert "attn-good 1.2.3" in rows(done.out)["good"]
    assert "torch_native" in rows(done.out)


def test_json_has_usability_and_the_headline_flags(site: Site) -> None:
    site.plugin("good")
    document = site.attn("list-backends", "--json").json
    entry = next(each for each in document["backends"] if each["name"] == "good")
    assert entry["usable"] is True
    assert entry["headline"] == {
        "page_size_gt_1": True,
        "spec_decoding": False,
        "mla": False,
        "sliding_window": True,
        "multimodal": False,
    }
    assert entry["evidence"] == "declared"


def test_a_backend_that_cannot_run_here_shows_the_root_cause(site: Site) -> None:
    site.plugin(
        "lacking", manifest=MANIFEST.replace("[[supports]]", "[requires]\ndists = ['nothing-such>=2']\n[[supports]]")
    )
    site.plugin("elsewhere", manifest=MANIFEST.replace('"any"\nkind', '"npu"\nkind'))
    document = site.attn("list-backends", "--json").json
    codes = {each["name"]: [r["code"] for r in each["reasons"]] for each in document["backends"]}
    assert codes["lacking"] == ["missing_dist"]
    assert codes["elsewhere"] == ["device_mismatch"]
    table = rows(site.attn("list-backends").out)
    assert "nothing-such>=2" in table["lacking"]
    assert "no: device is cpu, it needs npu" in table["elsewhere"]


BROKEN = {
    "no_manifest": ({"manifest": None}, "there is no manifest"),
    "not_toml": ({"manifest": "schema = = 1"}, "is not TOML"),
    "newer_schema": ({"manifest": MANIFEST.replace("schema = 1", "schema = 99")}, "this core reads schema 1"),
    "unknown_key": ({"manifest": MANIFEST.replace("features", "featurs")}, "featurs"),
    "unknown_feature": ({"manifest": MANIFEST.replace("sliding_window", "sliding_windw")}, "sliding_windw"),
    "other_name": ({"manifest": MANIFEST.replace("{name}", "somebody_else")}, "somebody_else"),
    "no_module": ({"code": None}, "is not there"),
    "no_package": ({"entry": "nowhere.backend:Backend"}, "'nowhere'"),
    "no_class": ({"entry": "not an object"}, "not an object"),
}


def test_a_broken_plugin_is_a_row_with_its_problem_and_breaks_no_other(site: Site) -> None:
    for name, (plugin, _) in BROKEN.items():
        site.plugin(name, **plugin)
    site.plugin("good")
    table = site.attn("list-backends")
    assert table.code == 0
    assert "broken" not in rows(table.out)["good"]
    for name, (_, cause) in BROKEN.items():
        assert "broken:" in rows(table.out)[name], name
        assert cause in rows(table.out)[name], name
    problems = {each["name"]: each for each in site.attn("list-backends", "--json").json["problems"]}
    assert set(problems) >= set(BROKEN)
    assert problems["unknown_feature"]["hint"]
    assert "sliding_window" in problems["unknown_feature"]["hint"]


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_strict_exits_with_4_for_what_is_broken(site: Site, name: str) -> None:
    plugin, _ = BROKEN[name]
    assert site.attn("list-backends", "--strict", "--names").code == 0
    site.plugin(name, **plugin)
    assert site.attn("list-backends", "--strict", "--names").code == 4


def test_two_distributions_with_one_name_are_both_listed_in_full(site: Site) -> None:
    site.plugin("twin", package="attn_first")
    site.plugin("twin", package="attn_second")
    names = site.attn("list-backends", "--names")
    assert {"twin@attn-first", "twin@attn-second"} <= set(names.out.split())
    assert "twin" not in names.out.split()
    assert site.attn("list-backends", "--strict", "--names").code == 4
    refused = site.attn("info", "twin")
    assert refused.code == 4
    assert "ambiguous_backend" in refused.err
    assert "twin@attn-first, twin@attn-second" in refused.err
    assert site.attn("info", "twin@attn-first").code == 0


def test_the_allow_list_and_the_deny_list_filter_by_distribution(site: Site) -> None:
    site.plugin("one")
    site.plugin("two")
    everything = set(site.attn("list-backends", "--names").out.split())
    assert {"one", "two"} <= everything
    assert set(site.attn("list-backends", "--names", ATTN_PLUGINS="attn-one").out.split()) == {"one", "torch_native"}
    assert set(site.attn("list-backends", "--names", ATTN_PLUGINS="").out.split()) == {"torch_native"}
    assert set(site.attn("list-backends", "--names", ATTN_DISABLE="attn-one").out.split()) == everything - {"one"}
    slip = site.attn("list-backends", "--names", ATTN_DISABLE="attn-on")
    assert "attn-on" in slip.err
    assert "attn-one" in slip.err
    assert site.attn("list-backends", "--strict", "--names", ATTN_DISABLE="attn-one").code == 0


def test_another_protocol_is_listed_and_not_usable(site: Site) -> None:
    site.plugin("future", manifest=MANIFEST.replace(">=1.0,<2", ">=9"))
    entry = next(e for e in site.attn("list-backends", "--json").json["backends"] if e["name"] == "future")
    assert [reason["code"] for reason in entry["reasons"]] == ["protocol_mismatch"]


def test_evidence_that_is_none_is_a_note_and_no_failure(site: Site) -> None:
    top = site.plugin("good")
    (top / "evidence" / "cpu").mkdir(parents=True)
    (top / "evidence" / "cpu" / "good.json").write_text("{")
    done = site.attn("list-backends", "--json")
    assert done.code == 0
    assert "good.json" in done.err
    assert done.json["backends"]


def _on_a_terminal(site: Site, *args: str, **env: str) -> str:
    """What the command writes to a terminal."""
    main, terminal = pty.openpty()
    ours = {**os.environ, "PYTHONPATH": str(site.folder), "COLUMNS": "200", "TERM": "xterm-256color", **env}
    process = subprocess.Popen([sys.executable, "-m", "attn_core", *args], stdout=terminal, env=ours)
    os.close(terminal)
    written = b""
    while True:
        try:
            chunk = os.read(main, 65536)
        except OSError:  # the other end is closed: how Linux says end of file here
            break
        if not chunk:
            break
        written += chunk
    process.wait(timeout=60)
    os.close(main)
    return written.decode()


def test_a_person_gets_a_table_in_colour_unless_they_say_no(site: Site) -> None:
    site.plugin("good", code=BACKEND)
    coloured = _on_a_terminal(site, "list-backends")
    assert "\x1b[" in coloured
    assert "torch_native" in coloured
    plain = _on_a_terminal(site, "list-backends", NO_COLOR="1")
    assert "\x1b[3" not in plain
    assert "torch_native" in plain
    assert "\x1b[" not in site.attn("list-backends").out


def test_words_stay_whole_in_80_columns(site: Site) -> None:
    site.plugin("flashinfer_mla", dist="attn-flashinfer")
    table = _on_a_terminal(site, "list-backends", NO_COLOR="1", COLUMNS="80")
    words = {word for line in table.splitlines() for word in line.split()}
    assert {"flashinfer_mla", "attn-flashinfer", "torch_native", "attn-core"} <= words
