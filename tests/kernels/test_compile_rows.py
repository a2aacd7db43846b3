"""Every configuration of the ragged-M kernels compiles without a GPU and stays lean."""

import dataclasses

import pytest
from sonicmoe_kernels import compile as kernel_cache
from sonicmoe_kernels.activations import ACTIVATIONS
from sonicmoe_kernels.tiles import (
    ELEMENT_BYTES,
    MAX_EXPERTS,
    ROW_TILES,
    SHARED_MEMORY_LIMIT,
    TILE_K,
    RowGemm,
    RowTile,
    pick_rows,
    why_illegal,
)

from scripts.gpu_check import row_tiles
from tests.kernels.sass import read_sass, tools_folder

pytest.importorskip("cutlass")

SIZES = (1536, 256, 128)
# Bytes of stack a thread, where it is not zero: per-tile bookkeeping, never in the main loop.
STACK_BYTES = {("d_hidden", "cooperative", 256): 8, ("up", "turned", 176): 24}


def configurations():
    """Each tile of the table and of its challengers; then activations, fp16 and most experts.

    Of turned tiles, which take ten times as long, the first of each kernel.
    """
    gemms = [RowGemm(kernel, *SIZES, "bfloat16", "swiglu", tile) for kernel, tile in row_tiles()]
    turned = [gemm for gemm in gemms if gemm.turned]
    first = {gemm.kernel: gemm for gemm in reversed(turned)}
    gemms = [gemm for gemm in gemms if not gemm.turned or gemm in first.values()]
    gemms.append(
        RowGemm("d_hidden", 192, 320, 3, "float16", "silu", RowTile(128, 4, "relayed", load_sets=4))
    )
    relayed = next(tile for tile in ROW_TILES["d_hidden"] if tile.schedule == "relayed")
    gemms.append(RowGemm("d_hidden", 2048, 512, 512, "bfloat16", "swiglu", relayed))
    for name in ACTIVATIONS:
        if name != "swiglu":
            gemms.append(pick_rows("up", d=192, f=128, num_experts=3, activation=name))
            gemms.append(pick_rows("d_hidden", d=192, f=128, num_experts=3, activation=name))
    gemms.append(pick_rows("d_input", d=192, f=128, num_experts=3, activation="relu2"))
    for kernel in ROW_TILES:
        gemms.append(pick_rows(kernel, d=512, f=256, num_experts=MAX_EXPERTS, dtype="float16"))
    return [gemm for gemm in dict.fromkeys(gemms) if why_illegal(gemm) is None]


def label(gemm):
    tile = gemm.tile
    name = f"{gemm.kernel}-{tile.schedule}-{tile.tile_n}-{tile.stages}-{tile.epi_n}"
    name += "-drawn" * tile.dynamic
    return f"{name}-{gemm.activation}-{gemm.dtype}-E{gemm.num_experts}"


@pytest.mark.parametrize("gemm", configurations(), ids=label)
def test_configuration_compiles_with_tensor_cores_and_a_main_loop_in_registers(gemm, tmp_path):
    kernel_cache.prepare_dsl()
    from sonicmoe_kernels.cute import build_rows

    instance = build_rows.instance_of(gemm)
    compiled = build_rows.compile_instance(instance)
    check_shared_memory(instance)
    object_file = tmp_path / "kernel.o"
    compiled.export_to_c(object_file_path=str(object_file), function_name=kernel_cache.ENTRY)
    if tools_folder() is None:
        pytest.skip("compiled; no cuobjdump here to look inside")
    sass = read_sass(object_file, tmp_path)
    key = (gemm.kernel, gemm.tile.schedule, gemm.tile.tile_n)
    assert sass.stack_bytes <= STACK_BYTES.get(key, 0)
    for width in gemm.widths:
        loop = sass.main_loop(width)
        assert not [line for line in loop if "LDL" in line or "STL" in line]
        assert all(f"HGMMA.64x{width}x16" in line for line in loop if "HGMMA" in line)
    # None waits for another, but for those of a whole k tile: of every width's two loops.
    assert sass.count("WARPGROUP.DEPBAR") <= 3 * len(gemm.widths)
    assert (sass.count("LDGSTS") > 0) == gemm.gathers
    assert sass.count("UTMASTG") > 0
    # TMA takes uniform registers: a warp that may have parted fills them lane by lane.
    assert sass.count("BRA.DIV") == 0
    assert not [line for line in sass.instructions if "UTMALDG" in line and line.startswith("@")]


def check_shared_memory(instance):
    """What is counted covers what is laid out, and operands have the room that they take."""
    gemm, storage = instance.gemm, instance.Storage
    assert storage.size_in_bytes() <= gemm.shared_memory <= SHARED_MEMORY_LIMIT
    assert gemm.shared_memory - storage.size_in_bytes() <= 2048  # counted, not guessed
    offsets, column = storage._offsets, gemm.tile.stages * TILE_K * ELEMENT_BYTES
    assert offsets["b"] - offsets["a"] == gemm.tile_rows * column
    assert offsets["stores"] - offsets["b"] == gemm.n_sources * gemm.n_step * column


def test_an_illegal_configuration_is_refused_before_compiling():
    gemm = pick_rows("up", d=SIZES[0], f=SIZES[1], num_experts=SIZES[2])
    too_deep = dataclasses.replace(gemm, tile=dataclasses.replace(gemm.tile, stages=6))
    with pytest.raises(ValueError, match="shared memory"):
        kernel_cache.compile_kernel(too_deep)
