"""Tile configurations of the kernels: what is legal and why, and the one table that picks them.

Legend: D model width, F expert width, E experts, M rows of one tile, N its columns, K depth of one
pipeline stage.

Nothing here is tuned at run time, and nothing depends on the number of tokens or routed rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from sonicmoe_kernels.activations import get_activation

RowKernel = Literal["up", "down", "d_hidden", "d_input"]
Schedule = Literal["cooperative", "pingpong", "relayed", "turned"]

TILE_M = 128  # two warpgroups of 64 rows, or one warpgroup with two blocks of 64
TILE_K = 64  # 128 bytes of 16-bit elements: one swizzle row, four wgmma deep
CLUSTER = 2  # CTAs that share weight tiles by multicast
WARPGROUP_ROWS = 64  # rows of one wgmma
SLICES = 4  # of 16 rows: a warp's part of those 64
ELEMENT_BYTES = 2
SHARED_MEMORY_LIMIT = 227 * 1024  # what one block may use on sm_90
MAX_EXPERTS = 1024
THREADS = 384  # one producer and two consumer warpgroups
TURNED_BOX_ROWS = 32  # of one load of a turned tile's rows
FINE_STEP, COARSE_STEP = 8, 32  # of the widths of turned tiles; wgmma's N is a multiple of 8
ROW_GROUPS = (4, 8, 16, 32)  # row tiles of an expert that L2 is to keep
UNIT_SLOTS = 4  # of units that are drawn: more than the turns that stages can be ahead


@dataclass(frozen=True)
class RowTile:
    """Tile of a ragged-M GEMM.

    tile_n: columns of the B tile (of both halves together when W1 and W3 are stacked along N).
    stages: k tiles in flight. epi_n: columns of one store; epi_sets: store buffers a warpgroup
    cycles through; load_sets: buffers for H tiles read ahead (d_hidden only).

    schedule: how main loops and epilogues share a multiprocessor. "cooperative": both consumer
    warpgroups multiply one tile, then both run its epilogue. "pingpong": a tile each, one's
    epilogue under the other's main loop. "relayed": both multiply one tile and hand its sums over
    in 16 bits to two warps of the producer's, which run the epilogue under the next main loop.
    "turned": ping-pong, with an expert's rows along N, up to tile_n of them, as many in each of its
    tiles, and 128 columns along M (turned.py); epi_n: rows of one store.
    dynamic: clusters take units as they become free (tickets.py) instead of every so many-th, and
    units that share a weight tile follow each other.
    row_group: where they do, for so many row tiles of an expert (a power of two) at a time: in all
    columns before the next ones, so that L2 keeps their rows; 0 is all of an expert's.
    """

    tile_n: int
    stages: int
    schedule: Schedule = "cooperative"
    epi_n: int = 32
    epi_sets: int = 1
    load_sets: int = 0
    dynamic: bool = False
    row_group: int = 0


@dataclass(frozen=True)
class RowGemm:
    """Everything a ragged-M kernel is compiled for. Never T or R."""

    builder: ClassVar[str] = "sonicmoe_kernels.cute.build_rows:build"

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
        return TILE_M if self.turned else self.tile.tile_n // self.n_sources

    @property
    def n_tiles(self) -> int:
        """Column tiles of a row tile; pairs of them where the CTAs of a cluster share rows."""
        return -(-self.n // self.columns_at_once)

    @property
    def columns_at_once(self) -> int:
        """Columns of each source that a unit covers."""
        shares_rows = self.turned and not self.gathers
        return CLUSTER * self.n_step if shares_rows else self.n_step

    @property
    def columns(self) -> int:
        """Columns of all tiles and sources, those past N included."""
        return self.n_tiles * self.columns_at_once * self.n_sources

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
    def relayed(self) -> bool:
        """Whether warps of their own run the epilogue."""
        return self.tile.schedule == "relayed"

    @property
    def tile_rows(self) -> int:
        """Rows of an expert in a tile, at most."""
        return self.tile.tile_n if self.turned else TILE_M

    @property
    def widths(self) -> tuple[int, ...]:
        """N of the kernel's products. Turned: fine from where experts have two tiles."""
        if not self.turned:
            return (self.tile.tile_n,)
        half = self.tile_rows // 2
        coarse = range(COARSE_STEP, half + COARSE_STEP, COARSE_STEP)
        fine = range((half // FINE_STEP + 1) * FINE_STEP, self.tile_rows + 1, FINE_STEP)
        return tuple(sorted({*coarse, *fine}))

    @property
    def turned(self) -> bool:
        """Whether an expert's rows lie along the product's N, its weights along M."""
        return self.tile.schedule == "turned"

    @property
    def rows_innermost(self) -> bool:
        """Whether units that share a weight tile follow each other."""
        return self.tile.dynamic or (self.turned and not self.gathers)

    @property
    def lean(self) -> bool:
        """False with drawn units, which take a counter, and with turned tiles, slow to compile."""
        return not (self.tile.dynamic or self.turned)

    @property
    def pingpong(self) -> bool:
        """Whether the consumers take turns, a whole tile each."""
        return self.tile.schedule == "pingpong" or (self.turned and not self.gathers)

    @property
    def store_buffers(self) -> int:
        """Chunks of shared memory that the epilogue stores from.

        Relayed: A' takes the place of the sums, handed over in 16 bits, and dH that of H.
        """
        if self.relayed:
            return 2 * self.epi_chunks
        return 2 * self.tile.epi_sets * self.stores

    @property
    def load_buffers(self) -> int:
        """Chunks of shared memory that the epilogue loads into. Relayed: four slices are one."""
        sets = 1 if self.relayed else self.tile.load_sets
        return 2 * sets * self.loads

    @property
    def epilogue_barriers(self) -> int:
        """Barriers of the epilogue: one for each load set; relayed, four more to hand over."""
        return 2 * self.tile.load_sets + 4 * self.relayed

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory, counted as the kernel lays them out."""
        return self._bytes_with(tables=2 if self.offsets_in_shared else 1)

    @property
    def offsets_in_shared(self) -> bool:
        """Whether the experts' offsets are copied to shared memory, beside their first units.

        A relayed tile that has no room for many experts' reads them where they are.
        """
        return not self.relayed or self._bytes_with(tables=2) <= SHARED_MEMORY_LIMIT

    def _bytes_with(self, *, tables: int) -> int:
        """Bytes of shared memory with so many tables of E + 1 numbers."""
        tile, aligned = self.tile, 1024
        stage = (self.tile_rows + self.n_sources * self.n_step) * TILE_K * ELEMENT_BYTES
        chunk = WARPGROUP_ROWS * tile.epi_n * ELEMENT_BYTES
        buffers = chunk * (self.store_buffers + self.load_buffers)
        small = 8 * 2 * tile.stages + 8 * self.epilogue_barriers
        small += 4 * (tables * (self.num_experts + 1) + THREADS // 32)
        small += (8 * 2 + 4) * UNIT_SLOTS * tile.dynamic
        return -(-small // aligned) * aligned + tile.stages * stage + buffers


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
    blocks = 2 if gemm.pingpong else 1
    if gemm.pingpong and tile.tile_n * blocks // 2 > 192:
        return "ping-pong keeps a whole tile in one warpgroup: over 192 accumulators a thread spill"
    if gemm.turned and (gemm.kernel == "d_hidden" or tile.tile_n > 192):
        return "turned tiles are for up, down and d_input, of up to 192 rows: more sums spill"
    if gemm.turned and tile.epi_sets > blocks:
        return (
            f"epi_sets={tile.epi_sets}: a turned tile's {blocks} blocks have a set each, or share"
        )
    if gemm.turned and not gemm.gathers and tile.tile_n % TURNED_BOX_ROWS:
        return f"tile_n={tile.tile_n}: TMA loads {TURNED_BOX_ROWS} rows of a turned tile at once"
    if gemm.relayed and gemm.kernel != "d_hidden":
        return "a relayed epilogue is written for d_hidden only"
    if gemm.relayed and tile.epi_n != 32:
        return f"epi_n={tile.epi_n}: a relayed epilogue has registers for 32 columns at a time"
    if gemm.relayed and (gemm.epi_chunks % SLICES or tile.load_sets != SLICES):
        return f"a relayed epilogue takes chunks and load sets by {SLICES}: a buffer's slices"
    if tile.epi_sets < 1 or (gemm.epi_chunks * blocks) % tile.epi_sets:
        return f"epi_sets={tile.epi_sets} must divide the {gemm.epi_chunks * blocks} chunks"
    if tile.dynamic and gemm.kernel == "d_hidden":
        return "dynamic units are for up, down and d_input: a relayed epilogue cannot take them"
    if tile.row_group and not (gemm.rows_innermost and tile.row_group in ROW_GROUPS):
        return f"row_group={tile.row_group}: with rows innermost, one of {ROW_GROUPS}"
    if gemm.loads and (tile.load_sets < 1 or (gemm.epi_chunks * blocks) % tile.load_sets):
        return f"load_sets={tile.load_sets} must divide the {gemm.epi_chunks * blocks} chunks"
    if tile.stages < 2:
        return "a pipeline needs two stages"
    if gemm.shared_memory > SHARED_MEMORY_LIMIT:
        return f"{gemm.shared_memory} bytes of shared memory exceed {SHARED_MEMORY_LIMIT}"
    return None


# Cost of a column of cooperative tiles relative to the widest: narrow tiles re-read A more often.
COLUMN_COST = {256: 1.0, 192: 1.05, 128: 1.3, 64: 2.0}
# The same for ping-pong tiles of kernels that gather nothing. H100, 2026-11-22, medians, ms: dX~
# at D 1536, F 256: 128x192 ping-pong 0.48, 128x256 cooperative 0.59; down at D 4096, F 1024: 1.62,
# 1.80.
PINGPONG_COLUMN_COST = {192: 0.9, 128: 1.1}
# The same for turned tiles, whose rows are as wide as an expert needs.
TURNED_COLUMN_COST = {192: 0.85, 176: 0.85}
COLUMN_COSTS = {"pingpong": PINGPONG_COLUMN_COST, "turned": TURNED_COLUMN_COST}
# Candidates of every kernel on sm_90a; the cheapest legal one is taken, the first one of equals.
PINGPONG = RowTile(192, 5, "pingpong", epi_n=32, epi_sets=2)
TURNED = RowTile(192, 5, "turned", epi_n=32, epi_sets=2)
UP_TURNED = RowTile(176, 3, "turned", dynamic=True)
WIDE = RowTile(256, 4, epi_n=64, epi_sets=2)
PLAIN_TILES = (
    PINGPONG,
    WIDE,
    RowTile(256, 4, epi_n=32, epi_sets=2),
    RowTile(128, 6, "pingpong", epi_n=64, epi_sets=2),
    RowTile(64, 4, epi_n=64, epi_sets=1),
)
ROW_TILES: dict[RowKernel, tuple[RowTile, ...]] = {
    "up": (
        UP_TURNED,
        RowTile(256, 4, dynamic=True),
        RowTile(256, 4),
        RowTile(128, 4),
        RowTile(64, 4),
    ),
    "down": (TURNED, *PLAIN_TILES),
    "d_input": (
        replace(TURNED, dynamic=True),
        replace(PINGPONG, dynamic=True),
        *PLAIN_TILES,
    ),
    "d_hidden": (
        RowTile(256, 3, "relayed", load_sets=4),
        RowTile(256, 3, load_sets=2),
        RowTile(192, 3, load_sets=2),
        RowTile(128, 4, load_sets=2),
        RowTile(64, 4, load_sets=2),
    ),
}


def relay_pays(gemm: RowGemm) -> bool:
    """Whether a relayed epilogue is worth rounding dA' once more.

    H100, 2026-11-27, relayed and cooperative tiles of 256 columns, ms: 0.44, 0.47 (D 1536, F 256);
    1.77, 1.93 (2048, 768); 2.33, 2.33 and 2.39, 2.35 (4096): the main loop is most of the time in
    both; 0.60, 0.53 (768): two warps need longer than it. Rounded to fp16, dA' would overflow
    before its score has scaled it. With offsets in global memory it has not been measured.
    """
    return gemm.dtype == "bfloat16" and 1024 <= gemm.d < 4096 and gemm.offsets_in_shared


LARGE_WEIGHT_BYTES = 6 * 2**20  # of one of an expert's weights


def experts_are_large(d: int, f: int) -> bool:
    """Whether L2 keeps an expert's weights only for clusters in step, and partial tiles cost most.

    See "Drift" and "Padding" in docs/performance.md for what was measured.
    """
    return d * f * ELEMENT_BYTES >= LARGE_WEIGHT_BYTES


def is_worthwhile(gemm: RowGemm) -> bool:
    """Whether what is special about a legal candidate pays."""
    if gemm.relayed and not relay_pays(gemm):
        return False
    return gemm.lean or experts_are_large(gemm.d, gemm.f)


def cost(gemm: RowGemm) -> float:
    """Relative time that a row tile's columns take."""
    return gemm.columns * COLUMN_COSTS.get(gemm.tile.schedule, COLUMN_COST)[gemm.tile.tile_n]


def pick_rows(
    kernel: RowKernel,
    *,
    d: int,
    f: int,
    num_experts: int,
    dtype: Literal["bfloat16", "float16"] = "bfloat16",
    activation: str = "swiglu",
    lean: bool = False,
) -> RowGemm:
    """The configuration of a ragged-M kernel on sm_90a.

    lean: only what `RowGemm.lean` says: for few tokens, where reading the weights is all there is.

    Raises:
        ValueError: no candidate is legal; the message says why.
    """
    candidates = [
        RowGemm(kernel, d, f, num_experts, dtype, activation, tile) for tile in ROW_TILES[kernel]
    ]
    legal = [gemm for gemm in candidates if why_illegal(gemm) is None]
    if not legal:
        raise ValueError(f"{kernel}: {why_illegal(candidates[-1])}")
    worthwhile = [gemm for gemm in legal if is_worthwhile(gemm) and (gemm.lean or not lean)]
    return min(worthwhile, key=cost)


WeightKernel = Literal["d_weight2", "d_weight13"]


@dataclass(frozen=True)
class WeightTile:
    """Tile of a weight gradient, 128 (along D) by tile_n (along F or halves * F).

    stages: k tiles in flight. cluster: CTAs, neighbours along D, that share the columns.
    short_end: of an expert's last k tile only the blocks of 16 rows that have one are multiplied.
    Measured and left out (H100, 2026-11-22, five shapes): k tiles of 32 rows with 8 stages, 1.02 to
    1.2 times slower; clusters of four on 120 SMs (more do not fit), 0.95 to 1.04.
    """

    tile_n: int
    stages: int
    cluster: int
    short_end: bool = False


@dataclass(frozen=True)
class WeightGemm:
    """Everything a ragged-K kernel is compiled for. Never T, R or E.

    halves: F-wide halves of dH, of which each gives one gradient in d_weight13; 1 in d_weight2.
    """

    builder: ClassVar[str] = "sonicmoe_kernels.cute.build_weights:build"

    kernel: WeightKernel
    d: int
    f: int
    halves: int
    dtype: Literal["bfloat16", "float16"]
    tile: WeightTile

    @property
    def n(self) -> int:
        """Columns of the operand that lies in order: A' or dH."""
        return self.halves * self.f

    @property
    def n_tiles(self) -> int:
        return -(-self.n // self.tile.tile_n)

    @property
    def m_units(self) -> int:
        """How many clusters of tiles cover D."""
        return -(-self.d // (TILE_M * self.tile.cluster))

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory, counted as the kernel lays them out."""
        stage = (TILE_M + self.tile.tile_n) * TILE_K * ELEMENT_BYTES
        buffers = WEIGHT_STORE_BUFFERS * WARPGROUP_ROWS * WEIGHT_SLAB * ELEMENT_BYTES
        tables, aligned = 8 * 2 * self.tile.stages + 2 * WEIGHT_SORTED_EXPERTS, 1024
        return -(-tables // aligned) * aligned + self.tile.stages * stage + buffers


WEIGHT_SLAB = 64  # columns of one store: a 128-byte swizzle row
WEIGHT_STORE_BUFFERS = 4  # two for each consumer warpgroup
WEIGHT_SORTED_EXPERTS = 512  # with more, experts are taken in their own order


def why_illegal_weights(gemm: WeightGemm) -> str | None:
    """The judge of ragged-K configurations: None if `gemm` can be compiled, else the reason."""
    tile = gemm.tile
    if gemm.d % TILE_K or gemm.f % TILE_K or gemm.d < TILE_K or gemm.f < TILE_K:
        return f"D={gemm.d} and F={gemm.f} must be positive multiples of {TILE_K} (one swizzle row)"
    if gemm.halves not in ((1,) if gemm.kernel == "d_weight2" else (1, 2)):
        return f"halves={gemm.halves} is not 1 or 2 (d_weight2: 1)"
    if not (tile.tile_n % WEIGHT_SLAB == 0 and WEIGHT_SLAB <= tile.tile_n <= 256):
        return f"tile_n={tile.tile_n} is not a multiple of {WEIGHT_SLAB} up to 256 (one wgmma)"
    if tile.cluster not in (1, CLUSTER):
        return f"cluster={tile.cluster} is not 1 or {CLUSTER}"
    if tile.stages < 2:
        return "a pipeline needs two stages"
    if gemm.shared_memory > SHARED_MEMORY_LIMIT:
        return f"{gemm.shared_memory} bytes of shared memory exceed {SHARED_MEMORY_LIMIT}"
    return None


WEIGHT_STAGES = {256: 4, 192: 4, 128: 6, 64: 8}  # as many as fit, by tile_n
# An odd tile along D leaves one CTA of the last cluster idle: worth it from this many tiles on.
WEIGHT_CLUSTER_TILES = 8


def pick_weights(
    kernel: WeightKernel,
    *,
    d: int,
    f: int,
    halves: int = 1,
    dtype: Literal["bfloat16", "float16"] = "bfloat16",
) -> WeightGemm:
    """The configuration of a ragged-K kernel on sm_90a.

    Raises:
        ValueError: no configuration is legal; the message says why.
    """
    m_tiles = -(-d // TILE_M)
    cluster = CLUSTER if m_tiles % CLUSTER == 0 or m_tiles >= WEIGHT_CLUSTER_TILES else 1
    short_end = experts_are_large(d, f)
    candidates = [
        WeightGemm(kernel, d, f, halves, dtype, WeightTile(tile_n, stages, cluster, short_end))
        for tile_n, stages in WEIGHT_STAGES.items()
    ]
    reason = why_illegal_weights(candidates[0])
    if reason is not None:
        raise ValueError(f"{kernel}: {reason}")
    return min(
        candidates, key=lambda gemm: gemm.n_tiles * gemm.tile.tile_n * COLUMN_COST[gemm.tile.tile_n]
    )


@dataclass(frozen=True)
class Aggregation:
    """Everything an aggregation kernel is compiled for. Never T or R.

    rows_per_token: K when every token owns exactly K rows, else None. weighted: rows are
    multiplied by their score. residual: a (T, D) tensor is added to the sums.
    """

    builder: ClassVar[str] = "sonicmoe_kernels.cute.build_aggregate:build"
    kernel: ClassVar[str] = "aggregate"

    d: int
    dtype: Literal["bfloat16", "float16"]
    rows_per_token: int | None
    weighted: bool
    residual: bool = False


RoutingStep = Literal["membership", "balance", "token_rounding", "plan_rows", "score_gradient"]

TOKEN_BLOCK = 256  # tokens of one CTA: one 32-byte sector of bits for every expert
BITS = 32  # tokens of one word of the membership bitmap
BLOCK_WORDS = TOKEN_BLOCK // BITS
MAX_ROUTED_EXPERTS = 4096  # 40 bytes of shared memory for each
MAX_TOP_K = 32  # a token's experts lie in registers
MAX_ROUTED_TOKENS = 2**20  # each CTA sums the counts of all blocks of tokens
MAX_PAIRS = 2**31  # T * E and rows are numbered in int32
NO_SOURCE = -(2**31)  # of a row that nobody owns: its score came from nowhere


def count_columns(num_experts: int) -> int:
    """Columns of a table of counts: E rounded up so that 16 bytes are counts of one block."""
    return -(-num_experts // 4) * 4


@dataclass(frozen=True)
class RoutingKernel:
    """Everything a kernel that builds plans is compiled for. Never T or R.

    rounding: the variant of token rounding, None for the plan of a top-k routing. ids: the dtype of
    the experts' numbers. scores: which scores get a gradient ("chosen" are (T, K), "added" (T, E)).
    What a step does not depend on is None, so that one object serves all that share it.
    """

    builder: ClassVar[str] = "sonicmoe_kernels.cute.build_routing:build"

    kernel: RoutingStep
    num_experts: int | None = None
    top_k: int | None = None
    ids: Literal["int32", "int64"] | None = None
    rounding: str | None = None
    scores: tuple[Literal["chosen", "added"], ...] | None = None


def why_illegal_routing(num_experts: int, top_k: int) -> str | None:
    """The judge of routings for the plan-building kernels: None if they serve it, or the reason."""
    if not 1 <= num_experts <= MAX_ROUTED_EXPERTS:
        return f"E={num_experts} is not in [1, {MAX_ROUTED_EXPERTS}] (tables in shared memory)"
    if not 1 <= top_k <= min(MAX_TOP_K, num_experts):
        return f"K={top_k} is not in [1, {min(MAX_TOP_K, num_experts)}] (experts in registers)"
    return None


def routing_kernels(
    num_experts: int,
    top_k: int,
    *,
    rounding: str | None = None,
    ids: Literal["int32", "int64"] = "int64",
) -> list[RoutingKernel]:
    """What building plans launches, in order, and its backward: of top-k, or of one rounding."""
    E, K = num_experts, top_k
    if rounding is None:
        return [
            RoutingKernel("membership", E, K, ids),
            RoutingKernel("plan_rows", E, K, ids),
            RoutingKernel("score_gradient", scores=("chosen",)),
        ]
    rounded = "any"  # what depends on there being a rounding, not on which
    balance = [RoutingKernel("balance", E)] if rounding == "balance" else []
    return [
        RoutingKernel("membership", E, K, ids, rounded),
        *balance,
        RoutingKernel("token_rounding", rounding=rounding),
        RoutingKernel("plan_rows", E, K, ids, rounded),
        RoutingKernel("score_gradient", scores=("chosen", "added")),
    ]


ScoreFunction = Literal["softmax", "sigmoid"]
SoftmaxOrder = Literal["before", "after"]

TOPK_MAX_EXPERTS = 4096  # a warp keeps a row of logits in registers: 128 a lane
TOPK_MAX_CHOSEN = 32  # lane k of a warp weighs the k-th chosen expert
TOPK_WARPS = 8  # of one block, a token each
TOPK_SHARED_MEMORY = 48 * 1024  # what a block may use without asking for more
WARP = 32
STATISTICS_CTAS = 64  # 512 warps for about 1024 sampled tokens
# Keeps a token whose chosen sigmoids all underflow finite; vanishes beside any other sum.
RENORMALIZE_EPS = 1e-20


@dataclass(frozen=True)
class TopKOptions:
    """What the router's top-k kernels are compiled for. Never T, nor the route scale.

    dtype: of the logits. The other options are those of `routing.route_topk`.
    """

    num_experts: int
    top_k: int
    dtype: Literal["float32", "bfloat16"] = "float32"
    score_func: ScoreFunction = "softmax"
    softmax_order: SoftmaxOrder = "before"
    renormalize: bool = True
    has_bias: bool = False

    @property
    def over_chosen(self) -> bool:
        """True when the weights are the softmax over the K chosen logits.

        So it is with "after", and with "before" and renormalisation, whose factors cancel. A bias
        may leave out an expert that dwarfs the chosen; then the reference's epsilon shows, and the
        kernels compute as it does.
        """
        renormalized = self.renormalize and not self.has_bias
        return self.score_func == "softmax" and (self.softmax_order == "after" or renormalized)

    @property
    def vector(self) -> int:
        """Experts of one load of a lane: as many as 32 lanes can share, a divisor of E."""
        vector = 4
        while self.num_experts % vector or (vector > 1 and vector // 2 * WARP >= self.num_experts):
            vector //= 2
        return vector

    @property
    def chunks(self) -> int:
        """Loads of one lane."""
        return -(-self.num_experts // (WARP * self.vector))

    @property
    def per_lane(self) -> int:
        """Experts of one lane, those past E included."""
        return self.chunks * self.vector


def topk_warps(bytes_per_warp: int) -> int:
    """Warps of one block of a top-k kernel."""
    return max(1, min(TOPK_WARPS, TOPK_SHARED_MEMORY // bytes_per_warp))


@dataclass(frozen=True)
class TopKForward(TopKOptions):
    """The choice and its weights; all_scores: every expert's score is stored too."""

    builder: ClassVar[str] = "sonicmoe_kernels.cute.build_topk:build_forward"
    kernel: ClassVar[str] = "topk"

    all_scores: bool = True


@dataclass(frozen=True)
class TopKBackward(TopKOptions):
    """dlogits from the gradients of the K weights, of all scores, or of both.

    through_plan: these gradients are those of the plan's rows, and dlogits leave as two bf16
    halves.
    """

    builder: ClassVar[str] = "sonicmoe_kernels.cute.build_topk:build_backward"
    kernel: ClassVar[str] = "topk_backward"

    d_weights: bool = True
    d_all: bool = True
    through_plan: bool = False

    @property
    def reads_logits(self) -> bool:
        """False when the K weights say everything."""
        return self.d_all or not self.over_chosen

    @property
    def reads_weights(self) -> bool:
        """True when a softmax over the chosen is differentiated."""
        return self.d_weights and self.over_chosen


def why_illegal_topk(spec: TopKOptions) -> str | None:
    """None if the top-k kernels can be compiled for these options, else the reason."""
    if not 1 <= spec.num_experts <= TOPK_MAX_EXPERTS:
        return f"E={spec.num_experts} is not in [1, {TOPK_MAX_EXPERTS}] (a row in registers)"
    if not 1 <= spec.top_k <= min(TOPK_MAX_CHOSEN, spec.num_experts):
        return f"K={spec.top_k} is not in [1, min({TOPK_MAX_CHOSEN}, E)] (a lane for each)"
    return None
