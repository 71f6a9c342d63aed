"""Tiles of an fp8 cache, from memory into the registers that the tensor cores take them from, and widened there.

Nothing goes through shared memory. The order in which a product sums is free, and so is the order of its columns, so a
thread reads 16 bytes side by side and calls them what the tensor core wants of it (m16n8k16: lane 4g + c holds, of the
right operand, column g at the summed places 2c, 2c + 1, 2c + 8, 2c + 9):

- keys: column g is a key; of its row the thread reads bytes 16c.. of each 64, and every four of them are the places of
  one instruction. The queries' columns are read in that order too.
- values: the summed places are keys, in their own order, as the scores' accumulators have them. The thread reads bytes
  16g.. of four keys' rows (8g.. of narrow ones); a register takes two keys' bytes of one column. Instruction j gives
  columns 16g + j, which the end puts in order.

A tile has N keys for each of W warps. Every change of layout here is one of names: ``assert_trivial``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def powers(axis, first, end, rank=3):
    """Bases of a linear layout: ``first``, twice that, .. below ``end`` along ``axis``."""
    bases = []
    while first < end:
        bases.append([first if i == axis else 0 for i in range(rank)])
        first *= 2
    return bases


@gluon.constexpr_function
def query_layout(D, W):
    """[W, 16, D] of queries, each warp all of them."""
    registers = [*powers(2, 1, 16), [0, 8, 0], *powers(2, 64, D)]
    return gl.DistributedLinearLayout(
        registers, [*powers(2, 16, 64), *powers(1, 1, 8)], powers(0, 1, W), [], [W, 16, D]
    )


@gluon.constexpr_function
def key_layout(N, D, W):
    """[W, N, D / 4] of keys, four bytes a word."""
    registers = [*powers(2, 1, 4), *powers(2, 16, D // 4), *powers(1, 8, N)]
    lanes = [*powers(2, 4, 16), *powers(1, 1, 8)]
    return gl.DistributedLinearLayout(registers, lanes, powers(0, 1, W), [], [W, N, D // 4])


@gluon.constexpr_function
def value_layout(N, D, W):
    """[W, N / 2, D / 4] of every second value, four bytes a word."""
    registers = [*powers(2, 1, D // 32), *powers(1, 4, N // 2)]
    lanes = [*powers(1, 1, 4), *powers(2, D // 32, D // 4)]
    return gl.DistributedLinearLayout(registers, lanes, powers(0, 1, W), [], [W, N // 2, D // 4])


@gluon.constexpr_function
def bytes_layout(layout, count):
    """``layout`` of words, each of them ``count`` numbers of one thread."""
    bases = [[[*basis, 0] for basis in of] for of in (layout.reg_bases, layout.lane_bases, layout.warp_bases)]
    registers = [*powers(3, 1, count, 4), *bases[0]]
    return gl.DistributedLinearLayout(registers, bases[1], bases[2], [], [*layout.shape, count])


@gluon.constexpr_function
def key_chunk_layout(N, W):
    """[W, N / 16, 16] of the rows of `key_layout`."""
    registers = [[0, 0, 8], *powers(1, 1, N // 16)]
    return gl.DistributedLinearLayout(
        registers, [[0, 0, 0], [0, 0, 0], *powers(2, 1, 8)], powers(0, 1, W), [], [W, N // 16, 16]
    )


@gluon.constexpr_function
def value_chunk_layout(N, W):
    """[W, N / 16, 8] of the rows of `value_layout`."""
    registers = [[0, 0, 4], *powers(1, 1, N // 16)]
    return gl.DistributedLinearLayout(
        registers, [*powers(2, 1, 4), [0, 0, 0], [0, 0, 0], [0, 0, 0]], powers(0, 1, W), [], [W, N // 16, 8]
    )


@gluon.constexpr_function
def part_layout(DV, W):
    """[W, 16, DV] of the warps' accumulators in shared memory: 16 bytes a thread are written and read, and what eight
    threads take lies in different banks.
    """
    wide = [[0, 0, 32 + 4], [0, 0, 64 + 8], [0, 1, 16]] if DV == 128 else [[0, 0, 32 + 4], [0, 1, 8]]
    return gl.SharedLinearLayout([*powers(2, 1, 32), *wide, *powers(1, 2, 16), *powers(0, 1, W)], [], 128)


@gluon.jit
def as_summed(x, R: gl.constexpr, D: gl.constexpr, W: gl.constexpr):
    """[W, R, D] with its columns in the order in which the scores sum them."""
    x = x.reshape([W, R, D // 64, 4, 4, 2, 2])
    return x.permute((0, 1, 2, 4, 5, 3, 6)).reshape([W, R, D])


@gluon.jit
def repeated(x, layout: gl.constexpr, COUNT: gl.constexpr):
    """Every word of ``x`` COUNT times in the same thread, as assembly takes what it makes COUNT numbers of."""
    shape: gl.constexpr = [x.shape[0], x.shape[1], x.shape[2], COUNT]
    wide: gl.constexpr = bytes_layout(layout, COUNT)
    x = gl.convert_layout(x, gl.SliceLayout(3, wide), assert_trivial=True)
    return gl.expand_dims(x, 3) + gl.full(shape, 0, gl.int32, wide)


@gluon.jit
def widened_keys(x, E4: gl.constexpr, N: gl.constexpr, D: gl.constexpr, W: gl.constexpr):
    """fp8 keys, four a word, as float16 [W, N, D]."""
    x = repeated(x, key_layout(N, D, W), 4)
    if E4:
        wide = gl.inline_asm_elementwise(
            "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $2; cvt.rn.f16x2.e4m3x2 $0, lo; cvt.rn.f16x2.e4m3x2 $1, hi; }",
            "=r,=r,r,r,r,r", [x], dtype=gl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        wide = gl.inline_asm_elementwise(
            "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $2; cvt.rn.f16x2.e5m2x2 $0, lo; cvt.rn.f16x2.e5m2x2 $1, hi; }",
            "=r,=r,r,r,r,r", [x], dtype=gl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    return wide.reshape([W, N, D])


@gluon.jit
def widened_values(even, odd, E4: gl.constexpr, N: gl.constexpr, D: gl.constexpr, W: gl.constexpr):
    """fp8 values of even and odd keys, four a word, as one float16 tile [W, N, D], its columns as the product gives
    them.
    """
    even = repeated(even, value_layout(N, D, W), 8)
    odd = repeated(odd, value_layout(N, D, W), 8)
    if E4:
        wide = gl.inline_asm_elementwise(
            "{ .reg .b32 a, b; .reg .b16 p, q, r, s; prmt.b32 a, $4, $12, 0x5140; prmt.b32 b, $4, $12, 0x7362;"
            " mov.b32 {p, q}, a; mov.b32 {r, s}, b;"
            " cvt.rn.f16x2.e4m3x2 $0, p; cvt.rn.f16x2.e4m3x2 $1, q;"
            " cvt.rn.f16x2.e4m3x2 $2, r; cvt.rn.f16x2.e4m3x2 $3, s; }",
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r", [even, odd], dtype=gl.float16, is_pure=True, pack=8,
        )  # fmt: skip
    else:
        wide = gl.inline_asm_elementwise(
            "{ .reg .b32 a, b; .reg .b16 p, q, r, s; prmt.b32 a, $4, $12, 0x5140; prmt.b32 b, $4, $12, 0x7362;"
            " mov.b32 {p, q}, a; mov.b32 {r, s}, b;"
            " cvt.rn.f16x2.e5m2x2 $0, p; cvt.rn.f16x2.e5m2x2 $1, q;"
            " cvt.rn.f16x2.e5m2x2 $2, r; cvt.rn.f16x2.e5m2x2 $3, s; }",
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r", [even, odd], dtype=gl.float16, is_pure=True, pack=8,
        )  # fmt: skip
    # [W, t, r, c, g, q, byte, key of the pair]: key 16t + 8r + 2c + .., column 16g + 4q + byte
    wide = wide.reshape([W, N // 16, 2, 4, 8, D // 32, 4, 2])
    return wide.permute((0, 1, 2, 3, 7, 5, 6, 4)).reshape([W, N, D])


@gluon.jit
def page_of(page_row, n, lowest, length, PAGE: gl.constexpr):
    """The page ids of keys ``n``, and the keys with which those pages begin. Keys that nobody sees are one that is
    seen.
    """
    which = gl.maximum(gl.maximum(gl.minimum(n, length - 1), lowest), 0) // PAGE
    return gl.load(page_row + which), which * PAGE


@gluon.jit
def chunk_pages(page_row, i, lowest, length, PAGE: gl.constexpr, N: gl.constexpr, W: gl.constexpr):
    """Page ids of every 16 keys of tile ``i``, [W, N / 16]; not looked at if pages are shorter."""
    layout: gl.constexpr = gl.SliceLayout(2, key_chunk_layout(N, W))
    w = gl.arange(0, W, gl.SliceLayout(1, layout))
    c = gl.arange(0, N // 16, gl.SliceLayout(0, layout))
    n = i * (W * N) + w[:, None] * N + c[None, :] * 16
    if PAGE % 16 == 0:
        return page_of(page_row, n, lowest, length, PAGE)
    else:
        return n, n


@gluon.jit
def spread(x, chunk: gl.constexpr, layout: gl.constexpr, W: gl.constexpr, C: gl.constexpr, R: gl.constexpr):
    """[W, C] of chunks to [W, C R] of their rows."""
    x = gl.convert_layout(x, gl.SliceLayout(2, chunk), assert_trivial=True)
    x = gl.expand_dims(x, 2) + gl.full([W, C, R], 0, x.dtype, chunk)
    return gl.convert_layout(x.reshape([W, C * R]), layout, assert_trivial=True)


@gluon.jit
def load_rows(
    POOL, page_row, page, begin, n, here, lowest, length, chunk: gl.constexpr, layout: gl.constexpr, W: gl.constexpr,
    N: gl.constexpr, R: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr, P: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """[W, R, D / 4] words of rows of a pool, of keys ``n`` [W, R]; nothing is read unless ``here``."""
    if PAGE % 16 == 0:
        page = spread(page, chunk, gl.SliceLayout(2, layout), W, N // 16, R * 16 // N)
        begin = spread(begin, chunk, gl.SliceLayout(2, layout), W, N // 16, R * 16 // N)
    else:
        page, begin = page_of(page_row, n, lowest, length, PAGE)
    at = gl.maximum(gl.minimum(n, length - 1), lowest) - begin
    column = gl.arange(0, D // 4, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    words = POOL.to(gl.pointer_type(gl.int32), bitcast=True)
    rows = gl.expand_dims(words + page.to(gl.int64) * (P // 4) + at * (T // 4), 2)
    if here is True:
        words = gl.load(rows + column[None, None, :])
    else:
        mask = gl.full([W, R, 1], 0, gl.int32, layout) + here.to(gl.int32) > 0
        words = gl.load(rows + column[None, None, :], mask=mask)
    return words


@gluon.jit
def load_keys(
    K, page_row, page, begin, i, here, lowest, length, W: gl.constexpr, N: gl.constexpr, D: gl.constexpr,
    PAGE: gl.constexpr, P: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """Keys of tile ``i``."""
    layout: gl.constexpr = key_layout(N, D, W)
    inner: gl.constexpr = gl.SliceLayout(2, layout)
    w = gl.arange(0, W, gl.SliceLayout(1, inner))
    n = i * (W * N) + w[:, None] * N + gl.arange(0, N, gl.SliceLayout(0, inner))[None, :]
    return load_rows(
        K, page_row, page, begin, n, here, lowest, length, key_chunk_layout(N, W), layout, W, N, N, D, PAGE, P, T
    )


@gluon.jit
def load_values(
    V, page_row, page, begin, i, here, lowest, length, ODD: gl.constexpr, W: gl.constexpr, N: gl.constexpr,
    D: gl.constexpr, PAGE: gl.constexpr, P: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """Values of every second key of tile ``i``."""
    layout: gl.constexpr = value_layout(N, D, W)
    inner: gl.constexpr = gl.SliceLayout(2, layout)
    w = gl.arange(0, W, gl.SliceLayout(1, inner))
    n = i * (W * N) + w[:, None] * N + gl.arange(0, N // 2, gl.SliceLayout(0, inner))[None, :] * 2 + ODD
    return load_rows(
        V, page_row, page, begin, n, here, lowest, length, value_chunk_layout(N, W), layout, W, N, N // 2, D, PAGE,
        P, T,
    )  # fmt: skip
