"""The fused block's compiled stages without a GPU: their buffers' parts, arithmetic and code.

Legend: T tokens, E experts, K experts per token, R routed rows.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from sonicmoe_kernels import compile as kernel_cache
from sonicmoe_kernels.block_stages import (
    STAGES,
    BlockLayer,
    BlockStage,
    gradient_parts,
    kept_parts,
    scratch_parts,
    why_illegal_block,
    words,
)
from sonicmoe_kernels.kernel_lists import block_specs
from sonicmoe_kernels.tiles import STATISTICS_CTAS, TILE_M, TopKBackward, TopKOptions

from tests.emulated_block import cut
from tests.kernels.fake_cuda import fake_cuda
from tests.kernels.sass import read_sass, tools_folder

cutlass = pytest.importorskip("cutlass")
cute = pytest.importorskip("cutlass.cute")

from cutlass import Float32, Int32, Int64  # noqa: E402
from cutlass.cute.runtime import from_dlpack  # noqa: E402
from sonicmoe_kernels.cute.block import Buffer  # noqa: E402
from sonicmoe_kernels.cute.statistics import Statistics, Sums, nats_of  # noqa: E402
from sonicmoe_kernels.cute.topk_backward import place_of  # noqa: E402

T, E, K = 96, 64, 4
ROUTING = TopKOptions(E, K, "float32", "softmax", "before", True, False)
SIGMOID = TopKOptions(E, K, "float32", "sigmoid", "before", True, True)
TOPK, NEAREST = (BlockLayer(ROUTING, rounding, 64, 64) for rounding in (None, "nearest"))
BALANCE = BlockLayer(SIGMOID, "balance", 64, 64)
LAYERS = {"topk": TOPK, "nearest": NEAREST, "balance, sigmoid, bias": BALANCE}


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernel_cache.CACHE_VARIABLE, str(tmp_path_factory.mktemp("kernels")))
        yield


# ------------------------------------------------------------------ buffers


def parts_of(kind: str, layer: BlockLayer, tokens, rows) -> dict:
    if kind == "gradient":
        return gradient_parts(layer, tokens, rows, 2)
    return {"kept": kept_parts, "scratch": scratch_parts}[kind](layer, tokens, rows)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("kind", ["kept", "scratch", "gradient"])
def test_host_and_compiled_code_cut_a_buffer_alike(kind: str, layer: BlockLayer):
    tokens, rows = 301, 1207  # neither a multiple of a part's alignment
    parts = parts_of(kind, layer, tokens, rows)

    @cute.jit
    def mark(mWords: cute.Tensor, tokens: Int32, rows: Int32):
        buffer = Buffer(mWords, parts_of(kind, layer, Int64(tokens), Int64(rows)))
        for number, name in enumerate(parts):
            part = buffer.part(name, Int32, (parts[name],))
            part[0] = 2 * number + 1
            part[parts[name] - 1] = 2 * number + 2

    marked = torch.zeros(words(parts), dtype=torch.int32)
    mark(from_dlpack(marked, assumed_align=16), Int32(tokens), Int32(rows))
    for number, part in enumerate(cut(marked, parts).values()):
        assert (int(part[0]), int(part[-1])) == (2 * number + 1, 2 * number + 2)
        assert part.storage_offset() % 4 == 0
    assert int(marked.count_nonzero()) == 2 * len(parts)


def test_parts_do_not_overflow_where_words_are_more_than_32_bits_count():
    layer = BlockLayer(ROUTING, None, 4096, 4096)
    assert words(scratch_parts(layer, 2**20, 2**20 * K)) > 2**32

    @cute.jit
    def begin_of(mWords: cute.Tensor, mBegin: cute.Tensor, tokens: Int32):
        parts = scratch_parts(layer, Int64(tokens), Int64(tokens) * K)
        mBegin[0] = Buffer(mWords, {**parts, "end": 1}).begins["end"]

    begin = torch.zeros(1, dtype=torch.int64)
    begin_of(from_dlpack(torch.zeros(4).int()), from_dlpack(begin), Int32(2**20))
    assert int(begin) == words(scratch_parts(layer, 2**20, 2**20 * K))


# ------------------------------------------------------------------ arithmetic


def test_a_gradient_finds_the_place_of_its_score():
    sources, tokens, want = [], [], []
    for token in (0, 5, T - 1):
        sources += [token * K + k for k in range(K)] + [-1 - (token * E + e) for e in range(E)]
        want += [2 * E + k for k in range(K)] + list(range(E))
        tokens += [token] * (K + E)

    @cute.jit
    def places(mSource: cute.Tensor, mToken: cute.Tensor, mPlace: cute.Tensor):
        for i in range(mSource.shape[0]):
            mPlace[i] = place_of(mSource[i], mToken[i], E, K, 2 * E)

    found = torch.zeros(len(want), dtype=torch.int32)
    given = (torch.tensor(sources).int(), torch.tensor(tokens).int(), found)
    places(*(from_dlpack(t) for t in given))
    assert found.tolist() == want


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("first_pass", [0, 1])
def test_each_expert_adds_its_rows(rounded: bool, first_pass: int):
    statistics = Statistics(TopKOptions(4, 2, "float32", "softmax", "before", True, False))
    rows_E, chosen_E = torch.tensor([0, 1, 128, 300]), torch.tensor([5, 1, 100, 310])

    @cute.jit
    def count(mOffsets: cute.Tensor, mChosen: cute.Tensor, mSums: cute.Tensor):
        load, tiles, added, change, choices = (mSums[i, None] for i in range(5))
        sums = Sums(mSums, mSums, load, tiles, added, change, choices)
        for e in range(4):
            chosen = mChosen if rounded else None
            rows = mOffsets[e + 1] - mOffsets[e]
            statistics.count(Int32(e), rows, chosen, sums, Int32(first_pass))

    offsets = torch.cat([torch.zeros(1), rows_E.cumsum(0)]).int()
    sums = torch.ones(5, 4)
    count(*(from_dlpack(t) for t in (offsets, chosen_E.int(), sums)))
    change_E = rows_E - chosen_E
    want = [rows_E, (rows_E + TILE_M - 1) // TILE_M, change_E.clamp(min=0), change_E]
    if not rounded:
        want[2:], chosen_E = [0 * rows_E] * 2, rows_E
    want = [w * first_pass for w in want]
    assert (sums - 1).tolist() == torch.stack([*want, chosen_E]).tolist()


def test_a_probability_of_0_adds_nothing_to_the_entropy():
    probability = torch.tensor([0.0, 1.0, 0.5, 1e-40, 1e-3, float("nan")])

    @cute.jit
    def nats(mP: cute.Tensor, mNats: cute.Tensor):
        for i in range(mP.shape[0]):
            mNats[i] = nats_of(Float32(mP[i]))

    found = torch.zeros(6)
    nats(from_dlpack(probability), from_dlpack(found))
    want = torch.special.entr(probability.double()).float()
    torch.testing.assert_close(found, want, equal_nan=True)


# ------------------------------------------------------------------ compiled code


@pytest.mark.skipif(tools_folder() is None, reason="no cuobjdump here")
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_every_stage_compiles_and_its_kernels_spill_no_more_than_alone(layer, tmp_path):
    for stage in STAGES:
        code = read_sass(kernel_cache.build(BlockStage(stage, layer)), tmp_path)
        assert code.stack_bytes <= 8, stage  # of d_hidden and up, see test_compile_rows
        atomics = [i for i in code.instructions if "ATOMG" in i or "RED." in i]
        assert all("SYNCS" in i for i in atomics), stage  # barriers in shared memory


@pytest.mark.skipif(tools_folder() is None, reason="no cuobjdump here")
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("routing", [ROUTING, SIGMOID], ids=["softmax", "sigmoid"])
def test_a_gradient_through_the_plan_is_stored_in_halves_without_spills(routing, added, tmp_path):
    layer = dataclasses.replace(TOPK, routing=routing, rounding="nearest" if added else None)
    spec = TopKBackward(**dataclasses.asdict(routing), d_all=added, through_plan=True)
    assert spec.reads_logits == (added or routing is SIGMOID)
    code = read_sass(kernel_cache.build(BlockStage("input_gradient", layer)), tmp_path)
    assert code.stack_bytes <= 8


@pytest.mark.parametrize(
    ("change", "words"),
    [({"d": 100}, "D=100"), ({"f": 32}, "F=32"), ({"routing": (96, 4)}, "E=96")],
)
def test_sizes_that_no_kernel_serves_are_refused(change, words):
    if "routing" in change:
        num_experts, top_k = change["routing"]
        routing = dataclasses.replace(ROUTING, num_experts=num_experts, top_k=top_k)
        change = {"routing": routing}
    layer = dataclasses.replace(TOPK, **change)
    assert words in (why_illegal_block(layer) or "")
    with pytest.raises(ValueError, match=words):
        kernel_cache.compile_kernel(BlockStage("forward", layer))
    assert block_specs(layer.routing, d=layer.d, f=layer.f) == []


def test_a_run_with_rounding_also_evaluates_by_token_choice():
    found = block_specs(ROUTING, d=64, f=64, rounding="nearest")
    assert found == [BlockStage(stage, layer) for layer in (TOPK, NEAREST) for stage in STAGES]


# ------------------------------------------------------------------ what a built stage accepts


def call(stage: str, *, batch: int = 2, length: int = 48, kept: torch.dtype = torch.int32) -> None:
    layer, fp32 = NEAREST, torch.float32
    rows, many = 1000, 2**20
    x = fake_cuda(batch, length, 64)
    w, gate, logits = (fake_cuda(E, 64, 64), fake_cuda(E, 64), fake_cuda(96, E, dtype=fp32))
    buffers = (fake_cuda(many, dtype=kept), fake_cuda(many, dtype=torch.int32))
    sums = [fake_cuda(n, dtype=fp32) for n in (9, STATISTICS_CTAS, E, E, E, E, E)]
    backward = (x, x, logits, gate, w, w, w, *buffers)
    arguments = {
        "forward": (x, logits, None, None, w, w, w, *buffers, x, *sums, rows, 1.0, 8, 1, 2, 132),
        "gradients": (*backward, w, x, gate, w, w, rows, 1.0, 132),
        "input_gradient": (*backward, w, x, None, None, None, rows, 1.0, 132),
        "weight_gradients": (x, buffers[0], w, w, rows, 132),
    }
    kernel_cache.load(BlockStage(stage, layer))(*arguments[stage])


@pytest.mark.skipif(torch.cuda.is_available(), reason="would launch on memory that is not there")
@pytest.mark.parametrize("stage", STAGES)
def test_a_right_call_is_stopped_by_the_missing_gpu_alone(stage):
    with pytest.raises(RuntimeError, match=r"(?i)cuda"):
        call(stage)


def test_a_buffer_of_another_dtype_is_refused():
    with pytest.raises((TypeError, ValueError), match="expected dtype=int32"):
        call("weight_gradients", kept=torch.int64)
