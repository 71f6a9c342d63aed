"""The second phase of a split: what the runs of a row's keys gave becomes its output and its log-sum-exp.

A wave takes one row; each lane holds a part of its width. A run moves the result by its share of all that was joined so
far, and a sink is where the log-sum-exp begins: one more logit, without a value.

Wave 3.9.1 expands a graph breadth first and visits each node once: of a value that is used at two distances from the
result, the nearer use alone is expanded, and compiling fails. So all uses of a value are at one distance here: what is
cheap is read again, and the rest goes through products with 1, which LLVM removes.
"""

import math

import wave_lang.kernel.lang as tkl
import wave_lang.kernel.wave as tkw
from wave_lang.kernel.lang.global_symbols import GLOBAL_ADDRESS_SPACE

from attn_wave.join_variant import SAW_NOTHING
from attn_wave.variant import LOG2_E, MASKED

_LANES = 64


def join_kernel(variant):
    """``(kernel, substitutions, dynamic symbols)`` of a `JoinVariant`, for wave_compile. A fresh one for each.

    Arguments, in order: partial [C, S, E] fp32 and lse [C, S] fp32 of base 2, as `attend` leaves them; places [S]
    int32, where each row goes; sinks [S] fp32 natural, minus infinity for none; out [*, E]; out_lse [*] fp32 natural.
    A run that a row saw nothing in counts for nothing, whatever is in ``partial``. A row that saw nothing at all gets
    0, and as log-sum-exp its sink or minus infinity.
    """
    C, S, E = tkl.sym.C, tkl.sym.S, tkl.sym.E
    BLOCK_C, BLOCK_S, BLOCK_E = tkl.sym.BLOCK_C, tkl.sym.BLOCK_S, tkl.sym.BLOCK_E
    EACH, RUN, PLACE = tkl.sym.EACH, tkl.sym.RUN, tkl.sym.PLACE
    c, s, e = tkl.sym.c, tkl.sym.s, tkl.sym.e
    dtype = {"float16": tkl.f16, "bfloat16": tkl.bf16}[variant.dtype]
    constraints = [
        # the first is where the lanes of a wave are
        tkw.WorkgroupConstraint(E, BLOCK_E, 0),
        tkw.WorkgroupConstraint(S, BLOCK_S, 1),
        tkw.TilingConstraint(C, BLOCK_C),
        tkw.WaveConstraint(E, BLOCK_E),
        tkw.HardwareConstraint(threads_per_wave=_LANES, vector_shapes={C: 1, S: 0, E: variant.width}),
        tkw.IteratorBindings({c: C, s: S, e: E}),
    ]
    results = tkl.MemoryLayout(shape=[None, variant.width])
    table = tkl.MemoryLayout(shape=[None])

    @tkw.wave(constraints)
    def join(
        partial: tkl.Memory[C, S, E, GLOBAL_ADDRESS_SPACE, tkl.f32],
        lse: tkl.Memory[C, S, GLOBAL_ADDRESS_SPACE, tkl.f32],
        places: tkl.Memory[S, GLOBAL_ADDRESS_SPACE, tkl.i32],
        sinks: tkl.Memory[S, GLOBAL_ADDRESS_SPACE, tkl.f32],
        out: tkl.Memory[S, E, GLOBAL_ADDRESS_SPACE, dtype, results],
        out_lse: tkl.Memory[S, GLOBAL_ADDRESS_SPACE, tkl.f32, table],
    ):
        def of_row(x):
            return tkl.Register[S, tkl.f32](x)

        def further(x, distance):
            for _ in range(distance):
                x = x * of_row(1.0)
            return x

        def stated():
            return tkw.read(lse, elements_per_thread=1, source=(RUN, s), target=(s,))

        def of_run():
            return tkw.select(stated() > of_row(SAW_NOTHING), stated(), of_row(float("-inf")))

        def sink():
            return tkw.read(sinks, elements_per_thread=1, source=(s,), target=(s,))

        def start():
            return tkw.maximum(sink() * of_row(LOG2_E), of_row(MASKED))

        @tkw.iterate(C, init_args=[tkl.Register[S, E, tkl.f32](0.0), start()])
        def loop(acc, total):
            tkw.set_symbol(RUN, tkw.self_index(C, tkl.i32))
            values = tkw.read(partial, elements_per_thread=EACH, source=(RUN, s, e), target=(s, e))
            seen = tkw.broadcast(stated() > of_row(SAW_NOTHING), target_shape=[S, E])
            values = tkw.select(seen, values, tkl.Register[S, E, tkl.f32](0.0))
            # log2(2^a + 2^b) = max(a, b) + log2(1 + 2^-|a - b|)
            apart = tkw.abs(total - of_run()) * of_row(-1.0)
            more = tkw.log2(tkw.exp2(apart) + of_row(1.0))
            new_total = further(tkw.maximum(total, of_run()), 5) + more
            kept = tkw.exp2(further(total, 7) - new_total)
            return acc * kept + values * tkw.exp2(of_run() - new_total), new_total

        acc, total = loop
        # what nothing was joined to is still the sink, to the bit
        natural = tkw.select(total > start(), total * of_row(math.log(2)), sink())
        place = tkw.read(places, elements_per_thread=1, source=(s,), target=(s,))
        tkw.set_symbol(PLACE, place)
        tkw.write(natural, out_lse, source=(s,), target=(PLACE,), elements_per_thread=1)
        tkw.write(tkw.cast(acc, dtype), out, source=(s, e), target=(PLACE, e), elements_per_thread=EACH)

    substitutions = {BLOCK_C: 1, BLOCK_S: 1, BLOCK_E: variant.width, E: variant.width, EACH: variant.width // _LANES}
    return join, substitutions, [C, S]
