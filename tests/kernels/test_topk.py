"""The router's top-k kernels without a GPU: they compile for both architectures, lean, and their
index and order arithmetic is that of plain Python.
"""

import itertools
import math
import struct

import pytest
import torch
from sonicmoe_kernels import compile as kernel_cache
from sonicmoe_kernels.tiles import WARP, TopKBackward, TopKForward, TopKOptions, topk_warps

from tests.kernels.blackwell import compile_for_blackwell
from tests.kernels.fake_cuda import fake_cuda
from tests.kernels.sass import read_sass, tools_folder

cutlass = pytest.importorskip("cutlass")
cute = pytest.importorskip("cutlass.cute")

from sonicmoe_kernels.cute.expert_row import ExpertRow, number_of, order_of  # noqa: E402

RENORMALISED = ("softmax", "before", True)
SIZES = (1, 2, 7, 16, 33, 64, 96, 100, 128, 200, 256, 512, 1000, 1024, 4095, 4096)


def options(num_experts: int, top_k: int = 1, dtype: str = "float32") -> tuple:
    return (num_experts, top_k, dtype, *RENORMALISED, False)


LEAN = TopKForward(*options(128, 8), all_scores=False)
FULL = TopKForward(*options(128, 8), all_scores=True)
SEARCHED = TopKForward(1024, 8, "bfloat16", "sigmoid", "before", True, True, all_scores=True)
SPARSE_GRADIENT = TopKBackward(*options(128, 8), d_weights=True, d_all=False)
FULL_GRADIENT = TopKBackward(1024, 8, "float32", "softmax", "before", True, True, True, True)

needs_disassembler = pytest.mark.skipif(tools_folder() is None, reason="no cuobjdump here")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernel_cache.CACHE_VARIABLE, str(tmp_path_factory.mktemp("kernels")))
        yield


# 16-byte loads and stores; reductions over the warp: two a round and one for the softmax's maximum
@needs_disassembler
@pytest.mark.parametrize(
    ("spec", "loads", "stores", "reductions"),
    [
        (LEAN, 1, 0, 2 * 8 + 1),
        (FULL, 1, 1, 2 * 8 + 2),
        (SEARCHED, 8, 8, 2 * (2 + 2)),  # two rounds in a loop; logits come in 8 bytes, bias in 16
        (SPARSE_GRADIENT, 0, 1, 0),
        (FULL_GRADIENT, 16, 8, 1),
    ],
    ids=["lean", "full", "searched", "sparse gradient", "full gradient"],
)
def test_rows_move_in_whole_vectors_and_nothing_spills(spec, loads, stores, reductions, tmp_path):
    code = read_sass(kernel_cache.build(spec), tmp_path)
    assert code.stack_bytes == 0
    assert code.count("LDL") == code.count("STL") == code.count("CALL") == 0
    assert code.count("LDG.E.128") == loads and code.count("STG.E.128") == stores
    assert code.count("REDUX") == reductions
    assert code.count("ATOM") == code.count("RED.") == 0


@needs_disassembler
def test_the_choice_of_8_out_of_128_is_short(tmp_path):
    """A warp a token: this many instructions bound the kernel as much as its bytes do."""
    assert len(read_sass(kernel_cache.build(LEAN), tmp_path).instructions) <= 256


@pytest.mark.parametrize("num_experts", [0, 4097])
def test_a_row_that_no_warp_can_hold_is_refused(num_experts):
    for kind in (TopKForward, TopKBackward):
        with pytest.raises(ValueError, match=f"E={num_experts} is not in"):
            kernel_cache.compile_kernel(kind(*options(num_experts)))


@pytest.mark.parametrize("top_k", [0, 8, 33])
def test_more_choices_than_experts_or_lanes_are_refused(top_k):
    with pytest.raises(ValueError, match=f"K={top_k} is not in"):
        kernel_cache.compile_kernel(TopKForward(*options(7 if top_k == 8 else 64, top_k)))


def test_every_size_is_covered_by_whole_loads_of_one_warp():
    for num_experts in SIZES:
        spec = TopKOptions(*options(num_experts))
        assert num_experts % spec.vector == 0 and spec.vector in (1, 2, 4)
        assert spec.per_lane * WARP >= num_experts > (spec.chunks - 1) * WARP * spec.vector
    assert [TopKOptions(*options(n)).vector for n in (128, 96, 64, 33, 4095)] == [4, 4, 2, 1, 1]
    assert topk_warps(1) == 8 and topk_warps(16 * 1024) == 3 and topk_warps(2**20) == 1


@pytest.mark.parametrize("num_experts", [7, 64, 96, 200, 1024])
def test_lanes_own_ascending_experts_and_each_expert_has_one_place(num_experts):
    row = ExpertRow(TopKOptions(*options(num_experts)))
    places = torch.zeros(WARP * row.per_lane, 3, dtype=torch.int32)

    @cute.jit
    def write(mPlaces: cute.Tensor):
        for lane in range(WARP):
            for i in range(row.per_lane):
                expert = row.expert(lane, i)
                owner, place = row.place(expert)
                mPlaces[lane * row.per_lane + i, 0] = expert
                mPlaces[lane * row.per_lane + i, 1] = owner
                mPlaces[lane * row.per_lane + i, 2] = place

    write(cute.runtime.from_dlpack(places))
    experts = places[:, 0].view(WARP, row.per_lane)
    assert sorted(experts.flatten().tolist()) == list(range(WARP * row.per_lane))
    assert bool((experts.diff(dim=1) > 0).all())
    want = [[lane, i] for lane, i in itertools.product(range(WARP), range(row.per_lane))]
    assert places[:, 1:].tolist() == want


def test_order_compares_as_numbers_do_and_is_undone():
    values = [-math.inf, -3e38, -1.5, -1.0, -1e-40, -0.0, 0.0, 1e-45, 1.0, 1.5, 3e38, math.inf]
    values = [struct.unpack("f", struct.pack("f", v))[0] for v in values] + [math.nan, -math.nan]
    numbers, orders = torch.tensor(values), torch.zeros(len(values), dtype=torch.int32)
    undone = torch.zeros(len(values))

    @cute.jit
    def convert(mNumber: cute.Tensor, mOrder: cute.Tensor, mUndone: cute.Tensor):
        for i in range(len(values)):
            mOrder[i] = order_of(mNumber[i])
            mUndone[i] = number_of(mOrder[i])

    convert(*(cute.runtime.from_dlpack(t) for t in (numbers, orders, undone)))
    finite, got = values[:-2], orders.tolist()
    for (one, a), (other, b) in itertools.product(zip(finite, got[:-2], strict=True), repeat=2):
        assert (one < other) == (a < b) and (one == other) == (a == b)
    assert undone[:-2].equal(numbers[:-2]) and undone[-2:].isnan().all()
    assert got[-2] > max(got[:-2]) and -(2**31) < got[-1] < min(got[:-2])


def call(spec: TopKForward, *, tokens: int = 4, width: int = 128, ids=torch.int64, all_scores=True):
    fp32 = {"dtype": torch.float32}
    kernel_cache.load(spec)(
        fake_cuda(tokens, width, **fp32),
        None,
        fake_cuda(4, 8, dtype=ids),
        fake_cuda(4, 8, **fp32),
        fake_cuda(4, 128, **fp32) if all_scores else None,
        1.0,
    )


@pytest.mark.parametrize(
    ("misuse", "complaint"),
    [
        ({"tokens": 5}, "expected to match"),
        ({"width": 129}, "128"),
        ({"ids": torch.int32}, "expected dtype=int64"),
        ({"all_scores": False}, "expected Tensor"),
    ],
    ids=str,
)
def test_a_built_kernel_refuses_tensors_it_was_not_compiled_for(misuse, complaint):
    with pytest.raises((TypeError, ValueError), match=complaint):
        call(FULL, **misuse)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would launch on memory that is not there")
def test_a_right_call_is_stopped_by_the_missing_gpu_alone():
    with pytest.raises(RuntimeError, match="cuda"):
        call(FULL)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would launch on memory that is not there")
def test_a_right_call_of_the_backward_is_stopped_by_the_missing_gpu_alone():
    chosen, every = fake_cuda(4, 8, dtype=torch.float32), fake_cuda(4, 128, dtype=torch.float32)
    ids = fake_cuda(4, 8, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="cuda"):
        kernel_cache.load(SPARSE_GRADIENT)(chosen, None, ids, chosen, None, every, 1.0)


def test_they_also_compile_for_blackwell():
    names = "FULL, SEARCHED, SPARSE_GRADIENT, FULL_GRADIENT"
    compile_for_blackwell(f"({names})", imports=f"from tests.kernels.test_topk import {names}")
