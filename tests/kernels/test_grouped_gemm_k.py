"""The weight gradient kernels without a GPU: machine code, limits, index arithmetic, misuse.

Legend: D model width, F expert width, M tile columns along D, K tile rows (64 rows of an expert).
"""

import os

os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sonicmoe_kernels import compile as kernel_cache
from sonicmoe_kernels import tiles

from tests.kernels.fake_cuda import fake_cuda
from tests.kernels.sass import read_sass, tools_folder

cutlass = pytest.importorskip("cutlass")
import cutlass.cute as cute  # noqa: E402
import cutlass.utils.hopper_helpers as sm90  # noqa: E402
from cutlass import Constexpr, Int32  # noqa: E402
from cutlass.cute.runtime import from_dlpack  # noqa: E402
from cutlass.tensor_utils import LayoutEnum  # noqa: E402
from sonicmoe_kernels.cute import gather_k, schedule_k  # noqa: E402

PAPER_SHAPES = [(1536, 256), (768, 256), (4096, 1024), (4096, 256)]
HGMMA_PER_STAGE = 4  # a k tile of 64 is four wgmma deep


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernel_cache.CACHE_VARIABLE, str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.mark.parametrize(
    "gemm",
    [
        tiles.pick_weights("d_weight2", d=1536, f=256),
        tiles.pick_weights("d_weight13", d=4096, f=1024, halves=2),
        tiles.pick_weights("d_weight13", d=192, f=64, halves=2, dtype="float16"),
        tiles.pick_weights("d_weight13", d=320, f=192, halves=1),
        tiles.pick_weights("d_weight2", d=64, f=64),
    ],
    ids=lambda g: f"{g.kernel}-{g.d}-{g.f}-{g.tile.tile_n}-{g.tile.cluster}",
)
def test_the_product_runs_on_wgmma_without_local_memory(gemm, tmp_path):
    library = kernel_cache.build(gemm)
    if tools_folder() is None:
        pytest.skip("compiled; no cuobjdump here to look inside")
    code = read_sass(library, tmp_path)
    assert code.stack_bytes == 0
    assert code.count("LDL") == code.count("STL") == 0
    slabs = gemm.tile.tile_n // tiles.WEIGHT_SLAB
    # a k tile under each slab and those behind, for every end; one that is short has its own tile
    ends = range(1, HGMMA_PER_STAGE) if gemm.tile.short_end else ()
    # for fewer rows the first one and those behind
    stages = (1 + len(ends)) * (slabs + 1) + min(slabs - 1, 2)
    assert code.count("HGMMA") == stages * HGMMA_PER_STAGE + sum(ends)
    # where the compiler cannot keep products in flight it waits for every one
    assert code.count("WARPGROUP.DEPBAR") == stages + len(ends)
    assert code.count("LDGSTS.E.BYPASS.128") == tiles.TILE_M * tiles.TILE_K // 8 // 128
    assert code.count("UTMALDG") > 0
    # The loop over lanes around each TMA and barrier whose operands look different to each lane.
    assert code.count("BRA.U.ANY") == 0
    assert code.count("UTMASTG") >= 2 * slabs  # before the next unit is done, and at the end


@pytest.mark.parametrize("kernel", ["d_weight2", "d_weight13"])
def test_every_pick_is_legal_and_covers_the_columns(kernel):
    for d in range(64, 7169, 64):
        for f in range(64, 2049, 64):
            halves = 2 if kernel == "d_weight13" else 1
            gemm = tiles.pick_weights(kernel, d=d, f=f, halves=halves)
            assert tiles.why_illegal_weights(gemm) is None
            assert gemm.n_tiles * gemm.tile.tile_n >= gemm.n
            assert gemm.m_units * gemm.tile.cluster * tiles.TILE_M >= d
            assert gemm.shared_memory <= tiles.SHARED_MEMORY_LIMIT


@pytest.mark.parametrize("shape", PAPER_SHAPES)
def test_the_papers_shapes_get_full_tiles_in_clusters(shape):
    gemm = tiles.pick_weights("d_weight13", d=shape[0], f=shape[1], halves=2)
    tile = tiles.WeightTile(tile_n=256, stages=4, cluster=2)
    assert dataclasses.replace(gemm.tile, short_end=False) == tile


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"d": 96}, "multiples of 64"),
        ({"f": 0}, "multiples of 64"),
        ({"halves": 3}, "halves=3"),
        ({"tile": tiles.WeightTile(96, 4, 2)}, "tile_n=96"),
        ({"tile": tiles.WeightTile(320, 2, 2)}, "tile_n=320"),
        ({"tile": tiles.WeightTile(256, 5, 2)}, "shared memory"),
        ({"tile": tiles.WeightTile(256, 1, 2)}, "two stages"),
        ({"tile": tiles.WeightTile(256, 4, 3)}, "cluster=3"),
    ],
)
def test_an_illegal_configuration_is_refused_with_its_reason(change, complaint):
    gemm = dataclasses.replace(tiles.pick_weights("d_weight13", d=1536, f=256, halves=2), **change)
    with pytest.raises(ValueError, match=complaint):
        kernel_cache.compile_kernel(gemm)


# ------------------------------------------------------------------ index arithmetic on the CPU


@cute.jit
def layout_offsets(mOut: cute.Tensor, tile_m: Constexpr):
    """Offset of every (m, k) in the operand layout that wgmma is given, before its swizzle."""
    layout = sm90.make_smem_layout_a(
        LayoutEnum.COL_MAJOR, (tile_m, 64, tiles.TILE_K), cutlass.BFloat16, 1
    ).outer
    for m in range(tile_m):
        for k in range(tiles.TILE_K):
            mOut[m, k] = layout((m, k, 0))


@cute.jit
def gather_offsets(mOut: cute.Tensor, mThreads: cute.Tensor, tile_m: Constexpr):
    """Where the gather's threads put every chunk, and how often, walked as `gather_tile_k` does."""
    chunks = tile_m // gather_k.CHUNK
    rows_per_pass = gather_k.GATHER_THREADS // chunks
    for thread in range(gather_k.GATHER_THREADS):
        chunk = thread % chunks
        first_row = thread // chunks
        target = gather_k.chunk_target(first_row, chunk)
        for p in range(tiles.TILE_K // rows_per_pass):
            row = first_row + p * rows_per_pass
            mOut[chunk, row] = target + p * rows_per_pass * gather_k.SLAB
            mThreads[chunk, row] += 1


def swizzle_128_bytes(offset):
    """The hardware's 128-byte swizzle, on offsets of 16-bit elements: 16-byte place ^= row."""
    byte = 2 * offset
    return (byte ^ ((byte >> 7 & 7) << 4)) // 2


@pytest.mark.parametrize("tile_m", [64, 128])
def test_the_gather_writes_where_wgmma_reads(tile_m):
    layout = torch.zeros(tile_m, tiles.TILE_K, dtype=torch.int32)
    layout_offsets(from_dlpack(layout), tile_m)
    chunks = tile_m // gather_k.CHUNK
    gathered = torch.full((chunks, tiles.TILE_K), -1, dtype=torch.int32)
    visits = torch.zeros(chunks, tiles.TILE_K, dtype=torch.int32)
    gather_offsets(from_dlpack(gathered), from_dlpack(visits), tile_m)
    assert (visits == 1).all()
    for inside in range(gather_k.CHUNK):
        expected = swizzle_128_bytes(layout[inside :: gather_k.CHUNK].long())
        assert torch.equal(gathered.long() + inside, expected)


@pytest.mark.parametrize("tile_m", [64, 128])
def test_each_lane_keeps_a_row_that_its_warp_copies(tile_m):
    @cute.jit
    def rows_of_lanes(mRows: cute.Tensor):
        for warp in range(4):
            for lane in range(32):
                mRows[warp, lane] = gather_k.row_of_lane(Int32(lane), Int32(warp), tile_m)

    rows = torch.full((4, 32), -1, dtype=torch.int32)
    rows_of_lanes(from_dlpack(rows))
    chunks = tile_m // gather_k.CHUNK
    rows_per_pass = gather_k.GATHER_THREADS // chunks
    warp_rows = rows_per_pass // 4
    for thread in range(gather_k.GATHER_THREADS):
        first_row = thread // chunks
        for p in range(tiles.TILE_K // rows_per_pass):
            keeper = p * warp_rows + first_row % warp_rows
            assert rows[thread // 32, keeper] == first_row + p * rows_per_pass


@cute.jit
def walk_rows(mIndex: cute.Tensor, mOffsets: cute.Tensor, mCount: cute.Tensor, mBad: cute.Tensor):
    """Counts, for every routed row, how often the k tiles of its expert load its index."""
    for expert in range(mOffsets.shape[0] - 1):
        first = mOffsets[expert]
        rows = mOffsets[expert + 1] - first
        for k in range((rows + tiles.TILE_K - 1) // tiles.TILE_K + 1):  # one tile past the end
            for row in range(tiles.TILE_K):
                index = gather_k.load_row_index(mIndex, first, k * tiles.TILE_K + row, rows)
                if index == gather_k.NO_ROW:
                    if k * tiles.TILE_K + row < rows:
                        mBad[0] += 1
                else:
                    mCount[index] += 1


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 63, 64, 65, 127, 128, 129, 7]), min_size=12, max_size=12))
def test_every_row_is_used_once_and_none_past_an_experts_end(counts):
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    total = int(offsets[-1])
    size = 12 * 129 + 1
    index = torch.full((size,), size - 1, dtype=torch.int32)  # rows of nobody: counted in the last
    index[:total] = torch.randperm(total, generator=torch.Generator().manual_seed(total)).int()
    count, bad = torch.zeros(size, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    walk_rows(*(from_dlpack(tensor) for tensor in (index, offsets, count, bad)))
    assert (count[:total] == 1).all()
    assert (count[total:] == 0).all()
    assert bad.item() == 0


@cute.jit
def sort_by_all_threads(mRows: cute.Tensor, mOrder: cute.Tensor, threads: Constexpr):
    """The order as the kernel's threads write it, one after the other."""
    experts = mRows.shape[0]
    for start in range(0, experts, threads):
        for thread in range(threads):
            expert = schedule_k.expert_of_turn(start, thread, experts)
            mOrder[schedule_k.slot_of(expert, mRows, experts)] = expert


@pytest.mark.parametrize("threads", [5, 12, 32])
@settings(max_examples=15, deadline=None)
@given(counts=st.lists(st.integers(0, 5), min_size=12, max_size=12))
def test_experts_are_ordered_by_rows_then_by_number(counts, threads):
    order = torch.full((12,), -1, dtype=torch.int32)
    rows = torch.tensor(counts, dtype=torch.int32)
    sort_by_all_threads(from_dlpack(rows), from_dlpack(order), threads)
    assert order.tolist() == sorted(range(12), key=lambda expert: (-counts[expert], expert))


@cute.jit
def walk_units(mCount: cute.Tensor, mFirst: cute.Tensor, units: Int32, clusters: Int32):
    """Counts how often each (slot, m, n) is taken, each cluster stopping as the kernel does."""
    for cluster in range(clusters):
        wave = Int32(0)
        unit = schedule_k.unit_of(wave, Int32(cluster), clusters)
        while unit < units:
            slot, m, n = schedule_k.place_of(unit, M_UNITS, N_TILES)
            mCount[slot, m, n] += 1
            if wave == 1:
                mFirst[cluster] = unit
            wave += 1
            unit = schedule_k.unit_of(wave, Int32(cluster), clusters)


M_UNITS, N_TILES = 3, 2


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 66))
def test_every_tile_is_computed_exactly_once(experts, clusters):
    count = torch.zeros(40, M_UNITS, N_TILES, dtype=torch.int32)
    second = torch.full((66,), -1, dtype=torch.int32)
    units = experts * M_UNITS * N_TILES
    walk_units(from_dlpack(count), from_dlpack(second), units, clusters)
    assert (count[:experts] == 1).all()
    assert (count[experts:] == 0).all()
    backwards = [2 * clusters - 1 - c for c in range(clusters)]
    assert second[:clusters].tolist() == [u if u < units else -1 for u in backwards]


# ------------------------------------------------------------------------------------- misuse

GEMM = tiles.pick_weights("d_weight13", d=1536, f=256, halves=2)


def call(*, dtype=torch.bfloat16, dh=(8, 2, 256), dw3=(2, 256, 1536), rows=8):
    kernel_cache.load(GEMM)(
        fake_cuda(4, 1536, dtype=dtype),
        fake_cuda(rows, dtype=torch.int32),
        fake_cuda(3, dtype=torch.int32),
        fake_cuda(*dh),
        fake_cuda(2, 256, 1536),
        fake_cuda(*dw3) if dw3 else None,
        132,
    )


@pytest.mark.parametrize(
    ("misuse", "complaint"),
    [
        ({"dtype": torch.float16}, "expected dtype=bfloat16"),
        ({"dh": (8, 512)}, "expected ndim=3"),
        ({"dh": (8, 2, 320)}, "256"),
        ({"rows": 9}, "expected to match"),
        ({"dw3": (3, 256, 1536)}, "expected to match"),
        ({"dw3": None}, "expected Tensor"),
    ],
    ids=["fp16", "rank", "width", "rows", "experts", "no dw3"],
)
def test_a_built_kernel_refuses_tensors_it_was_not_compiled_for(misuse, complaint):
    with pytest.raises((TypeError, ValueError), match=complaint):
        call(**misuse)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would launch on memory that is not there")
def test_a_right_call_is_stopped_by_the_missing_gpu_alone():
    with pytest.raises(RuntimeError, match="cuda"):
        call()
