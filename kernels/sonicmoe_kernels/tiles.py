"""Tile configurations of the kernels: what is legal and why, and the one table that picks them.

Legend: D model width, F expert width, E experts, M rows of one tile, N its columns, K depth of one
pipeline stage.

Nothing here is tuned at run time, and nothing depends on the number of tokens or routed rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sonicmoe_kernels.activations import get_activation

RowKernel = Literal["up", "down", "d_hidden", "d_input"]
Schedule = Literal["cooperative", "pingpong"]

TILE_M = 128  # two warpgroups of 64 rows, or one warpgroup with two blocks of 64
TILE_K = 64  # 128 bytes of 16-bit elements: one swizzle row, four wgmma deep
CLUSTER = 2  # CTAs that share weight tiles by multicast
WARPGROUP_ROWS = 64  # rows of one wgmma
ELEMENT_BYTES = 2
SHARED_MEMORY_LIMIT = 227 * 1024  # what one block may use on sm_90
MAX_EXPERTS = 1024
THREADS = 384  # one producer and two consumer warpgroups


@dataclass(frozen=True)
class RowTile:
    """Tile of a ragged-M GEMM.

    tile_n: columns of the B tile (of both halves together when W1 and W3 are stacked along N).
    stages: k tiles in flight. epi_n: columns of one store; epi_sets: store buffers a warpgroup
    cycles through; load_sets: buffers for H tiles read ahead (d_hidden only).
    """

    tile_n: int
    stages: int
    schedule: Schedule = "cooperative"
    epi_n: int = 32
    epi_sets: int = 1
    load_sets: int = 0


@dataclass(frozen=True)
class RowGemm:
    """Everything a ragged-M kernel is compiled for. Never T or R."""

    kernel: RowKernel
    d: int
    f: int
    num_experts: int
    dtype: Literal["bfloat16", "float16"]
    activation: str
    tile: RowTile

    @property
    def halves(self) -> int:
        """F-wide halves of H: 2 when the activation is gated."""
        return get_activation(self.activation).halves

    @property
    def gathers(self) -> bool:
        """True when A's rows are gathered by token index, False when they lie in order."""
        return self.kernel in ("up", "d_hidden")

    @property
    def n_sources(self) -> int:
        """Weights stacked along N in one B tile (W1 over W3)."""
        return self.halves if self.kernel == "up" else 1

    @property
    def k_sources(self) -> int:
        """Weights that follow each other along K (first all of W1, then all of W3)."""
        return self.halves if self.kernel == "d_input" else 1

    @property
    def n(self) -> int:
        """Columns of one weight source."""
        return self.f if self.kernel in ("up", "d_hidden") else self.d

    @property
    def k(self) -> int:
        """Depth of one weight source."""
        return self.d if self.kernel in ("up", "d_hidden") else self.f

    @property
    def n_step(self) -> int:
        """Columns of each source that one tile covers."""
        return self.tile.tile_n // self.n_sources

    @property
    def n_tiles(self) -> int:
        return -(-self.n // self.n_step)

    @property
    def k_tiles(self) -> int:
        """K tiles of all sources together."""
        return self.k_sources * self.k // TILE_K

    @property
    def stores(self) -> int:
        """Tensors (or halves of H) the epilogue stores."""
        return self.halves + 1 if self.kernel in ("up", "d_hidden") else 1

    @property
    def loads(self) -> int:
        """Halves of H the epilogue reads."""
        return self.halves if self.kernel == "d_hidden" else 0

    @property
    def epi_chunks(self) -> int:
        """Stores that one block of 64 rows of a tile takes per stored tensor."""
        return self.n_step // self.tile.epi_n

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory, counted as the kernel lays them out."""
        tile, aligned = self.tile, 1024
        stage = (TILE_M + tile.tile_n) * TILE_K * ELEMENT_BYTES
        chunk = WARPGROUP_ROWS * tile.epi_n * ELEMENT_BYTES
        buffers = 2 * chunk * (self.stores * tile.epi_sets + self.loads * tile.load_sets)
        tables = 8 * 2 * tile.stages + 8 * 2 * tile.load_sets
        tables += 4 * (2 * (self.num_experts + 1) + THREADS // 32)
        return -(-tables // aligned) * aligned + tile.stages * stage + buffers


def why_illegal(gemm: RowGemm) -> str | None:
    """The one judge of configurations: None if `gemm` can be compiled, else the reason."""
    tile = gemm.tile
    if gemm.d % TILE_K or gemm.f % TILE_K or gemm.d < TILE_K or gemm.f < TILE_K:
        return f"D={gemm.d} and F={gemm.f} must be positive multiples of {TILE_K} (one k tile)"
    if not 1 <= gemm.num_experts <= MAX_EXPERTS:
        return f"E={gemm.num_experts} is not in [1, {MAX_EXPERTS}] (tables in shared memory)"
    if not (tile.tile_n % 16 == 0 and 16 <= tile.tile_n <= 256):
        return f"tile_n={tile.tile_n} is not a multiple of 16 in [16, 256] (one wgmma)"
    if tile.tile_n % gemm.n_sources or gemm.n_step % 64:
        return f"each source's {gemm.n_step} columns must be a multiple of 64 (whole swizzle rows)"
    if gemm.n_step % tile.epi_n or tile.epi_n not in (32, 64):
        return f"epi_n={tile.epi_n} must be 32 or 64 and divide {gemm.n_step}"
    blocks = 2 if tile.schedule == "pingpong" else 1
    if tile.schedule == "pingpong" and tile.tile_n * blocks // 2 > 192:
        return "ping-pong keeps 128 rows in one warpgroup: over 192 accumulators a thread spill"
    if tile.epi_sets < 1 or (gemm.epi_chunks * blocks) % tile.epi_sets:
        return f"epi_sets={tile.epi_sets} must divide the {gemm.epi_chunks * blocks} chunks"
    if gemm.loads and (tile.load_sets < 1 or (gemm.epi_chunks * blocks) % tile.load_sets):
        return f"load_sets={tile.load_sets} must divide the {gemm.epi_chunks * blocks} chunks"
    if tile.stages < 2:
        return "a pipeline needs two stages"
    if gemm.shared_memory > SHARED_MEMORY_LIMIT:
        return f"{gemm.shared_memory} bytes of shared memory exceed {SHARED_MEMORY_LIMIT}"
    return None
