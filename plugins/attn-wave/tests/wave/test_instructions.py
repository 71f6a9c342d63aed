"""Each instruction that shipped code uses does what the manual of its architecture says.

Expected values are worked out by hand or in Python's own integers and floats, from "AMD Instinct MI300 Instruction Set
Architecture" (CDNA3), chapters 12 (instructions) and 13 (encodings: dpp and sdwa).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from attn_wave.emulator.code_object import action_of
from attn_wave.emulator.faults import EmulationError, MemoryFaultError
from attn_wave.emulator.instructions import parse
from attn_wave.emulator.wave import GARBAGE

from .artefacts import all_instructions
from .test_another_compiler import kernel
from .waves import LANE, LOW32, READ_ONLY, WRITABLE, check, f16, f32, held, lanes, run, wave_of

ALL = (1 << 64) - 1
ODD = 0xAAAAAAAAAAAAAAAA
NAN, INF = float("nan"), float("inf")
Case = tuple[str, Mapping[str, Any], Mapping[str, Any]]


def bytes_at(offset: int, count: int = 4) -> int:
    """What memory that counts its bytes up holds at ``offset``."""
    return int.from_bytes(bytes((offset + i) % 251 for i in range(count)), "little")


def each(step: int, offset: int = 0, count: int = 4) -> Any:
    """What each lane reads there, at ``step`` bytes from the lane before."""
    return lanes(lambda i: bytes_at(step * i + offset, count))


def pair(value: Any) -> dict[str, Any]:
    """v[2:3] with the low and high words of 64-bit values."""
    wide = np.broadcast_to(np.asarray(value, dtype=np.uint64), 64)
    return {"v2": wide & np.uint64(LOW32), "v3": wide >> np.uint64(32)}


SCALAR: list[Case] = [
    ("s_mov_b32 s0, s1", {"s1": 7}, {"s0": 7}),
    ("s_mov_b32 s0, -3", {}, {"s0": LOW32 - 2}),
    ("s_mov_b32 s0, 1.0", {}, {"s0": 0x3F800000}),
    ("s_movk_i32 s0, 0x8000", {}, {"s0": 0xFFFF8000}),
    ("s_movk_i32 s0, 0x318", {}, {"s0": 0x318}),
    ("s_add_u32 s0, s1, s2", {"s1": LOW32, "s2": 2}, {"s0": 1, "scc": 1}),
    ("s_add_u32 s0, s1, -1", {"s1": 0}, {"s0": LOW32, "scc": 0}),
    ("s_addc_u32 s0, s1, s2", {"s1": 5, "s2": 6, "scc": 1}, {"s0": 12, "scc": 0}),
    ("s_addc_u32 s0, s1, 0", {"s1": LOW32, "scc": 1}, {"s0": 0, "scc": 1}),
    ("s_sub_u32 s0, 0, s1", {"s1": 1}, {"s0": LOW32, "scc": 1}),
    ("s_subb_u32 s0, 0, s1", {"s1": 0, "scc": 1}, {"s0": LOW32, "scc": 1}),
    ("s_add_i32 s0, s1, -1", {"s1": 0x80000000}, {"s0": 0x7FFFFFFF, "scc": 1}),
    ("s_add_i32 s0, s1, -1", {"s1": 3}, {"s0": 2, "scc": 0}),
    ("s_mul_i32 s0, s1, 40", {"s1": 0x10000001}, {"s0": 0x10000001 * 40 & LOW32}),
    ("s_mul_hi_i32 s0, s1, 40", {"s1": LOW32}, {"s0": LOW32}),
    ("s_mul_hi_i32 s0, s1, 40", {"s1": 0x40000000}, {"s0": 10}),
    ("s_lshr_b32 s0, s1, 27", {"s1": 0xF8000000}, {"s0": 31, "scc": 1}),
    ("s_ashr_i32 s0, s1, 31", {"s1": 0x80000000}, {"s0": LOW32, "scc": 1}),
    ("s_lshl_b64 s[0:1], s[2:3], 2", {"s[2:3]": 3 << 62 | 1}, {"s[0:1]": 4, "scc": 1}),
    ("s_ashr_i64 s[0:1], s[2:3], 5", {"s[2:3]": 1 << 63}, {"s[0:1]": 0xFC << 56, "scc": 1}),
    ("s_mov_b64 s[0:1], -1", {}, {"s[0:1]": ALL}),
    ("s_addk_i32 s0, 0xfff0", {"s0": 5}, {"s0": LOW32 - 10, "scc": 0}),
    ("s_lshl_b32 s0, s1, 4", {"s1": 0xF0000001}, {"s0": 16, "scc": 1}),
    ("s_cmp_gt_i32 s0, s1", {"s0": 0, "s1": LOW32}, {"scc": 1}),
    ("s_abs_i32 s0, s1", {"s1": LOW32 - 4}, {"s0": 5, "scc": 1}),
    ("s_brev_b32 s0, -2", {}, {"s0": 0x7FFFFFFF}),
    ("s_and_b64 vcc, exec, s[2:3]", {"exec": ODD, "s[2:3]": 0xFF}, {"vcc": 0xAA, "scc": 1}),
    ("s_and_b64 vcc, exec, s[2:3]", {"exec": ODD, "s[2:3]": 0x55}, {"vcc": 0, "scc": 0}),
    ("s_andn2_b64 vcc, exec, s[2:3]", {"exec": ALL, "s[2:3]": ODD}, {"vcc": ALL - ODD}),
    ("s_or_b64 exec, exec, s[2:3]", {"exec": ODD, "s[2:3]": 1}, {"exec": ODD | 1}),
    ("s_xor_b64 s[0:1], exec, s[2:3]", {"exec": ODD, "s[2:3]": ALL}, {"s[0:1]": ALL - ODD}),
    ("s_and_saveexec_b64 s[0:1], s[2:3]", {"exec": ALL, "s[2:3]": ODD}, {"s[0:1]": ALL, "exec": ODD, "scc": 1}),
    ("s_and_saveexec_b64 s[0:1], vcc", {"exec": ODD, "vcc": ALL - ODD}, {"s[0:1]": ODD, "exec": 0, "scc": 0}),
    # the operand and not the mask, and the old mask goes where the operand was
    ("s_andn2_saveexec_b64 s[2:3], s[2:3]", {"exec": ODD, "s[2:3]": ALL}, {"s[2:3]": ODD, "exec": ALL - ODD}),
    ("s_cmp_ge_i32 s0, s1", {"s0": LOW32, "s1": 0}, {"scc": 0}),
    ("s_cmp_eq_u64 s[0:1], 0", {"s[0:1]": 1 << 40}, {"scc": 0}),
    ("s_cmp_eq_u64 s[0:1], s[2:3]", {"s[0:1]": 7 << 40, "s[2:3]": 7 << 40}, {"scc": 1}),
    ("s_cmp_lg_u64 s[0:1], 0", {"s[0:1]": 1 << 40}, {"scc": 1}),
    ("s_cmp_lg_u64 s[0:1], 0", {"s[0:1]": 0}, {"scc": 0}),
    ("s_cmp_ge_i32 s0, s1", {"s0": 2, "s1": 2}, {"scc": 1}),
    ("s_cmp_lt_i32 s0, 1", {"s0": LOW32}, {"scc": 1}),
    ("s_cmp_lg_u32 s0, 0", {"s0": 0}, {"scc": 0}),
    ("s_cselect_b32 s0, s1, s2", {"s1": 1, "s2": 2, "scc": 0}, {"s0": 2}),
    ("s_cselect_b64 s[0:1], -1, 0", {"scc": 1}, {"s[0:1]": ALL}),
    ("s_load_dword s0, s[8:9], 0x24", {"s[8:9]": READ_ONLY}, {"s0": bytes_at(0x24)}),
    ("s_load_dwordx2 s[2:3], s[8:9], 0x4", {"s[8:9]": READ_ONLY}, {"s[2:3]": bytes_at(4, 8)}),
    ("s_load_dwordx4 s[4:7], s[8:9], 0x8", {"s[8:9]": READ_ONLY},
     {"s[4:5]": bytes_at(8, 8), "s[6:7]": bytes_at(16, 8)}),
    ("s_load_dwordx8 s[0:7], s[8:9], 0x0", {"s[8:9]": READ_ONLY},
     {"s[0:1]": bytes_at(0, 8), "s[6:7]": bytes_at(24, 8)}),
]  # fmt: skip

INTEGER: list[Case] = [
    ("v_mov_b32_e32 v0, v1", {"v1": LANE}, {"v0": LANE}),
    ("v_mov_b32_e32 v0, s1", {"s1": 9}, {"v0": 9}),
    ("v_mov_b32_e32 v0, v1", {"v0": 5, "v1": LANE, "exec": ODD}, {"v0": lanes(lambda i: i if i % 2 else 5)}),
    ("v_accvgpr_write_b32 a7, v1", {"v1": LANE}, {"a7": LANE}),
    ("v_accvgpr_read_b32 v0, a7", {"a7": LANE}, {"v0": LANE}),
    ("v_accvgpr_mov_b32 a8, a7", {"a7": LANE}, {"a8": LANE}),
    ("v_add_u32_e32 v0, v1, v2", {"v1": LOW32, "v2": LANE}, {"v0": LANE - 1}),
    ("v_sub_u32_e32 v0, v1, v2", {"v1": LANE, "v2": 1}, {"v0": LANE - 1}),
    ("v_add3_u32 v0, v1, s33, -7", {"v1": LANE, "s33": 10}, {"v0": LANE + 3}),
    ("v_add_lshl_u32 v0, v1, v2, 1", {"v1": LANE, "v2": 1}, {"v0": 2 * (LANE + 1)}),
    ("v_lshl_add_u32 v0, v1, 1, v2", {"v1": LANE, "v2": 1}, {"v0": 2 * LANE + 1}),
    ("v_lshl_or_b32 v0, v1, 8, v2", {"v1": LANE, "v2": 0x1FF}, {"v0": lanes(lambda i: i << 8 | 0x1FF)}),
    ("v_lshlrev_b32_e32 v0, 2, v1", {"v1": LANE}, {"v0": 4 * LANE}),
    ("v_lshrrev_b32_e32 v0, 4, v1", {"v1": 0xF0000010}, {"v0": 0x0F000001}),
    ("v_ashrrev_i32_e32 v0, 31, v1", {"v1": LANE - 32}, {"v0": lanes(lambda i: -1 if i < 32 else 0)}),
    ("v_lshrrev_b16_e32 v0, 12, v1", {"v1": 0xFFFFABCD}, {"v0": 0xA}),
    ("v_lshlrev_b64 v[0:1], 9, v[2:3]", pair(0x0080000000400001), {"v0": 0x80000200, "v1": 0}),
    ("v_and_b32_e32 v0, 15, v1", {"v1": LANE}, {"v0": LANE % 16}),
    ("v_or_b32_e32 v0, 16, v1", {"v1": LANE}, {"v0": lanes(lambda i: i | 16)}),
    ("v_xor_b32_e32 v0, 0x80, v1", {"v1": 0xC0}, {"v0": 0x40}),
    ("v_not_b32_e32 v0, 63", {}, {"v0": LOW32 - 63}),
    ("v_bfe_u32 v0, v1, 16, 1", {"v1": LANE << 15}, {"v0": LANE >> 1 & 1}),
    ("v_bfi_b32 v0, s1, v2, v3", {"s1": 0x7FFFFFFF, "v2": f32(2.5), "v3": f32(-1.0)}, {"v0": f32(-2.5)}),
    ("v_alignbit_b32 v0, v1, v2, 16", {"v1": 0x1111ABCD, "v2": 0x4321FFFF}, {"v0": 0xABCD4321}),
    ("v_perm_b32 v0, v1, v2, s3", {"v1": 0x77665544, "v2": 0x33221100, "s3": 0x07060302}, {"v0": 0x77663322}),
    ("v_perm_b32 v0, v1, v2, s3", {"v1": 0x77665544, "v2": 0x33221100, "s3": 0x0C0D0004}, {"v0": 0x00FF0044}),
    ("v_perm_b32 v0, v1, v2, s3", {"v1": 0x80000000, "v2": 0x00008000, "s3": 0x0809_0A0B}, {"v0": 0xFF0000FF}),
    ("v_mul_lo_u32 v0, v1, s2", {"v1": 0x10001, "s2": 0x10001}, {"v0": 0x20001}),
    ("v_mul_hi_u32 v0, v1, s2", {"v1": 0x80000000, "s2": 6}, {"v0": 3}),
    ("v_mul_i32_i24_e32 v0, -16, v1", {"v1": 0xFF000003}, {"v0": -48}),
    ("v_mul_u32_u24_e32 v0, 0x84, v1", {"v1": 0xFF000003}, {"v0": 0x18C}),
    ("v_mad_i32_i24 v0, v1, -16, v2", {"v1": LANE, "v2": 5}, {"v0": 5 - 16 * LANE}),
    ("v_mad_u32_u24 v0, v1, s2, v3", {"v1": LANE, "s2": 100, "v3": 7}, {"v0": 100 * LANE + 7}),
    ("v_mad_u64_u32 v[0:1], s[2:3], v5, s8, v[2:3]", {"v5": LOW32, "s8": LOW32, **pair(ALL)},
     {"v0": 0, "v1": LOW32 - 1, "s[2:3]": ALL}),
    ("v_mad_u64_u32 v[0:1], s[2:3], v5, s8, v[2:3]", {"v5": LANE, "s8": 3, **pair(1 << 32)},
     {"v0": 3 * LANE, "v1": 1, "s[2:3]": 0}),
    ("v_lshl_add_u64 v[0:1], v[2:3], 2, s[4:5]", {"s[4:5]": 0x5_00000001, **pair(0x40000001)}, {"v0": 5, "v1": 6}),
    ("v_mad_i64_i32 v[0:1], s[2:3], v5, s8, v[2:3]", {"v5": LANE - 32, "s8": LOW32 - 2, **pair(1 << 40)},
     {"v0": 96 - 3 * LANE, "v1": lanes(lambda i: 256 if 96 - 3 * i >= 0 else 255)}),
    ("v_subrev_u32_e32 v0, 1, v1", {"v1": LANE}, {"v0": LANE - 1}),
    ("v_and_or_b32 v0, v1, 15, v2", {"v1": LANE, "v2": 0x100}, {"v0": LANE % 16 + 0x100}),
    ("v_or3_b32 v0, v1, v2, 64", {"v1": LANE, "v2": 0x100}, {"v0": LANE + 0x140}),
    ("v_xad_u32 v0, v1, v2, 7", {"v1": LANE, "v2": 63}, {"v0": 63 - LANE + 7}),
    ("v_bfe_i32 v0, v1, 4, 4", {"v1": LANE << 2}, {"v0": lanes(lambda i: (i // 4) - 16 * (i // 4 > 7))}),
    ("v_mul_hi_i32 v0, v1, s2", {"v1": LOW32, "s2": 6}, {"v0": LOW32}),
    ("v_max3_i32 v0, v1, v2, 0", {"v1": LANE - 32, "v2": -5}, {"v0": np.maximum(LANE - 32, 0)}),
    ("v_min3_i32 v0, v1, v2, v3", {"v1": LANE - 32, "v2": -5, "v3": 9}, {"v0": np.minimum(LANE - 32, -5)}),
    ("v_subbrev_co_u32_e64 v0, s[2:3], 0, v1, s[4:5]", {"v1": LANE, "s[4:5]": 3},
     {"v0": lanes(lambda i: i - 1 if i < 2 else i), "s[2:3]": 1}),
    ("v_addc_co_u32_e32 v0, vcc, v1, v2, vcc", {"v1": LOW32, "v2": 0, "vcc": ODD},
     {"v0": lanes(lambda i: i % 2 - 1), "vcc": ODD}),
    ("v_mul_lo_u16_e32 v0, 57, v1", {"v1": 0xF0002000}, {"v0": 57 * 0x2000 & 0xFFFF}),
    ("v_pk_mul_lo_u16 v0, v1, s2 op_sel_hi:[1,0]", {"v1": 0x00030002, "s2": 0x00090005}, {"v0": 0x000F000A}),
    ("v_pk_mul_lo_u16 v0, v1, s2", {"v1": 0x00030002, "s2": 0x00090005}, {"v0": 0x001B000A}),
    ("v_mbcnt_lo_u32_b32 v0, -1, 0", {}, {"v0": np.minimum(LANE, 32)}),
    ("v_mbcnt_hi_u32_b32 v0, -1, v1", {"v1": 100}, {"v0": 100 + np.maximum(LANE - 32, 0)}),
    # sdwa: a half of a register as the operand
    ("v_lshlrev_b32_sdwa v0, v1, sext(v2) dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:WORD_0",
     {"v1": 4, "v2": 0x7FFF0000 + (0xFFFF - LANE)}, {"v0": -(LANE + 1) << 4}),
    ("v_add_u32_sdwa v0, sext(v1), v2 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:BYTE_2 src1_sel:DWORD",
     {"v1": (0x80 + LANE) << 16 | 0x7F00007F, "v2": 1000}, {"v0": 1000 - 128 + LANE}),
    ("v_lshlrev_b32_sdwa v0, v1, v2 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:WORD_1",
     {"v1": 4, "v2": 0x00120034}, {"v0": 0x120}),
    ("v_mul_u32_u24_sdwa v0, v1, s2 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1 src1_sel:DWORD",
     {"v1": 0x00120034, "s2": 10}, {"v0": 180}),
    ("v_add_u32_sdwa v0, v1, v2 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:BYTE_0 src1_sel:BYTE_3",
     {"v0": 0xAAAABBBB, "v1": 0x01020304, "v2": 0x10203040}, {"v0": 0x0014BBBB}),
]  # fmt: skip

COMPARE: list[Case] = [
    ("v_cmp_eq_u32_e32 vcc, 1, v1", {"v1": LANE % 2}, {"vcc": ODD}),
    ("v_cmp_eq_u32_e64 s[2:3], 1, v1", {"v1": 1, "exec": ODD}, {"s[2:3]": ODD}),
    ("v_cmp_lt_u32_e32 vcc, 7, v1", {"v1": LANE}, {"vcc": ALL - 0xFF}),
    ("v_cmp_gt_i32_e32 vcc, s1, v1", {"s1": 0, "v1": LANE - 4}, {"vcc": 0xF}),
    ("v_cmp_lt_i32_e32 vcc, s1, v1", {"s1": LOW32, "v1": LANE - 4}, {"vcc": ALL - 0xF}),
    ("v_cmp_le_i32_e64 s[2:3], v1, -1", {"v1": LANE - 4}, {"s[2:3]": 0xF}),
    ("v_cmp_ge_i64_e32 vcc, v[0:1], v[2:3]", {"v0": 0, "v1": 0, **pair(1 << 63)}, {"vcc": ALL}),
    ("v_cmp_gt_i64_e32 vcc, s[0:1], v[2:3]", {"s[0:1]": 4, **pair(LANE)}, {"vcc": 0xF}),
    ("v_cmp_lt_i64_e64 s[2:3], s[0:1], 1", {"s[0:1]": ALL}, {"s[2:3]": ALL}),
    ("v_cmp_gt_f32_e32 vcc, s1, v1", {"s1": f32(1.0), "v1": f32(*[0.5, 1.0, 2.0, NAN] * 16)},
     {"vcc": 0x1111111111111111}),
    ("v_cmp_ngt_f32_e32 vcc, s1, v1", {"s1": f32(1.0), "v1": f32(*[0.5, 1.0, 2.0, NAN] * 16)},
     {"vcc": 0xEEEEEEEEEEEEEEEE}),
    ("v_cmp_lt_f32_e32 vcc, s1, v1", {"s1": f32(1.0), "v1": f32(*[0.5, 1.0, 2.0, NAN] * 16)},
     {"vcc": 0x4444444444444444}),
    ("v_cmp_nlt_f32_e64 s[2:3], |v1|, s1", {"s1": f32(1.0), "v1": f32(*[-0.5, -1.0, -2.0, NAN] * 16)},
     {"s[2:3]": 0xEEEEEEEEEEEEEEEE}),
    ("v_cmp_o_f32_e32 vcc, v1, v1", {"v1": f32(*[0.0, INF, NAN, -1.0] * 16)}, {"vcc": 0xBBBBBBBBBBBBBBBB}),
    ("v_cndmask_b32_e32 v0, 0, v1, vcc", {"v1": LANE, "vcc": ODD}, {"v0": lanes(lambda i: i if i % 2 else 0)}),
    ("v_cndmask_b32_e64 v0, v1, 0, s[2:3]", {"v1": LANE, "s[2:3]": ODD}, {"v0": lanes(lambda i: 0 if i % 2 else i)}),
]  # fmt: skip

FLOAT: list[Case] = [
    ("v_add_f32_e32 v0, 1.0, v1", {"v1": f32(2.5)}, {"v0": f32(3.5)}),
    ("v_add_f32_e64 v0, |v1|, |v1|", {"v1": f32(-2.5)}, {"v0": f32(5.0)}),
    ("v_sub_f32_e32 v0, v1, v2", {"v1": f32(1.0), "v2": f32(2.5)}, {"v0": f32(-1.5)}),
    ("v_mul_f32_e32 v0, 0x3fb8aa3b, v1", {"v1": f32(1.0)}, {"v0": 0x3FB8AA3B}),
    ("v_mul_f32_e64 v0, -v1, v2", {"v1": f32(3.0), "v2": f32(0.5)}, {"v0": f32(-1.5)}),
    ("v_max_f32_e32 v0, v1, v2", {"v1": f32(*[1.0, NAN] * 32), "v2": f32(-3.0)}, {"v0": f32(*[1.0, -3.0] * 32)}),
    ("v_max3_f32 v0, v1, v2, v3", {"v1": f32(1.0), "v2": f32(4.0), "v3": f32(-9.0)}, {"v0": f32(4.0)}),
    # one rounding: the product of 1 + 2^-23 with itself has a bit that two roundings would lose
    ("v_fma_f32 v0, v1, v1, v2", {"v1": f32(1 + 2**-23), "v2": f32(-1 - 2**-22)}, {"v0": f32(2**-46)}),
    ("v_fma_f32 v0, -v1, v2, 1.0", {"v1": f32(3.0), "v2": f32(2.0)}, {"v0": f32(-5.0)}),
    ("v_fma_f32 v0, v1, -2.0, |v2|", {"v1": f32(3.0), "v2": f32(-2.0)}, {"v0": f32(-4.0)}),
    ("v_fmac_f32_e32 v0, v1, v2", {"v0": f32(1.0), "v1": f32(3.0), "v2": f32(2.0)}, {"v0": f32(7.0)}),
    ("v_fmaak_f32 v0, v1, v2, 0x40400000", {"v1": f32(5.0), "v2": f32(2.0)}, {"v0": f32(13.0)}),
    ("v_fmamk_f32 v0, v1, 0x40400000, v2", {"v1": f32(5.0), "v2": f32(2.0)}, {"v0": f32(17.0)}),
    ("v_exp_f32_e32 v0, v1", {"v1": f32(*[-1.0, 0.0, 3.0, -INF] * 16)}, {"v0": f32(*[0.5, 1.0, 8.0, 0.0] * 16)}),
    ("v_log_f32_e32 v0, v1", {"v1": f32(*[0.5, 1.0, 8.0, 0.0] * 16)}, {"v0": f32(*[-1.0, 0.0, 3.0, -INF] * 16)}),
    ("v_rcp_f32_e32 v0, v1", {"v1": f32(*[4.0, 0.0] * 32)}, {"v0": f32(*[0.25, INF] * 32)}),
    ("v_rcp_iflag_f32_e32 v0, v1", {"v1": f32(4.0)}, {"v0": f32(0.25)}),
    ("v_fma_mixlo_f16 v0, s1, v2, 0", {"v0": 0xABCD1234, "s1": f32(1.5), "v2": f32(2.0)},
     {"v0": 0xABCD0000 | f16(3.0)}),
    ("v_fma_mixhi_f16 v0, v1, v2, v3 op_sel:[0,1,0] op_sel_hi:[1,1,0]",
     {"v0": 0xABCD1234, "v1": f16(2.0), "v2": f16(5.0) << 16, "v3": f32(-4.0)}, {"v0": f16(6.0) << 16 | 0x1234}),
    ("v_rndne_f32_e32 v0, v1", {"v1": f32(*[0.5, 1.5, -2.5, 2.6] * 16)}, {"v0": f32(*[0.0, 2.0, -2.0, 3.0] * 16)}),
    ("v_ldexp_f32 v0, v1, v2", {"v1": f32(1.5), "v2": LANE - 32},
     {"v0": f32(*[1.5 * 2.0 ** (i - 32) for i in range(64)])}),
    ("v_cvt_i32_f32_e32 v0, v1", {"v1": f32(*[-1.9, 1.9, 1e20, NAN] * 16)},
     {"v0": lanes(lambda i: [-1, 1, 2**31 - 1, 0][i % 4])}),
    ("v_cvt_f16_f32_e32 v0, v1", {"v1": f32(*[1.0, -2.0, 1e6, 2**-25 * 1.5] * 16)},
     {"v0": lanes(lambda i: [f16(1.0), f16(-2.0), 0x7C00, 1][i % 4])}),
    ("v_pack_b32_f16 v0, v1, v2", {"v1": 0xFFFF0000 | f16(1.0), "v2": 0xFFFF0000 | f16(-2.0)},
     {"v0": f16(-2.0) << 16 | f16(1.0)}),
    ("v_pk_add_f32 v[0:1], v[2:3], v[4:5]", {"v2": f32(1.0), "v3": f32(2.0), "v4": f32(10.0), "v5": f32(20.0)},
     {"v0": f32(11.0), "v1": f32(22.0)}),
    ("v_pk_mul_f32 v[0:1], v[2:3], v[4:5] op_sel_hi:[1,0]",
     {"v2": f32(1.0), "v3": f32(2.0), "v4": f32(10.0), "v5": f32(20.0)},
     {"v0": f32(10.0), "v1": f32(20.0)}),
    ("v_pk_mul_f32 v[0:1], s[2:3], v[4:5]", {"s2": f32(1.0), "s3": f32(2.0), "v4": f32(10.0), "v5": f32(20.0)},
     {"v0": f32(10.0), "v1": f32(40.0)}),
    ("v_pk_fma_f32 v[0:1], v[2:3], s[4:5], v[6:7] op_sel_hi:[1,0,1]",
     {"v2": f32(1.0), "v3": f32(2.0), "s4": f32(3.0), "s5": f32(99.0), "v6": f32(10.0), "v7": f32(20.0)},
     {"v0": f32(13.0), "v1": f32(26.0)}),
]  # fmt: skip

LANES: list[Case] = [
    ("ds_swizzle_b32 v0, v1 offset:swizzle(SWAP,16)", {"v1": LANE}, {"v0": LANE ^ 16}),
    ("ds_bpermute_b32 v0, v1, v2", {"v1": 4 * (63 - LANE), "v2": 10 * LANE}, {"v0": 10 * (63 - LANE)}),
    ("ds_bpermute_b32 v0, v1, v2", {"v1": 4 * (LANE ^ 1), "v2": LANE, "v0": 5, "exec": ODD},
     {"v0": lanes(lambda i: 0 if i % 2 else 5)}),
]  # fmt: skip

ADDRESS = {"v2": 4 * LANE, "v3": READ_ONLY >> 32}
LOADS: list[Case] = [
    ("global_load_dword v0, v[2:3], off offset:32", ADDRESS, {"v0": each(4, 32)}),
    ("global_load_dword a0, v[2:3], off", ADDRESS, {"a0": each(4)}),
    ("global_load_dword v0, v[2:3], off offset:-4", {**ADDRESS, "v2": 4 * LANE + 4}, {"v0": each(4)}),
    ("global_load_dword v0, v2, s[4:5]", {"v2": 4 * LANE, "s[4:5]": READ_ONLY}, {"v0": each(4)}),
    ("global_load_dwordx2 v[0:1], v[2:3], off", ADDRESS, {"v1": each(4, 4)}),
    ("global_load_dwordx4 v[4:7], v[2:3], off", ADDRESS, {"v4": each(4), "v7": each(4, 12)}),
    ("global_load_ubyte v0, v[2:3], off offset:3", ADDRESS, {"v0": each(4, 3, 1)}),
    ("global_load_ushort v0, v[2:3], off", ADDRESS, {"v0": each(4, 0, 2)}),
    # what an inactive lane would read is not touched, wherever it points
    ("global_load_dword v0, v[2:3], off",
     {"v2": np.where(LANE % 2, 4 * LANE, 1 << 30), "v3": READ_ONLY >> 32, "v0": 5, "exec": ODD},
     {"v0": lanes(lambda i: bytes_at(4 * i) if i % 2 else 5)}),
    ("ds_read_b64 v[0:1], v2", {"v2": 8 * LANE}, {"v0": each(8), "v1": each(8, 4)}),
    ("ds_read_b32 v0, v2 offset:4", {"v2": 4 * LANE}, {"v0": each(4, 4)}),
    ("ds_read_u16 v0, v2 offset:32", {"v2": 2 * LANE}, {"v0": each(2, 32, 2)}),
    ("ds_read2_b64 v[4:7], v2 offset0:1 offset1:4", {"v2": 8 * LANE},
     {"v4": each(8, 8), "v6": each(8, 32), "v7": each(8, 36)}),
]  # fmt: skip

ARITHMETIC = [*SCALAR, *INTEGER, *COMPARE, *FLOAT, *LANES, *LOADS]


@pytest.mark.parametrize(
    ("text", "given", "expected"), ARITHMETIC, ids=[f"{i}-{c[0]}" for i, c in enumerate(ARITHMETIC)]
)
def test_it_computes_what_the_manual_says(text: str, given: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    check(text, given, expected)


# -- stores


def stored(text: str, registers: Mapping[str, Any], count: int) -> bytes:
    wave = run(text, {"v0": 16 * LANE, "v1": WRITABLE >> 32, "s[4:5]": WRITABLE, **registers})
    return wave.memory.find(WRITABLE, 1, "a test").data[:count].tobytes()


STORES = {
    "global_store_dword v[0:1], v2, off": 4,
    "global_store_dwordx2 v0, v[2:3], s[4:5]": 8,
    "global_store_dwordx4 v[0:1], v[2:5], off": 16,
}


@pytest.mark.parametrize("text", STORES)
def test_a_store_writes_the_active_lanes_alone(text: str) -> None:
    registers = {f"v{2 + i}": 1000 * i + LANE for i in range(4)}
    got = np.frombuffer(stored(text, {**registers, "exec": ODD}, 1024), np.uint32).reshape(64, 4)
    words = STORES[text] // 4
    np.testing.assert_array_equal(got[1::2, :words], (LANE[1::2, None] + 1000 * np.arange(words)))
    assert not got[::2].any()
    assert not got[:, words:].any()


def test_a_short_store_leaves_its_neighbour() -> None:
    got = np.frombuffer(
        stored("global_store_short v0, v2, s[4:5] offset:2", {"v2": 0x77770000 + LANE}, 1024), np.uint16
    )
    np.testing.assert_array_equal(got[1::8], LANE)
    assert not np.delete(got.reshape(64, 8), 1, axis=1).any()


LDS_STORES: dict[str, list[int]] = {
    "ds_write_b32 v0, v2 offset:4": [4],
    "ds_write_b64 v0, v[2:3] offset:8": [8, 12],
    "ds_write_b128 v0, v[2:5]": [0, 4, 8, 12],
    "ds_write2_b64 v0, v[2:3], v[4:5] offset1:1": [0, 4, 8, 12],
    "ds_write2_b64 v0, v[2:3], v[4:5] offset0:1 offset1:0": [8, 12, 0, 4],
}


@pytest.mark.parametrize("text", LDS_STORES)
def test_a_store_to_lds_puts_each_word_in_its_place(text: str) -> None:
    registers = {f"v{2 + i}": 1000 * i + LANE for i in range(4)}
    wave = run(text, {"v0": 16 * (LANE % 32), **registers, "exec": 0xFFFFFFFF})
    words = wave.lds.view(np.uint32)
    for i, place in enumerate(LDS_STORES[text]):
        np.testing.assert_array_equal(words[place // 4 : place // 4 + 4 * 32 : 4], 1000 * i + LANE[:32])


def test_a_short_store_to_lds_leaves_its_neighbour() -> None:
    wave = run("ds_write_b16 v0, v2 offset:2", {"v0": 4 * LANE, "v2": 0x77770000 + LANE})
    halves = wave.lds.view(np.uint16)
    np.testing.assert_array_equal(halves[1:128:2], LANE)
    np.testing.assert_array_equal(halves[:128:2], lanes(lambda i: bytes_at(4 * i, 2)))


# -- scratch

SPILLS = {"": 1, "x2": 2, "x3": 3, "x4": 4}


@pytest.mark.parametrize("wide", SPILLS)
def test_scratch_keeps_what_each_active_lane_put_there(wide: str) -> None:
    words = SPILLS[wide]
    data = f"v[2:{1 + words}]" if words > 1 else "v2"
    wave = wave_of({f"v{2 + i}": 1000 * i + LANE for i in range(4)} | {"exec": ODD})
    action_of(parse(f"scratch_store_dword{wide} off, {data}, off offset:8"))(wave)
    wave.vector[2:6] = 0
    wave.set_exec(LOW32 << 32 | LOW32)
    action_of(parse(f"scratch_load_dword{wide} {data}, off, off offset:8"))(wave)
    for i in range(4):
        found = wave.vector[2 + i]
        np.testing.assert_array_equal(found[1::2], 1000 * i + LANE[1::2] if i < words else 0)
        np.testing.assert_array_equal(found[::2], GARBAGE if i < words else 0)
    others = np.delete(wave.scratch, range(2, 2 + words), axis=0)
    np.testing.assert_array_equal(others, GARBAGE)


@pytest.mark.parametrize(
    "text", ["scratch_store_dword off, v2, off offset:32", "scratch_load_dwordx2 v[2:3], off, off offset:28"]
)
def test_scratch_that_the_code_did_not_ask_for(text: str) -> None:
    with pytest.raises(MemoryFaultError, match="scratch bytes"):
        run(text, {})


@pytest.mark.parametrize("text", ["scratch_store_dword v1, v2, off", "scratch_load_dword v2, off, s3"])
def test_scratch_by_an_address_in_registers_is_not_modelled(text: str) -> None:
    with pytest.raises(EmulationError, match="not modelled"):
        action_of(parse(text))


# -- divisions, as compilers spell them

DIVISION = """
v_div_scale_f32 v3, s[2:3], v2, v2, v1
v_div_scale_f32 v4, vcc, v1, v2, v1
v_rcp_f32_e32 v5, v3
v_fma_f32 v6, -v3, v5, 1.0
v_fmac_f32_e32 v5, v6, v5
v_mul_f32_e32 v6, v4, v5
v_fma_f32 v7, -v3, v6, v4
v_fmac_f32_e32 v6, v7, v5
v_fma_f32 v3, -v3, v6, v4
v_div_fmas_f32 v3, v3, v5, v6
v_div_fixup_f32 v0, v3, v2, v1
"""


def divided(over: float, under: float, spelled: str = DIVISION) -> np.float32:
    wave = wave_of({"v1": f32(over), "v2": f32(under)})
    with np.errstate(all="ignore"):
        for line in spelled.strip().splitlines():
            action_of(parse(line))(wave)
    return np.float32(held(wave, "v0").view(np.float32)[0])


@pytest.mark.parametrize(
    ("over", "under"),
    [
        (1.0, 3.0), (-2.0, 7.0), (1.5e-20, 3e7), (-7.5, 1e-35), (1e30, 1e-30), (1e-30, 1e30), (5.0, 0.0), (-5.0, INF),
        (0.0, 0.0),
    ],
)  # fmt: skip
def test_a_division_gives_the_rounded_quotient(over: float, under: float) -> None:
    with np.errstate(all="ignore"):
        quotient = np.float32(over) / np.float32(under)
    np.testing.assert_equal(divided(over, under), quotient)


@pytest.mark.parametrize("step", ["v_rcp_f32_e32", "v_div_fmas_f32"])
def test_a_division_without_its_estimate_or_its_last_sum_is_wrong(step: str) -> None:
    without = "\n".join(line for line in DIVISION.strip().splitlines() if not line.startswith(step))
    assert divided(1.0, 3.0, without) != divided(1.0, 3.0)


# -- steering


@pytest.mark.parametrize(
    ("text", "registers", "taken"),
    [
        ("s_branch 2", {}, True),
        ("s_cbranch_scc0 2", {"scc": 0}, True), ("s_cbranch_scc0 2", {"scc": 1}, False),
        ("s_cbranch_scc1 2", {"scc": 1}, True), ("s_cbranch_scc1 2", {"scc": 0}, False),
        ("s_cbranch_execz 2", {"exec": 0}, True), ("s_cbranch_execz 2", {"exec": 1 << 63}, False),
        ("s_cbranch_execnz 2", {"exec": 1 << 63}, True), ("s_cbranch_execnz 2", {"exec": 0}, False),
        ("s_cbranch_vccnz 2", {"vcc": 1 << 63}, True), ("s_cbranch_vccnz 2", {"vcc": 0}, False),
    ],
)  # fmt: skip
def test_a_branch_is_taken_on_its_condition(text: str, registers: Mapping[str, Any], taken: bool) -> None:
    places = {0: 0, 4: 1, 8: 2, 12: 3}
    assert action_of(parse(text), places)(wave_of(registers)) == (3 if taken else None)


@pytest.mark.parametrize("text", ["s_nop 0", "s_waitcnt vmcnt(0) lgkmcnt(0)"])
def test_waiting_changes_nothing(text: str) -> None:
    before, after = run("s_nop 7", {"v0": LANE, "s0": 1}), run(text, {"v0": LANE, "s0": 1})
    np.testing.assert_array_equal(before.vector, after.vector)
    assert before.scalar == after.scalar


# -- completeness


def names_with_a_test() -> set[str]:
    elsewhere = {
        "s_branch", "s_cbranch_scc0", "s_cbranch_scc1", "s_cbranch_execz", "s_cbranch_execnz", "s_cbranch_vccnz",
        "s_nop", "s_waitcnt", "v_div_scale_f32", "v_div_fmas_f32", "v_div_fixup_f32",
        # test_matrix.py, test_launch.py
        "v_mfma_f32_16x16x16_f16", "v_mfma_f32_16x16x16_bf16", "v_mfma_f32_32x32x8_f16", "s_barrier", "s_endpgm",
        "ds_write_b16", "global_store_short",
        *(f"scratch_{what}_dword{wide}" for what in ("load", "store") for wide in SPILLS),
    }  # fmt: skip
    return elsewhere | {parse(text).base for text in [*(c[0] for c in ARITHMETIC), *STORES, *LDS_STORES]}


def test_every_instruction_of_code_that_runs_here_is_tested() -> None:
    """Of what is shipped, and of Triton's kernel."""
    used = {instruction.base for instruction in (*all_instructions(), *kernel().instructions)}
    assert sorted(used - names_with_a_test()) == []
