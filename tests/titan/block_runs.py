"""What the MoE block's tests train: one launch per number of ranks, shared by all test files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchtitan.config import OverrideConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from tests.titan import aux_loss_ranks, expert_parallel_ranks, probes, stock_models
from tests.titan.distributed import Run, launch

# Every layout gets four sequences a step, in whatever shares.
WHOLE = {"local_batch_size": 4}
SINGLE = {"local_batch_size": 1}  # TorchTitan's pipeline microbatch
HALF = {"local_batch_size": 2}
ROUNDING = {"router": "token_rounding"}
DRAWING = ROUNDING | {"rounding": "stochastic"}
AUX = {"aux_loss_coeff": 0.1, "z_loss_coeff": 0.01}
BIAS = {"load_balance_coeff": 0.05}
UNTIED = {"tie_embeddings": False}  # TorchTitan's pipelines need it
SELECTIVE = {"activation_checkpoint": SelectiveAC.Config()}
FULL = {"activation_checkpoint": FullAC.Config()}
OVERRIDE = OverrideConfig(
    imports=[
        ("sonicmoe_titan.overrides.sonic_moe", {"backend": "torch"}),
        "sonicmoe_titan.overrides.sonic_selective_ac",
    ]
)
EP2 = {"expert_parallel_degree": 2}
TP2 = {"tensor_parallel_degree": 2}
PP2 = {"pipeline_parallel_degree": 2}


def _run(*, whole: bool = True, bf16: bool = False, **fields: Any) -> Run:
    fields["training"] = (WHOLE if whole else HALF) | fields.get("training", {})
    return Run(float32=not bf16, **fields)


Runs = dict[str, Run | Callable[[], Any]]

ONE: Runs = {
    "stock": _run(stock=True),
    "stock, bf16": _run(stock=True, bf16=True),
    "stock, untied": _run(stock=True, model=UNTIED),
    "stock, bias": _run(stock=True, model=BIAS, inspect=probes.expert_bias),
    "bias": _run(model=BIAS, inspect=probes.expert_bias),
    "bias, one step": _run(model=BIAS, steps=1, inspect=probes.expert_bias),
    "bias, rounding": _run(model=BIAS | ROUNDING, steps=1, inspect=probes.expert_bias),
    "plain": _run(inspect=probes.layer_stats),
    "plain, bf16": _run(bf16=True),
    "accumulated": _run(whole=False, training={"global_batch_size": 4}),
    "compiled": _run(compiled=True),
    "selective": _run(trainer=SELECTIVE, inspect=probes.layer_stats),
    "full": _run(trainer=FULL, inspect=probes.layer_stats),
    "overridden": _run(stock=True, trainer={"override": OVERRIDE} | SELECTIVE),
    "rounding": _run(model=ROUNDING, inspect=probes.layer_stats),
    "rounding, compiled, selective": _run(model=ROUNDING, compiled=True, trainer=SELECTIVE),
    "rounding, full": _run(model=ROUNDING, trainer=FULL),
    "drawing": _run(model=DRAWING),
    "drawing, selective": _run(model=DRAWING, trainer=SELECTIVE),
    "drawing, full": _run(model=DRAWING, trainer=FULL),
    "rounding, evaluated": _run(model=ROUNDING, steps=1, inspect=probes.evaluation),
    "plain, evaluated": _run(steps=1, inspect=probes.evaluation),
    "aux": _run(model=AUX, inspect=probes.layer_stats),
    "aux, full": _run(model=AUX, trainer=FULL),
    "aux, accumulated": _run(model=AUX | UNTIED, training=SINGLE | {"global_batch_size": 4}),
    **stock_models.FUNCTIONS,
}
TWO: Runs = {
    "fsdp": _run(whole=False),
    "fsdp, bf16": _run(whole=False, bf16=True),
    "ep": _run(whole=False, parallelism=EP2),
    "ep, bf16": _run(whole=False, bf16=True, parallelism=EP2),
    "ep, partial_dtensor": _run(whole=False, parallelism=EP2 | {"spmd_backend": "partial_dtensor"}),
    "ep, full_dtensor": _run(whole=False, parallelism=EP2 | {"spmd_backend": "full_dtensor"}),
    "ep, compiled": _run(whole=False, compiled=True, parallelism=EP2),
    "ep, selective": _run(whole=False, parallelism=EP2, trainer=SELECTIVE),
    "ep, full": _run(whole=False, parallelism=EP2, trainer=FULL),
    "ep, redispatch_x": _run(whole=False, parallelism=EP2, model={"redispatch_x": True}),
    "ep, rounding": _run(whole=False, parallelism=EP2, model=ROUNDING, inspect=probes.layer_stats),
    "ep, rounding, full": _run(whole=False, parallelism=EP2, model=ROUNDING, trainer=FULL),
    "ep, aux": _run(whole=False, parallelism=EP2, model=AUX),
    "ep, bias": _run(whole=False, parallelism=EP2, model=BIAS, inspect=probes.expert_bias),
    "tp": _run(parallelism=TP2),
    "tp, full_dtensor": _run(parallelism=TP2 | {"spmd_backend": "full_dtensor"}),
    "tp, bf16": _run(bf16=True, parallelism=TP2),
    "tp, rounding": _run(parallelism=TP2, model=ROUNDING),
    "tp, aux": _run(parallelism=TP2, model=AUX),
    "tp, aux, partial_dtensor": _run(
        parallelism=TP2 | {"spmd_backend": "partial_dtensor"}, model=AUX
    ),
    "fsdp, aux": _run(whole=False, model=AUX),
    "fsdp, aux, partial_dtensor": _run(
        whole=False, model=AUX, parallelism={"spmd_backend": "partial_dtensor"}
    ),
    "pp": _run(parallelism=PP2, model=UNTIED),
    "pp, aux": _run(parallelism=PP2, model=AUX | UNTIED),
    "redispatch_x, selective": _run(
        parallelism=EP2, model={"redispatch_x": True}, trainer=SELECTIVE
    ),
    "redispatch_x, compiled": _run(parallelism=EP2, model={"redispatch_x": True}, compiled=True),
    **aux_loss_ranks.FUNCTIONS,
    **expert_parallel_ranks.FUNCTIONS,
}
FOUR: Runs = {
    "tp + ep": _run(whole=False, parallelism=TP2 | EP2),
    "tp + ep, bf16": _run(whole=False, bf16=True, parallelism=TP2 | EP2),
    "tp + ep, aux": _run(whole=False, parallelism=TP2 | EP2, model=AUX),
}
_LAUNCHES = {1: ONE, 2: TWO, 4: FOUR}


def results(ranks: int, shared_folder: Path) -> dict[str, list[Any]]:
    """Results of all runs on `ranks` processes, trained once per test session."""
    return launch(_LAUNCHES[ranks], ranks=ranks, folder=shared_folder / f"block{ranks}")


def failed(result: Any) -> str:
    """The traceback of a run that must not succeed."""
    assert isinstance(result, str), "the run succeeded"
    return result


def succeeded(result: Any) -> Any:
    """The result of a run, or its traceback as this test's failure."""
    assert not isinstance(result, str), result
    return result
