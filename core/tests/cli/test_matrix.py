"""The support matrix: each cell says claimed, proved (where, how, when), refused or failed, and documents carry it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from attn_core.cli.matrix import BEGIN, END
from attn_core.errors import CheckFailedError
from attn_core.planning.discovery import BackendRef, discover
from attn_core.planning.manifest import Manifest
from attn_core.testing.fingerprint import code_hashes
from attn_core.testing.matrix import Row, to_html, to_json, to_markdown
from attn_core.testing.matrix import matrix as matrix_of
from attn_core.testing.proof import Evidence, best_level, read_evidence

from .conftest import MANIFEST, Site

REF = BackendRef(
    "mine", "attn-mine", "1.0", "attn_mine.b:B", Manifest.parse(MANIFEST.replace("{name}", "mine")), "mine"
)


def run(level: str = "silicon", date: str = "2026-11-22", device: str = "H100", **outcomes: str) -> Evidence:
    return Evidence("mine", "attn-mine", "1.0", device, level, date, outcomes, "x.json", ("contract",), "c0de")


def matrix(refs: list[BackendRef], runs: list[Evidence], code: str = "c0de", kit: str = "") -> list[Row]:
    return matrix_of(refs, runs, lambda _ref: code, lambda: kit)


def document(**changes: Any) -> dict[str, Any]:
    return {
        "schema": "attn/evidence",
        "version": 1,
        "backend": "good",
        "distribution": {"name": "attn-good", "version": "1.2.3"},
        "device": {"name": "a chip", "system": "cpu"},
        "level": "silicon",
        "date": "2026-11-22",
        "features": {"sliding_window": {"outcome": "proved"}, "softcap": {"outcome": "refused"}},
        **changes,
    }


@pytest.mark.parametrize(
    ("runs", "feature", "state", "level"),
    [
        ([], "sliding_window", "claimed", None),
        ([], "softcap", "refused", None),
        ([run(sliding_window="proved")], "sliding_window", "proved", "silicon"),
        ([run(sliding_window="not_run")], "sliding_window", "claimed", None),
        ([run(softcap="refused")], "softcap", "refused", "silicon"),
        ([run(softcap="under_claimed")], "softcap", "refused", "silicon"),
        ([run(sliding_window="over_claimed")], "sliding_window", "failed", "silicon"),
        ([run(sliding_window="raised")], "sliding_window", "failed", "silicon"),
        ([run("schema", sliding_window="proved")], "sliding_window", "claimed", "schema"),
        ([run("schema", sliding_window="proved"), run(sliding_window="proved")], "sliding_window", "proved", "silicon"),
        (
            [run(sliding_window="not_run"), run("isa-emulated", sliding_window="proved")],
            "sliding_window",
            "proved",
            "isa-emulated",
        ),
    ],
)
def test_a_cell(runs: list[Evidence], feature: str, state: str, level: str | None) -> None:
    (row,) = matrix([REF], runs)
    cell = row.features[feature]
    assert (cell.state, cell.runs[0].level if cell.runs else None) == (state, level)


def test_every_device_of_the_strongest_level_is_named_and_no_weaker_one() -> None:
    runs = [run(device="A", a="x", sliding_window="proved"), run(device="B", sliding_window="proved")]
    (row,) = matrix([REF], [*runs, run("schema", device="C", sliding_window="proved")])
    assert [each.device for each in row.features["sliding_window"].runs] == ["A", "B"]


def test_a_failure_on_one_device_is_not_hidden_by_a_proof_on_another() -> None:
    runs = [run(device="A", sliding_window="proved"), run(device="B", sliding_window="over_claimed")]
    (row,) = matrix([REF], runs)
    assert row.features["sliding_window"].state == "failed"
    assert [each.device for each in row.features["sliding_window"].runs] == ["B"]


def test_what_is_not_claimed_and_not_refused_has_failed() -> None:
    (row,) = matrix([REF], [run(softcap="over_claimed")])
    assert row.features["softcap"].state == "failed"


def test_a_run_of_another_version_says_so() -> None:
    older = run(sliding_window="proved")._replace(version="0.9")
    assert "proved, silicon [1] of 0.9" in to_markdown(matrix([REF], [older]))


@pytest.mark.parametrize(
    ("recorded", "installed", "mark", "words", "code"),
    [
        ("c0de", "c0de", "", "", "same"),
        ("c0de", "0dd", "†", "code edited since", "edited"),
        ("", "c0de", "‡", "the run did not record its code", "unknown"),
    ],
)
def test_a_run_of_other_code_says_so(recorded: str, installed: str, mark: str, words: str, code: str) -> None:
    """In one version, too: what was proved is code, and what is here may have been edited since."""
    rows = matrix([REF], [run(sliding_window="proved")._replace(code=recorded)], installed)
    text = to_markdown(rows)
    assert f"| proved, silicon [1]{mark} |" in text
    assert f"| Has run | silicon [1]{mark} contract |" in text
    assert ("†" in text, "‡" in text) == (mark == "†", mark == "‡")
    assert text.endswith(f"\n{mark} {words}" if mark else "\n[1] silicon: H100, 2026-11-22")
    cell = rows[0].features["sliding_window"]
    assert str(cell) == "proved: silicon, H100, 2026-11-22" + (f" ({words})" if words else "")
    assert cell.to_json()["runs"][0]["code"] == code
    assert to_html(rows).count(f" ({words})" if words else "†") == (4 if words else 0)


@pytest.mark.parametrize(
    ("outcome", "recorded", "installed", "doubtful"),
    [
        ("over_claimed", "k1", "k2", True),
        ("over_claimed", "k1", "k1", False),
        ("over_claimed", "", "k1", False),
        ("proved", "k1", "k2", False),
    ],
)
def test_a_fault_that_another_kit_found_says_so(outcome: str, recorded: str, installed: str, doubtful: bool) -> None:
    """It may have been the kit's own fault; what was proved by another kit stays proved."""
    runs = [run(sliding_window=outcome)._replace(code="c0de", kit=recorded)]
    rows = matrix([REF], runs, kit=installed)
    words = "found by a kit that was edited since, and not run with it again"
    text, cell = to_markdown(rows), rows[0].features["sliding_window"]
    assert (f"| {cell.state}, silicon [1]§ |" in text, text.endswith(f"\n§ {words}")) == (doubtful, doubtful)
    assert (words in str(cell), words in to_html(rows)) == (doubtful, doubtful)
    assert cell.to_json()["runs"][0]["kit"] == (
        "unknown" if not recorded else "same" if recorded == installed else "edited"
    )


def test_the_evidence_of_another_distribution_proves_nothing() -> None:
    other = Evidence(
        "mine", "attn-other", "1.0", "H100", "silicon", "2026-11-22", {"sliding_window": "proved"}, "x.json"
    )
    (row,) = matrix([REF], [other])
    assert row.features["sliding_window"].state == "claimed"


def test_headline_flags_have_proof_of_their_own() -> None:
    (row,) = matrix([REF], [run(sliding_window="proved", page_size_gt_1="proved")])
    assert {flag: cell.state for flag, cell in row.flags.items()} == {
        "page_size_gt_1": "proved",
        "spec_decoding": "refused",
        "mla": "refused",
        "sliding_window": "proved",
        "multimodal": "refused",
    }


def test_no_rendering_has_a_bare_tick() -> None:
    rows = matrix([REF], [run(sliding_window="proved", softcap="refused")])
    for text in (to_markdown(rows), to_html(rows), json.dumps(to_json(rows))):
        assert not set("✓✔✅❌✗") & set(text)
        assert "H100" in text
        assert "2026-11-22" in text
        assert "silicon" in text
        assert "claimed" in text


def test_every_table_says_what_never_ran_on_silicon() -> None:
    """Beside whatever an emulator has proved."""
    emulated = matrix([REF], [run("isa-emulated", device="gfx942", sliding_window="proved")])
    assert to_markdown(emulated).count("| Has run | **silicon: never run**; isa-emulated [1] contract |") == 2
    assert to_html(emulated).count("<td>silicon: never run<br>isa-emulated: gfx942 contract</td>") == 2
    assert to_json(emulated)["backends"][0]["ran"] == {"silicon": [], "isa-emulated": ["gfx942"]}
    both = matrix([REF], [run(sliding_window="proved"), run("isa-emulated", device="gfx942", sliding_window="proved")])
    assert "never run" not in to_markdown(both) + to_html(both)
    assert to_markdown(both).count("| Has run | silicon [1] contract; isa-emulated [2] contract |") == 2
    assert to_markdown(matrix([REF], [])).count("| Has run | **silicon: never run** |") == 2


@pytest.mark.parametrize(
    ("level", "tiers", "said"),
    [
        ("silicon", ["contract", "numerics", "stress"], "silicon [1]‡ to stress"),
        ("silicon", ["contract"], "silicon [1]‡ contract"),
        ("isa-emulated", [], "isa-emulated [1]‡ contract in part"),
        ("schema", [], "schema [1]‡"),
    ],
)
def test_how_much_of_the_kit_ran_is_said(level: str, tiers: list[str], said: str) -> None:
    """A cut-off contract is no whole one, and a contract is no stress."""
    evidence = Evidence.parse(document(level=level, tiers=tiers), "x.json")._replace(backend="mine", dist="attn-mine")
    rows = matrix([REF], [evidence._replace(version="1.0")])
    assert f"{said} |" in to_markdown(rows)
    assert [run.tiers for run in rows[0].runs] == [tuple(tiers)]


def test_the_strongest_level_is_what_a_listing_shows() -> None:
    assert best_level([], "mine") == "declared"
    assert best_level([run("schema", a="proved"), run("compiled", a="proved")], "mine") == "compiled"
    assert best_level([run(a="over_claimed")], "mine") == "declared"


@pytest.mark.parametrize(
    "change", [{"schema": "other"}, {"version": 2}, {"level": "believed"}, {"features": 3}, {"device": None}]
)
def test_what_is_no_evidence_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckFailedError, match=r"x\.json"):
        Evidence.parse(document(**change), "x.json")


def test_files_are_read_by_device_and_sorted_by_strength(tmp_path: Path) -> None:
    for device, level, date in (
        ("a", "schema", "2026-01-01"),
        ("b", "silicon", "2025-01-01"),
        ("c", "silicon", "2026-01-01"),
    ):
        (tmp_path / device).mkdir()
        (tmp_path / device / "good.json").write_text(json.dumps(document(level=level, date=date)))
    (tmp_path / "c" / "torn.json").write_text("{")
    runs, problems = read_evidence([str(tmp_path)])
    assert [(each.level, each.date) for each in runs] == [
        ("silicon", "2026-01-01"),
        ("silicon", "2025-01-01"),
        ("schema", "2026-01-01"),
    ]
    assert len(problems) == 1
    assert "torn.json" in problems[0]


def test_a_plugin_may_ship_its_evidence(site: Site) -> None:
    top = site.plugin("good")
    (top / "evidence" / "chip").mkdir(parents=True)
    (top / "evidence" / "chip" / "good.json").write_text(json.dumps(document()))
    rows = {each["name"]: each for each in site.attn("matrix", "--format", "json").json["backends"]}
    proof = {
        "level": "silicon",
        "device": "a chip",
        "date": "2026-11-22",
        "version": "1.2.3",
        "tiers": [],
        "code": "unknown",
        "kit": "unknown",
    }
    assert rows["good"]["features"]["sliding_window"] == {"state": "proved", "runs": [proof]}
    listed = {each["name"]: each for each in site.attn("list-backends", "--json").json["backends"]}
    assert listed["good"]["evidence"] == "silicon"


def test_what_was_edited_since_it_was_proved_is_told_apart(site: Site) -> None:
    """Whoever edits a kernel sees in the matrix that its proof is of other code; a note changes nothing."""
    top = site.plugin("good")
    ref = next(ref for ref in discover([str(site.folder)]).backends if ref.name == "good")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site.folder))
        code = code_hashes(ref)
    assert set(code) == {"attn-core", "attn-good"}
    (top / "evidence" / "chip").mkdir(parents=True)
    (top / "evidence" / "chip" / "good.json").write_text(json.dumps(document(code=code)))

    def standing() -> Any:
        rows = {each["name"]: each for each in site.attn("matrix", "--format", "json").json["backends"]}
        return rows["good"]["features"]["sliding_window"]["runs"][0]["code"]

    assert standing() == "same"
    (top / "NOTES.txt").write_text("no code")
    assert standing() == "same"
    (top / "more.py").write_text("# edited")
    assert standing() == "edited"
    assert "(code edited since)" in site.attn("info", "good").out


@pytest.mark.parametrize("command", [["list-backends"], ["matrix"], ["info", "torch_native"]])
def test_a_folder_of_evidence_that_is_not_there_is_said(site: Site, command: list[str]) -> None:
    """Nothing would be proved, without a word."""
    done = site.attn(*command, ATTN_EVIDENCE="no/such")
    assert done.code == 2
    assert "ATTN_EVIDENCE is 'no/such'" in done.err


def test_documents_carry_it_and_a_stale_one_fails_the_check(site: Site) -> None:
    readme = site.folder / "README.md"
    readme.write_text(f"# before\n{BEGIN}\n{END}\nafter\n")
    stale = site.attn("matrix", "--check")
    assert stale.code == 1
    assert "README.md" in stale.err
    assert site.attn("matrix", "--write").code == 0
    text = readme.read_text()
    assert text.startswith("# before\n")
    assert text.endswith("\nafter\n")
    assert "Sliding window" in text
    assert site.attn("matrix", "--check").code == 0


def test_a_document_without_the_markers_is_a_usage_error(site: Site) -> None:
    (site.folder / "README.md").write_text("nothing")
    assert site.attn("matrix", "--write").code == 2


def test_a_torn_file_among_the_evidence_fails_the_matrix(site: Site) -> None:
    (site.folder / "evidence" / "chip").mkdir(parents=True)
    (site.folder / "evidence" / "chip" / "good.json").write_text("{")
    done = site.attn("matrix", "--evidence", "evidence")
    assert done.code == 1
    assert "good.json" in done.err
