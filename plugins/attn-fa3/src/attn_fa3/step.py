"""One step as FlashAttention 3 wants it: which keys, which query rows, and the tile schedules that its layers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Generic, NamedTuple, TypeVar

from attn_core.errors import BatchError
from attn_core.runtime.batch import ForwardBatch, ForwardMode, TreeMask
from torch import Tensor

T = TypeVar("T")

#: Modes whose requests all have the same number of new tokens, so that queries need no start locations.
UNIFORM: Final = (ForwardMode.DECODE, ForwardMode.TARGET_VERIFY)


@dataclass(frozen=True, slots=True, eq=False)
class Keys:
    """A set of cached keys: lens [B] int32, page_table [B, width] int32, and the longest that the table holds.

    kind: "own", "encoder" or "prefix", for schedules of different keys are different.
    """

    lens: Tensor
    page_table: Tensor
    max_len: int
    kind: str

    @classmethod
    def of(cls, lens: Tensor, page_table: Tensor, page_size: int, longest: int, kind: str) -> Keys:
        """The columns of ``page_table`` that ``longest`` tokens need: the library sizes its work by the width."""
        columns = max(1, min(page_table.shape[1], -(-longest // page_size)))
        return cls(lens, page_table[:, :columns], columns * page_size, kind)


class Shape(NamedTuple):
    """What a tile schedule depends on, beside the keys."""

    num_q_heads: int
    num_kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    window: tuple[int, int]
    causal: bool
    has_softcap: bool


@dataclass(slots=True)
class Once(Generic[T]):
    """Things that the layers of a step share, made by the first layer that needs them.

    In a captured graph they are made inside the graph, so that every replay makes them anew from the lengths of that
    replay. There the step may run more than once (a warm-up, then the capture), and what the warm-up made must not be
    captured: so the layer that came first makes it again each time it comes by.
    """

    in_graph: bool
    made: dict[object, tuple[int, T]] = field(default_factory=dict)

    def get(self, key: object, layer_id: int, make: Callable[[], T]) -> T:
        """What ``make`` gave for ``key`` in this step."""
        found = self.made.get(key)
        if found is None or (self.in_graph and found[0] == layer_id):
            found = self.made[key] = (layer_id, make())
        return found[1]


@dataclass(slots=True, eq=False)
class Step:
    """What `init_forward_metadata` leaves on the batch.

    query_len: new tokens of every request, or None if they differ; then query_start_loc [B + 1] says where each begins.
    num_splits: parts that the keys of a request are cut into; 0 leaves it to the library.
    """

    batch_size: int
    query_len: int | None
    query_start_loc: Tensor
    max_query_len: int
    keys: Keys
    encoder_keys: Keys | None
    tree: TreeMask | None
    num_splits: int
    schedules: Once[Tensor]
    trees: Once[object]

    @classmethod
    def of(cls, batch: ForwardBatch, page_size: int, *, num_splits: int, in_graph: bool = False) -> Step:
        """From a batch, without reading the device. Raises BatchError for a batch that contradicts itself."""
        query_len = None
        if batch.mode in UNIFORM and batch.batch_size:
            query_len, rest = divmod(batch.num_tokens, batch.batch_size)
            if rest:
                raise BatchError(
                    f"{batch.mode.name} with {batch.num_tokens} tokens of {batch.batch_size} requests",
                    accepted="the same number of tokens for each request",
                )
        if batch.tree is not None and batch.tree.num_draft_tokens != query_len:
            raise BatchError(
                f"a tree of {batch.tree.num_draft_tokens} drafts in a batch of {query_len} tokens a request",
                accepted="TARGET_VERIFY with one row of the tree for each token",
            )
        return cls(
            batch_size=batch.batch_size,
            query_len=query_len,
            query_start_loc=batch.query_start_loc,
            max_query_len=batch.max_query_len,
            keys=Keys.of(batch.seq_lens, batch.page_table, page_size, batch.max_seq_len, "own"),
            encoder_keys=_encoder_keys(batch, page_size),
            tree=batch.tree,
            num_splits=num_splits,
            schedules=Once(in_graph),
            trees=Once(in_graph),
        )


def _encoder_keys(batch: ForwardBatch, page_size: int) -> Keys | None:
    if batch.encoder_seq_lens is None or batch.encoder_page_table is None:
        return None
    return Keys.of(batch.encoder_seq_lens, batch.encoder_page_table, page_size, batch.max_encoder_seq_len, "encoder")
