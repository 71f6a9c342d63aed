"""The one attention kernel: some query rows of one KV head over some of its keys, with their log-sum-exp.

A workgroup takes one item of the work list (`attn_wave.work`): rows that share a KV head, and a run of keys. What a row
sees is an interval of positions, read from tables, so that causality, windows, spans, given keys and prefixes are one
kernel; so are head counts, group sizes, page sizes and layouts, since rows of q, k and v are found through tables too.
Results are joined by their log-sum-exp outside. Online softmax: Milakov and Gimelshein (2018).

Index arithmetic is never negative: Wave marks it unsigned, and a negative index gives another address without a word.
"""

import sympy
import wave_lang.kernel.lang as tkl
import wave_lang.kernel.wave as tkw
from wave_lang.kernel.lang.global_symbols import GLOBAL_ADDRESS_SPACE, SHARED_ADDRESS_SPACE
from wave_lang.kernel.wave.constraints import MMAType
from wave_lang.kernel.wave.utils.mma_utils import get_mfma_load_elems_per_thread, get_mfma_store_elems_per_thread

from attn_wave.variant import LOG2_E, MASKED, UNIT, WORK_FIELDS

_MMA = MMAType.F32_16x16x16_F16
_LANES = 64


def attend_kernel(variant):
    """``(kernel, substitutions, dynamic symbols)`` of a `Variant`, for wave_compile. A fresh one for every compilation.

    Arguments, in order: q, k, v in units [*, 1, UNIT] of where their rows of D, D and E elements may begin (v of MLA is
    k: its first E columns); work [W, 10] int32, columns `WORK_FIELDS`; query_rows, low, high [*] int32 by query row;
    key_rows, value_rows [*] int32 by key; (tree: visible [*] int8;) factors [2] fp32, scale and soft cap;
    out [*, E] fp32, lse [*] fp32 of base 2.
    """
    W, R, K, D, E = (tkl.sym.W, tkl.sym.R, tkl.sym.K, tkl.sym.D, tkl.sym.E)
    H, F = tkl.sym.H, tkl.sym.F
    BLOCK_W, BLOCK_R, BLOCK_K, BLOCK_E = tkl.sym.BLOCK_W, tkl.sym.BLOCK_R, tkl.sym.BLOCK_K, tkl.sym.BLOCK_E
    BLOCK_H = tkl.sym.BLOCK_H
    KEY_SPACE = tkl.sym.KEY_SPACE
    LOAD_QK, LOAD_PV, STORE = tkl.sym.LOAD_QK, tkl.sym.LOAD_PV, tkl.sym.STORE
    ROW_START, KEY_START, KEY_BASE = tkl.sym.ROW_START, tkl.sym.KEY_START, tkl.sym.KEY_BASE
    QUERY_OFFSET, KEY_OFFSET, OUT_START = tkl.sym.QUERY_OFFSET, tkl.sym.KEY_OFFSET, tkl.sym.OUT_START
    NUM_DRAFTS, VALUE_OFFSET, N = tkl.sym.NUM_DRAFTS, tkl.sym.VALUE_OFFSET, tkl.sym.N
    w, h, r, key, d, e = (tkl.sym.w, tkl.sym.h, tkl.sym.r, tkl.sym.key, tkl.sym.d, tkl.sym.e)
    dtype = {"float16": tkl.f16, "bfloat16": tkl.bf16}[variant.dtype]
    constraints = [
        tkw.WorkgroupConstraint(W, BLOCK_W, 0),
        tkw.WorkgroupConstraint(R, BLOCK_R, 1, iters=1),
        tkw.WorkgroupConstraint(E, BLOCK_E, 2),
        tkw.WorkgroupConstraint(H, BLOCK_H, 3),
        tkw.TilingConstraint(K, BLOCK_K),
        tkw.WaveConstraint(R, BLOCK_R / variant.waves),
        tkw.WaveConstraint(E, BLOCK_E),
        tkw.HardwareConstraint(threads_per_wave=_LANES, mma_type=_MMA, vector_shapes={W: 0, H: 0, R: 16, E: 16}),
        tkw.IteratorBindings({w: W, h: H, r: R, key: K, d: D, e: E}),
    ]
    units = tkl.MemoryLayout(shape=[None, 1, UNIT])
    results_of = tkl.MemoryLayout(shape=[None, variant.v_width])
    table = tkl.MemoryLayout(shape=[None])

    def core(q, k, v, work, query_rows, low, high, key_rows, value_rows, visible, factors, out, lse):
        def field(i):
            return tkw.read(work, elements_per_thread=1, source=(w, sympy.Integer(i)), target=(w,))

        for symbol, name in (
            (ROW_START, "row_start"), (R, "row_count"), (QUERY_OFFSET, "query_offset"), (KEY_START, "key_start"),
            (K, "key_count"), (KEY_OFFSET, "key_offset"), (KEY_BASE, "key_base"), (OUT_START, "out_start"),
            (NUM_DRAFTS, "num_drafts"), (VALUE_OFFSET, "value_offset"),
        ):  # fmt: skip
            tkw.set_symbol(symbol, field(WORK_FIELDS.index(name)))
        scale = tkw.read(factors, elements_per_thread=1, source=(h,), target=(h,))
        cap = tkw.read(factors, elements_per_thread=1, source=(h + 1,), target=(h,))

        @tkw.iterate(K, init_args=[
            tkl.Register[H, R, tkl.f32](MASKED), tkl.Register[H, R, tkl.f32](0.0), tkl.Register[H, E, R, tkl.f32](0.0)
        ])  # fmt: skip
        def loop(row_max, row_sum, acc):
            query_row = tkw.read(query_rows, elements_per_thread=1, source=(r + ROW_START,), target=(r,))
            q_reg = tkw.read(q, elements_per_thread=LOAD_QK, source=(query_row, h + QUERY_OFFSET, d), target=(h, r, d))
            # Both tables before any key: Wave moves the gathers through LDS to the first of them.
            value_row = tkw.read(value_rows, elements_per_thread=LOAD_PV, source=(key + KEY_START,), target=(key,))
            key_row = tkw.read(key_rows, elements_per_thread=1, source=(key + KEY_START,), target=(key,))
            k_reg = tkw.read(k, elements_per_thread=LOAD_QK, source=(key_row, h + KEY_OFFSET, d), target=(h, key, d))
            scores = tkw.mma(k_reg, q_reg, tkl.Register[H, K, R, tkl.f32](0.0))
            x = tkw.permute(scores, target_shape=[H, R, K]) * scale
            if variant.softcap:
                x = cap * tkw.tanh(x / cap)
            x = x * tkl.Register[H, R, K, tkl.f32](LOG2_E)
            local = tkw.self_index(K, tkl.i32)
            local = tkw.broadcast(local, target_shape=[R, K])
            first = tkw.read(low, elements_per_thread=1, source=(r + ROW_START,), target=(r,))
            last = tkw.read(high, elements_per_thread=1, source=(r + ROW_START,), target=(r,))
            first = tkw.broadcast(first, target_shape=[R, K])
            last = tkw.broadcast(last, target_shape=[R, K])
            seen = tkw.apply_expr(
                [local, first, last], lambda i, lo, hi: sympy.And(i < K, i + KEY_BASE >= lo, i + KEY_BASE < hi)
            )
            seen = tkw.cast(seen, tkw.i1)
            if variant.tree:
                drafts = tkw.read(
                    visible, elements_per_thread=STORE, target=(r, key),
                    source=((r + ROW_START) * NUM_DRAFTS + key,),
                )  # fmt: skip
                seen &= tkw.cast(drafts, tkw.i1)
            hidden = tkw.select(seen, tkl.Register[R, K, tkl.f32](0.0), tkl.Register[R, K, tkl.f32](MASKED))
            x = x + hidden
            new_max = tkw.max(x, row_max, dim=K)
            decay = tkw.exp2(row_max - new_max)
            probability = tkw.exp2(x - new_max)
            new_sum = tkw.sum(probability, row_sum * decay, dim=K)
            v_reg = tkw.read(
                v, elements_per_thread=LOAD_PV, source=(value_row, h + VALUE_OFFSET, e), target=(h, e, key)
            )
            return new_max, new_sum, tkw.mma(v_reg, tkw.cast(probability, dtype), acc * decay)

        row_max, row_sum, acc = loop
        tkw.write(row_max + tkw.log2(row_sum), lse, source=(h, r), target=(r + OUT_START,), elements_per_thread=1)
        tkw.write(
            acc * tkw.reciprocal(row_sum), out, source=(h, e, r), target=(r + OUT_START, e), elements_per_thread=STORE
        )

    Q = tkl.Memory[R, H, D, GLOBAL_ADDRESS_SPACE, dtype, units]
    Keys = tkl.Memory[K, H, D, KEY_SPACE, dtype, units]
    Values = tkl.Memory[K, H, E, KEY_SPACE, dtype, units]
    Work = tkl.Memory[W, F, GLOBAL_ADDRESS_SPACE, tkl.i32]
    RowTable = tkl.Memory[R, GLOBAL_ADDRESS_SPACE, tkl.i32, table]
    KeyTable = tkl.Memory[K, GLOBAL_ADDRESS_SPACE, tkl.i32, table]
    Visible = tkl.Memory[N, GLOBAL_ADDRESS_SPACE, tkl.i8, table]
    Factors = tkl.Memory[H, GLOBAL_ADDRESS_SPACE, tkl.f32, tkl.MemoryLayout(shape=[2])]
    Out = tkl.Memory[R, E, GLOBAL_ADDRESS_SPACE, tkl.f32, results_of]
    Lse = tkl.Memory[R, GLOBAL_ADDRESS_SPACE, tkl.f32, table]

    # Wave reads the arguments off the signature: one function for each list of them.
    @tkw.wave(constraints)
    def attend(
        q: Q, k: Keys, v: Values, work: Work, query_rows: RowTable, low: RowTable, high: RowTable, key_rows: KeyTable,
        value_rows: KeyTable, factors: Factors, out: Out, lse: Lse,
    ):  # fmt: skip
        core(q, k, v, work, query_rows, low, high, key_rows, value_rows, None, factors, out, lse)

    @tkw.wave(constraints)
    def attend_tree(
        q: Q, k: Keys, v: Values, work: Work, query_rows: RowTable, low: RowTable, high: RowTable, key_rows: KeyTable,
        value_rows: KeyTable, visible: Visible, factors: Factors, out: Out, lse: Lse,
    ):  # fmt: skip
        core(q, k, v, work, query_rows, low, high, key_rows, value_rows, visible, factors, out, lse)

    substitutions = {
        KEY_SPACE: SHARED_ADDRESS_SPACE,
        LOAD_QK: get_mfma_load_elems_per_thread(_MMA),
        LOAD_PV: get_mfma_load_elems_per_thread(_MMA),
        STORE: get_mfma_store_elems_per_thread(_MMA),
        BLOCK_W: 1,
        BLOCK_R: variant.rows,
        BLOCK_K: variant.keys,
        BLOCK_E: variant.v_width,
        D: variant.qk_width,
        E: variant.v_width,
        H: 1,
        BLOCK_H: 1,
        F: len(WORK_FIELDS),
    }
    return (attend_tree, substitutions, [W, R, K, N]) if variant.tree else (attend, substitutions, [W, R, K])
