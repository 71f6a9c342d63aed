"""Captured graphs: one capture, then replays for other lengths, other pages and fewer requests than were captured.

Three replays follow a capture of padding alone: all requests; the same ones grown and in another order; fewer of
others, on other pages, beside padding whose rows hold NaN. The pool holds NaN wherever no token lies, and in the null
page. Each replay is compared with the oracle, and so with the eager step, which other cases compare with it.

On an accelerator the metadata function and the replay run with synchronisation made an error, with the allocator's
counters compared, and under a profiler that would see a copy to the host; the tensors of the captured ``plan_state``
must stay where they are. A CPU has no graphs: the captured calls are made again over the same buffers, which proves the
bookkeeping and nothing else.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_core.runtime.batch import ForwardBatch, TreeMask
from attn_core.testing.checks import Fault, Output, output_faults, snapshot, write_faults
from attn_core.testing.reference import problems
from attn_core.testing.scene import Inputs, Step
from attn_core.testing.tolerances import expect

if TYPE_CHECKING:
    from attn_core.testing.run import Trial


def graph_faults(trial: Trial) -> list[Fault]:
    """What is wrong with the replays of the case, nothing if all is right."""
    waves = [wave[0] for wave in trial.scene.waves]
    graph = CapturedStep(trial, waves[0])
    found: list[Fault] = []
    trial.scene.fill(trial.cache, poison=True)
    before = snapshot(trial.scene, trial.cache)
    for i, step in enumerate(waves):
        if not trial.case.options & {"nosave", "decoy"}:
            outputs, faults = graph.replay(step, strict=i > 0)
            found += [Fault("cuda_graph", f"replay {i}: {fault}") for fault in faults]
            found += [Fault("cuda_graph", f"replay {i}: {fault.message}") for fault in _compared(trial, step, outputs)]
    found += [Fault("cuda_graph", str(f)) for f in write_faults(trial.scene, trial.cache, before, waves)]
    return found


def _compared(trial: Trial, step: Step, outputs: list[Output]) -> list[Fault]:
    found = []
    for inputs, output in zip(step.inputs, outputs, strict=True):
        every = problems(inputs.q, inputs.layer, step.batch, trial.cache)
        expected = expect(every, inputs.q, inputs.layer, trial.precision)
        found += output_faults(output, expected, f"layer {inputs.layer.layer_id}")
    return found


class CapturedStep:
    """The forwards of all layers, captured once for as many requests as ``step`` has, over buffers of its own."""

    def __init__(self, trial: Trial, step: Step) -> None:
        self.trial, self.backend = trial, trial.witness.backend
        self.device = trial.scene.device
        self.capacity = step.batch.batch_size
        self.query_len = step.batch.num_tokens // self.capacity
        self.batch = self._padding(step.batch)
        self.inputs = [_buffers(inputs) for inputs in step.inputs]
        self.backend.init_cuda_graph_state(self.capacity, self.capacity * self.query_len)
        self.backend.init_forward_metadata_capture_cuda_graph(self.batch)
        self.pointers = _pointers(self.batch.plan_state)
        self.outputs: list[Output] = []
        self._replay = self._capture()

    def _padding(self, like: ForwardBatch) -> ForwardBatch:
        """A batch of padded requests alone, with a page table as wide as the longest context needs."""
        page, context = self.trial.scene.page_size, self.trial.scene.config.max_context_len
        assert context is not None, "cases bound their context"
        columns = -(-context // page)
        tokens = self.capacity * self.query_len
        fill = self.backend.cuda_graph_seq_len_fill_value
        encoders = self._encoder_table(like)
        lengths = torch.full_like(like.seq_lens, fill)
        starts = torch.arange(0, tokens + 1, self.query_len, dtype=torch.int32, device=self.device)
        return replace(
            like,
            seq_lens=lengths,
            seq_lens_cpu=None if like.seq_lens_cpu is None else lengths.cpu(),
            query_start_loc=starts,
            query_start_loc_cpu=None if like.query_start_loc_cpu is None else starts.cpu(),
            page_table=torch.zeros(self.capacity, columns, dtype=torch.int32, device=self.device),
            slot_mapping=torch.full((tokens,), -1, dtype=torch.int64, device=self.device),
            max_query_len=self.query_len,
            max_seq_len=context,
            tree=None if like.tree is None else TreeMask(_alone(like.tree.visible)),
            encoder_seq_lens=_zeros_like(like.encoder_seq_lens),
            encoder_seq_lens_cpu=_zeros_like(like.encoder_seq_lens_cpu),
            encoder_page_table=encoders,
            max_encoder_seq_len=0 if encoders is None else encoders.shape[1] * page,
            plan_state=None,
        )

    def _encoder_table(self, like: ForwardBatch) -> Tensor | None:
        """Null pages, as many columns as any encoder of the case has."""
        if like.encoder_page_table is None:
            return None
        columns = max(1, *(len(pages) for pages in self.trial.scene.encoder_pages))
        return torch.zeros(self.capacity, columns, dtype=torch.int32, device=self.device)

    def _run(self) -> None:
        options = self.trial.case.options
        self.outputs = []
        for inputs in self.inputs:
            result = self.backend.forward(
                inputs.q, inputs.k, inputs.v, inputs.layer, self.batch, return_lse="lse" in options
            )
            self.outputs.append(Output(*result) if isinstance(result, tuple) else Output(result, None))

    def _capture(self) -> Callable[[], None]:
        if self.device.type == "cpu":
            return self._run
        library: Any = getattr(torch, self.device.type)
        side = library.Stream()
        side.wait_stream(library.current_stream())
        with library.stream(side):
            for _ in range(2):  # what compiles or tunes itself does so before the capture
                self._run()
        library.current_stream().wait_stream(side)
        library.synchronize()
        graph = getattr(library, f"{self.device.type.upper()}Graph")()
        with library.graph(graph):
            self._run()
        return graph.replay  # type: ignore[no-any-return]

    def replay(self, step: Step, *, strict: bool) -> tuple[list[Output], list[str]]:
        """The outputs of the step's own rows, and what the replay did that it may not. ``strict``: watch the host."""
        batch = self._load(step)
        watch = _Watch(self.device, strict)
        with watch.replaying():
            self.backend.init_forward_metadata_replay_cuda_graph(batch)
            self._replay()
        moved = [name for name, at in _pointers(self.batch.plan_state).items() if self.pointers.get(name, at) != at]
        faults = [*watch.faults, *(f"{name} of plan_state moved since the capture" for name in moved)]
        rows = step.batch.num_tokens
        outputs = [Output.on_host(o.out[:rows], None if o.lse is None else o.lse[:rows]) for o in self.outputs]
        return outputs, faults

    def _load(self, step: Step) -> ForwardBatch:
        """The step in the buffers, padded up to the capacity; rows of padding hold NaN."""
        own, new = self.batch, step.batch
        n, tokens = new.batch_size, new.num_tokens
        fill = self.backend.cuda_graph_seq_len_fill_value
        _load_rows(own.seq_lens, new.seq_lens, fill)
        _load_rows(own.slot_mapping, new.slot_mapping, -1)
        columns = min(own.page_table.shape[1], new.page_table.shape[1])
        own.page_table.zero_()
        own.page_table[:n, :columns] = new.page_table[:, :columns]
        if own.tree is not None and new.tree is not None:
            own.tree.visible[:n] = new.tree.visible
        if own.encoder_seq_lens is not None and new.encoder_seq_lens is not None:
            assert own.encoder_page_table is not None, "encoder lengths without pages"
            assert new.encoder_page_table is not None, "encoder lengths without pages"
            _load_rows(own.encoder_seq_lens, new.encoder_seq_lens, 0)
            own.encoder_page_table.zero_()
            shared = min(own.encoder_page_table.shape[1], new.encoder_page_table.shape[1])
            own.encoder_page_table[:n, :shared] = new.encoder_page_table[:, :shared]
        for buffers, inputs in zip(self.inputs, step.inputs, strict=True):
            for name in ("q", "k", "v"):
                buffer, rows = getattr(buffers, name), getattr(inputs, name)
                if buffer is not None and rows is not None:
                    buffer[:tokens] = rows
                    buffer[tokens:] = float("nan")
        longest = max(int(new.seq_lens.max()), fill)
        host = None if own.seq_lens_cpu is None else own.seq_lens.cpu()
        encoder = (
            None if own.encoder_seq_lens_cpu is None or own.encoder_seq_lens is None else own.encoder_seq_lens.cpu()
        )
        return replace(own, max_seq_len=longest, seq_lens_cpu=host, encoder_seq_lens_cpu=encoder, plan_state=None)


def _load_rows(buffer: Tensor, rows: Tensor, padding: int) -> None:
    buffer[: rows.shape[0]] = rows
    buffer[rows.shape[0] :] = padding


def _alone(visible: Tensor) -> Tensor:
    """A tree [B, q, q] in which every token sees itself alone."""
    return torch.eye(visible.shape[-1], dtype=torch.bool, device=visible.device).expand_as(visible).clone()


def _zeros_like(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.zeros_like(tensor)


def _buffers(inputs: Inputs) -> Inputs:
    q, k, v = (None if t is None else torch.zeros_like(t) for t in (inputs.q, inputs.k, inputs.v))
    assert q is not None, "every forward has queries"
    return Inputs(inputs.layer, q, k, v)


class _Watch:
    """What an accelerator's host does while a graph is replayed: waits, allocations, copies to the host."""

    def __init__(self, device: torch.device, strict: bool) -> None:
        self.device, self.strict = device, strict and device.type == "cuda"
        self.faults: list[str] = []

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Everything inside is watched if it should be."""
        if not self.strict:
            yield
            self._settle()
            return
        torch.cuda.synchronize()
        allocations = _allocations()
        with warnings.catch_warnings():
            # both tools announce that they are young, the profiler as it begins and as it is read
            warnings.simplefilter("ignore", UserWarning)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                torch.cuda.set_sync_debug_mode("error")
                try:
                    yield
                except RuntimeError as error:
                    if "synchroniz" not in str(error):
                        raise
                    self.faults.append(f"it waits for the host: {str(error).splitlines()[0]}")
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                made = _allocations() - allocations
                torch.cuda.synchronize()
            events = profile.events() or ()
        copies = [event.name for event in events if "DtoH" in event.name]
        self.faults += [f"{made} allocations on the device"] if made else []
        self.faults += [f"{len(copies)} copies from the device to the host ({copies[0]})"] if copies else []

    def _settle(self) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()


def _allocations() -> int:
    """How many blocks the allocator has handed out since the process began."""
    return int(torch.cuda.memory_stats()["allocation.all.allocated"])


def _pointers(state: object, path: str = "plan_state", depth: int = 4) -> dict[str, int]:
    """Where every tensor that hangs from ``state`` lies, by the way to it."""
    if isinstance(state, Tensor):
        return {path: state.data_ptr()} if state.device.type != "meta" else {}
    if depth == 0 or state is None or isinstance(state, str | int | float | bool):
        return {}
    found: dict[str, int] = {}
    for name, value in _members(state):
        found |= _pointers(value, f"{path}.{name}", depth - 1)
    return found


def _members(state: object) -> Iterator[tuple[str, object]]:
    if isinstance(state, dict):
        yield from ((str(key), value) for key, value in state.items())
    elif isinstance(state, list | tuple):
        yield from ((str(i), value) for i, value in enumerate(state))
    elif is_dataclass(state) and not isinstance(state, type):
        yield from ((f.name, getattr(state, f.name)) for f in fields(state))
    else:
        yield from vars(state).items() if hasattr(state, "__dict__") else ()
