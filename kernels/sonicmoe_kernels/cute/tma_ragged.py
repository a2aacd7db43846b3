"""TMA over the rows of one expert inside a (R_max, ...) tensor: stores that clip at the expert's
last row.

Legend: R rows of all experts, s row stride in elements.

TMA clips a box at the extents of its map, which are fixed when the map is made, while an expert's
end is known on the device only. So the map gets two extra modes that move its base without leaving
its extents:

    shape  (BIG, ..., MANY, MANY)    stride (s, ..., WRAP - s, s)    with BIG * WRAP = 2^64

At coordinates (BIG - length + row, ..., BIG, first + length) the address is, modulo 2^64, that of
row `first + row`, and the box ends where row == length. One map serves all experts; nothing is
rewritten on the device. (Addresses count bytes, so what wraps is 2 * 2^64 for 16-bit elements:
also zero modulo 2^64.)
"""

import cutlass.cute as cute
from cutlass import Int32, Int64

BIG = 2**30  # no expert has more rows
MANY = 2**31 - 1  # extent of the two extra modes, the largest TMA takes
WRAP = 2**64 // BIG


def ragged_view(iterator: cute.Pointer, inner_shape: tuple, inner_stride: tuple, row_stride: int):
    """The (BIG, *inner, MANY, MANY) view to map; `row_stride` in elements, a multiple of 8."""
    shape = (Int32(BIG), *inner_shape, Int32(MANY), Int32(MANY))
    wrap_stride = cute.assume(Int64(WRAP - row_stride), divby=8)
    return cute.make_tensor(
        iterator,
        cute.make_layout(shape, stride=(row_stride, *inner_stride, wrap_stride, row_stride)),
    )


@cute.jit
def expert_rows(mRagged: cute.Tensor, first: Int32, length: Int32, row: Int32) -> cute.Tensor:
    """(rows, *inner) coordinates from row `row` of the expert on, up to its `length` rows."""
    inner = cute.rank(mRagged) - 3
    zeros = (0,) * inner
    expert = mRagged[(*([None] * (inner + 1)), BIG, first + length)]
    return cute.domain_offset((BIG - length + row, *zeros), expert)
