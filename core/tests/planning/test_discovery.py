"""Discovery reads entry points and manifests and runs nothing: wheels, editable installs, and everything broken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from attn_core.errors import AmbiguousBackendError, ManifestError, PluginError, UnknownBackendError
from attn_core.planning.discovery import Installed, discover, register, unregister
from attn_core.planning.distributions import InstalledVersions, scan
from attn_core.planning.reasons import availability
from attn_core.planning.system import System

from .building import clause, manifest
from .sites import TEXT, Site, only_problem


def test_a_wheel_is_found_with_its_distribution_version_and_manifest(site: Site) -> None:
    folder = site.wheel("fast")
    (ref,) = site.discover().backends
    assert (ref.name, ref.listed, ref.dist, ref.version) == ("fast", "fast", "attn-fast", "1.2.3")
    assert ref.object == "attn_fast.backend:Backend"
    assert ref.location == str(folder / "fast.toml")
    assert ref.manifest.summary == "made for a test"


def test_one_distribution_may_have_several_backends(site: Site) -> None:
    site.info(
        "attn-two",
        "[console_scripts]\nx = y:z\n\n[attn.backends]\n# both\na = attn_two.backend:A\nb=attn_two:B [extra]\n",
    )
    site.package("attn_two", "a", "b")
    found = site.discover()
    assert {ref.name: ref.object for ref in found.backends} == {"a": "attn_two.backend:A", "b": "attn_two:B"}


def test_the_first_of_a_distribution_on_the_path_hides_the_others(site: Site, tmp_path: Path) -> None:
    site.wheel("fast")
    other = Site(tmp_path / "other")
    other.info("attn-fast", "[attn.backends]\nfast = gone:X\nslow = gone:X\n", version="9")
    found = site.discover(other.folder, tmp_path / "missing")
    assert [(ref.listed, ref.version) for ref in found.backends] == [("fast", "1.2.3")]
    assert found.problems == ()


def test_what_pip_could_not_remove_claims_nothing(site: Site) -> None:
    site.wheel("fast")
    rest = site.folder / "~ttn_fast-1.2.2.dist-info"
    rest.mkdir()
    (rest / "entry_points.txt").write_text("[attn.backends]\nfast = attn_fast.backend:Backend\n")
    assert site.discover().names == ("fast",)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("bad = attn_bad", ["entry point bad = 'attn_bad'", "module:Class"]),
        ("bad = :Backend", ["entry point bad"]),
        ("bad", ["entry point bad = ''"]),
        ("bad = attn-bad.backend:Backend", ["entry point bad"]),
        (
            "bad = attn_gone.backend:Backend",
            ["package 'attn_gone' is not there", "pip install --force-reinstall attn-bad"],
        ),
        ("bad = attn_bad.gone:Backend", ["module 'attn_bad.gone' is not there"]),
        ("bad = attn_bad.backend:A\nbad = attn_bad.backend:B", ["its entry points name 'bad' twice"]),
    ],
)
def test_a_broken_entry_point_is_one_row_with_its_cause(site: Site, entry: str, words: list[str]) -> None:
    site.package("attn_bad", "bad")
    site.info("attn-bad", f"[attn.backends]\n{entry}\n")
    text = only_problem(site.discover())
    assert [word for word in ["attn-bad 1.2.3", *words] if word not in text] == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["there is no manifest", "bad.toml", "beside the package's __init__.py"]),
        ("schema = 1\nname\n", ["is not TOML", "line 2"]),
        (TEXT.format(name="other"), ["name is 'other', the entry point is 'bad'"]),
        (
            TEXT.format(name="bad").replace("schema = 1", "schema = 9"),
            ["schema is 9; this core reads schema 1", "upgrade"],
        ),
        (
            TEXT.format(name="bad").replace("kv_layouts", "kv_layout"),
            ["kv_layout is not a key", "did you mean 'kv_layouts'?"],
        ),
        (b"\xff\xfe", ["cannot be read"]),
    ],
)
def test_a_broken_manifest_is_one_row_with_its_cause(site: Site, content: str | bytes | None, words: list[str]) -> None:
    folder = site.wheel("bad")
    (folder / "bad.toml").unlink()
    if content is not None:
        (folder / "bad.toml").write_bytes(content if isinstance(content, bytes) else content.encode())
    text = only_problem(site.discover())
    assert [word for word in words if word not in text] == []


def test_one_broken_plugin_does_not_touch_the_others(site: Site) -> None:
    site.wheel("good")
    (site.wheel("bad") / "bad.toml").write_text("no")
    found = site.discover()
    assert [ref.listed for ref in found.backends] == ["good"]
    assert [problem.listed for problem in found.problems] == ["bad"]


def test_two_distributions_of_one_name_are_both_listed_in_full_and_the_bare_name_is_refused(site: Site) -> None:
    site.wheel("same", dist="attn-a", package="attn_a")
    site.wheel("same", dist="attn-b", package="attn_b")
    found = site.discover()
    assert found.names == ("same@attn-a", "same@attn-b")
    assert all(ref.ambiguous for ref in found.backends)
    assert found.find("same@attn-b").dist == "attn-b"
    with pytest.raises(AmbiguousBackendError, match="same@attn-a, same@attn-b"):
        found.find("same")


def test_a_name_is_ambiguous_even_if_one_of_its_plugins_is_broken(site: Site) -> None:
    site.wheel("same", dist="attn-a", package="attn_a")
    (site.wheel("same", dist="attn-b", package="attn_b") / "same.toml").unlink()
    found = site.discover()
    assert (found.names, [p.listed for p in found.problems]) == (("same@attn-a",), ["same@attn-b"])
    with pytest.raises(AmbiguousBackendError, match="same@attn-a, same@attn-b"):
        found.find("same")


def test_denying_one_of_two_makes_the_bare_name_plain_again(site: Site) -> None:
    site.wheel("same", dist="attn-a", package="attn_a")
    site.wheel("same", dist="attn-b", package="attn_b")
    found = site.discover(ATTN_DISABLE="attn-a")
    assert found.find("same").dist == "attn-b"
    assert found.names == ("same",)
    assert [(p.listed, p.code) for p in found.problems] == [("same@attn-a", "disabled")]


def test_a_full_name_works_where_the_bare_one_does(site: Site) -> None:
    site.wheel("fast")
    assert site.discover().find("fast@attn-fast").listed == "fast"


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({}, ["fast", "slow", "torch_native"]),
        ({"ATTN_PLUGINS": ""}, ["torch_native"]),
        ({"ATTN_PLUGINS": "attn-slow"}, ["slow", "torch_native"]),
        ({"ATTN_PLUGINS": "Attn_Slow, attn-fast"}, ["fast", "slow", "torch_native"]),
        ({"ATTN_DISABLE": "attn_slow"}, ["fast", "torch_native"]),
        ({"ATTN_PLUGINS": "attn-slow attn-fast", "ATTN_DISABLE": "attn-slow"}, ["fast", "torch_native"]),
        ({"ATTN_DISABLE": "attn-core"}, ["fast", "slow"]),
        ({"ATTN_DISABLE": ""}, ["fast", "slow", "torch_native"]),
    ],
)
def test_the_allow_list_and_the_deny_list_filter_by_distribution(
    site: Site, environ: dict[str, str], names: list[str]
) -> None:
    site.wheel("fast")
    site.wheel("slow")
    site.wheel("torch_native", dist="attn-core", package="core_of_attn")
    found = site.discover(**environ)
    assert [ref.listed for ref in found.backends] == names
    left_out = {"fast", "slow", "torch_native"} - set(names)
    assert {problem.listed for problem in found.problems if problem.code == "disabled"} == left_out


def test_what_is_left_out_is_not_even_read(site: Site) -> None:
    (site.wheel("bad") / "bad.toml").write_text("no")
    (problem,) = site.discover(ATTN_DISABLE="attn-bad").problems
    assert (problem.code, problem.message) == ("disabled", "ATTN_DISABLE names attn-bad")


def test_a_name_on_a_list_that_nothing_has_is_noted(site: Site) -> None:
    site.wheel("fast")
    assert site.discover(ATTN_DISABLE="attn-fats").notes == (
        "ATTN_DISABLE names attn-fats, which is no installed distribution with backends; did you mean attn-fast?",
    )
    assert site.discover(ATTN_PLUGINS="attn-fast").notes == ()


def test_finding_says_what_there_is_and_what_was_meant(site: Site) -> None:
    site.wheel("flashinfer")
    with pytest.raises(UnknownBackendError, match=r"accepted: flashinfer\nnext: did you mean 'flashinfer'\?"):
        site.discover().find("flashinfr")
    with pytest.raises(UnknownBackendError, match="none is installed"):
        Installed().find("x")


def test_finding_a_broken_or_disabled_backend_says_why(site: Site) -> None:
    (site.wheel("bad") / "bad.toml").unlink()
    with pytest.raises(PluginError, match="there is no manifest"):
        site.discover().find("bad")
    with pytest.raises(PluginError, match="ATTN_DISABLE names attn-bad"):
        site.discover(ATTN_DISABLE="attn-bad").find("bad")


class Backend:
    """Stands for a backend class; discovery never looks into it."""


def test_a_class_can_be_registered_in_the_process_and_taken_back() -> None:
    with register(Backend, manifest("notebook")) as ref:
        found = discover([], {})
        assert found.backends == (ref,)
        assert found.find("notebook").cls is Backend
        assert ref.dist == "in-process"
    assert discover([], {}).backends == ()


@pytest.mark.parametrize("as_", ["text", "mapping", "path"])
def test_a_manifest_can_be_given_in_any_form(as_: str, tmp_path: Path) -> None:
    text = TEXT.format(name="notebook")
    (tmp_path / "notebook.toml").write_text(text)
    data = {"schema": 1, "name": "notebook", "protocol": ">=1.0,<2", "summary": "x", "supports": [clause()]}
    given: dict[str, Any] = {"text": text, "mapping": data, "path": tmp_path / "notebook.toml"}
    with register(Backend, given[as_]) as ref:
        assert ref.name == "notebook"


def test_a_registered_name_is_refused_a_second_time_and_free_after_it_was_taken_back() -> None:
    first = register(Backend, manifest("notebook"))
    with pytest.raises(AmbiguousBackendError, match="already registered"):
        register(Backend, manifest("notebook"))
    first.unregister()
    register(Backend, manifest("notebook"))
    unregister("notebook")
    first.unregister()
    with pytest.raises(UnknownBackendError):
        unregister("notebook")


def test_a_bad_manifest_is_not_registered() -> None:
    with pytest.raises(ManifestError, match="manifest of Backend"):
        register(Backend, "schema = 1")
    assert discover([], {}).backends == ()


def test_a_registered_name_that_is_installed_too_is_ambiguous(site: Site) -> None:
    site.wheel("same")
    with register(Backend, manifest("same")):
        assert site.discover().names == ("same@attn-same", "same@in-process")


def test_versions_are_read_from_the_folders(site: Site) -> None:
    site.info("Some.Thing-else", version="2.0+cu130")
    site.info("plain", version="1!2.0")
    assert {name: dist.version for name, dist in scan([str(site.folder)]).items()} == {
        "some-thing-else": "2.0+cu130",
        "plain": "1!2.0",
    }


def test_what_is_installed_here_is_what_importlib_finds() -> None:
    from importlib.metadata import distributions

    from attn_core.planning.versions import normal_name

    expected: dict[str, str] = {}
    for dist in distributions():
        expected.setdefault(normal_name(dist.name), dist.version)
    assert dict(InstalledVersions()) == expected


def test_the_cores_own_backend_is_found_like_any_other() -> None:
    ref = discover().find("torch_native")
    assert (ref.dist, ref.name) == ("attn-core", "torch_native")
    assert ref.manifest.speaks_protocol
    assert availability(ref.manifest, System("cpu")) == ()


def test_discovery_imports_no_torch_no_plugin_and_no_importlib_metadata(site: Site) -> None:
    site.wheel("fast")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules)\n"
        "from attn_core.planning.discovery import discover\n"
        "from attn_core.planning.reasons import availability\n"
        "from attn_core.planning.system import detect\n"
        "found = discover(); system = detect()\n"
        "assert 'fast' in found.names, found\n"
        "reasons = [availability(ref.manifest, system) for ref in found.backends]\n"
        "bad = {'torch', 'attn_fast', 'importlib.metadata', 'importlib_metadata', 'pluggy', 'click', 'rich', 'email',"
        " 'subprocess', 'packaging', 'json', 'attn_core.runtime'}\n"
        "print(sorted(bad & set(sys.modules) - before))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(site.folder)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr
