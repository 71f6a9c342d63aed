"""What the tests of the engine share: a backend that forgets a feature, a driver that chunks, mixes and scatters."""

from __future__ import annotations

import functools
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from attn_core.generate.model import PagedModel
from attn_core.planning.config import AttentionConfig
from attn_core.runtime.backend import AttentionBackend
from attn_core.runtime.batch import ForwardBatch, ForwardMode, slots_of
from attn_core.runtime.kv_cache import KVCache
from attn_core.runtime.layer import AttentionLayer
from attn_core.runtime.torch_native.backend import TorchNativeBackend
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Change = Callable[[AttentionLayer], AttentionLayer]
Spans = list[list[tuple[int, int]]]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Forgetful(AttentionBackend):
    """torch_native, but every layer, query and batch goes through ``change`` first: the negative controls."""

    def __init__(
        self,
        config: AttentionConfig,
        kv_cache: KVCache,
        layer: Change = lambda layer: layer,
        query: Callable[[Tensor, AttentionLayer], Tensor] = lambda q, layer: q,
        batch: Callable[[ForwardBatch], None] = lambda batch: None,
    ) -> None:
        super().__init__(config, kv_cache)
        self._inner = TorchNativeBackend(config, kv_cache)
        self._layer, self._query, self._batch = layer, query, batch

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        self._batch(batch)
        self._inner.init_forward_metadata(batch)

    def forward_extend(self, q: Tensor, k: Any, v: Any, layer: AttentionLayer, batch: ForwardBatch, **kw: Any) -> Any:
        return self._inner.forward_extend(self._query(q, layer), k, v, self._layer(layer), batch, **kw)

    def forward_decode(self, q: Tensor, k: Any, v: Any, layer: AttentionLayer, batch: ForwardBatch, **kw: Any) -> Any:
        return self._inner.forward_decode(self._query(q, layer), k, v, self._layer(layer), batch, **kw)


@dataclass
class Encoder:
    """Images of each request for cross layers: what a request sees of its own, and what the first step is given."""

    #: keys of the tiles that the image fills: what the image token and those after it see
    lens: list[int]
    inputs: dict[str, Any]
    #: keys that the model makes for each image, padding tiles included: what tokens before the image token see
    rows: int
    #: the position of the image token
    first_seen: list[int]

    def seen(self, request: int, position: int) -> int:
        return self.rows if position < self.first_seen[request] else self.lens[request]


@dataclass
class Driver:
    """Runs prompts through PagedModel over scattered pages, step by step, and gives each request's logits [n, V]."""

    model: Any
    config: AttentionConfig
    page_size: int = 4
    device: str = "cpu"
    forget: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layout = "MLA" if self.config.cached_kinds[0].kind == "mla" else "NHD"
        config = self.config.replace(
            layers=self.config.cached_kinds, dtype="float32", page_size=self.page_size, kv_layout=layout
        )
        self.cache = KVCache.allocate(config, num_pages=1 + 512 // self.page_size, device=self.device)
        self._free = list(range(1, self.cache.num_pages))
        random.Random(0).shuffle(self._free)
        backend = Forgetful(config, self.cache, **self.forget)
        self.paged = PagedModel(self.model.to(self.device), config, backend)

    def batch(
        self, mode: ForwardMode, query_lens: list[int], seq_lens: list[int], pages: list[list[int]], **more: Any
    ) -> tuple[Tensor, ForwardBatch]:
        """A batch, and as many tokens as it has slots."""
        batch = ForwardBatch.build(
            mode, query_lens=query_lens, seq_lens=seq_lens, pages=pages, page_size=self.page_size, device=self.device,
            **more,
        )  # fmt: skip
        return torch.arange(5, 5 + batch.num_tokens, device=self.device), batch

    def pages(self, num_tokens: int) -> list[int]:
        return [self._free.pop() for _ in range(-(-num_tokens // self.page_size))]

    def run(
        self,
        sequences: list[list[int]],
        steps: list[list[int]],
        *,
        spans: Spans | None = None,
        inputs: dict[str, Any] | None = None,
        encoder: Encoder | None = None,
    ) -> list[Tensor]:
        """``steps[s][b]`` new tokens of request b in step s (0: it waits). ``inputs`` and images come in step 0."""
        pages = [self.pages(len(s)) for s in sequences]
        encoder_pages = [self.pages(encoder.rows) for _ in sequences] if encoder else None
        done = [0] * len(sequences)
        logits: list[list[Tensor]] = [[] for _ in sequences]
        for index, lens in enumerate(steps):
            order = sorted((b for b, n in enumerate(lens) if n), key=lambda b: lens[b] != 1)
            query = [lens[b] for b in order]
            batch = ForwardBatch.build(
                _mode(query),
                query_lens=query,
                seq_lens=[done[b] + lens[b] for b in order],
                pages=[pages[b] for b in order],
                page_size=self.page_size,
                device=self.device,
                spans=None if spans is None or index else [spans[b] for b in order],
                encoder_seq_lens=[encoder.seen(b, done[b]) for b in order] if encoder else None,
                encoder_pages=[encoder_pages[b] for b in order] if encoder_pages else None,
            )
            sees = None
            if encoder and encoder_pages:
                if index == 0:
                    batch.encoder_slot_mapping = self._encoder_slots(encoder, encoder_pages)
                at = [p >= encoder.first_seen[b] for b in order for p in range(done[b], done[b] + lens[b])]
                sees = torch.tensor(at, device=self.device)
            batch.check(self.page_size)
            tokens = [t for b in order for t in sequences[b][done[b] : done[b] + lens[b]]]
            given = (encoder.inputs if encoder else inputs) if index == 0 else None
            step_inputs = {name: value.to(self.device) for name, value in (given or {}).items()}
            out = self.paged.forward(
                torch.tensor(tokens, device=self.device), batch, sees_encoder=sees, inputs=step_inputs
            )
            for b, part in zip(order, out.split(query), strict=True):
                logits[b].append(part.cpu())
                done[b] += lens[b]
        assert done == [len(s) for s in sequences], "the steps must run every sequence to its end"
        return [torch.cat(parts) for parts in logits]

    def _encoder_slots(self, encoder: Encoder, pages: list[list[int]]) -> Tensor:
        slots = [slot for row in pages for slot in slots_of(row, range(encoder.rows), self.page_size)]
        return torch.tensor(slots, device=self.device)


def _mode(query_lens: list[int]) -> ForwardMode:
    if max(query_lens) == 1:
        return ForwardMode.DECODE
    return ForwardMode.MIXED if query_lens[0] == 1 else ForwardMode.EXTEND


#: lengths 25, 11, 17: a chunk, a wait, chunks mixed with decodes, and the end decoded token by token
LENGTHS = (25, 11, 17)
STEPS = [[7, 5, 0], [12, 1, 11], [1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 0, 1]]


DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def driver(request: pytest.FixtureRequest) -> Callable[..., Driver]:
    """Makes a driver on the CPU, and on the GPU where there is one; what it is compared with ran on the CPU."""
    return functools.partial(Driver, device=request.param)


@pytest.fixture
def encoder() -> type[Encoder]:
    return Encoder


@pytest.fixture
def sequences() -> list[list[int]]:
    return [torch.randint(5, 246, (n,)).tolist() for n in LENGTHS]


@pytest.fixture
def steps() -> list[list[int]]:
    return STEPS


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of a tiny random llama whose tokens are bytes, and one end token; context 512."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    assert tokenizer.eos_token_id == 256
    tokenizer.save_pretrained(folder)
    return folder
