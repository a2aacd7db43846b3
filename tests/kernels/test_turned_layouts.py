"""What turned tiles take for granted about layouts, asked of the layouts on the CPU."""

import os

os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")

import pytest
import torch

cutlass = pytest.importorskip("cutlass")
import cutlass.cute as cute  # noqa: E402
from cutlass import Constexpr, Int32  # noqa: E402
from cutlass.cute.runtime import from_dlpack  # noqa: E402
from sonicmoe_kernels.cute.plain_turned import BOX_ROWS, DInputTurned  # noqa: E402
from sonicmoe_kernels.cute.turned import stored_at  # noqa: E402
from sonicmoe_kernels.cute.up_turned import UpTurned  # noqa: E402
from sonicmoe_kernels.tiles import TILE_K, TILE_M, RowGemm, RowTile  # noqa: E402

TILE = RowTile(192, 2, "turned", epi_n=32, epi_sets=2)
KERNEL = DInputTurned(RowGemm("d_input", 128, 64, 1, "bfloat16", "relu2", TILE))
SWIZZLES = []  # of rows and boxes: known when the function is traced


@cute.jit
def row_offsets(mRows: cute.Tensor, mBoxes: cute.Tensor, mParts: cute.Tensor, width: Constexpr):
    """Offset of every (stage, row, column): of all rows, of boxes, of a width's rows."""
    KERNEL.make_layouts()
    rows, boxes, part = KERNEL.a_layout, KERNEL.box_layout(), KERNEL.rows_layout(width)
    SWIZZLES[:] = [str(rows.inner), str(boxes.inner)]
    for stage in range(TILE.stages):
        for row in range(TILE.tile_n):
            for column in range(TILE_K):
                mRows[stage, row, column] = rows.outer((row, column, stage))
                box = stage * KERNEL.boxes + row // BOX_ROWS
                mBoxes[stage, row, column] = boxes.outer((row % BOX_ROWS, column, box))
                if row < width:
                    mParts[stage, row, column] = part((row, column, stage))


@pytest.mark.parametrize("width", [32, 104, 184, 192])
def test_boxes_and_every_width_are_the_bytes_of_the_rows(width):
    found = torch.full((3, TILE.stages, TILE.tile_n, TILE_K), -1, dtype=torch.int32)
    row_offsets(*(from_dlpack(offsets) for offsets in found), width)
    rows, boxes, part = found
    assert rows.unique().numel() == rows.numel() == rows.max() + 1
    assert torch.equal(rows, boxes)
    assert torch.equal(rows[:, :width], part[:, :width])
    assert SWIZZLES[0] == SWIZZLES[1]


@cute.jit
def sums(mColumns: cute.Tensor, mRows: cute.Tensor, width: Constexpr):
    """Column and row of the result of every (thread, register) of a width's sums."""
    identity = cute.make_identity_tensor((TILE_M, width))
    for thread in range(mRows.shape[0]):
        tSums = KERNEL.mma_of(width).get_slice(thread).partition_C(identity)
        for i in cutlass.range(cute.size(tSums), unroll_full=True):
            mColumns[thread, i], mRows[thread, i] = tSums[i]


@pytest.mark.parametrize("width", KERNEL.widths[::4])
def test_sums_lie_where_the_epilogue_takes_them(width):
    """Register (block * width + 8 j) / 2 + 2 h + e: rows 8 j + 2 (lane % 4) + e, octet h."""
    found = torch.full((2, 128, width), -1, dtype=torch.int32)
    sums(from_dlpack(found[0]), from_dlpack(found[1]), width)
    thread, register = torch.meshgrid(torch.arange(128), torch.arange(width), indexing="ij")
    block, i = register // (width // 2), register % (width // 2)
    columns = block * 64 + thread // 32 * 16 + i // 2 % 2 * 8 + thread % 32 // 4
    rows = i // 4 * 8 + thread % 4 * 2 + i % 2
    assert torch.equal(found[0].long(), columns)
    assert torch.equal(found[1].long(), rows)


@cute.jit
def chunk_offsets(mChunk: cute.Tensor, mThreads: cute.Tensor):
    """Offset of every (row, column) of a chunk, and where each thread stores."""
    KERNEL.make_layouts()
    for row in range(TILE.epi_n):
        for column in range(64):
            mChunk[row, column] = KERNEL.store_layout.outer((row, column, 0))
    for thread in range(128):
        mThreads[thread] = stored_at(Int32(thread))
    SWIZZLES[:] = [str(KERNEL.store_layout.inner)]


def test_a_chunk_is_stored_where_tma_reads_it():
    """A thread's register 2 m + e goes to matrix m, which lane 8 m + r stores row r of."""
    chunk = torch.full((TILE.epi_n, 64), -1, dtype=torch.int32)
    threads = torch.full((128,), -1, dtype=torch.int32)
    chunk_offsets(from_dlpack(chunk), from_dlpack(threads))
    assert "3,4,3" in SWIZZLES[0]
    chunk ^= (chunk // 64 % 8) * 8  # 16 bytes among 128, by the row of eight
    for thread, offset in enumerate(threads.tolist()):
        warp, matrix, row = thread // 32, thread % 32 // 8, thread % 8
        stored = chunk[matrix // 2 * 8 + row, warp * 16 + matrix % 2 * 8 :][:8]
        assert stored.tolist() == list(range(offset, offset + 8))


UP = UpTurned(RowGemm("up", 64, 128, 1, "bfloat16", "swiglu", RowTile(192, 2, "turned")))


@cute.jit
def weight_offsets(mSources: cute.Tensor, mWeights: cute.Tensor):
    """Offset of every (stage, half, warpgroup, column, k): as loaded, as a warpgroup has it."""
    UP.make_layouts()
    source = UP.source_layout.outer
    weights = UP.weights_layout()
    for stage in range(2):
        for half in range(2):
            for group in range(2):
                for column in range(64):
                    for k in range(TILE_K):
                        at = (64 * group + column, k, 2 * stage + half)
                        mSources[stage, half, group, column, k] = source(at)
                        own = group * UP.group_elements + weights((64 * half + column, k, stage))
                        mWeights[stage, half, group, column, k] = own


def test_a_warpgroup_has_the_same_columns_of_both_halves():
    found = torch.full((2, 2, 2, 2, 64, TILE_K), -1, dtype=torch.int32)
    weight_offsets(*(from_dlpack(offsets) for offsets in found))
    assert torch.equal(*found)
    assert found[0].unique().numel() == found[0].numel()
