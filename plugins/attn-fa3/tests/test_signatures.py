"""Every call that our code makes is one that the real library takes: bound against the schemas inside the wheel."""

from __future__ import annotations

import inspect
import re
import zipfile
from functools import cache

import pytest
import torch
from attn_core.errors import PluginLoadError
from attn_core.runtime.batch import TreeMask
from attn_fa3 import library
from attn_fa3.backend import FA3Backend
from attn_fa3.build_flags import BuildFlags
from fake_flash_attention import FLAGS, FakeFlashAttention
from real_wheel import WHEELS, source, wheel
from test_backend import KIND, MLA, PARENTS, STEPS, batch_of, config_of, inputs, layer_of, random_cache

TOKENSPEED = "tokenspeed-fa3==3.0.0.post20260810"


@cache
def schemas() -> str:
    """The operators' schemas, which the extension holds as text; kept beside the wheel, for it is large."""
    kept = WHEELS / f"{TOKENSPEED}.schemas.txt"
    if not kept.exists():
        found: list[bytes] = []
        with zipfile.ZipFile(wheel(TOKENSPEED)) as archive, archive.open("flash_attn_3/_C.abi3.so") as stream:
            tail = b""
            while chunk := stream.read(1 << 24):
                found += re.findall(
                    rb"(?:fwd|get_scheduler_metadata)\((?:Tensor|int) [^\0]{200,4000}\) -> [^\0]+", tail + chunk
                )
                tail = chunk[-8192:]
        kept.write_text("\n".join(sorted({text.decode() for text in found})) + "\n")
    return kept.read_text()


def schema(name: str) -> inspect.Signature:
    """The signature that the operator was registered with."""
    (line,) = [line for line in schemas().splitlines() if line.startswith(f"{name}(")]
    inside = line[len(name) + 1 : line.rindex(") ->")]
    parameters = []
    for text in re.split(r",\s*(?![^()]*\))", inside):
        declared, _, default = text.partition("=")
        argument = declared.split()[-1]
        empty = inspect.Parameter.empty if not default else None
        parameters.append(inspect.Parameter(argument, inspect.Parameter.KEYWORD_ONLY, default=empty))
    return inspect.Signature(parameters)


def test_the_schemas_are_found() -> None:
    assert set(library.FORWARD_ARGUMENTS) <= set(schema("fwd").parameters)
    assert set(library.SCHEDULE_ARGUMENTS) <= set(schema("get_scheduler_metadata").parameters)


@pytest.mark.parametrize("step", [*STEPS, "tree"])
@pytest.mark.parametrize("what", ["plain", "latent", "fp8"])
def test_every_call_binds(fake: FakeFlashAttention, step: str, what: str) -> None:
    kind = MLA if what == "latent" else KIND
    config = config_of(kind, **({"kv_cache_dtype": "fp8_e4m3"} if what == "fp8" else {}))
    if step == "tree":
        batch = batch_of(STEPS["chain"][0], [6, 6], [14, 9], tree=TreeMask.from_parents(torch.tensor(PARENTS[:2])))
    else:
        batch = batch_of(*STEPS[step])
    backend = FA3Backend(config, random_cache(config))
    seen: list[tuple[str, dict[str, object]]] = []
    record(backend, seen)
    backend.init_forward_metadata(batch)
    backend.forward(*inputs(kind, batch.num_tokens), layer_of(config), batch)
    assert {name for name, _ in seen} == {"fwd", "get_scheduler_metadata"}
    for name, arguments in seen:
        schema(name).bind(**arguments)


def record(backend: FA3Backend, seen: list[tuple[str, dict[str, object]]]) -> None:
    """Note the keyword arguments of each call of the library, as they are given."""
    real = backend._calls.library

    def forward(**arguments: object) -> object:
        seen.append(("fwd", arguments))
        return real.forward(**arguments)

    def schedule(**arguments: object) -> object:
        seen.append(("get_scheduler_metadata", arguments))
        return real.schedule(**arguments)

    backend._calls.library = library.Library(forward, schedule)  # type: ignore[arg-type]


def test_a_changed_signature_would_fail() -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        schema("fwd").bind(q=None, k=None, v=None, not_an_argument=None)
    with pytest.raises(TypeError, match="missing"):
        schema("get_scheduler_metadata").bind(batch_size=1)


def test_a_library_that_lacks_an_argument_is_refused_when_it_is_loaded(
    fake: FakeFlashAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fwd(q, k, v) -> None:
        raise AssertionError("not called")

    monkeypatch.setattr(fake.operators, "fwd", fwd)
    with pytest.raises(PluginLoadError, match=r"flash_attn_3\.fwd has no argument"):
        library.load()


def test_the_default_builds_flags_are_the_ones_we_read() -> None:
    scope: dict[str, dict[str, dict[str, bool]]] = {}
    exec(source(TOKENSPEED, "flash_attn_config.py"), scope)
    flags = scope["CONFIG"]["build_flags"]
    assert set(flags) == set(FLAGS)
    build = BuildFlags.of(flags)
    assert build.paged
    assert build.local
    assert build.float16
    assert build.fp8
    assert not build.softcap
    assert not build.wide_values_64
    assert build.widths == (64, 128, 192, 256)
