"""What ships is what the sources say: every variant is there, within the chip's limits, with its disassembly."""

from __future__ import annotations

import lzma
import runpy
import tomllib
from hashlib import sha256
from pathlib import Path

import pytest
from attn_wave import shipped
from attn_wave.compiler import WAVE_VERSION, sources
from attn_wave.emulator import code_object
from attn_wave.emulator.code_object import CodeObject, disassemble, disassembler, registers
from attn_wave.emulator.listing import listed
from attn_wave.join_variant import AnyVariant, all_kernels
from attn_wave.variant import WIDTHS, Variant, all_variants

from .artefacts import ARCH, SHIPPED, code_objects

#: Of a compute unit of CDNA3: registers of one lane of a wave, and bytes of LDS.
VECTOR_REGISTERS, SCALAR_REGISTERS, LDS = 512, 106, 64 << 10
KERNELS, ATTEND = list(all_kernels()), list(all_variants())
each_kernel = pytest.mark.parametrize("variant", KERNELS, ids=[variant.key for variant in KERNELS])
each_of_attend = pytest.mark.parametrize("variant", ATTEND, ids=[variant.key for variant in ATTEND])


def test_they_are_of_these_sources_and_this_compiler() -> None:
    """After a change of a kernel: make wave-compile."""
    assert shipped.index(ARCH)["versions"] == {"sources": sources(), "wave-lang": WAVE_VERSION}


def test_there_is_one_for_every_variant_and_no_other() -> None:
    keys = {variant.key for variant in KERNELS}
    assert set(shipped.index(ARCH)["kernels"]) == keys
    assert set(code_objects()) == keys


def test_every_claimed_width_has_variants_and_every_variant_is_claimed() -> None:
    manifest = tomllib.loads((SHIPPED.parent.parent / "wave.toml").read_text(encoding="utf-8"))
    assert {tuple(widths) for clause in manifest["supports"] for widths in clause["head_dims"]} == set(WIDTHS)
    assert all(clause["arch"] == [ARCH] for clause in manifest["supports"])


@each_kernel
def test_it_is_the_one_that_was_compiled(variant: AnyVariant) -> None:
    record = shipped.index(ARCH)["kernels"][variant.key]
    blob = lzma.decompress((SHIPPED / f"{variant.key}.hsaco.xz").read_bytes())
    assert record["sha256"] == sha256(blob).hexdigest()
    code = CodeObject.parse(blob)
    assert (code.arch, code.name) == (ARCH, record["name"])
    assert tuple(record["block"]) == (64, variant.waves, 1)


@each_kernel
def test_it_keeps_within_the_chip(variant: AnyVariant) -> None:
    """Registers and LDS as the code object's own metadata states them, and without spilling any."""
    code, record = code_objects()[variant.key], shipped.index(ARCH)["kernels"][variant.key]
    stated = registers(code.blob)
    assert stated["vgpr_count"] == record["vgprs"] <= VECTOR_REGISTERS // max(1, variant.waves // 4)
    assert stated["agpr_count"] == record["agprs"]
    assert stated["sgpr_count"] == record["sgprs"] <= SCALAR_REGISTERS
    assert stated["group_segment_fixed_size"] == record["lds"] == code.lds_size <= LDS
    assert stated["vgpr_spill_count"] == record["spilled_vgprs"] == 0


@each_kernel
def test_it_asks_for_the_arithmetic_that_the_emulator_has(variant: AnyVariant) -> None:
    """Rounding to nearest and denormals kept, from the first instruction to the last."""
    code = code_objects()[variant.key]
    assert code.float_mode == 0b11110000
    assert not any(instruction.name.startswith("s_setreg") for instruction in code.instructions)


@each_kernel
def test_it_compiles_for_gfx950_too(variant: AnyVariant) -> None:
    """Which is not claimed, and not shipped: there is nothing that could run it."""
    index = shipped.index("gfx950")
    assert index["versions"] == shipped.index(ARCH)["versions"]
    record = index["kernels"][variant.key]
    if isinstance(variant, Variant):
        assert record["matrix_instructions"] >= variant.keys // 32 * (variant.qk_width + variant.v_width) // 32
    assert record["vgprs"] <= VECTOR_REGISTERS // max(1, variant.waves // 4)
    assert (record["sgprs"] <= SCALAR_REGISTERS, record["lds"] <= 160 << 10, record["spilled_vgprs"]) == (True, True, 0)
    assert shipped.shipped(variant, "gfx950") is None


@each_kernel
def test_how_long_it_took_to_compile_is_said(variant: AnyVariant) -> None:
    for arch in shipped.ARCHITECTURES:
        assert 0 < shipped.index(arch)["kernels"][variant.key]["compile_seconds"] < 120


@each_of_attend
def test_products_are_matrix_instructions(variant: Variant) -> None:
    """As many as one step of the loop needs: 16 keys and 16 of the width at a time, for scores and for values."""
    code = code_objects()[variant.key]
    kind = {"float16": "v_mfma_f32_16x16x16_f16", "bfloat16": "v_mfma_f32_16x16x16_bf16"}[variant.dtype]
    found = [i.base for i in code.instructions if i.base.startswith("v_mfma")]
    assert set(found) == {kind}
    wanted = variant.keys // 16 * (variant.qk_width + variant.v_width) // 16
    assert len(found) == wanted == shipped.index(ARCH)["kernels"][variant.key]["matrix_instructions"]


@each_kernel
def test_its_listing_covers_its_code(variant: AnyVariant) -> None:
    code = code_objects()[variant.key]
    instructions = listed(code.blob, ARCH)
    assert instructions is not None
    assert instructions[0].address == code.entry
    assert any(instruction.name == "s_endpgm" for instruction in instructions)
    ends = [i.address + i.size for i in instructions]
    assert [i.address for i in instructions[1:]] == ends[:-1]
    assert ends[-1] <= code.image.size


def test_the_listings_are_what_a_disassembler_says() -> None:
    try:
        program = disassembler(ARCH)
    except Exception as error:
        pytest.skip(f"nothing to compare with: {error}")
    assert program
    for key, code in code_objects().items():
        assert listed(code.blob, ARCH) == tuple(disassemble(code.blob, ARCH)), key


def test_without_a_disassembler_shipped_code_runs_and_other_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_object.shutil, "which", lambda name: None)
    blob = next(iter(code_objects().values())).blob
    assert CodeObject.parse(blob).instructions
    with pytest.raises(code_object.PluginLoadError, match="no disassembler for gfx942"):
        tuple(CodeObject.parse(blob + b"\0").instructions)


def test_the_published_table_is_of_these_facts() -> None:
    """After a change of a kernel: plugins/attn-wave/tools/report_kernels.py."""
    made = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "report_kernels.py"))
    if not made["DOCUMENT"].parent.is_dir():
        pytest.skip("the documentation is not beside this distribution")
    assert made["DOCUMENT"].read_text(encoding="utf-8") == made["report"]()
    assert "silicon: never run" in made["report"]()
