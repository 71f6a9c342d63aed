"""Every call that our code makes is one that the real library takes: bound against the wheel's own sources."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from attn_core.runtime.batch import ForwardMode, TreeMask
from attn_core.runtime.layer import AttentionLayer
from attn_flashinfer.mha import FlashInferBackend
from attn_flashinfer.mla import FlashInferMLABackend
from fake_flashinfer import MLA, Decode, FakeFlashInfer, Prefill, Ragged
from real_wheel import signature_of, source
from test_mha import KIND as MHA_KIND
from test_mha import PARENTS, STEPS, batch_of, config_of, inputs, layer_of, random_cache
from test_mla import batch_of as latent_batch_of
from test_mla import config_of as latent_config_of
from test_mla import random_cache as latent_random_cache

FLASHINFER = "flashinfer-python==0.7.2.post1"
DECODE = ("flashinfer/decode.py", "BatchDecodeWithPagedKVCacheWrapper")
PREFILL = ("flashinfer/prefill.py", "BatchPrefillWithPagedKVCacheWrapper")
RAGGED = ("flashinfer/prefill.py", "BatchPrefillWithRaggedKVCacheWrapper")
LATENT = ("flashinfer/mla/_batch_mla/_wrapper.py", "BatchMLAPagedAttentionWrapper")
#: Each function of the stand-in, and where the real one is.
FUNCTIONS: dict[str, tuple[Callable[..., object], tuple[str, str]]] = {
    "decode wrapper": (Decode.__init__, (DECODE[0], f"{DECODE[1]}.__init__")),
    "decode plan": (Decode.plan, (DECODE[0], f"{DECODE[1]}._plan_impl")),
    "decode run": (Decode.run, (DECODE[0], f"{DECODE[1]}.run")),
    "prefill wrapper": (Prefill.__init__, (PREFILL[0], f"{PREFILL[1]}.__init__")),
    "prefill plan": (Prefill.plan, (PREFILL[0], f"{PREFILL[1]}.plan")),
    "prefill run": (Prefill.run, (PREFILL[0], f"{PREFILL[1]}.run")),
    "prefill workspace": (Prefill.reset_workspace_buffer, (PREFILL[0], f"{PREFILL[1]}.reset_workspace_buffer")),
    "decode workspace": (Decode.reset_workspace_buffer, (DECODE[0], f"{DECODE[1]}.reset_workspace_buffer")),
    "ragged wrapper": (Ragged.__init__, (RAGGED[0], f"{RAGGED[1]}.__init__")),
    "ragged plan": (Ragged.plan, (RAGGED[0], f"{RAGGED[1]}.plan")),
    "ragged run": (Ragged.run, (RAGGED[0], f"{RAGGED[1]}.run")),
    "mla wrapper": (MLA.__init__, (LATENT[0], f"{LATENT[1]}.__init__")),
    "mla plan": (MLA.plan, (LATENT[0], f"{LATENT[1]}.plan")),
    "mla run": (MLA.run, (LATENT[0], f"{LATENT[1]}.run")),
}


def real(name: str) -> inspect.Signature:
    member, function = FUNCTIONS[name][1]
    return signature_of(source(FLASHINFER, member), function)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_the_stand_in_takes_the_library_takes_in_the_same_places(name: str) -> None:
    """Our calls run against the stand-in in every other test: so each of them binds to the real function too."""
    ours = [p for p in inspect.signature(FUNCTIONS[name][0]).parameters.values() if p.name != "self"]
    theirs = {p: i for i, p in enumerate(q for q in real(name).parameters if q != "self")}
    missing = [p.name for p in ours if p.name not in theirs]
    assert not missing, f"{name}: the library has no {missing}"
    positional = [p.name for p in ours if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    required = [p.name for p in ours if p.default is inspect.Parameter.empty]
    assert [theirs[p] for p in required if p in positional] == sorted(theirs[p] for p in required if p in positional)
    real(name).bind(
        **dict.fromkeys(p.name for p in ours if p.kind is not inspect.Parameter.VAR_KEYWORD), **self_of(name)
    )


def self_of(name: str) -> dict[str, None]:
    """fast_decode_plan is a method in all but place: its first argument is the wrapper."""
    return {"self": None} if "self" in real(name).parameters else {}


def test_every_required_argument_of_the_library_is_given(fake: FakeFlashInfer) -> None:
    """The calls of a decode, a prefill, a tree, a ragged and a latent step, with what each really passed."""
    for step, tree in (("decode", False), ("prefix", False), ("chain", True)):
        mode, query, lens = STEPS[step]
        if tree:
            query, lens = [6, 6], [14, 9]
        mask = TreeMask.from_parents(torch.tensor(PARENTS[:2])) if tree else None
        batch = batch_of(mode, query, lens, tree=mask)
        config = config_of(MHA_KIND)
        backend = FlashInferBackend(config, random_cache(config))
        backend.init_forward_metadata(batch)
        backend.forward(*inputs(MHA_KIND, batch.num_tokens), layer_of(config), batch, return_lse=True)
    latent = latent_config_of()
    latent_batch = latent_batch_of(ForwardMode.EXTEND, [2], [5])
    latent_backend = FlashInferMLABackend(latent, latent_random_cache(latent))
    latent_backend.init_forward_metadata(latent_batch)
    layer = AttentionLayer.of_kind(latent.layers[0], 0)
    latent_backend.forward(torch.randn(2, 4, 576).bfloat16(), None, None, layer, latent_batch)
    names = {"Decode": "decode", "Prefill": "prefill", "MLA": "mla"}
    for list_name, what in (("plans", "plan"), ("runs", "run")):
        for wrapper, arguments in getattr(fake, list_name):
            signature = real(f"{names[wrapper]} {what}")
            passed = {k: v for k, v in arguments.items() if k not in ("self", "a", "wrapper")}
            signature.bind(**passed)
    assert len(fake.plans) == 4


def test_a_changed_signature_would_fail() -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        real("prefill run").bind(q=None, paged_kv_cache=None, not_an_argument=None)
    with pytest.raises(TypeError, match="missing"):
        real("prefill plan").bind(causal=True)


@pytest.mark.parametrize(
    ("member", "names"),
    [
        (PREFILL[0], ("self._mask_indptr_buf = ", "self._custom_mask_buf is not None")),
        *((file, ("self._plan_info = self._cached_module.plan(",)) for file, _ in (PREFILL, DECODE)),
        (
            "flashinfer/mla/_batch_mla/_backends/_fa_common.py",
            (
                "self._int_workspace_buffer = ", "self._pin_memory_int_workspace_buffer = ", "self._cached_module = ",
                "self._plan_info = ", "self._causal = ", "self._float_workspace_buffer = ",
            ),
        ),
        (LATENT[0], ("self._planned_backend = planned_backend",)),
    ],
)  # fmt: skip
def test_the_inner_names_that_we_touch_are_still_there(member: str, names: tuple[str, ...]) -> None:
    text = source(FLASHINFER, member)
    assert [name for name in names if name not in text] == []


@pytest.mark.parametrize(
    ("member", "function", "of_fa2"),
    [
        ("batch_prefill.cu", "BatchPrefillWithKVCachePlan", True),
        ("batch_prefill_sm90.cu", "BatchPrefillWithKVCacheSM90Plan", False),
    ],
)
def test_the_compiled_planners_take_what_graphs_pass_in_this_order(member: str, function: str, of_fa2: bool) -> None:
    """`GraphPlanner` calls them past the wrappers, with positions alone."""
    text = source(FLASHINFER, f"flashinfer/data/csrc/{member}")
    inside = text[text.index(f"Array<int64_t> {function}(") :]
    declared = inside[inside.index("(") + 1 : inside.index(")")].split(",")
    names = [argument.partition("=")[0].split()[-1] for argument in declared]
    more = ["fixed_split_size", "disable_split_kv", "num_colocated_ctas", "uniform_q_len"]
    assert names == [
        "float_workspace_buffer", "int_workspace_buffer", "page_locked_int_workspace_buffer", "qo_indptr", "kv_indptr",
        "kv_len_arr", "total_num_rows", "batch_size", "num_qo_heads", "num_kv_heads", "page_size", "enable_cuda_graph",
        "head_dim_qk", "head_dim_vo", "causal", "window_left", *(more if of_fa2 else ()),
    ]  # fmt: skip


def test_in_a_graph_keys_are_always_split_so_that_one_layout_serves_all_lengths() -> None:
    text = source(FLASHINFER, "flashinfer/data/include/flashinfer/attention/scheduler.cuh")
    assert "std::make_tuple(enable_cuda_graph || low < max_kv_len, low)" in text
    assert "enable_cuda_graph ? std::max(max_batch_size_if_split, total_num_tiles_q) : new_batch_size" in text


def test_the_order_of_the_mla_planners_tables_is_the_one_we_pass() -> None:
    """`PlanTables` plans them again without the wrapper, as `_plan_generated_fa` does."""
    text = source(FLASHINFER, "flashinfer/mla/_batch_mla/_backends/_fa_common.py")
    inside = text[text.index("plan_args = (") :]
    order = [line.strip().rstrip(",") for line in inside[: inside.index(")")].splitlines()[1:] if line.strip()]
    assert order == [
        "self._float_workspace_buffer", "self._int_workspace_buffer", "self._pin_memory_int_workspace_buffer",
        "qo_indptr_host", "kv_indptr_host", "kv_len_arr_host", "num_heads", "head_dim_ckv", "causal",
    ]  # fmt: skip


def test_the_mla_planner_leaves_the_copy_of_its_tables_to_the_library_s_proxy_and_to_us() -> None:
    """`mla_graphs._planner` calls what the proxy wraps, and makes the copy itself."""
    text = source(FLASHINFER, "flashinfer/jit/attention/modules.py")
    proxy = text[text.index("class _BatchMLAModuleProxy") :]
    proxy = proxy[: proxy.index("def plan(self")]
    assert "self._module = module" in proxy
    assert "plan_info, staged_int_workspace_bytes = self._module.plan(*args)" in proxy
    assert "device_bytes[:staged_int_workspace_bytes].copy_(staging, non_blocking=True)" in proxy
    planner = source(FLASHINFER, "flashinfer/data/include/flashinfer/attention/scheduler.cuh")
    assert "cudaMemcpyAsync" not in planner[planner.index("inline cudaError_t MLAPlan(") :]


def test_the_traps_we_work_around_are_still_in_the_library() -> None:
    """If one is gone, its workaround can go too."""
    prefill = source(FLASHINFER, PREFILL[0])
    assert "left (inclusive) window size" in prefill
    assert "mask_indptr = _compute_page_mask_indptr(" in prefill, "starts of packed masks, counted in bits"
    sinks = source(FLASHINFER, "flashinfer/attention/_core.py")
    uri = sinks[sinks.index("batch_prefill_attention_sink_") :].splitlines()[0]
    assert "head_dim" not in uri, "one module name for all head sizes"
