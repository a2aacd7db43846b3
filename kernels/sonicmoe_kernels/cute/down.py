"""Kernel 2, down: Y = A W2^T for every expert's rows.

Legend: D model width, F expert width, E experts, R routed rows.

Reads A (R, F), W2 (E, D, F); writes Y (R, D). FLOPs: 2 R D F. With small F it is bound by writing
Y.
"""

import cutlass.cute as cute
from cuda.bindings.driver import CUstream
from cutlass import Int32

from sonicmoe_kernels.cute.plain_store import PlainStore
from sonicmoe_kernels.tiles import RowGemm


class Down(PlainStore):
    """A by TMA in order, W2 K-major (F contiguous)."""

    def __init__(self, gemm: RowGemm):
        super().__init__(gemm, weights_are_n_major=False)

    @cute.jit
    def __call__(
        self,
        mCounter: cute.Tensor | None,
        mA_RF: cute.Tensor,
        mOffsets: cute.Tensor,
        mW2_EDF: cute.Tensor,
        mY_RD: cute.Tensor,
        num_ctas: Int32,
        stream: CUstream,
    ):
        self.make_layouts()
        self.launch(
            mOffsets,
            self.contiguous_a(mA_RF),
            (self.weight_maps(mW2_EDF),),
            self.plain_store_map(mY_RD),
            num_ctas,
            stream,
            mCounter,
        )
