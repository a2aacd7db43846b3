"""The aggregation kernel without a GPU: compiles, links, loads, reads 16 bytes, refuses misuse."""

import pytest
import torch
from sonicmoe_kernels import compile as kernel_cache
from sonicmoe_kernels.tiles import Aggregation

from tests.kernels.blackwell import compile_for_blackwell
from tests.kernels.fake_cuda import fake_cuda
from tests.kernels.sass import read_sass, tools_folder

pytest.importorskip("nvidia_cutlass_dsl", reason="needs the kernel compiler")

FIXED = Aggregation(1536, "bfloat16", 8, weighted=True)
RAGGED = Aggregation(72, "float16", None, weighted=True, residual=True)


needs_disassembler = pytest.mark.skipif(tools_folder() is None, reason="no cuobjdump here")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernel_cache.CACHE_VARIABLE, str(tmp_path_factory.mktemp("kernels")))
        yield


@needs_disassembler
@pytest.mark.parametrize(
    ("spec", "rows_in_code"), [(FIXED, 8), (RAGGED, 8)], ids=["fixed", "ragged"]
)
def test_every_row_is_read_with_16_bytes_and_nothing_spills(spec, rows_in_code, tmp_path):
    code = read_sass(kernel_cache.build(spec), tmp_path)
    assert code.stack_bytes == 0
    assert code.count("LDL") == code.count("STL") == 0
    assert code.count("LDG.E.128") == rows_in_code + spec.residual
    assert code.count("STG.E.128") == 1
    assert code.count("ATOM") == code.count("RED") == 0


@needs_disassembler
def test_row_offsets_have_64_bits(tmp_path):
    """A row id is widened before it is multiplied by D: R * D may exceed 2^31 elements."""
    code = read_sass(kernel_cache.build(FIXED), tmp_path)
    assert code.count("IMAD.WIDE") >= FIXED.rows_per_token


@pytest.mark.parametrize("d", [0, 4, 1537])
def test_a_width_without_whole_16_byte_chunks_is_refused(d):
    with pytest.raises(ValueError, match="multiple of 8"):
        kernel_cache.compile_kernel(Aggregation(d, "bfloat16", 8, weighted=True))


def test_zero_rows_per_token_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        kernel_cache.compile_kernel(Aggregation(64, "bfloat16", 0, weighted=True))


def call(*, y_dtype=torch.bfloat16, width=1536, index_dtype=torch.int32, scores=32, tokens=4):
    kernel_cache.load(FIXED)(
        fake_cuda(32, width, dtype=y_dtype),
        fake_cuda(32, dtype=index_dtype),
        None,
        fake_cuda(scores, dtype=torch.float32) if scores else None,
        None,
        fake_cuda(tokens, 1536),
    )


@pytest.mark.parametrize(
    ("misuse", "complaint"),
    [
        ({"y_dtype": torch.float16}, "expected dtype=bfloat16"),
        ({"y_dtype": torch.float32}, "expected dtype=bfloat16"),
        ({"width": 1544}, "1536"),
        ({"index_dtype": torch.int64}, "expected dtype=int32"),
        ({"scores": 31}, "expected to match"),
        ({"scores": 0}, "expected Tensor"),
    ],
    ids=["fp16", "fp32", "width", "int64", "sizes", "no score"],
)
def test_a_built_kernel_refuses_tensors_it_was_not_compiled_for(misuse, complaint):
    with pytest.raises((TypeError, ValueError), match=complaint):
        call(**misuse)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would launch on memory that is not there")
def test_a_right_call_is_stopped_by_the_missing_gpu_alone():
    with pytest.raises(RuntimeError, match="cuda"):
        call()


def test_it_also_compiles_for_blackwell():
    compile_for_blackwell(
        "[tiles.Aggregation(1536, 'bfloat16', 8, True),"
        " tiles.Aggregation(1536, 'bfloat16', None, False)]"
    )
