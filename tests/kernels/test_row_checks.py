"""The GPU checks of one number a row: what cancels passes, what is wrong in one row does not."""

import pytest
import torch

from tests.cases import Case
from tests.gpu.row_kernels import Problem, assert_rows

ROWS = (20, 1, 3, 12)


def check(got_R: torch.Tensor, expected_R: torch.Tensor) -> None:
    bounds = [0, *torch.tensor(ROWS).cumsum(0).tolist()]
    case = Case(T=sum(ROWS), D=64, F=64, E=len(ROWS), K=1)
    nothing = torch.empty(0)
    problem = Problem(case, None, nothing, nothing, nothing, bounds)  # pyrefly: ignore
    assert_rows(problem, "dS", torch.cat([got_R, torch.full((5,), float("nan"))]), expected_R)


def test_a_sum_that_cancels_is_judged_by_the_others():
    torch.manual_seed(0)
    expected_R = 20 * torch.randn(sum(ROWS))
    expected_R[ROWS[0]] = 1e-3  # the only row of its expert
    check(expected_R + 2e-3 * torch.randn(sum(ROWS)), expected_R)


@pytest.mark.parametrize("row", [0, 19, 20, 21, 23, 24, 35])
def test_one_wrong_row_fails(row):
    torch.manual_seed(0)
    expected_R = 20 * torch.randn(sum(ROWS))
    wrong_R = expected_R.clone()
    wrong_R[row] += 1.0  # a twentieth of what is typical
    with pytest.raises(AssertionError, match="diff"):
        check(wrong_R, expected_R)
