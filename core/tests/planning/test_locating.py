"""Where a package lies is found without importing it: beside its metadata, where editable installs point, elsewhere."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from attn_core.planning.distributions import scan

from .sites import Site, only_problem


def test_an_editable_install_is_found_through_its_pth_file(site: Site, tmp_path: Path) -> None:
    source = tmp_path / "work" / "src"
    site.package("attn_live", "live", at=source)
    record = "_editable_impl_attn_live.pth,,\nattn_live-1.2.3.dist-info/METADATA,,\n"
    site.info("attn-live", "[attn.backends]\nlive = attn_live.backend:Backend\n", record=record)
    (site.folder / "_editable_impl_attn_live.pth").write_text(f"import os; os\n{source}\n")
    (ref,) = site.discover().backends
    assert ref.location == str(source / "attn_live" / "live.toml")


def test_an_editable_install_is_found_through_the_finder_of_setuptools_which_is_not_run(
    site: Site, tmp_path: Path
) -> None:
    package = site.package("attn_live", "live", at=tmp_path / "work")
    finder = "__editable___attn_live_1_2_3_finder.py"
    site.info("attn-live", "[attn.backends]\nlive = attn_live.backend:Backend\n", record=f"{finder},,\n")
    (site.folder / finder).write_text(
        f"MAPPING: dict[str, str] = {{'attn_live': {str(package)!r}}}\nraise SystemExit(1)\n"
    )
    (ref,) = site.discover().backends
    assert ref.location == str(package / "live.toml")


def test_a_development_install_with_egg_info_is_found(site: Site, tmp_path: Path) -> None:
    source = tmp_path / "src"
    site.package("attn_egg", "egg", at=source)
    info = source / "attn_egg.egg-info"
    info.mkdir()
    (info / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: attn_egg\nVersion: 0.4\n\nVersion: not this\n")
    (info / "entry_points.txt").write_text("[attn.backends]\negg = attn_egg.backend:Backend\n")
    (ref,) = site.discover(source).backends
    assert (ref.dist, ref.version) == ("attn-egg", "0.4")


def test_a_package_elsewhere_on_the_path_is_found(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = site.package("attn_far", "far", at=tmp_path / "elsewhere")
    monkeypatch.syspath_prepend(str(package.parent))
    site.info("attn-far", "[attn.backends]\nfar = attn_far.backend:Backend\n")
    (ref,) = site.discover().backends
    assert ref.location == str(package / "far.toml")


def test_at_last_the_installed_finders_are_asked(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = site.package("attn_hidden", "hidden", at=tmp_path / "hidden")

    class Finder:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(package)]
            return spec if name == "attn_hidden" else None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    site.info("attn-hidden", "[attn.backends]\nhidden = attn_hidden.backend:Backend\n")
    (ref,) = site.discover().backends
    assert ref.location == str(package / "hidden.toml")


@pytest.mark.parametrize("finder", ["MAPPING = {", "MAPPING = make()", "MAPPING = {'x': 'y'}", "MAPPING: dict", None])
def test_a_finder_that_cannot_be_read_finds_nothing(site: Site, finder: str | None) -> None:
    record = "__editable___attn_live_finder.py,,\n_gone.pth,,\n"
    site.info("attn-live", "[attn.backends]\nlive = attn_live.backend:Backend\n", record=record)
    if finder is not None:
        (site.folder / "__editable___attn_live_finder.py").write_text(finder)
    assert "package 'attn_live' is not there" in only_problem(site.discover())


def test_a_compiled_module_counts_as_one(site: Site) -> None:
    folder = site.wheel("fast")
    (folder / "backend.py").rename(folder / "backend.cpython-311-x86_64-linux-gnu.so")
    assert site.discover().names == ("fast",)
    (folder / "backend.cpython-311-x86_64-linux-gnu.so").rename(folder / "backend_other.so")
    assert "module 'attn_fast.backend' is not there" in only_problem(site.discover())


def test_a_module_in_a_folder_that_is_not_there_is_a_problem(site: Site) -> None:
    site.package("attn_deep", "deep")
    site.info("attn-deep", "[attn.backends]\ndeep = attn_deep.gone.backend:Backend\n")
    assert "module 'attn_deep.gone.backend' is not there" in only_problem(site.discover())


def test_egg_info_without_a_name_is_no_distribution(site: Site) -> None:
    (site.folder / "odd.egg-info").mkdir()
    (site.folder / "odder.egg-info").write_text("Version: 1\nName: odder\n")
    assert scan([str(site.folder)]) == {}
