"""A chosen plugin that misbehaves while it is loaded: every fault is typed, and says the root cause and what to do."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from attn_core.errors import BackendRefusedError, PluginLoadError, ProtocolError
from attn_core.planning.discovery import BackendRef
from attn_core.runtime import loading
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.loading import PluginOutputWarning, load_backend
from attn_core.runtime.torch_native.backend import TorchNativeBackend

from .scenes import ref

GOOD = "from attn_core.runtime.torch_native.backend import TorchNativeBackend as Backend\n"


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Makes a module of the given source, and a backend whose entry point names ``Backend`` in it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(source: str, name: str = "made_plugin", path: str = "Backend") -> BackendRef:
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return ref("made", None, object_=f"{name}:{path}")

    yield make
    sys.modules.pop("made_plugin", None)


BROKEN: dict[str, tuple[str, str, str]] = {
    "raises": ("raise RuntimeError('no kernels today')", "RuntimeError: no kernels today", "attn doctor"),
    "exits": ("import sys; sys.exit(3)", r"it called sys.exit\(3\)", "ATTN_DISABLE=attn-made"),
    "exits quietly": ("import sys; sys.exit()", r"it called sys.exit\(None\)", "ATTN_DISABLE"),
    "misses a module": ("import not_there_at_all", "No module named 'not_there_at_all'", "install not_there_at_all"),
    "has no such class": ("x = 1", "has no attribute 'Backend'", "attn doctor"),
    "has a syntax error": ("def", "SyntaxError", "attn doctor"),
    "was built against another torch": (
        "raise ImportError('_C.so: undefined symbol: _ZN3c106detail')",
        "undefined symbol",
        "built against another torch",
    ),
    "hides the root cause": (
        "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise ImportError('sorry') from e",
        "ZeroDivisionError: division by zero",
        "attn doctor",
    ),
    "raises while handling": (
        "try:\n    open('/no/such/file')\nexcept OSError:\n    raise ImportError('sorry')",
        "No such file",
        "attn doctor",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_plugin_that_cannot_be_imported(fault: str, plugin) -> None:  # type: ignore[no-untyped-def]
    source, root_cause, hint = BROKEN[fault]
    with pytest.raises(PluginLoadError, match=root_cause) as caught:
        load_backend(plugin(source))
    assert caught.value.code == "plugin_load_failed"
    assert "backend 'made' (attn-made 1.0)" in str(caught.value)
    assert hint in str(caught.value)


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(PluginLoadError, match="No module named 'nowhere_to_be_found'"):
        load_backend(ref("made", None, object_="nowhere_to_be_found:Backend"))


def test_something_that_is_no_backend(plugin) -> None:  # type: ignore[no-untyped-def]
    for source in ("class Backend: ...", "def Backend(config, kv_cache): ..."):
        with pytest.raises(PluginLoadError, match="a subclass of"):
            load_backend(plugin(source))


def test_another_protocol_is_refused_before_any_import(plugin) -> None:  # type: ignore[no-untyped-def]
    made = plugin("raise AssertionError('imported')")
    newer = ref("made", None, object_=made.object, protocol=">=2.0,<3")
    with pytest.raises(ProtocolError, match=r"built for protocol >=2\.0,<3"):
        load_backend(newer)
    assert "made_plugin" not in sys.modules


def test_what_is_printed_goes_to_stderr_and_is_warned_of(plugin, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    with pytest.warns(PluginOutputWarning, match="'hello there' first"):
        load_backend(plugin("print('hello there')\nprint('and more')\n" + GOOD))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "hello there\nand more\n"


def test_who_waits_is_told_for_what(plugin, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    watched: list[tuple[str, str, str]] = []
    monkeypatch.setattr(loading, "not_in_silence", lambda *about: watched.append(about) or nullcontext())
    load_backend(plugin(GOOD))
    assert watched == [("backend 'made' (attn-made 1.0)", "importing it", "attn-made")]


def test_a_nested_class_and_a_registered_one(plugin) -> None:  # type: ignore[no-untyped-def]
    nested = plugin(GOOD + "class Holder:\n    Inner = Backend\n", path="Holder.Inner")
    assert load_backend(nested) is TorchNativeBackend
    assert load_backend(ref("made", TorchNativeBackend)) is TorchNativeBackend


def test_typed_errors_of_a_plugin_pass_through(plugin) -> None:  # type: ignore[no-untyped-def]
    source = "from attn_core.errors import BackendRefusedError\nraise BackendRefusedError('this build is for sm_90')"
    with pytest.raises(BackendRefusedError, match="sm_90"):
        load_backend(plugin(source))


def test_ctrl_c_is_not_swallowed(plugin) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(KeyboardInterrupt):
        load_backend(plugin("raise KeyboardInterrupt"))


def test_the_protocol_class_itself_can_be_named() -> None:
    assert issubclass(load_backend(ref("made", TorchNativeBackend)), AttentionBackend)
