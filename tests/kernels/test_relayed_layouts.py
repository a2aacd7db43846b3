"""What the relayed kernels take for granted about layouts, asked of the layouts on the CPU."""

import os

os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")

import pytest
import torch

cutlass = pytest.importorskip("cutlass")
import cutlass.cute as cute  # noqa: E402
from cutlass import Constexpr  # noqa: E402
from cutlass.cute.runtime import from_dlpack  # noqa: E402
from sonicmoe_kernels.cute.d_hidden_relayed import DHiddenRelayed  # noqa: E402
from sonicmoe_kernels.cute.relayed import SLICE_ROWS  # noqa: E402
from sonicmoe_kernels.tiles import SLICES, WARPGROUP_ROWS, RowGemm, RowTile  # noqa: E402

CHUNKS = 3
SWIZZLES = {}  # by epi_n, those of chunks and of slices: known when the functions are traced


@cute.jit
def offsets(mChunks: cute.Tensor, mSlices: cute.Tensor, kernel: Constexpr, epi_n: Constexpr):
    """Offset of every (chunk, row, column) in the layout of chunks, and in that of slices."""
    kernel.make_layouts()
    chunks, slices = kernel.store_layout, kernel.slice_layout(SLICES * CHUNKS)
    SWIZZLES[epi_n] = (str(chunks.inner), str(slices.inner))
    for c in range(CHUNKS):
        for row in range(WARPGROUP_ROWS):
            for column in range(epi_n):
                mChunks[c, row, column] = chunks.outer((row, column, c))
                place = c * SLICES + row // SLICE_ROWS
                mSlices[c, row, column] = slices.outer((row % SLICE_ROWS, column, place))


@cute.jit
def coordinates(mRows: cute.Tensor, mColumns: cute.Tensor, kernel: Constexpr, epi_n: Constexpr):
    """Row and column of every (thread, value) of a chunk's fragments."""
    kernel.make_layouts()
    chunk_mma = kernel.chunk_mma
    identity = cute.make_identity_tensor((WARPGROUP_ROWS, epi_n))
    for thread in range(mRows.shape[0]):
        tChunk = chunk_mma.get_slice(thread).partition_C(identity)
        for i in cutlass.range_constexpr(cute.size(tChunk)):
            mRows[thread, i], mColumns[thread, i] = tChunk[i]


def kernel_with(epi_n):
    tile = RowTile(256, 2, "relayed", epi_n=epi_n, load_sets=4)
    return DHiddenRelayed(RowGemm("d_hidden", 64, 256, 1, "bfloat16", "relu2", tile))


@pytest.mark.parametrize("epi_n", [32, 64])
def test_slices_are_the_bytes_of_their_chunk(epi_n):
    """TMA moves 16 rows of what a warpgroup writes and reads as 64."""
    found = torch.full((2, CHUNKS, WARPGROUP_ROWS, epi_n), -1, dtype=torch.int32)
    offsets(from_dlpack(found[0]), from_dlpack(found[1]), kernel_with(epi_n), epi_n)
    assert torch.equal(found[0], found[1])
    assert found[0].unique().numel() == found[0].numel() == found[0].max() + 1
    chunks, slices = SWIZZLES[epi_n]
    assert chunks == slices
    # A slice starts where the swizzle's pattern of eight rows does.
    starts = found[0, :, ::SLICE_ROWS, 0]
    assert (starts % (8 * epi_n) == 0).all()


@pytest.mark.parametrize("epi_n", [32, 64])
def test_a_slice_is_one_warps_part_of_a_fragment(epi_n):
    """Rows lane / 4 and lane / 4 + 8 of it: value i of a lane lies in row i // 2 % 2 of the two."""
    values = WARPGROUP_ROWS * epi_n // 128
    found = torch.full((2, 128, values), -1, dtype=torch.int32)
    coordinates(from_dlpack(found[0]), from_dlpack(found[1]), kernel_with(epi_n), epi_n)
    thread, i = torch.meshgrid(torch.arange(128), torch.arange(values), indexing="ij")
    rows = thread // 32 * SLICE_ROWS + i // 2 % 2 * 8 + thread % 32 // 4
    columns = i // 4 * 8 + thread % 4 * 2 + i % 2
    assert torch.equal(found[0].long(), rows)
    assert torch.equal(found[1].long(), columns)
