"""What the tests of the engines share: backends that forget a feature, registered by name like any other."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any, ClassVar

import attn_core
import pytest
import torch
from attn_core.planning.manifest import Manifest
from attn_core.runtime.batch import ForwardBatch
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.torch_native.backend import TorchNativeBackend

Change = Callable[[AttentionLayer], AttentionLayer]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Changed(TorchNativeBackend):
    """torch_native, but layers and batches go through a change first; it counts the modes that it ran."""

    layer: ClassVar[Change] = staticmethod(lambda layer: layer)
    batch: ClassVar[Callable[[ForwardBatch], None]] = staticmethod(lambda batch: None)
    modes: ClassVar[list[str]] = []

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        self.modes.append(batch.mode.name)
        type(self).batch(batch)
        super().init_forward_metadata(batch)

    def forward_extend(self, q: Any, k: Any, v: Any, layer: AttentionLayer, *args: Any, **options: Any) -> Any:
        return super().forward_extend(q, k, v, type(self).layer(layer), *args, **options)

    def forward_decode(self, q: Any, k: Any, v: Any, layer: AttentionLayer, *args: Any, **options: Any) -> Any:
        return super().forward_decode(q, k, v, type(self).layer(layer), *args, **options)

    def forward_ragged(self, q: Any, k: Any, v: Any, layer: AttentionLayer, **options: Any) -> Any:
        self.modes.append("ragged causal" if options["causal"] else "ragged")
        return super().forward_ragged(q, k, v, type(self).layer(layer), **options)


@pytest.fixture
def changed() -> Iterator[Callable[..., type[Changed]]]:
    """Registers a changed torch_native under a name, as long as the test runs."""
    names: list[str] = []

    def make(name: str, **changes: Any) -> type[Changed]:
        text = files("attn_core").joinpath("torch_native.toml").read_text(encoding="utf-8")
        manifest = Manifest.parse(text.replace('name = "torch_native"', f'name = "{name}"'), source="<test>")
        cls = type(name, (Changed,), {"name": name, "modes": [], **{k: staticmethod(v) for k, v in changes.items()}})
        attn_core.register(cls, manifest)
        names.append(name)
        return cls

    yield make
    for name in names:
        attn_core.unregister(name)
