"""From options to a session that can generate: files, plan, tokenizer and queue first, weights and cache last.

What can be refused is refused before weights are loaded: an unknown model or dtype, no plan, prompts that cannot fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from attn_core.errors import CacheFullError, ConfigError, UsageError
from attn_core.generate.decode_graphs import DecodeGraphs
from attn_core.generate.engine import Engine
from attn_core.generate.loading import load_model, load_tokenizer, read_config, stop_ids
from attn_core.generate.model import PagedModel, check_served
from attn_core.generate.page_pool import PagePool
from attn_core.generate.request import Request
from attn_core.generate.sampling import SamplingParams
from attn_core.generate.scheduler import Scheduler
from attn_core.generate.weights import ModelFiles, Progress, locate
from attn_core.planning.config import AttentionConfig, Phase
from attn_core.planning.plan import FallbackPolicy, Plan, plan
from attn_core.planning.system import System, detect
from attn_core.runtime.build import build
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.witness import Witness

#: planning's device -> torch's
TORCH_DEVICES: Final[Mapping[str, str]] = {"cpu": "cpu", "cuda": "cuda", "rocm": "cuda", "npu": "npu", "xpu": "xpu"}
#: MiB of cache where none is asked for
DEFAULT_CACHE_MIB: Final = {"cpu": 64}
DEFAULT_CACHE_MIB_ELSEWHERE: Final = 1024
MIB: Final = 2**20


@dataclass(frozen=True, slots=True)
class ServingOptions:
    """How to serve: None leaves the choice to the model, the machine or the planner."""

    model: str | None = None
    dtype: str | None = None
    device: str | None = None
    page_size: int | None = None
    kv_cache_dtype: str = "auto"
    backends: Mapping[Phase, str] = field(default_factory=dict)
    fallback: FallbackPolicy = "warn"
    cache_mib: int | None = None
    max_requests: int = 16
    max_batch_tokens: int = 512
    cuda_graph: bool = False
    #: where ``device`` is an emulator's: torch's device, and the machine that plans are made for
    stand_in: tuple[str, System] | None = None
    #: tokens of a request that a verify step checks, its last one and guesses; 0 is off
    speculative_num_draft_tokens: int = 0


class Queue:
    """A model's plan, tokenizer and scheduler, without weights: takes prompts, and refuses those that cannot fit."""

    def __init__(self, options: ServingOptions, progress: Progress) -> None:
        """Raises UnknownModelError, ModelFolderError, ConfigError, UsageError, PlanError or CacheFullError."""
        self.files: ModelFiles = locate(options.model, progress)
        self.device, system = options.stand_in or pick_device(options.device)
        #: what people are told: torch's device, or the emulator that it stands for
        self.place = self.device if options.stand_in is None else str(options.device)
        config = text_config(self.files, system.device, options)
        self.hf_config = read_config(self.files)
        check_served(self.hf_config, has_cross=False)
        # Guesses come from the prompt, so that there is no draft model and no draft phase.
        phases: tuple[Phase, ...] = (
            "prefill",
            "decode",
            *(("verify",) if options.speculative_num_draft_tokens else ()),
        )
        self.plan: Plan = plan(config, options.backends, system=system, fallback=options.fallback, phases=phases)
        self.num_pages = num_pages(self.plan.config, self.device, options.cache_mib)
        assert self.plan.config.page_size is not None
        self.scheduler = Scheduler(
            PagePool(self.num_pages, self.plan.config.page_size),
            max_requests=options.max_requests,
            max_batch_tokens=options.max_batch_tokens,
            max_context_len=self.plan.config.max_context_len,
            num_draft_tokens=options.speculative_num_draft_tokens,
        )
        self.tokenizer: Any = load_tokenizer(self.files)
        self._stop_ids = stop_ids(self.files, self.tokenizer)

    def add(self, prompt: str, sampling: Mapping[str, Any], *, raw: bool = False) -> Request:
        """Queue a prompt, in the model's chat template unless ``raw``. Raises RequestTooLongError, CacheFullError."""
        params = SamplingParams(**sampling, stop_ids=self._stop_ids)
        request = Request(len(self.scheduler.waiting), self.encode(prompt, raw=raw), params)
        self.scheduler.add(request)
        return request

    def encode(self, prompt: str, *, raw: bool) -> list[int]:
        """The tokens of a prompt."""
        if raw or not self.tokenizer.chat_template:
            return list(self.tokenizer(prompt)["input_ids"])
        message = {"role": "user", "content": prompt}
        encoded = self.tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, special ones left out."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Session:
    """A queue with its weights, cache and backends: ready to run. ``witness`` saw which backend ran each phase."""

    def __init__(self, queue: Queue, progress: Progress) -> None:
        """Raises ModelFolderError, PluginError, BackendRefusedError or CacheFullError."""
        self.queue = queue
        dtype = queue.plan.config.dtype
        model = load_model(queue.files, queue.hf_config, dtype=dtype, device=queue.device, progress=progress)
        self.cache = allocate(queue.plan.config, queue.num_pages, queue.device)
        self.witness = Witness(build(queue.plan, self.cache))
        paged = PagedModel(model, queue.plan.config, self.witness.backend)
        graphs = _decode_graphs(paged, queue.scheduler) if queue.plan.config.cuda_graph else None
        self.engine = Engine(paged, queue.scheduler, graphs)


def text_config(files: ModelFiles, device: str, options: ServingOptions) -> AttentionConfig:
    """What generating text needs of the model's attention: its cached decoder layers, without images.

    Vision towers run in transformers' own modules, cross layers are skipped by the model without an image, and text
    alone has no spans: so none of that is asked of a backend.
    """
    config = AttentionConfig.from_hf(files.folder)
    dtype = options.dtype or ("float32" if device == "cpu" else config.dtype)
    return config.replace(
        layers=tuple(kind for kind in config.cached_kinds if not kind.cross),
        bidirectional_spans=False,
        multimodal=False,
        dtype=dtype,
        kv_cache_dtype=options.kv_cache_dtype,
        page_size=options.page_size,
        cuda_graph=options.cuda_graph,
        speculative_num_draft_tokens=options.speculative_num_draft_tokens,
    )


def pick_device(name: str | None) -> tuple[str, System]:
    """torch's device and the planner's system for ``--device``; None takes the accelerator, else the CPU.

    Raises UsageError for a device that is not here, and where ATTN_FORCE_SYSTEM names another machine.
    """
    here = detect()
    if here.forced:
        raise UsageError(
            f"ATTN_FORCE_SYSTEM names {here}, which is not this machine; generating runs here",
            given=str(here),
            hint="unset ATTN_FORCE_SYSTEM, or use attn explain, which plans for other machines",
        )
    accelerator = TORCH_DEVICES[here.device]
    if name is None:
        name = accelerator if is_usable(accelerator) else "cpu"
    if name == "cpu":
        return name, here if here.device == "cpu" else detect("cpu")
    if name != accelerator or not is_usable(name):
        accepted = ["cpu", *([accelerator] if accelerator != "cpu" and is_usable(accelerator) else [])]
        raise UsageError(
            f"device {name!r} cannot be used here",
            given=name,
            accepted=accepted,
            hint="attn doctor shows the machine, its drivers and what this torch was built for",
        )
    return name, here


def is_usable(device: str) -> bool:
    """Whether this torch can run on its device of that name."""
    if device == "npu":
        from importlib.util import find_spec

        return find_spec("torch_npu") is not None and bool(_module("torch_npu").npu.is_available())
    checks: Mapping[str, Callable[[], bool]] = {
        "cpu": lambda: True,
        "cuda": torch.cuda.is_available,
        "xpu": torch.xpu.is_available,
    }
    return checks[device]() if device in checks else False


def num_pages(config: AttentionConfig, device: str, cache_mib: int | None) -> int:
    """How many pages, the null page among them, a cache of ``cache_mib`` MiB has.

    Raises ConfigError for an impossible size, CacheFullError for one that holds no page.
    """
    mib = DEFAULT_CACHE_MIB.get(device, DEFAULT_CACHE_MIB_ELSEWHERE) if cache_mib is None else cache_mib
    if mib < 1:
        raise ConfigError(f"a cache of {mib} MiB", given=mib, accepted="an integer from 1")
    of_a_page = KVCache.bytes_per_page(config)
    count = mib * MIB // of_a_page
    if count < 2:
        raise CacheFullError(
            f"a cache of {mib} MiB has no room for two pages of {of_a_page} bytes, one of which is the null page",
            given=mib,
            hint=f"--cache-mib {-(-2 * of_a_page // MIB)}, or a smaller page",
        )
    return count


def allocate(config: AttentionConfig, count: int, device: str) -> KVCache:
    """The cache of ``count`` pages on ``device``. Raises CacheFullError where the device has no room for it."""
    try:
        return KVCache.allocate(config, num_pages=count, device=device)
    except (RuntimeError, MemoryError) as error:
        mib = count * KVCache.bytes_per_page(config) / MIB
        raise CacheFullError(
            f"a cache of {mib:.0f} MiB cannot be allocated on {device}: {str(error).splitlines()[0]}",
            hint="a smaller --cache-mib",
        ) from error


def _decode_graphs(model: PagedModel, scheduler: Scheduler) -> DecodeGraphs:
    """Graphs for the largest batch and the longest sequence that the queued requests can come to."""
    requests = scheduler.waiting
    longest = max((len(r.tokens) + r.sampling.max_new_tokens for r in requests), default=1)
    return DecodeGraphs(model, max_batch_size=max(1, min(scheduler.max_requests, len(requests))), max_seq_len=longest)


def _module(name: str) -> Any:
    from importlib import import_module

    return import_module(name)
