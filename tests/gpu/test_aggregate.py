"""The aggregation kernel on a GPU, against an fp32 scatter-add.

Legend: T tokens, D model width, K rows per token, R routed rows.

Before every call the output is NaN, y and scores are NaN in rows of no token, and row ids past R
name a row that does not exist, so that reading one faults.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from sonicmoe_kernels import hopper
from torch import Tensor

from tests.oracle import CALC_DIFF_BOUND, calc_diff

GARBAGE_ROWS = 77
GARBAGE_ROW = 2**30
REPEATS = 50
SLICE = 100_000  # rows of one step of the reference


class Problem(NamedTuple):
    """score_R and add_TD may be None; rows_per_token is None for ragged counts."""

    y_RD: Tensor
    token_rows_R: Tensor
    token_offsets: Tensor
    score_R: Tensor | None
    add_TD: Tensor | None
    rows_per_token: int | None

    def run(self) -> Tensor:
        """The kernel's output, written over NaN."""
        tokens = self.token_offsets.shape[0] - 1
        out_TD = self.y_RD.new_full((tokens, self.y_RD.shape[1]), float("nan"))
        hopper.aggregate(
            self.y_RD,
            self.token_rows_R,
            self.token_offsets,
            out_TD,
            rows_per_token=self.rows_per_token,
            score_R=self.score_R,
            add_TD=self.add_TD,
        )
        return out_TD

    def reference(self) -> Tensor:
        """The same sums in fp32."""
        counts = self.token_offsets.diff().long()
        tokens = torch.arange(len(counts), device="cuda").repeat_interleave(counts)
        out_TD = torch.zeros(len(counts), self.y_RD.shape[1], device="cuda")
        for start in range(0, len(tokens), SLICE):
            owners = tokens[start : start + SLICE]
            rows = self.token_rows_R[start : start + len(owners)].long()
            weight = 1.0 if self.score_R is None else self.score_R[rows, None]
            out_TD.index_add_(0, owners, self.y_RD[rows].float() * weight)
        return out_TD if self.add_TD is None else out_TD + self.add_TD.float()


def make_problem(
    counts_T: Tensor,
    d: int,
    *,
    rows_per_token: int | None = None,
    weighted: bool = True,
    residual: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Problem:
    """Rows of a token lie anywhere among the R rows, as in an expert-major order."""
    generator = torch.Generator("cuda").manual_seed(seed)
    offsets = torch.zeros(len(counts_T) + 1, dtype=torch.int32, device="cuda")
    offsets[1:] = counts_T.cumsum(0)
    rows = int(offsets[-1])
    ids = torch.full((rows + GARBAGE_ROWS,), GARBAGE_ROW, dtype=torch.int32, device="cuda")
    ids[:rows] = torch.randperm(rows, generator=generator, device="cuda")
    y_RD = torch.empty(rows + GARBAGE_ROWS, d, dtype=dtype, device="cuda")
    y_RD.normal_(generator=generator)
    y_RD[rows:] = float("nan")
    score_R = torch.rand(rows + GARBAGE_ROWS, generator=generator, device="cuda")
    score_R[rows:] = float("nan")
    add_TD = torch.randn(len(counts_T), d, generator=generator, device="cuda").to(dtype)
    return Problem(
        y_RD,
        ids,
        offsets,
        score_R if weighted else None,
        add_TD if residual else None,
        rows_per_token,
    )


def ragged_counts(tokens: int, most: int = 20) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(tokens)
    return torch.randint(0, most, (tokens,), generator=generator, device="cuda")


def fixed_counts(tokens: int, k: int) -> Tensor:
    return torch.full((tokens,), k, device="cuda")


def check(problem: Problem) -> None:
    out_TD = problem.run()
    assert torch.isfinite(out_TD).all()
    assert calc_diff(out_TD, problem.reference()) < CALC_DIFF_BOUND


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("k", [1, 2, 5, 8, 16, 33])
def test_fixed_sums_match_fp32(k, weighted, residual):
    counts = fixed_counts(777, k)
    check(make_problem(counts, 264, rows_per_token=k, weighted=weighted, residual=residual))


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_ragged_sums_match_fp32(weighted, residual):
    check(make_problem(ragged_counts(3001), 1536, weighted=weighted, residual=residual))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("d", [8, 72, 768, 4096, 7168])
def test_every_width_of_whole_chunks_works(d, dtype):
    check(make_problem(ragged_counts(301), d, dtype=dtype))
    check(make_problem(fixed_counts(301, 8), d, rows_per_token=8, dtype=dtype))


@pytest.mark.parametrize("tokens", [0, 1, 2, 255, 4097])
def test_every_number_of_tokens_runs_the_same_kernel(tokens):
    check(make_problem(ragged_counts(tokens), 64))
    check(make_problem(fixed_counts(tokens, 8), 64, rows_per_token=8))


def test_tokens_without_rows_give_zero_or_the_residual():
    counts = torch.zeros(100, dtype=torch.int64, device="cuda")
    assert (make_problem(counts, 128).run() == 0).all()
    problem = make_problem(counts, 128, residual=True)
    assert torch.equal(problem.run(), problem.add_TD)


def test_a_token_may_own_a_thousand_rows():
    counts = torch.tensor([0, 1024, 3, 0, 1023], device="cuda")
    check(make_problem(counts, 128))


def test_rows_of_other_tokens_do_not_leak():
    problem = make_problem(ragged_counts(500), 256)
    for token in range(0, 500, 2):
        first, end = problem.token_offsets[token : token + 2].tolist()
        poisoned = problem.token_rows_R[first:end].long()
        problem.y_RD[poisoned] = float("nan")
    finite = torch.isfinite(problem.run()).all(1)
    empty = problem.token_offsets.diff() == 0
    odd = torch.arange(500, device="cuda") % 2 == 1
    assert torch.equal(finite, odd | empty)


def test_repeats_are_bitwise_equal_beside_other_work():
    problem = make_problem(ragged_counts(5000), 1536)
    first = problem.run()
    noise, other = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    for _ in range(REPEATS):
        with torch.cuda.stream(other):
            noise @ noise
        assert torch.equal(first, problem.run())
    torch.cuda.synchronize()


def test_rows_beyond_2_to_the_31_elements_are_addressed():
    counts = ragged_counts(60_000)  # about 570,000 rows
    problem = make_problem(counts, 4096)
    assert problem.y_RD.numel() > 2**31
    check(problem)
