"""What one step looks like to a backend: ForwardMode, TreeMask, ForwardBatch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor

from attn_core.errors import BatchError
from attn_core.planning.config import Phase


class ForwardMode(Enum):
    """What the new tokens of a step are."""

    EXTEND = "extend"  #: prompt tokens, with or without a cached prefix
    DECODE = "decode"  #: one new token for each request
    MIXED = "mixed"  #: decodes first, then extends
    TARGET_VERIFY = "target_verify"  #: draft tokens that the target model checks, the same number for each request
    DRAFT_EXTEND = "draft_extend"  #: accepted tokens that the draft model catches up on
    IDLE = "idle"  #: no request; a rank that only keeps step

    # Each step looks its mode up several times; an Enum's own hash is computed in Python.
    __hash__ = object.__hash__


#: The phase of the plan that runs a mode. MIXED has two: its decodes are `decode`, the rest is `prefill`.
PHASE_OF_MODE: Final[Mapping[ForwardMode, Phase]] = {
    ForwardMode.EXTEND: "prefill",
    ForwardMode.DECODE: "decode",
    ForwardMode.MIXED: "prefill",
    ForwardMode.TARGET_VERIFY: "verify",
    ForwardMode.DRAFT_EXTEND: "draft",
}


@dataclass(slots=True, eq=False)
class TreeMask:
    """Which draft token sees which.

    ``visible`` [B, q, q] bool: row i is what draft token i sees among the q draft tokens of its request, itself
    included; the cached prefix is always visible. A token's position is the prefix length plus the number of its
    ancestors, that is ``visible.sum(-1) - 1``: windows count positions, not places in the row.
    A dead branch (padding) is a row that sees itself alone and that no other row sees.
    """

    visible: Tensor

    @property
    def num_draft_tokens(self) -> int:
        return self.visible.shape[-1]

    def depths(self) -> Tensor:
        """[B, q] int64: the number of ancestors of each draft token."""
        return self.visible.sum(-1) - 1

    @classmethod
    def from_parents(cls, parents: Tensor) -> TreeMask:
        """From ``parents`` [B, q] (-1 for a root; a parent stands before its children)."""
        batch, q = parents.shape
        visible = torch.eye(q, dtype=torch.bool, device=parents.device).repeat(batch, 1, 1)
        rows = torch.arange(batch, device=parents.device)
        for i in range(q):
            parent = parents[:, i]
            inherited = visible[rows, parent.clamp(min=0)] & (parent >= 0)[:, None]
            visible[:, i] |= inherited
        return cls(visible)


@dataclass(slots=True, eq=False)
class ForwardBatch:
    """One step, in engine-neutral fields with one meaning each. B = requests, T = new tokens of all of them.

    The new tokens of request b are rows ``query_start_loc[b]`` to ``query_start_loc[b + 1]`` of q, k, v; they are the
    last ones of its sequence, so that its first new token stands at position ``seq_lens[b] - query_len[b]``.
    """

    #: what the new tokens are
    mode: ForwardMode
    #: [B] int32: valid KV tokens after this step's tokens are written; the same meaning in every mode
    seq_lens: Tensor
    #: [B + 1] int32: where each request's new tokens begin
    query_start_loc: Tensor
    #: [B, max_pages] int32: page ids in order; page 0 is the null page, never allocated;
    #: entries past the end are unspecified
    page_table: Tensor
    #: [T] int64: page * page_size + offset of each new token; -1 = do not write (padding, or written already)
    slot_mapping: Tensor
    #: a bound on the new tokens of a request, on the host: at least the true maximum
    max_query_len: int
    #: a bound on seq_lens, on the host: at least the true maximum
    max_seq_len: int
    #: MIXED: how many requests at the front are decodes (one new token each)
    num_decodes: int = 0
    #: seq_lens on the host; None where nobody made it (a backend that needs it says so in its manifest)
    seq_lens_cpu: Tensor | None = None
    #: query_start_loc on the host, likewise
    query_start_loc_cpu: Tensor | None = None
    #: verify: the tree; None is a chain (each draft token sees those before it)
    tree: TreeMask | None = None
    #: [B, S, 2] int32: half-open position ranges whose tokens see each other both ways; (0, 0) is no span
    spans: Tensor | None = None
    #: [B] int32: keys of each request's encoder, for cross layers
    encoder_seq_lens: Tensor | None = None
    #: [B, max_encoder_pages] int32: the pages that they lie in
    encoder_page_table: Tensor | None = None
    #: [T_enc] int64: where k and v of a cross layer are written; None where they are written already
    encoder_slot_mapping: Tensor | None = None
    #: a bound on encoder_seq_lens, on the host
    max_encoder_seq_len: int = 0
    #: encoder_seq_lens on the host, likewise
    encoder_seq_lens_cpu: Tensor | None = None
    #: what init_forward_metadata made for this batch; on the batch, so that several may be in flight
    plan_state: Any = None

    @property
    def batch_size(self) -> int:
        return self.seq_lens.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.slot_mapping.shape[0]

    @property
    def device(self) -> torch.device:
        return self.seq_lens.device

    @classmethod
    def build(
        cls,
        mode: ForwardMode,
        *,
        query_lens: Sequence[int],
        seq_lens: Sequence[int],
        pages: Sequence[Sequence[int]],
        page_size: int,
        device: torch.device | str = "cpu",
        write: Sequence[bool] | None = None,
        tree: TreeMask | None = None,
        spans: Sequence[Sequence[tuple[int, int]]] | None = None,
        encoder_seq_lens: Sequence[int] | None = None,
        encoder_pages: Sequence[Sequence[int]] | None = None,
        write_encoder: bool = False,
    ) -> ForwardBatch:
        """From host lists: ``query_lens[b]`` new tokens at the end of ``seq_lens[b]``, in the pages ``pages[b]``.

        ``write[b]`` False gives the request slots of -1. ``write_encoder`` fills ``encoder_slot_mapping`` for all
        encoder tokens. The host copies of the lengths are kept. Raises BatchError if the pages do not hold them.
        """
        _check_lists(mode, query_lens, seq_lens, pages, page_size)
        starts = [0]
        for n in query_lens:
            starts.append(starts[-1] + n)
        slots = [
            slot if write is None or write[b] else -1
            for b, (n, length) in enumerate(zip(query_lens, seq_lens, strict=True))
            for slot in slots_of(pages[b], range(length - n, length), page_size)
        ]
        batch = cls(
            mode=mode,
            seq_lens=_int32(seq_lens, device),
            query_start_loc=_int32(starts, device),
            page_table=page_table_of(pages, device),
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
            max_query_len=max(query_lens, default=0),
            max_seq_len=max(seq_lens, default=0),
            num_decodes=_leading_decodes(query_lens) if mode is ForwardMode.MIXED else 0,
            seq_lens_cpu=_int32(seq_lens, "cpu"),
            query_start_loc_cpu=_int32(starts, "cpu"),
            tree=tree,
        )
        if spans is not None:
            width = max((len(s) for s in spans), default=0)
            rows = [list(s) + [(0, 0)] * (width - len(s)) for s in spans]
            batch.spans = torch.tensor(rows, dtype=torch.int32, device=device).reshape(len(rows), width, 2)
        if encoder_seq_lens is not None and encoder_pages is not None:
            batch.encoder_seq_lens = _int32(encoder_seq_lens, device)
            batch.encoder_seq_lens_cpu = _int32(encoder_seq_lens, "cpu")
            batch.encoder_page_table = page_table_of(encoder_pages, device)
            batch.max_encoder_seq_len = max(encoder_seq_lens, default=0)
            if write_encoder:
                encoder_slots = [
                    slot
                    for row, length in zip(encoder_pages, encoder_seq_lens, strict=True)
                    for slot in slots_of(row, range(length), page_size)
                ]
                batch.encoder_slot_mapping = torch.tensor(encoder_slots, dtype=torch.int64, device=device)
        return batch

    def split(self) -> tuple[ForwardBatch, ForwardBatch]:
        """The decode part and the extend part of a MIXED batch, as views: for backends or plans that run them apart.

        Raises BatchError for another mode.
        """
        if self.mode is not ForwardMode.MIXED:
            raise BatchError(f"split() of a batch of mode {self.mode.name}", accepted="MIXED")
        n = self.num_decodes
        decode = self._rows(slice(0, n), ForwardMode.DECODE, 0, n)
        extend = self._rows(slice(n, self.batch_size), ForwardMode.EXTEND, n, self.num_tokens)
        decode.max_query_len = min(1, n)
        return decode, extend

    def _rows(self, rows: slice, mode: ForwardMode, first_token: int, last_token: int) -> ForwardBatch:
        """The requests ``rows`` whose tokens are ``first_token`` to ``last_token``."""
        bounds = slice(rows.start, rows.stop + 1)
        cut = {
            name: getattr(self, name)[rows]
            for name in ("seq_lens_cpu", "spans", "encoder_seq_lens", "encoder_page_table", "encoder_seq_lens_cpu")
            if getattr(self, name) is not None
        }
        if self.query_start_loc_cpu is not None:
            cut["query_start_loc_cpu"] = self.query_start_loc_cpu[bounds] - first_token
        return replace(
            self,
            mode=mode,
            seq_lens=self.seq_lens[rows],
            query_start_loc=self.query_start_loc[bounds] - first_token,
            page_table=self.page_table[rows],
            slot_mapping=self.slot_mapping[first_token:last_token],
            num_decodes=0,
            plan_state=None,
            **cut,
        )

    def check(self, page_size: int) -> None:
        """Raise BatchError for what breaks the contract. Reads the device: for tests and debugging, not for serving."""
        b, t = self.batch_size, self.num_tokens
        seq, starts = self.seq_lens.tolist(), self.query_start_loc.tolist()
        query = [hi - lo for lo, hi in pairwise(starts)]
        longest = max(seq, default=0)
        table = tuple(self.page_table.shape)
        int32s = (self.seq_lens, self.query_start_loc, self.page_table)
        rules: list[tuple[bool, str]] = [
            (len(starts) == b + 1, f"query_start_loc has {len(starts)} entries for {b} requests"),
            (starts[-1:] == [t], f"query_start_loc ends at {starts[-1:]}, slot_mapping has {t} tokens"),
            (
                all(0 <= q <= s for q, s in zip(query, seq, strict=False)),
                f"query lengths {query}, sequence lengths {seq}",
            ),
            (self.max_query_len >= max(query, default=0), f"max_query_len {self.max_query_len}, query lengths {query}"),
            (self.max_seq_len >= longest, f"max_seq_len {self.max_seq_len}, sequence lengths {seq}"),
            (self.mode is not ForwardMode.DECODE or all(q == 1 for q in query), f"DECODE with query lengths {query}"),
            (
                self.mode is not ForwardMode.MIXED or all(q == 1 for q in query[: self.num_decodes]),
                f"MIXED with {self.num_decodes} decodes in front, query lengths {query}",
            ),
            (
                table[0] == b and table[1] * page_size >= longest,
                f"page_table {table} of pages of {page_size} for {b} requests of up to {longest} tokens",
            ),
            (
                all(x.dtype == torch.int32 for x in int32s) and self.slot_mapping.dtype == torch.int64,
                "dtypes: seq_lens, query_start_loc and page_table are int32, slot_mapping int64",
            ),
        ]
        for holds, problem in rules:
            if not holds:
                raise BatchError(problem, accepted="see ForwardBatch")


def slots_of(pages: Sequence[int], positions: range, page_size: int) -> list[int]:
    """The slots (page * page_size + offset) of the tokens at ``positions`` of a sequence in ``pages``."""
    return [pages[p // page_size] * page_size + p % page_size for p in positions]


def page_table_of(pages: Sequence[Sequence[int]], device: torch.device | str) -> Tensor:
    """[B, max_pages] int32, rows filled up with the null page 0; at least one column."""
    width = max(1, max((len(row) for row in pages), default=1))
    table = torch.zeros(len(pages), width, dtype=torch.int32)
    for b, row in enumerate(pages):
        table[b, : len(row)] = torch.tensor(list(row), dtype=torch.int32)
    return table.to(device)


def _int32(values: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=device)


def _leading_decodes(query_lens: Sequence[int]) -> int:
    for i, n in enumerate(query_lens):
        if n != 1:
            return i
    return len(query_lens)


def _check_lists(
    mode: ForwardMode,
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    pages: Sequence[Sequence[int]],
    page_size: int,
) -> None:
    if not len(query_lens) == len(seq_lens) == len(pages):
        raise BatchError(
            f"{len(query_lens)} query lengths, {len(seq_lens)} sequence lengths, {len(pages)} page lists",
            accepted="one each a request",
        )
    for b, (n, length, row) in enumerate(zip(query_lens, seq_lens, pages, strict=True)):
        if n > length:
            raise BatchError(
                f"request {b}: {n} new tokens in a sequence of {length}", accepted="seq_len counts the new tokens too"
            )
        if len(row) * page_size < length:
            raise BatchError(
                f"request {b}: {len(row)} pages of {page_size} for {length} tokens",
                accepted=f"{-(-length // page_size)} pages",
            )
    if mode is ForwardMode.DECODE and any(n != 1 for n in query_lens):
        raise BatchError(f"DECODE with query lengths {list(query_lens)}", accepted="1 for each request")
