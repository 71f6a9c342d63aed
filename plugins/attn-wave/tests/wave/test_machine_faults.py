"""A fault in the machine code itself, of which the sources know nothing, is noticed: by the result or as a fault."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from attn_wave.emulator import device
from attn_wave.emulator.code_object import CodeObject

from .kit import failures
from .programs import changed, dropped
from .small import differences

Change = Callable[[str], str | None]
Patch = pytest.MonkeyPatch


def substitution(pattern: str, replacement: str) -> Change:
    """The text with ``pattern`` replaced, None where it is not."""
    return lambda text: re.sub(pattern, replacement, text) if re.match(pattern, text) else None


#: of the first phase: what is changed in the first instruction that it can be changed in (or the one of that number)
FAULTS: dict[str, tuple[Change, int]] = {
    "a product that begins at one": (substitution(r"(v_mfma.*), 0$", r"\1, 1.0"), 0),
    "a product that forgets the sum before it": (substitution(r"(v_mfma\S+ (v\[\d+:\d+\]), .*), \2$", r"\1, 0"), 0),
    "operands of a product exchanged": (substitution(r"(v_mfma\S+ \S+) (\S+), (\S+), (.*)", r"\1 \3, \2, \4"), 0),
    "powers of another base": (substitution(r"v_exp_f32_e32 (.*)", r"v_log_f32_e32 \1"), 0),
    "a quotient without its divisor": (substitution(r"v_rcp_f32_e32 (.*)", r"v_mov_b32_e32 \1"), 0),
    "lanes exchanged at another distance": (substitution(r"(ds_swizzle.*)16\)", r"\g<1>8)"), 0),
    "a comparison the other way round": (substitution(r"v_cmp_gt_i32(.*)", r"v_cmp_lt_i32\1"), 0),
    "a mask that is not taken": (substitution(r"s_and_saveexec_b64 (\S+), .*", r"s_and_saveexec_b64 \1, exec"), 0),
    "another argument": (substitution(r"(s_load_dwordx2.*) 0x0$", r"\1 0x8"), 0),
    "a store 16 bytes on": (substitution(r"(global_store_dwordx4 \S+ \S+ off)$", r"\1 offset:16"), 0),
    "a gather from the next address": (substitution(r"(global_load_dwordx4 \S+ \S+ off)$", r"\1 offset:16"), 0),
    "LDS written elsewhere": (substitution(r"(ds_write2_b64 .*) offset1:1$", r"\1 offset1:2"), 0),
    "halves exchanged": (substitution(r"(v_pack_b32_f16 v\d+), (v\d+), (v\d+)", r"\1, \3, \2"), 0),
    "a loop of one turn": (substitution(r"(s_cbranch_scc|s_branch).* 6\d{4}$", "s_nop 0"), 0),
}  # fmt: skip
#: of the second
JOIN_FAULTS: dict[str, tuple[Change, int]] = {
    "powers of another base": (substitution(r"v_exp_f32_e32 (.*)", r"v_mov_b32_e32 \1"), 1),
    "a logarithm left out": (substitution(r"v_log_f32_e32 (.*)", r"v_mov_b32_e32 \1"), 0),
    "the smaller in place of the larger": (substitution(r"v_max_f32_e32 (v\d+, v\d+, v\d+)$", r"v_min_f32_e32 \1"), 2),
    "a sum that forgets what was": (substitution(r"v_fmac_f32_e32 (.*)", r"v_mul_f32_e32 \1"), 0),
    "a run of one turn": (substitution(r"s_cbranch_scc1 6\d{4}$", "s_nop 0"), 0),
    "results of another row": (substitution(r"s_lshl_b64 (\S+ \S+) 8$", r"s_lshl_b64 \1 9"), 0),
    "another argument": (substitution(r"(s_load_dwordx2.*) 0x0$", r"\1 0x8"), 0),
    "a store elsewhere": (substitution(r"(global_store_short .*)$", r"\1 offset:2"), 0),
}  # fmt: skip
Tamper = Callable[..., None]


@pytest.fixture
def tampered(monkeypatch: Patch) -> Iterator[Tamper]:
    """Makes the emulator load a changed code object in place of each of one kernel."""
    parse = CodeObject.parse

    def tamper(how: Callable[[CodeObject], CodeObject], kernel: str = "attend") -> None:
        def changed_if_it_is_that(blob: bytes) -> CodeObject:
            code = parse(blob)
            return how(code) if code.name.startswith(kernel) else code

        class Tampered:
            parse = staticmethod(changed_if_it_is_that)

        monkeypatch.setattr(device, "CodeObject", Tampered)

    return tamper


def test_the_small_forwards_are_right() -> None:
    assert differences() == []


@pytest.mark.parametrize("name", FAULTS)
def test_it_is_noticed(name: str, tampered: Tamper) -> None:
    change, which = FAULTS[name]
    tampered(lambda code: changed(code, change, which=which))
    assert differences() != []


@pytest.mark.parametrize("name", JOIN_FAULTS)
def test_one_in_the_second_phase_is_noticed(name: str, tampered: Tamper) -> None:
    change, which = JOIN_FAULTS[name]
    tampered(lambda code: changed(code, change, which=which), "join")
    assert differences() != []


def test_a_barrier_left_out_is_noticed(tampered: Tamper) -> None:
    def without(code: CodeObject) -> CodeObject:
        places = [i for i, instruction in enumerate(code.instructions) if instruction.name == "s_barrier"]
        return dropped(code, places[0]) if places else code

    tampered(without)
    assert differences(steps=("extend",)) != []


def test_the_kit_notices_it_too(tampered: Tamper) -> None:
    tampered(lambda code: changed(code, FAULTS["powers of another base"][0]))
    assert len(failures("decode/8x2x64/", 3)) == 3
