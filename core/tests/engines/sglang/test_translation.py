"""SGLang's layers, pools, tables and batches in our terms, compared with SGLang's own attention over its own pools."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import attn_core
import pytest
import torch
from attn_core.engines.sglang import backend as adapter
from attn_core.engines.sglang.backend import SGLangBackend
from attn_core.errors import BackendRefusedError, BatchError, ConfigError
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from torch import Tensor

from .runners import CONTEXT, HEADS, RANK, ROPE, Layers, batch, runner, states

TOLERANCE = 2e-6
SPECULATION = SimpleNamespace(speculative_algorithm="EAGLE", speculative_eagle_topk=4, speculative_num_draft_tokens=3)
_serial = itertools.count()


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """SGLang's settings of a process, which only a launched engine has."""

    def change(spec: Any = None, graphs: bool = False, check: Callable[[Any], None] = lambda runner: None) -> None:
        spec = spec or SimpleNamespace(speculative_algorithm=None)
        monkeypatch.setattr(adapter, "speculative_settings", lambda: (spec, "prefill"))
        monkeypatch.setattr(adapter, "graphs_of_decode", lambda runner: graphs)
        monkeypatch.setattr(adapter, "deterministic", lambda: False)
        monkeypatch.setattr(adapter, "check_served", check)

    change()
    return change


def graphed(changed: Any) -> str:
    """torch_native under a new name, with graphs on the CPU, where they are run again instead of captured."""
    name = f"graphed{next(_serial)}"
    cls = changed(name)
    attn_core.unregister(name)
    from importlib.resources import files

    from attn_core.planning.manifest import Manifest

    text = files("attn_core").joinpath("torch_native.toml").read_text(encoding="utf-8")
    text = text.replace('name = "torch_native"', f'name = "{name}"').replace('"deterministic"]', '"cuda_graph"]')
    attn_core.register(cls, Manifest.parse(text, source="<test>"))
    return name


def compared(ours: Any, theirs: Any, given: Any, its: Any, tokens: int, layers: tuple[Layers, Layers]) -> float:
    """The largest difference of the two layers' outputs for the same queries, keys and values."""
    ours.init_forward_metadata(given)
    theirs.init_forward_metadata(its)
    worst = 0.0
    for index in (0, 1):
        q, k, v = states(tokens)
        got = ours.forward(q, k, v, layers[0].attention(index), given)
        wanted = theirs.forward(q.contiguous(), k, v, layers[1].attention(index), its)
        assert got.shape == wanted.shape
        worst = max(worst, float((got - wanted).abs().max()))
    return worst


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize(("kind", "window"), [("mha", -1), ("mha", 5), ("swa", 5)])
def test_prefill_with_and_without_a_prefix_then_decode(kind: str, window: int, page_size: int) -> None:
    """Windows reach ``window`` tokens back, one fewer than ours count; in one pool, or in a pool of their own."""
    torch.manual_seed(page_size)
    layers = Layers(window=window), Layers(window=window)
    torch.manual_seed(7)
    one = runner(layers[0], kind, page_size=page_size)
    torch.manual_seed(7)
    two = runner(layers[1], page_size=page_size)  # SGLang's torch_native reads a window pool by the other's slots
    ours, theirs = SGLangBackend("auto", one), TorchNativeAttnBackend(two)
    steps = [
        (ForwardMode.EXTEND, [1, 3], [9, 5], [9, 5]),
        (ForwardMode.EXTEND, [3, 2], [7, 11], [12, 11]),
        (ForwardMode.MIXED, [2, 1], [6, 1], [17, 10]),  # SGLang puts its decodes last
        (ForwardMode.DECODE, [1, 2, 3], [1, 1, 1], [11, 18, 13]),
    ]
    for mode, rows, new, lens in steps:
        given, its = (batch(mode, rows, new, lens, of) for of in (one, two))
        assert compared(ours, theirs, given, its, sum(new), layers) < TOLERANCE
    for i in (0, 1):
        mine, other = (of.token_to_kv_pool.get_key_buffer(i) for of in (one, two))
        if kind == "swa" and i == 0:
            mine = mine[one.token_to_kv_pool.full_to_swa_index_mapping[:-1]]
        assert torch.equal(mine[page_size:], other[page_size:]), "the keys lie where SGLang would have put them"


def test_a_window_off_by_one_would_be_seen(changed: Any) -> None:
    from dataclasses import replace

    name = f"wide{next(_serial)}"
    changed(name, layer=lambda at: replace(at, sliding_window=at.sliding_window and at.sliding_window + 1))
    layers = Layers(window=5), Layers(window=5)
    torch.manual_seed(7)
    one = runner(layers[0], backend=f"attn-{name}")
    torch.manual_seed(7)
    two = runner(layers[1])
    given, its = (batch(ForwardMode.EXTEND, [1], [12], [12], of) for of in (one, two))
    assert compared(SGLangBackend(name, one), TorchNativeAttnBackend(two), given, its, 12, layers) > 1e-2


def test_a_latent_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_absorb_under", lambda name: None)
    model = Layers(latent=True)
    of = runner(model, "mla", page_size=4)
    ours = SGLangBackend("auto", of)
    rows = torch.zeros(0, 1, RANK + ROPE)
    for mode, new in ((ForwardMode.EXTEND, 9), (ForwardMode.DECODE, 1)):
        given = batch(mode, [2], [new], [rows.shape[0] + new], of)
        ours.init_forward_metadata(given)
        q, k, v = states(new, latent=True)
        got = ours.forward(q, k, v, model.attention(0), given)
        rows = torch.cat((rows, k))
        scores = torch.einsum("qhd,kd->hqk", q.view(new, HEADS, -1), rows[:, 0]) * 0.25
        hidden = torch.ones(new, rows.shape[0]).triu(rows.shape[0] - new + 1).bool()
        wanted = torch.einsum("hqk,kd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), rows[:, 0, :RANK])
        assert (got - wanted.flatten(1)).abs().max() < TOLERANCE


def test_an_fp8_cache_is_written_and_read_with_its_scales() -> None:
    model = Layers()
    model.attention(0).k_scale_float, model.attention(0).v_scale_float = 0.5, 2.0
    of = runner(model, cache=torch.float8_e4m3fn)
    ours = SGLangBackend("auto", of)
    given = batch(ForwardMode.EXTEND, [1], [3], [3], of)
    ours.init_forward_metadata(given)
    q, k, v = states(3)
    ours.forward(q, k, v, model.attention(0), given)
    slots = given.out_cache_loc
    stored = of.token_to_kv_pool.get_key_buffer(0)[slots].float() * 0.5
    assert (stored - k).abs().max() < 0.1 * k.abs().max()
    assert of.token_to_kv_pool.k_buffer[0].dtype == torch.uint8


TREE = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)


def masks(lens: list[int], whole: bool) -> Tensor:
    """SGLang's two forms: a row has the prefix and the draft tokens, or these alone."""
    return torch.cat([
        torch.cat((torch.ones(3, n if whole else 0, dtype=torch.bool), TREE), dim=1).flatten() for n in lens
    ])  # fmt: skip


@pytest.mark.parametrize("whole", [False, True])
def test_draft_tokens_are_verified_as_a_tree(whole: bool, settings: Callable[..., None]) -> None:
    """Draft tokens 1 and 2 follow token 0 and do not see each other: each has the output of its own branch."""
    settings(spec=SPECULATION)
    model = Layers()
    of = runner(model, page_size=4)
    ours = SGLangBackend("auto", of)
    ours.init_forward_metadata(first := batch(ForwardMode.EXTEND, [1, 2], [5, 9], [5, 9], of))
    ours.forward(*states(14), model.attention(1), first)
    info = SimpleNamespace(custom_mask=masks([5, 9], whole))
    given = batch(ForwardMode.TARGET_VERIFY, [1, 2], [3, 3], [5, 9], of, spec_info=info)
    ours.init_forward_metadata(given)
    (ready,) = ours.forward_metadata
    ready.check(4)
    assert ready.seq_lens.tolist() == [8, 12], "ours count the draft tokens"
    assert torch.equal(ready.tree.visible, TREE.repeat(2, 1, 1))
    q, k, v = states(6)
    got = ours.forward(q, k, v, model.attention(1), given)
    for branch in ([0, 1], [0, 2]):
        rows = torch.tensor([*branch, *(b + 3 for b in branch)])
        chain = batch(ForwardMode.EXTEND, [1, 2], [2, 2], [7, 11], of)
        ours.init_forward_metadata(chain)
        wanted = ours.forward(q[rows], k[rows], v[rows], model.attention(1), chain)
        assert (got[rows] - wanted).abs().max() < TOLERANCE


def test_the_draft_stage_fills_the_mask_after_metadata_was_made(settings: Callable[..., None]) -> None:
    settings(spec=SPECULATION)
    of = runner(Layers())
    ours = SGLangBackend("auto", of)
    mask = ours.verify_mask
    assert mask.mode.name == "QLEN_ONLY"
    assert mask.fits(4)
    info = SimpleNamespace(custom_mask=mask.buffer)
    ours.init_forward_metadata(batch(ForwardMode.TARGET_VERIFY, [1], [3], [5], of, spec_info=info))
    mask.buffer[:9] = TREE.flatten()
    ours.update_verify_buffers_to_fill_after_draft(info, None)
    assert torch.equal(ours.forward_metadata[0].tree.visible[0], TREE)


@pytest.mark.parametrize("kind", ["mha", "swa"])
def test_a_replay_over_padded_buffers_is_the_eager_step(kind: str, settings: Callable[..., None], changed: Any) -> None:
    """SGLang pads with row 0 of its table, slot 0 and the fill value; captures the largest size first."""
    settings(graphs=True)
    name = graphed(changed)
    model = Layers(window=5)
    of = runner(model, kind, page_size=4, backend=f"attn-{name}")
    ours = SGLangBackend(name, of)
    ours.init_forward_metadata(first := batch(ForwardMode.EXTEND, [1, 2, 3], [9, 14, 6], [9, 14, 6], of))
    for i in (0, 1):
        ours.forward(*states(29), model.attention(i), first)
    fill = ours.get_cuda_graph_seq_len_fill_value()
    ours.init_cuda_graph_state(4, 4)
    for size in (4, 2):
        ours.init_forward_metadata_out_graph(padded([], [], size, fill, of), True)
    pointers = [ready.page_table.data_ptr() for ready in ours.forward_metadata]
    for rows, lens in (([1, 3], [10, 7]), ([2], [15]), ([2, 1, 3], [16, 11, 8])):
        live, size = len(rows), 2 if len(rows) <= 2 else 4
        q, k, v = states(size)
        eager = batch(ForwardMode.DECODE, rows, [1] * live, lens, of)
        ours.init_forward_metadata(eager)
        wanted = [ours.forward(q[:live], k[:live], v[:live], model.attention(i), eager) for i in (0, 1)]
        replayed = padded(rows, lens, size, fill, of)
        ours.init_forward_metadata_out_graph(replayed)
        ours.init_forward_metadata_in_graph(replayed)
        for i in (0, 1):
            got = ours.forward(q, k, v, model.attention(i), replayed)
            assert (got[:live] - wanted[i]).abs().max() < TOLERANCE
        if size == 2:
            assert [ready.page_table.data_ptr() for ready in ours.forward_metadata] == pointers


def padded(rows: list[int], lens: list[int], size: int, fill: int, of: Any) -> Any:
    """A decode batch of ``size`` requests as SGLang fills its buffers: the rest is row 0 and slot 0."""
    missing = size - len(rows)
    slots = [of.req_to_token_pool.req_to_token[r, n - 1] for r, n in zip(rows, lens, strict=True)]
    seq_lens = torch.tensor([*lens, *[fill] * missing])
    return SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        batch_size=size,
        req_pool_indices=torch.tensor([*rows, *[0] * missing]),
        seq_lens=seq_lens,
        seq_lens_cpu=seq_lens.clone(),
        out_cache_loc=torch.tensor([*slots, *[0] * missing], dtype=torch.int64),
        spec_info=None,
    )


UNSAID: dict[str, tuple[dict[str, Any], str]] = {
    "cross": ({"is_cross_attention": True}, "cross-attention"),
    "encoder": ({"attn_type": AttentionType.ENCODER_ONLY}, "encoder_only"),
    "chunks": ({"use_irope": True}, "iRoPE"),
    "cap": ({"logit_cap": 3.0, "logit_capping_method": "sigmoid"}, "sigmoid"),
}


@pytest.mark.parametrize("what", UNSAID)
def test_layers_that_the_contract_cannot_say_are_refused(what: str) -> None:
    asked, message = UNSAID[what]
    with pytest.raises(ConfigError, match=message):
        SGLangBackend("auto", runner(Layers(**asked)))


def test_keys_that_are_not_given_are_there_already() -> None:
    model = Layers()
    of = runner(model)
    ours = SGLangBackend("auto", of)
    given = batch(ForwardMode.EXTEND, [1], [4], [4], of)
    ours.init_forward_metadata(given)
    q, k, v = states(4)
    wanted = ours.forward(q, k, v, model.attention(0), given)
    assert torch.equal(ours.forward(q, None, None, model.attention(0), given), wanted)
    assert torch.equal(ours.forward(q, k * 9, v * 9, model.attention(0), given, save_kv_cache=False), wanted)


def test_a_soft_cap_is_part_of_the_plan() -> None:
    of = runner(Layers(logit_cap=5.0))
    assert SGLangBackend("auto", of)._of_layer[0][1].softcap == 5.0


def test_an_argument_that_is_not_known_is_refused() -> None:
    model = Layers()
    of = runner(model)
    ours = SGLangBackend("auto", of)
    given = batch(ForwardMode.DECODE, [1], [1], [1], of)
    ours.init_forward_metadata(given)
    with pytest.raises(ConfigError, match="k_rope"):
        ours.forward(*states(1), model.attention(0), given, k_rope=torch.zeros(1))
    with pytest.raises(ConfigError, match="sinks given, planned as sinks=False"):
        ours.forward(*states(1), model.attention(0), given, sinks=torch.zeros(HEADS))


def test_sinks_are_found_where_the_model_keeps_them() -> None:
    model = Layers()
    for i in (0, 1):
        getattr(model, f"layer{i}").sinks = torch.nn.Parameter(torch.randn(HEADS))
    of = runner(model)
    ours = SGLangBackend("auto", of)
    given = batch(ForwardMode.EXTEND, [1], [4], [4], of)
    ours.init_forward_metadata(given)
    q, k, v = states(4)
    with torch.no_grad():
        got = ours.forward(q, k, v, model.attention(0), given, sinks=model.layer0.sinks)
    scores = torch.einsum("hd,hd->h", q[0].view(HEADS, -1), k[0].repeat_interleave(2, 0)) * 0.25
    share = scores.exp() / (scores.exp() + model.layer0.sinks.detach().exp())
    assert (got[0].view(HEADS, -1) - share[:, None] * v[0].repeat_interleave(2, 0)).abs().max() < TOLERANCE


@pytest.mark.parametrize("mode", [ForwardMode.DRAFT_EXTEND_V2, ForwardMode.DLLM_EXTEND])
def test_modes_that_are_not_translated_are_refused(mode: ForwardMode) -> None:
    of = runner(Layers())
    with pytest.raises(BatchError, match=mode.name):
        SGLangBackend("auto", of).init_forward_metadata(batch(mode, [1], [1], [1], of))


def test_a_graph_of_prefill_is_refused() -> None:
    of = runner(Layers())
    with pytest.raises(BatchError, match="EXTEND"):
        SGLangBackend("auto", of).init_forward_metadata_out_graph(batch(ForwardMode.EXTEND, [1], [2], [2], of), True)


def test_graphs_need_a_backend_that_has_them(settings: Callable[..., None]) -> None:
    settings(graphs=True)
    with pytest.raises(BackendRefusedError, match="torch_native"):
        SGLangBackend("torch_native", runner(Layers(), backend="attn-torch_native"))


def test_page_sizes_are_never_changed() -> None:
    ours = SGLangBackend("auto", runner(Layers(), page_size=4))
    assert [group.router.config.page_size for group in ours._groups] == [4]
    assert ours._groups[0].router.kv_cache.num_pages == (512 + 4) // 4
    assert ours._groups[0].router.config.max_context_len == CONTEXT


@pytest.mark.parametrize(
    ("backends", "mode", "phases"),
    [
        (("attn", "attn"), "prefill", {"prefill", "decode", "verify"}),
        (("attn", "triton"), "prefill", {"prefill", "verify"}),
        (("triton", "attn"), "prefill", {"decode"}),
        (("triton", "attn"), "decode", {"decode", "verify"}),
    ],
)
def test_only_the_phases_that_sglang_gives_it_are_planned(
    backends: tuple[str, str], mode: str, phases: set[str], settings: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings(spec=SPECULATION)
    monkeypatch.setattr(adapter, "speculative_settings", lambda: (SPECULATION, mode))
    of = runner(Layers())
    of.prefill_attention_backend_str, of.decode_attention_backend_str = backends
    assert set(SGLangBackend("auto", of)._groups[0].router.plan.phases) == phases
