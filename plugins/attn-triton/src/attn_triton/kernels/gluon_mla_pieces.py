"""What the roles of MLA decode in Gluon share (gluon_mla.py): which tiles are whose, how halves of tiles come, how rows
go.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma


@gluon.jit
def load_half(NOPE, ROPE, ks, k1s, full, buf, row, SIDE: gl.constexpr):
    """Ask for half of the first 512 columns of the 64 latent rows from ``row`` on; with the first half come the last
    64."""
    bar = full.index(buf)
    if SIDE == 0:
        mbarrier.expect(bar, 64 * 320 * 2)
        tma.async_copy_global_to_shared(ROPE, [row, 512], bar, k1s.index(buf))
    else:
        mbarrier.expect(bar, 64 * 256 * 2)
    tma.async_copy_global_to_shared(NOPE, [row, 256 * SIDE], bar, ks.index(buf))


@gluon.jit
def row_of(page_row, i, behind, PAGE: gl.constexpr):
    """The pool's row in which tile ``i`` begins; past the end, that of the last tile."""
    PER: gl.constexpr = PAGE // 64
    at = gl.minimum(i, gl.maximum(behind - 1, 0))
    return gl.load(page_row + at // PER) * PAGE + at % PER * 64


@gluon.jit
def clear_tail(k_boxes, buf, rows):
    """Zero the latent rows from ``rows`` on: behind a sequence lies anything, and 0 * NaN would be NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    r = gl.arange(0, 64, gl.SliceLayout(1, layout))
    for c in gl.static_range(8):
        part = k_boxes[c // 4].index(buf * 4 + c % 4)
        x = part.load(layout)
        part.store(gl.where((r < rows)[:, None], x, gl.zeros_like(x)))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def first_piece(LENGTHS, BOUNDS, FIRST, g, splits, FIXED: gl.constexpr):
    """(request, begin, end) of a program's part of the line of tiles; see kernels/decode.py."""
    if FIXED:
        b = g // splits
        line1 = gl.maximum((gl.load(LENGTHS + b) + 63) // 64, 1)
        per = (line1 + splits - 1) // splits
        pos = (g % splits) * per
        end = gl.minimum(pos + per, line1)
    else:
        b = gl.load(FIRST + g)
        pos = gl.load(BOUNDS + g)
        end = gl.load(BOUNDS + g + 1)
    return b, pos, end


@gluon.jit
def line_of(LENGTHS, LINE, b, FIXED: gl.constexpr):
    """Where request ``b`` begins and ends on the line, and its length."""
    length = gl.load(LENGTHS + b)
    if FIXED:
        line0 = b * 0
        line1 = gl.maximum((length + 63) // 64, 1)
    else:
        line0 = gl.load(LINE + b)
        line1 = gl.load(LINE + b + 1)
    return line0, line1, length


@gluon.jit
def query_range(STARTS, b, SINGLE: gl.constexpr):
    """First token and number of tokens of request ``b``."""
    if SINGLE:
        return b, b * 0 + 1
    else:
        start = gl.load(STARTS + b)
        return start, gl.load(STARTS + b + 1) - start


@gluon.jit
def write_rows(acc, tiles, POINTER, row, live, flat: gl.constexpr):
    """``acc`` to the ``live`` ones of 64 rows, which begin at ``row``, by way of the memory of ``tiles``: a thread has
    two numbers of a row side by side, and stores of so little took a tenth of a program's time. (Of parts, which are
    fp32, these are 8 bytes, four threads fill 32, and the way around costs more than it saves.)
    """
    dtype: gl.constexpr = POINTER.dtype.element_ty
    BITS: gl.constexpr = dtype.primitive_bitwidth
    WIDE: gl.constexpr = 1024 // BITS
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=BITS, rank=2)
    tiles._reinterpret(dtype, [64, 256], swizzled).store(acc.to(dtype))
    gl.thread_barrier()
    boxes = tiles._reinterpret(dtype, [256 // WIDE, 64, WIDE], swizzled)
    column = gl.arange(0, WIDE, gl.SliceLayout(0, flat))
    for c in gl.static_range(256 // WIDE):
        gl.store(POINTER + row[:, None] + WIDE * c + column[None, :], boxes.index(c).load(flat), mask=live[:, None])
    fence_async_shared()  # the copy engine writes here next
    gl.thread_barrier()
