"""The kernels' own schedule arithmetic, run on the CPU against plain Python over random plans."""

import os

os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

cutlass = pytest.importorskip("cutlass")
import cutlass.cute as cute  # noqa: E402
from cutlass import Constexpr, Int32  # noqa: E402
from cutlass.cute.runtime import from_dlpack  # noqa: E402
from sonicmoe_kernels.cute import schedule  # noqa: E402
from sonicmoe_kernels.tiles import RowGemm, RowTile  # noqa: E402

NUM_EXPERTS = 12
# Rows of a tile, columns of tiles, CTAs of a cluster, whether units are drawn, in groups of rows.
SHAPES = [(128, 1, 1, False, 0), (128, 3, 1, False, 0)]
SHAPES += [
    (128, n_tiles, 2, *order)
    for n_tiles in (1, 2, 3, 6)
    for order in ((False, 0), (True, 0), (True, 4))
]


@cute.jit
def walk(
    mOffsets: cute.Tensor,
    mStart: cute.Tensor,
    mTiles: cute.Tensor,
    tile_m: Constexpr,
    n_tiles: Constexpr,
    cluster: Constexpr,
    drawn: Constexpr,
    row_group: Constexpr,
):
    """Writes (expert, m, n, shared) of every (unit, rank) and the prefix over experts."""
    total = Int32(0)
    for e in range(NUM_EXPERTS):
        mStart[e] = total
        total += schedule.units_of(mOffsets[e + 1] - mOffsets[e], tile_m, n_tiles, cluster)
    mStart[NUM_EXPERTS] = total
    expert = Int32(0)
    for unit in range(total):
        expert = schedule.find_expert(unit, expert, mStart, NUM_EXPERTS)
        rows = mOffsets[expert + 1] - mOffsets[expert]
        for rank in range(cluster):
            own = unit - mStart[expert]
            if cutlass.const_expr(drawn):
                tile = schedule.tile_of_drawn(own, rows, rank, tile_m, n_tiles, row_group)
            else:
                tile = schedule.tile_of(own, rows, rank, tile_m, n_tiles, cluster)
            at = unit * cluster + rank
            mTiles[at, 0] = expert
            mTiles[at, 1] = tile.m
            mTiles[at, 2] = tile.n
            mTiles[at, 3] = tile.shared_weights


def expected_tiles(counts, tile_m, n_tiles, cluster, drawn, row_group):
    """The same list in plain Python."""
    tiles = []
    for expert, rows in enumerate(counts):
        m_tiles = -(-rows // tile_m)
        step = 2 if drawn else n_tiles
        group = row_group or m_tiles or 1
        for first in range(0, m_tiles, group):
            group_tiles = min(group, m_tiles - first)
            paired = first + (group_tiles if cluster == 1 else group_tiles - group_tiles % 2)
            for begin in range(0, n_tiles, step):
                columns = range(begin, min(begin + step, n_tiles))
                for m in range(first, paired, cluster):
                    for n in columns:
                        shared = int(cluster == 2)
                        tiles += [(expert, m + rank, n, shared) for rank in range(cluster)]
                if paired < first + group_tiles:
                    even = len(columns) + len(columns) % 2
                    tiles += [(expert, paired, begin + i, 0) for i in range(even)]
    return tiles


@pytest.fixture(scope="module")
def compiled_walks():
    zeros = [torch.zeros(n, dtype=torch.int32) for n in (NUM_EXPERTS + 1, NUM_EXPERTS + 1, (4, 4))]
    example = [from_dlpack(tensor).mark_layout_dynamic() for tensor in zeros]
    return {shape: cute.compile(walk, *example, *shape) for shape in SHAPES}


@settings(max_examples=150, deadline=None)
@given(
    counts=st.lists(
        st.one_of(
            st.sampled_from([0, 1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 512, 513, 640]),
            st.integers(0, 1500),
        ),
        min_size=NUM_EXPERTS,
        max_size=NUM_EXPERTS,
    ),
    shape=st.sampled_from(SHAPES),
)
def test_every_tile_of_every_expert_is_scheduled_exactly_once_in_order(
    compiled_walks, counts, shape
):
    expected = expected_tiles(counts, *shape)
    offsets = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    start = torch.full((NUM_EXPERTS + 1,), -1, dtype=torch.int32)
    tiles = torch.full((len(expected) + 8, 4), -1, dtype=torch.int32)
    wrapped = [from_dlpack(t).mark_layout_dynamic() for t in (offsets, start)]
    compiled_walks[shape](*wrapped, from_dlpack(tiles).mark_layout_dynamic())
    assert [tuple(row) for row in tiles[: len(expected)].tolist()] == expected, (counts, shape)
    assert (tiles[len(expected) :] == -1).all()
    real = {tile[:3] for tile in expected if tile[2] < shape[1]}
    assert len(real) == sum(-(-rows // shape[0]) * shape[1] for rows in counts)


def test_many_experts_and_mostly_empty_ones_are_found_by_bisection():
    @cute.jit
    def find_all(mStart: cute.Tensor, mFound: cute.Tensor, num_experts: Constexpr):
        for unit in range(mFound.shape[0]):
            mFound[unit] = schedule.find_expert(Int32(unit), Int32(0), mStart, num_experts)

    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 3, (1024,), generator=generator) * (
        torch.rand(1024, generator=generator) < 0.1
    )
    start = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0).to(torch.int32)])
    found = torch.full((int(start[-1]),), -1, dtype=torch.int32)
    find_all(from_dlpack(start), from_dlpack(found), 1024)
    assert torch.equal(found.long(), torch.arange(1024).repeat_interleave(counts))


TURNED_PAIRS = 3


@cute.jit
def turn(rows: Int32, mTiles: cute.Tensor, tile_rows: Constexpr, row_group: Constexpr):
    """Writes (row, end, width, n) of every (unit, rank) of an expert."""
    for unit in range(schedule.units_of(rows, tile_rows, TURNED_PAIRS, 1)):
        for rank in range(2):
            tile = schedule.turned_tile(unit, rows, rank, tile_rows, TURNED_PAIRS, row_group)
            at = 2 * unit + rank
            mTiles[at, 0] = tile.row
            mTiles[at, 1] = tile.end
            mTiles[at, 2] = tile.width
            mTiles[at, 3] = tile.n


@pytest.mark.parametrize("row_group", [0, 8])
@pytest.mark.parametrize("tile_rows", [176, 192])
def test_turned_tiles_of_any_expert_are_even_and_hold_every_row_once(tile_rows, row_group):
    example = from_dlpack(torch.zeros((4, 4), dtype=torch.int32)).mark_layout_dynamic()
    compiled = cute.compile(turn, Int32(0), example, tile_rows, row_group)
    tile = RowTile(tile_rows, 3, "turned")
    widths = RowGemm("up", 64, 64, 1, "bfloat16", "swiglu", tile).widths
    assert all(width % 8 == 0 for width in widths) and widths[-1] == tile_rows
    for rows in (*range(6000), 24_576, 100_001, 2**24 + 1):
        count = -(-rows // tile_rows)
        tiles = torch.full((2 * TURNED_PAIRS * count + 2, 4), -1, dtype=torch.int32)
        compiled(rows, from_dlpack(tiles).mark_layout_dynamic())
        assert (tiles[-2:] == -1).all()
        groups = tiles[:-2].split(2 * TURNED_PAIRS * (row_group or count or 1))
        by_column = [group.view(TURNED_PAIRS, -1, 2, 4) for group in groups]
        row, end, width, n = torch.cat(by_column, dim=1).unbind(-1)
        assert (n == torch.arange(2 * TURNED_PAIRS).view(TURNED_PAIRS, 1, 2)).all()
        assert (row == row[:1, :, :1]).all() and (end == end[:1, :, :1]).all()
        if rows:
            row, end = row[0, :, 0], end[0, :, 0]
            assert row[0] == 0 and end[-1] == rows
            assert (row < end).all() and torch.equal(end[:-1], row[1:])
            assert width.unique().numel() == 1 and width[0, 0, 0] in widths
            assert (end - row <= width[0, :, 0]).all()
            spare = width[0, 0, 0] - -(-rows // count)
            assert 0 <= spare < (8 if 2 * -(-rows // count) > tile_rows else 32)
