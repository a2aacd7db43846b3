"""Tile configurations: what the table picks is legal for every size users may have."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sonicmoe_kernels.activations import ACTIVATIONS
from sonicmoe_kernels.tiles import (
    MAX_EXPERTS,
    ROW_TILES,
    SHARED_MEMORY_LIMIT,
    RowGemm,
    RowTile,
    pick_rows,
    pick_weights,
    why_illegal,
)


def gemm(kernel="up", d=1536, f=256, experts=128, tile=None, activation="swiglu"):
    tile = tile or RowTile(256, 4)
    return RowGemm(kernel, d, f, experts, "bfloat16", activation, tile)


@settings(max_examples=400, deadline=None)
@given(
    kernel=st.sampled_from(list(ROW_TILES)),
    d=st.integers(1, 112),
    f=st.integers(1, 64),
    experts=st.integers(1, MAX_EXPERTS),
    activation=st.sampled_from(list(ACTIVATIONS)),
)
def test_every_multiple_of_64_has_a_legal_configuration(kernel, d, f, experts, activation):
    picked = pick_rows(kernel, d=64 * d, f=64 * f, num_experts=experts, activation=activation)
    assert why_illegal(picked) is None
    assert picked.shared_memory <= SHARED_MEMORY_LIMIT
    covered = picked.n_tiles * picked.columns_at_once
    assert covered >= picked.n > covered - picked.columns_at_once


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"d": 1000}, "multiples of 64"),
        ({"f": 0}, "multiples of 64"),
        ({"experts": MAX_EXPERTS + 1}, "E=1025"),
        ({"tile": RowTile(264, 3)}, "multiple of 16"),
        ({"tile": RowTile(192, 3)}, "96 columns"),
        ({"tile": RowTile(256, 3, epi_n=48)}, "epi_n=48"),
        ({"tile": RowTile(256, 3, "pingpong")}, "spill"),
        ({"tile": RowTile(256, 3, epi_sets=3)}, "epi_sets=3"),
        ({"tile": RowTile(256, 5)}, "shared memory"),
        ({"tile": RowTile(256, 1)}, "two stages"),
        (
            {"kernel": "d_hidden", "tile": RowTile(256, 3, load_sets=2, dynamic=True)},
            "for up, down",
        ),
        ({"tile": RowTile(256, 3, row_group=8)}, "rows innermost"),
        ({"tile": RowTile(256, 3, dynamic=True, row_group=12)}, "row_group=12"),
        ({"kernel": "d_hidden", "tile": RowTile(256, 3)}, "load_sets=0"),
        ({"tile": RowTile(256, 3, "relayed")}, "d_hidden only"),
        ({"kernel": "d_hidden", "tile": RowTile(256, 3, "relayed", load_sets=2)}, "by 4"),
        ({"kernel": "d_hidden", "tile": RowTile(256, 4, "relayed", load_sets=4)}, "shared memory"),
        ({"kernel": "d_hidden", "tile": RowTile(256, 2, "relayed", epi_n=64)}, "epi_n=64"),
    ],
)
def test_an_illegal_configuration_is_refused_with_its_reason(changes, reason):
    assert reason in why_illegal(gemm(**changes))


def test_asking_for_impossible_sizes_raises_what_is_accepted():
    with pytest.raises(ValueError, match="D=100 and F=256 must be positive multiples of 64"):
        pick_rows("up", d=100, f=256, num_experts=8)


@pytest.mark.parametrize(
    ("changes", "schedule"),
    [
        ({"d": 1536}, "relayed"),
        ({"d": 768}, "cooperative"),
        ({"d": 4096}, "cooperative"),
        ({"d": 1536, "dtype": "float16"}, "cooperative"),
        ({"d": 1536, "num_experts": 512}, "cooperative"),  # offsets have no room
    ],
)
def test_dh_is_relayed_where_that_pays(changes, schedule):
    sizes = {"f": 256, "num_experts": 128} | changes
    assert pick_rows("d_hidden", **sizes).tile.schedule == schedule


def test_a_relayed_tile_reads_many_experts_offsets_where_they_are():
    relayed = RowTile(256, 3, "relayed", load_sets=4)
    for experts, in_shared in ((359, True), (360, False), (512, False)):
        wide = gemm(kernel="d_hidden", experts=experts, tile=relayed)
        assert why_illegal(wide) is None
        assert wide.offsets_in_shared == in_shared
    assert "shared memory" in why_illegal(gemm(kernel="d_hidden", experts=1024, tile=relayed))


@pytest.mark.parametrize(
    ("kernel", "schedule", "drawn"),
    [
        ("up", "turned", True),
        ("down", "turned", False),
        ("d_hidden", "cooperative", False),
        ("d_input", "turned", True),
    ],
)
def test_large_experts_have_turned_tiles_and_drawn_units(kernel, schedule, drawn):
    tile = pick_rows(kernel, d=4096, f=1024, num_experts=64).tile  # 8 MiB a weight
    assert (tile.schedule, tile.dynamic) == (schedule, drawn)
    lean = pick_rows(kernel, d=4096, f=1024, num_experts=64, lean=True).tile
    assert lean.schedule != "turned" and not lean.dynamic
    for d, f in ((2048, 1024), (1536, 256)):
        tile = pick_rows(kernel, d=d, f=f, num_experts=64).tile
        assert tile.schedule != "turned" and not tile.dynamic


@pytest.mark.parametrize("kernel", ["d_weight2", "d_weight13"])
def test_weight_gradients_of_large_experts_end_short(kernel):
    assert pick_weights(kernel, d=4096, f=1024).tile.short_end
    assert not pick_weights(kernel, d=2048, f=1024).tile.short_end


def test_gated_up_projection_halves_the_columns_of_a_tile():
    gated, plain = gemm(), gemm(activation="relu2")
    assert (gated.n_step, gated.n_tiles, gated.stores) == (128, 2, 3)
    assert (plain.n_step, plain.n_tiles, plain.stores) == (256, 1, 2)


def test_specs_are_values_that_can_name_a_cache_entry():
    assert gemm() == gemm() and hash(gemm()) == hash(gemm())
    with pytest.raises(dataclasses.FrozenInstanceError):
        gemm().d = 64
