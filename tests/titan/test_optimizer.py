"""`optimizer.lr` and TorchTitan's parameter groups."""

import pytest
from torch import nn
from torchtitan.components.optimizer import ParamGroupConfig

from sonicmoe_titan.optimizer import AdamW


def test_numbers_make_one_adamw_over_all_parameters() -> None:
    model = nn.Linear(2, 3)
    config = AdamW.Config(lr=0.5, weight_decay=0.1, beta1=0.8, beta2=0.7, eps=1e-3)
    (optimizer,) = config.build(model_parts=[model])
    (group,) = optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}
    assert (group["lr"], group["weight_decay"], group["eps"]) == (0.5, 0.1, 1e-3)
    assert group["betas"] == (0.8, 0.7)


def test_groups_are_used_as_they_are() -> None:
    groups = [
        ParamGroupConfig(pattern=name, optimizer_name="AdamW", optimizer_kwargs={"lr": lr})
        for name, lr in (("bias", 1.0), ("weight", 2.0))
    ]
    config = AdamW.Config(lr=None, param_groups=groups)
    (optimizer,) = config.build(model_parts=[nn.Linear(2, 3)])
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 2.0]


def test_rate_and_groups_together_are_refused() -> None:
    group = ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1.0})
    with pytest.raises(ValueError, match="give either a rate, or groups"):
        AdamW.Config(lr=1.0, param_groups=[group])
    with pytest.raises(ValueError, match="give either a rate, or groups"):
        AdamW.Config(lr=None)
