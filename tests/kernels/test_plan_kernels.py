"""The kernels that build plans, without a GPU: their arithmetic, what the compiler makes of them,
what a built one accepts, and the operators around them.

Legend: T tokens, E experts, K experts per token, R routed rows.
"""

import os
from collections import defaultdict

import pytest
import torch
from sonicmoe_kernels import backends, hopper_routing
from sonicmoe_kernels import compile as kernel_cache
from sonicmoe_kernels.plan import RoutingPlan
from sonicmoe_kernels.rounding import ROUNDINGS, token_rounding_plan
from sonicmoe_kernels.tiles import (
    MAX_ROUTED_TOKENS,
    NO_SOURCE,
    RoutingKernel,
    routing_kernels,
    why_illegal_routing,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.emulated_block import with_sources
from tests.kernels.blackwell import compile_for_blackwell
from tests.kernels.fake_cuda import fake_cuda
from tests.kernels.sass import read_sass, tools_folder
from tests.saved_bytes import saved_bytes

pytest.importorskip("nvidia_cutlass_dsl", reason="needs the kernel compiler")

kernel_cache.prepare_dsl(os.environ.get(kernel_cache.ARCH_VARIABLE, kernel_cache.ARCH))
import cutlass  # noqa: E402
import cutlass.cute as cute  # noqa: E402
from cutlass import Boolean, Constexpr, Int32, Uint32  # noqa: E402
from cutlass.cute.runtime import from_dlpack  # noqa: E402
from sonicmoe_kernels.cute import balance, block_scan, score_keys, token_rounding  # noqa: E402

E, K = 128, 8
SPECS = list(
    dict.fromkeys(
        spec for rounding in (None, *ROUNDINGS) for spec in routing_kernels(E, K, rounding=rounding)
    )
)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernel_cache.CACHE_VARIABLE, str(tmp_path_factory.mktemp("kernels")))
        yield


# ------------------------------------------------------------------ arithmetic


def test_keys_order_scores_as_torch_sorts_them():
    @cute.jit
    def keys_of(mBits: cute.Tensor, mKeys: cute.Tensor, mBack: cute.Tensor):
        for i in range(mBits.shape[0]):
            mKeys[i] = score_keys.key_of(mBits[i])
            mBack[i] = score_keys.score_of(mKeys[i])

    odd = [0.0, -0.0, 1e-45, -1e-45, 1.5, -1.5, 3e38, -3e38, float("inf"), -float("inf")]
    generator = torch.Generator().manual_seed(0)
    scores = torch.cat([torch.tensor([*odd, float("nan")]), torch.randn(500, generator=generator)])
    scores = torch.cat([scores, scores.flip(0), -torch.tensor([float("nan")])])
    keys, back = torch.zeros_like(scores, dtype=torch.int32), torch.zeros_like(scores)
    keys_of(from_dlpack(scores.view(torch.int32)), from_dlpack(keys), from_dlpack(back))
    want = scores.sort(descending=True, stable=True).indices
    assert keys.sort(descending=True, stable=True).indices.equal(want)
    assert torch.equal(back.nan_to_num(nan=7.0), (scores + 0.0).nan_to_num(nan=7.0))
    assert keys[9] == score_keys.MINUS_INFINITY_KEY
    assert int(keys.min()) > score_keys.LOWEST_KEY and int(keys.max()) < score_keys.HIGHEST_KEY


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 0), (5, 2052), (5, 2053), (-(2**31), 2**31 - 1), (-7, 2**30), (2**31 - 2, 2**31 - 1)],
)
def test_bins_cover_every_key_in_order(low: int, high: int):
    @cute.jit
    def bins_of(low: Int32, high: Int32, mKeys: cute.Tensor, mBins: cute.Tensor):
        shift = token_rounding.shift_of(low, high)
        mBins[0] = Int32(shift)
        for i in range(mKeys.shape[0]):
            mBins[i + 1] = token_rounding.bin_of(mKeys[i], low, shift)

    keys = torch.linspace(low, high, 4001, dtype=torch.float64).round().long().clamp(low, high)
    found = torch.zeros(4002, dtype=torch.int32)
    bins_of(Int32(low), Int32(high), from_dlpack(keys.int()), from_dlpack(found))
    shift, bins = int(found[0]), found[1:].long()
    assert bins.equal((keys - low) >> shift)
    assert int(bins.max()) < token_rounding.BINS
    assert shift == 0 or int(bins.max()) >= token_rounding.BINS // 2  # no bit is wasted


def test_three_rounds_of_bins_reach_a_single_key():
    assert 3 * token_rounding.BIN_BITS >= 32


def test_a_candidate_chose_the_expert_or_may_be_added():
    @cute.jit
    def candidates(mKeys: cute.Tensor, mWords: cute.Tensor, mFound: cute.Tensor):
        for i in range(mKeys.shape[0]):
            for lane in range(32):
                for chosen in cutlass.range_constexpr(2):
                    found = token_rounding.is_candidate(
                        mKeys[i], mWords[i], Int32(lane), Boolean(chosen)
                    )
                    mFound[i, lane, chosen] = Int32(found)

    keys = torch.tensor([0, score_keys.MINUS_INFINITY_KEY, -5], dtype=torch.int32)
    words = torch.tensor([0x5A5A5A5A, -0x5A5A5A5B, -1], dtype=torch.int32)
    found = torch.zeros(3, 32, 2, dtype=torch.int32)
    candidates(from_dlpack(keys), from_dlpack(words), from_dlpack(found))
    member = (words.unsqueeze(1) >> torch.arange(32)) & 1
    assert found[:, :, 1].equal(member)
    legal = keys != score_keys.MINUS_INFINITY_KEY
    assert found[:, :, 0].equal((1 - member) * legal.unsqueeze(1))


def test_five_swaps_transpose_a_warps_bits():
    """The shuffles are a plain loop here; what is swapped is the kernel's own function."""

    @cute.jit
    def swap_all(mRows: cute.Tensor, mNew: cute.Tensor, step: Constexpr):
        for lane in range(32):
            upper = (lane & step) != 0
            other = Uint32(mRows[lane ^ step])
            mNew[lane] = Int32(block_scan.swap_bits(Uint32(mRows[lane]), other, upper, step))

    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-(2**31), 2**31, (32,), generator=generator).int()
    bits = (rows.unsqueeze(1) >> torch.arange(32)) & 1
    for step in (16, 8, 4, 2, 1):
        new = torch.zeros_like(rows)
        swap_all(from_dlpack(rows), from_dlpack(new), step)
        rows = new
    assert ((rows.unsqueeze(1) >> torch.arange(32)) & 1).equal(bits.T)


def test_bits_are_counted_below_a_lane_and_found_from_the_lowest():
    @cute.jit
    def bits_of(mBelow: cute.Tensor, mLowest: cute.Tensor):
        for lane in range(32):
            mBelow[lane] = Int32(block_scan.bits_below(Int32(lane)))
            word = (Uint32(1) << Uint32(lane)) | Uint32(0x80000000)
            mLowest[lane] = block_scan.lowest_bit(word)

    below, lowest = torch.zeros(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    bits_of(from_dlpack(below), from_dlpack(lowest))
    assert below.tolist() == [2**lane - 1 for lane in range(32)]
    assert lowest.tolist() == list(range(32))


def test_the_balanced_number_of_tiles_is_the_nearest_and_halves_go_down():
    @cute.jit
    def tiles_of(mTiles: cute.Tensor, mUp: cute.Tensor, tile: Int32):
        for chosen in range(mTiles.shape[0]):
            mTiles[chosen] = balance.tiles_until(Int32(chosen), tile)
            mUp[chosen] = balance.can_go_up(Int32(chosen), Int32(3), tile)

    for tile in (1, 2, 7, 8, 128):
        tiles, up = torch.zeros(300, dtype=torch.int32), torch.zeros(300, dtype=torch.int32)
        tiles_of(from_dlpack(tiles), from_dlpack(up), Int32(tile))
        chosen = torch.arange(300)
        want = torch.div(2 * chosen + tile - 1, 2 * tile, rounding_mode="floor")
        assert tiles.equal(want.int())
        over = chosen % tile
        assert up.equal(((over > 0) & (tile - over <= 3)).int())


# ------------------------------------------------------------------ compiled code


@pytest.mark.skipif(tools_folder() is None, reason="no cuobjdump here")
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kernel}-{s.rounding}")
def test_nothing_spills_and_no_atomic_leaves_the_block(spec, tmp_path):
    code = read_sass(kernel_cache.build(spec), tmp_path)
    assert code.stack_bytes == 0
    assert code.count("LDL") == code.count("STL") == 0
    assert code.count("ATOMG") == code.count("RED.") == 0


@pytest.mark.skipif(tools_folder() is None, reason="no cuobjdump here")
def test_counts_are_read_with_16_bytes_and_eight_in_flight(tmp_path):
    code = read_sass(kernel_cache.build(RoutingKernel("plan_rows", E, K, "int64")), tmp_path)
    assert code.count("LDG.E.128") >= 8


def test_they_also_compile_for_blackwell():
    compile_for_blackwell(
        "[s for r in (None, 'score_stochastic', 'balance')"
        " for s in tiles.routing_kernels(128, 8, rounding=r)]"
    )


@pytest.mark.parametrize(
    ("experts", "top_k", "words"),
    [(0, 1, r"E=0 is not in \[1, 4096\]"), (4097, 8, "E=4097"), (8, 9, r"K=9 is not in \[1, 8\]")],
)
def test_sizes_beyond_the_tables_are_refused(experts: int, top_k: int, words: str):
    with pytest.raises(ValueError, match=words):
        kernel_cache.compile_kernel(RoutingKernel("plan_rows", experts, top_k, "int64"))
    assert why_illegal_routing(4096, 32) is None


@pytest.mark.parametrize("experts", [1, 7, E])
@pytest.mark.skipif(torch.cuda.is_available(), reason="would launch on memory that is not there")
def test_right_calls_are_stopped_by_the_missing_gpu_alone(experts: int, monkeypatch):
    """The launch functions themselves, on tensors that claim to be on a GPU."""
    top_k = min(K, experts)
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *shape, dtype=torch.float32, device=None: fake_cuda(*shape, dtype=dtype),
    )
    monkeypatch.setattr(torch, "empty_like", lambda like: fake_cuda(*like.shape, dtype=torch.int32))
    stopped = []
    load = kernel_cache.load

    def calling(spec):
        def call(*arguments):
            with pytest.raises(RuntimeError, match=r"(?i)cuda"):
                load(spec)(*arguments)
            stopped.append(spec.kernel)

        return call

    monkeypatch.setattr(hopper_routing.kernel_cache, "load", calling)
    hopper_routing.kernel.cache_clear()
    monkeypatch.setattr(hopper_routing, "_IDS", defaultdict(lambda: "int64"))
    ids_TK = fake_cuda(1000, top_k, dtype=torch.int64)
    scores_TK = fake_cuda(1000, top_k, dtype=torch.float32)
    scores_TE = fake_cuda(1000, experts, dtype=torch.float32)
    draws_E = fake_cuda(experts, dtype=torch.float32)
    plan = hopper_routing.plan_of_topk(ids_TK, scores_TK, experts)
    for rounding in ("balance", "stochastic"):
        hopper_routing.plan_of_rounding(
            ids_TK,
            scores_TK,
            scores_TE,
            draws_E if rounding == "stochastic" else None,
            rounding=rounding,
            tile=128,
            r_max=5000,
        )
    pairs = [fake_cuda(1000 * width, dtype=torch.float32) for width in (top_k, experts)]
    hopper_routing.score_gradient(plan.score_R, plan.source_R, *pairs)
    hopper_routing.kernel.cache_clear()
    assert stopped == [
        *("membership", "plan_rows"),
        *("membership", "balance", "token_rounding", "plan_rows"),
        *("membership", "token_rounding", "plan_rows"),
        "score_gradient",
    ]


# ------------------------------------------------------------------ operators


def routing(T: int = 40, E: int = 6, K: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores_TE = torch.rand(T, E, generator=generator)
    scores_TK, ids_TK = scores_TE.topk(K, dim=1)
    return ids_TK, scores_TK.clone().requires_grad_(), scores_TE.requires_grad_()


@pytest.fixture
def stand_ins(monkeypatch):
    """Torch in place of the launches, on the CPU; what is around them is the real thing."""

    def plan_of_topk(ids_TK, scores_TK, num_experts):
        plan = RoutingPlan.from_topk(ids_TK, scores_TK, num_experts=num_experts, backend="torch")
        return with_sources(plan, ids_TK)

    def plan_of_rounding(ids_TK, scores_TK, scores_TE, uniform_E, *, rounding, tile, r_max):
        plan = token_rounding_plan(
            ids_TK,
            scores_TK,
            scores_TE,
            rounding=rounding,
            tile=tile,
            uniform_E=uniform_E,
            backend="torch",
        )
        assert plan.r_max == r_max
        return with_sources(plan, ids_TK)

    def score_gradient(dscore_R, source_R, dchosen_P, dadded_P):
        if dchosen_P is not None:
            dchosen_P[source_R[source_R >= 0].long()] = dscore_R[source_R >= 0]
        if dadded_P is not None:
            added_R = (source_R < 0) & (source_R != NO_SOURCE)
            dadded_P[-1 - source_R[added_R].long()] = dscore_R[added_R]

    for function in (plan_of_topk, plan_of_rounding, score_gradient):
        monkeypatch.setattr(hopper_routing, function.__name__, function)

    def resolve(requested, *_):
        return "torch" if requested == "torch" else "hopper"

    for module in ("plan", "rounding"):
        monkeypatch.setattr(f"sonicmoe_kernels.{module}.resolve_plan_backend", resolve)


def plan_by(backend: str, name: str, routed: tuple[Tensor, ...]) -> RoutingPlan:
    ids_TK, scores_TK, scores_TE = routed
    E = scores_TE.shape[1]
    if name == "topk":
        return RoutingPlan.from_topk(ids_TK, scores_TK, num_experts=E, backend=backend)
    draws_E = torch.linspace(0, 0.9, E)
    return token_rounding_plan(*routed, rounding=name, tile=8, uniform_E=draws_E, backend=backend)


def plan_and_bytes_kept(
    backend: str, name: str, routed: tuple[Tensor, ...]
) -> tuple[RoutingPlan, int]:
    plans = []

    def scores() -> Tensor:
        plans.append(plan_by(backend, name, routed))
        return plans[0].score_R

    kept = saved_bytes(scores, [])
    return plans[0], kept


@pytest.mark.parametrize("name", ["topk", *ROUNDINGS])
def test_gradients_reach_the_scores_and_only_sources_are_kept(stand_ins, name):
    gradients = []
    for backend in ("hopper", "torch"):
        routed = routing()
        plan, kept = plan_and_bytes_kept(backend, name, routed)
        R = int(plan.expert_offsets[-1])
        gradient_R = torch.randn(plan.r_max, generator=torch.Generator().manual_seed(1))
        gradient_R[R:] = float("nan")
        gradients.append(
            torch.autograd.grad(plan.score_R, routed[1:], gradient_R, allow_unused=True)
        )
        if backend == "hopper":
            assert kept == 4 * plan.r_max
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or mine.equal(theirs)


def test_second_derivatives_are_refused(stand_ins):
    routed = routing()
    plan = plan_by("hopper", "nearest", routed)
    (first,) = torch.autograd.grad(plan.score_R.square().sum(), routed[1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("name", ["topk", "nearest", "stochastic"])
def test_compiled_functions_trace_through_the_operators(stand_ins, name):
    def loss_of(*routed: Tensor) -> Tensor:
        plan = plan_by("auto", name, routed)
        return (plan.score_R * plan.token_idx_R).sum() * plan.num_tokens

    torch.compiler.reset()
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of, fullgraph=True, backend=frames)
    for T in (40, 56, 64, 72):
        routed = routing(T)
        gradients = [torch.autograd.grad(f(*routed), routed[1])[0] for f in (compiled, loss_of)]
        assert gradients[0].equal(gradients[1])
    assert frames.frame_count == 2  # the second time for any number of tokens


@pytest.mark.parametrize("name", ["topk", "up"])
def test_torch_finds_the_operators_well_formed(stand_ins, name):
    ids_TK, scores_TK, scores_TE = routing()
    operator, arguments = {
        "topk": (torch.ops.sonicmoe.topk_plan.default, (ids_TK, scores_TK, 6)),
        "up": (
            torch.ops.sonicmoe.rounding_plan.default,
            (ids_TK, scores_TK, scores_TE, None, "up", 8, 80 + 6 * 7),
        ),
    }[name]
    # not its tracing of the backward: that sums all outputs, the first of them integers
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, arguments, test_utils=checks)


# ------------------------------------------------------------------ choice of backend


def test_plans_are_built_by_torch_where_there_is_no_hopper_gpu():
    ids_TK, scores_TK, scores_TE = routing()
    assert backends.resolve_plan_backend("auto", ids_TK, 6, scores_TK) == "torch"
    for build in (
        lambda: RoutingPlan.from_topk(ids_TK, scores_TK, num_experts=6, backend="hopper"),
        lambda: token_rounding_plan(
            ids_TK, scores_TK, scores_TE, rounding="up", tile=8, backend="hopper"
        ),
    ):
        with pytest.raises(ValueError, match="'hopper' cannot run here: the tensors are on cpu"):
            build()


def test_an_unknown_backend_is_refused():
    ids_TK, scores_TK, _ = routing()
    with pytest.raises(ValueError, match="'cuda' is unknown; accepted: auto, hopper, torch"):
        RoutingPlan.from_topk(ids_TK, scores_TK, num_experts=6, backend="cuda")


@pytest.mark.parametrize(
    ("T", "E", "K", "dtype", "words"),
    [
        (64, 8, 2, torch.float32, None),
        (64, 8, 2, torch.bfloat16, None),
        (0, 8, 2, torch.float32, None),
        (64, 4097, 2, torch.float32, "E=4097 is not in"),
        (64, 64, 33, torch.float32, "K=33 is not in"),
        (64, 8, 2, torch.float64, "float64"),
        (MAX_ROUTED_TOKENS + 1, 8, 2, torch.float32, "are more than 1048576"),
        (MAX_ROUTED_TOKENS, 2048, 2, torch.float32, "do not fit in int32"),
    ],
)
def test_auto_takes_the_kernels_within_their_limits(T, E, K, dtype, words, monkeypatch):
    monkeypatch.setattr(backends, "_device_obstacle_once", lambda *device: "")
    with FakeTensorMode():
        ids_TK = torch.empty(T, K, dtype=torch.int64, device="cuda")
        scores_TK = torch.empty(T, K, dtype=dtype, device="cuda")
    resolve = backends.resolve_plan_backend
    assert resolve("torch", ids_TK, E, scores_TK) == "torch"
    if words is None:
        assert resolve("auto", ids_TK, E, scores_TK) == "hopper"
        assert resolve("hopper", ids_TK, E, scores_TK) == "hopper"
    else:
        assert resolve("auto", ids_TK, E, scores_TK) == "torch"
        with pytest.raises(ValueError, match=words):
            resolve("hopper", ids_TK, E, scores_TK)
