"""Chips, head widths and page sizes: what a clause can say, and what it then allows."""

from __future__ import annotations

from itertools import islice

import pytest
from attn_core.planning.claims import ANY_ARCH, NO_PAGES, ArchSpec, HeadDims, PageRule, PageSet, Widths, normal_arch
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("spec", "allowed", "refused"),
    [
        (">=sm_80", ["sm_80", "sm_90", "sm_90a", "sm_100", "sm_120"], ["sm_75", "sm_8", "gfx942", "ascend910b"]),
        ("<sm_100", ["sm_90", "sm_89", "sm_99"], ["sm_100", "sm_100a", "sm_120"]),
        (">=sm_90,<sm_100", ["sm_90", "sm_90a"], ["sm_89", "sm_100"]),
        ("sm_90a", ["sm_90", "sm_90a"], ["sm_91", "sm_9"]),
        (["gfx942", "gfx950"], ["gfx942", "gfx950", "gfx942:sramecc+:xnack-"], ["gfx90a", "gfx9421a", "sm_94"]),
        ([">=sm_90,<sm_100", "sm_120"], ["sm_90", "sm_120"], ["sm_100", "sm_121"]),
        ("ascend910b", ["ascend910b", "Ascend910B3"], ["ascend910", "ascend910_9382", "ascend310p3"]),
        ("ascend910_93", ["ascend910_9382"], ["ascend910b3"]),
        ("<=sm_90", ["sm_90", "sm_70"], ["sm_100"]),
        (">sm_90", ["sm_100"], ["sm_90", "sm_90a"]),
    ],
)
def test_an_arch_spec_allows_these_chips_and_not_those(spec: object, allowed: list[str], refused: list[str]) -> None:
    parsed = ArchSpec.parse(spec)
    assert [arch for arch in allowed if not parsed.allows(arch)] == []
    assert [arch for arch in refused if parsed.allows(arch)] == []


def test_an_unknown_chip_is_allowed_only_where_every_chip_is() -> None:
    assert not ArchSpec.parse(">=sm_80").allows(None)
    assert ANY_ARCH.allows(None)


@pytest.mark.parametrize("spec", [[], "", "80", ">=gfx942", [">=sm_80", 90], 90, ">=sm_80,", ">>sm_80"])
def test_what_is_no_arch_spec_is_refused(spec: object) -> None:
    with pytest.raises(ValueError, match=r"architecture|order"):
        ArchSpec.parse(spec)


def test_two_open_bounds_in_a_list_would_allow_every_chip_and_are_refused() -> None:
    with pytest.raises(ValueError, match="'>=sm_80,<sm_100'"):
        ArchSpec.parse([">=sm_80", "<sm_100"])


@pytest.mark.parametrize(
    ("arch", "chip"), [("sm_90a", "sm_90"), ("SM_100f", "sm_100"), ("gfx90a", "gfx90a"), ("gfx942:x", "gfx942")]
)
def test_the_suffix_of_an_arch_is_the_compilers(arch: str, chip: str) -> None:
    assert normal_arch(arch) == chip


def exactly(n: int) -> Widths:
    return Widths(n, n)


def test_head_widths_are_pairs_ranges_or_anything() -> None:
    pairs = HeadDims(((exactly(128), exactly(128), False), (exactly(192), exactly(128), False)))
    assert pairs.allows(192, 128)
    assert not pairs.allows(128, 192)
    square = HeadDims(((Widths(32, 256, 8), Widths(32, 256, 8), True),))
    assert square.allows(72, 72)
    assert not square.allows(72, 64)
    assert not square.allows(70, 70)
    assert not square.allows(264, 264)
    assert HeadDims().allows(576, 512)


@pytest.mark.parametrize(
    ("dims", "expected"),
    [
        (HeadDims(), True),
        (HeadDims(((exactly(192), exactly(128), False),)), False),
        (HeadDims(((exactly(192), exactly(128), False), (exactly(64), exactly(64), False))), True),
        (HeadDims(((Widths(32, 256, 8), Widths(32, 256, 8), True),)), True),
        (HeadDims(((Widths(64, 128), Widths(256, 512), False),)), False),
    ],
)
def test_square_heads_are_those_with_keys_as_wide_as_values(dims: HeadDims, expected: bool) -> None:
    assert dims.any_square is expected


def rule(**bounds: int | bool) -> PageSet:
    return PageSet(((PageRule(**bounds),),))  # type: ignore[arg-type]


def test_page_sets_answer_without_listing() -> None:
    assert PageSet().allows(1)
    assert PageSet().allows(65536)
    assert not PageSet().allows(0)
    assert not PageSet().allows(65537)
    assert not NO_PAGES
    assert list(PageSet.of(16, 1)) == [1, 16]
    assert list(islice(rule(multiple_of=16, max=48), 9)) == [16, 32, 48]
    assert list(islice(rule(power_of_two=True, max=8), 9)) == [1, 2, 4, 8]


page_sets = st.lists(
    st.lists(
        st.one_of(
            st.integers(1, 64).map(lambda n: PageRule(n, n)),
            st.builds(PageRule, min=st.integers(1, 8), max=st.integers(8, 64), multiple_of=st.integers(1, 6)),
            st.builds(PageRule, max=st.integers(1, 64), power_of_two=st.just(True)),
        ),
        max_size=3,
    ).map(tuple),
    max_size=2,
).map(lambda groups: PageSet(tuple(groups)))


@settings(deadline=None)
@given(page_sets, page_sets, st.integers(1, 130))
def test_union_and_intersection_are_those_of_sets(a: PageSet, b: PageSet, n: int) -> None:
    assert (a & b).allows(n) == (a.allows(n) and b.allows(n))
    assert (a | b).allows(n) == (a.allows(n) or b.allows(n))


@settings(deadline=None)
@given(page_sets, st.integers(1, 128))
def test_the_largest_divisor_is_native_and_no_larger_one_is(pages: PageSet, n: int) -> None:
    divisors = [d for d in range(1, n + 1) if n % d == 0 and pages.allows(d)]
    assert pages.largest_divisor(n) == max(divisors, default=None)


@pytest.mark.parametrize(
    ("pages", "text"),
    [
        (PageSet(), "any"),
        (NO_PAGES, "none"),
        (PageSet.of(1, 16), "1, 16"),
        (rule(multiple_of=16), "multiples of 16"),
        (rule(multiple_of=16, max=256), "multiples of 16 up to 256"),
        (rule(power_of_two=True), "powers of two"),
        (rule(min=8, power_of_two=True), "powers of two from 8"),
        (PageSet.of(16, 32, 64) & rule(multiple_of=32), "32, 64"),
        (rule(multiple_of=16) & rule(power_of_two=True), "multiples of 16 and powers of two"),
    ],
)
def test_page_sets_print_themselves(pages: PageSet, text: str) -> None:
    assert str(pages) == text
