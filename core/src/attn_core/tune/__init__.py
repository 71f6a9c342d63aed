"""Measured ranking: times every backend that can run a model's phases on this device, for `auto` to choose by."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

import torch

from attn_core.bench.run import Workload
from attn_core.bench.shapes import Shape
from attn_core.bench.timing import time_call
from attn_core.errors import AttnError, UsageError
from attn_core.planning.config import AttentionConfig, LayerKind, Phase
from attn_core.planning.discovery import BackendRef, Installed, discover
from attn_core.planning.measured import Timing, save_timings, shape_key, tuned_path
from attn_core.planning.plan import plan
from attn_core.planning.reasons import evaluate
from attn_core.planning.system import System, detect
from attn_core.runtime.batch import ForwardMode
from attn_core.runtime.build import build
from attn_core.testing.devices import device_name

#: requests and tokens of the workloads of a phase: (requests, new tokens of each, keys of each)
WORKLOADS: Final[dict[Phase, tuple[tuple[int, int, int], ...]]] = {
    "prefill": ((1, 2048, 2048), (4, 256, 4096)),
    "decode": ((1, 1, 8192), (16, 1, 4096), (64, 1, 2048)),
    "verify": ((16, 0, 4096),),  # 0: as many as the config drafts
    "draft": ((16, 1, 2048),),
}
#: A CPU takes this part of the keys: the order of the backends is the question, not the time.
_CPU_SHARE: Final = 8

_MODES: Final[dict[Phase, ForwardMode]] = {
    "prefill": ForwardMode.EXTEND,
    "decode": ForwardMode.DECODE,
    "verify": ForwardMode.TARGET_VERIFY,
    "draft": ForwardMode.DRAFT_EXTEND,
}

Progress = Callable[[str], None]


def tune(
    config: AttentionConfig, *, system: System | None = None, seconds: float = 0.2, progress: Progress = lambda _: None
) -> list[Timing]:
    """Time every usable backend on every phase and layer kind of ``config``, and file it for ``plan``.

    Cross and ragged kinds are not timed: what has them is ranked by the table. Raises UsageError for a system that is
    not this machine: what is not here cannot be measured.
    """
    system = detect() if system is None else system
    if system.forced:
        raise UsageError(f"{system} is not this machine", hint="run attn tune there")
    installed = discover()
    timings = list(_timings(config, system, installed, seconds, progress))
    device = device_name("cuda" if system.device == "rocm" else system.device)
    save_timings(
        tuned_path(system), timings, device=device, date=datetime.datetime.now(datetime.UTC).date().isoformat()
    )
    return timings


def _timings(
    config: AttentionConfig, system: System, installed: Installed, seconds: float, progress: Progress
) -> Iterator[Timing]:
    for phase in config.phases:
        for kind in config.kinds(phase):
            if kind.cross or kind.ragged:
                continue
            alone = config.replace(layers=(_one_layer(kind),))
            for ref in installed.backends:
                if ref.ambiguous or not evaluate(ref.manifest, alone, phase, system).accepted:
                    continue
                key = shape_key(config, kind, phase)
                progress(f"{ref.listed}: {key}")
                try:
                    taken = _geometric_mean([*_times(alone, phase, ref, system, installed, seconds)])
                except AttnError as error:
                    progress(f"{ref.listed}: not timed: {error.message}")
                    continue
                yield Timing(key, ref.listed, ref.version, taken)


def _times(
    config: AttentionConfig, phase: Phase, ref: BackendRef, system: System, installed: Installed, seconds: float
) -> Iterator[float]:
    """Seconds of one layer's call, for each workload of the phase."""
    chosen = plan(config, backend={phase: ref.listed}, system=system, installed=installed, phases=(phase,))
    device = torch.device("cuda" if system.device == "rocm" else system.device)
    share = _CPU_SHARE if device.type == "cpu" else 1
    longest = config.max_context_len or 1 << 30
    for requests, new, keys in WORKLOADS[phase]:
        keys = min(keys // share, longest)
        new = min(new or config.speculative_num_draft_tokens, keys)
        shape = _shape(config.layers[0], phase, requests, new, keys)
        work = Workload.make(shape, chosen, device, mode=_MODES[phase])
        forward = work.call(build(chosen, work.cache))
        yield time_call(forward, device, seconds=seconds) / 1e3


def _shape(kind: LayerKind, phase: Phase, requests: int, new: int, keys: int) -> Shape:
    return Shape(
        "mla" if kind.kind == "mla" else "decode" if phase == "decode" else "extend",
        f"{phase} bs{requests} q{new} kv{keys}",
        (new,) * requests,
        (keys,) * requests,
        kind.num_q_heads,
        kind.num_kv_heads,
        kind.qk_head_dim,
        kind.v_head_dim,
        kind=kind.kind,
    )


def _one_layer(kind: LayerKind) -> LayerKind:
    return replace(kind, layer_ids=(0,))


def _geometric_mean(values: list[float]) -> float:
    """The mean that does not let the longest workload decide alone."""
    return math.exp(sum(map(math.log, values)) / len(values))
