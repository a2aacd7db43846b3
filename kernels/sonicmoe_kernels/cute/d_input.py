"""Kernel 6, dX~: dX~ = dH [W1; W3] for every expert's rows, before they are summed per token.

Legend: D model width, F expert width, E experts, R routed rows, halves 2 when gated.

The depth runs over F of W1, then over F of W3, as dH's halves lie behind each other in a row.
Reads dH (R, halves, F) and E F D per weight; writes dX~ (R, D). FLOPs: 2 R D F halves.
"""

import cutlass.cute as cute
from cuda.bindings.driver import CUstream
from cutlass import Int32, const_expr

from sonicmoe_kernels.cute.plain_store import PlainStore
from sonicmoe_kernels.tiles import RowGemm


class DInput(PlainStore):
    """dH by TMA in order, W1 and W3 N-major (D contiguous)."""

    def __init__(self, gemm: RowGemm):
        super().__init__(gemm, weights_are_n_major=True)

    @cute.jit
    def __call__(
        self,
        mCounter: cute.Tensor | None,
        mDH_RHF: cute.Tensor,
        mOffsets: cute.Tensor,
        mW1_EFD: cute.Tensor,
        mW3_EFD: cute.Tensor | None,
        mDX_RD: cute.Tensor,
        num_ctas: Int32,
        stream: CUstream,
    ):
        self.make_layouts()
        width = self.gemm.halves * self.gemm.f
        rows = cute.make_layout((mDH_RHF.shape[0], width), stride=(width, 1))
        weights = (self.weight_maps(mW1_EFD),)
        if const_expr(mW3_EFD is not None):
            weights = (*weights, self.weight_maps(mW3_EFD))
        self.launch(
            mOffsets,
            self.contiguous_a(cute.make_tensor(mDH_RHF.iterator, rows)),
            weights,
            self.plain_store_map(mDX_RD),
            num_ctas,
            stream,
            mCounter,
        )
