"""Versions compare as PEP 440 says; `packaging`, too slow to import in the command, is the oracle."""

from __future__ import annotations

import pytest
from attn_core.planning.versions import Requirement, Specifier, Version, normal_name
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from packaging.version import Version as Oracle

VERSIONS = [
    "0", "0.6", "0.6.0", "0.7.2.post1", "1.0", "1.0.0", "1.0.1", "1.0a1", "1.0b2", "1.0rc1", "1.0.dev3", "1.0a1.dev2",
    "1.0.post1", "1.0.post1.dev1", "1.0-1", "v1.0", "1!0.5", "2", "2.0rc1", "2.0.dev0", "2.1", "1.9.9", "2.13.0+cpu",
    "2.13.0", "2.11.0+cu130", "3.0.0.post20260810", "4.0.0b36", "1.10", "1.2",
]  # fmt: skip
SPECIFIERS = [
    ">=1.0", ">=1.0,<2", "<2", "<2.0rc1", ">1.0", ">1.0.post1", "<1.0.post1", ">1.0a1", ">1.0.dev3", "<=1.0",
    "==1.0", "==1.0.*", "!=1.0.*", "!=1.0",
    "~=1.0", "~=1.0.1", ">=0.6", "==2.13.0", "==2.13.0+cpu", ">=4.0.0b36", "~=2.13.0", "==1!0.5", "", ">=1.0, !=1.0.1",
]  # fmt: skip

numbers = st.integers(0, 30)
releases = st.lists(numbers, min_size=1, max_size=4).map(lambda parts: ".".join(map(str, parts)))
versions = st.builds(
    "{}{}{}{}".format,
    releases,
    st.sampled_from(["", "a1", "b2", "rc3"]),
    st.sampled_from(["", ".post1", ".post20"]),
    st.sampled_from(["", ".dev4"]),
)


@pytest.mark.parametrize("specifier", SPECIFIERS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_specifier_allows_what_packaging_allows(specifier: str, version: str) -> None:
    expected = SpecifierSet(specifier).contains(Oracle(version), prereleases=True)
    assert Specifier.parse(specifier).allows(version) == expected


@settings(deadline=None)
@given(versions, versions, st.sampled_from([">=", "<=", "<", ">", "==", "!="]))
def test_any_two_versions_compare_as_packaging_compares_them(version: str, bound: str, operator: str) -> None:
    expected = SpecifierSet(operator + bound).contains(Oracle(version), prereleases=True)
    assert Specifier.parse(operator + bound).allows(version) == expected


@settings(deadline=None)
@given(versions, versions)
def test_versions_sort_as_packaging_sorts_them(a: str, b: str) -> None:
    assert (Version.parse(a) < Version.parse(b)) == (Oracle(a) < Oracle(b))


@pytest.mark.parametrize("text", ["1.x", ">=", "=1.0", "1.0", ">=one", "===1.0", ">=1.*", "~=1"])
def test_what_is_no_bound_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not|not supported|wildcard|two numbers"):
        Specifier.parse(text)


def test_a_text_that_is_no_version_is_within_no_bound() -> None:
    assert not Specifier.parse(">=0").allows("unknown")
    assert Specifier.parse("").allows("unknown")


@pytest.mark.parametrize("name", ["attn_core", "attn.core", "Attn-Core", "attn__core"])
def test_names_compare_as_registries_compare_them(name: str) -> None:
    assert normal_name(name) == "attn-core"


def test_a_requirement_is_satisfied_by_one_of_its_choices() -> None:
    requirement = Requirement.parse("Flash_Attn_3>=3.0 | flash-attn-4")
    assert requirement.satisfied({"flash-attn-3": "3.1"})
    assert requirement.satisfied({"flash-attn-3": "2.0", "flash-attn-4": "0.1"})
    assert not requirement.satisfied({"flash-attn-3": "2.0"})
    assert not requirement.satisfied({})
    assert requirement.found({"flash-attn-3": "2.0", "torch": "2"}) == {"flash-attn-3": "2.0"}


@pytest.mark.parametrize("text", ["", "name[extra]", "name; python_version>'3'", "name @ file:///x", "a | ", ">=1.0"])
def test_a_requirement_is_names_and_bounds_and_nothing_else(text: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        Requirement.parse(text)
