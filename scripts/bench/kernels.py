"""How the profiler names our kernels, and which part of a layer each belongs to."""

from __future__ import annotations

import re
from typing import NamedTuple


class ExpertKernel(NamedTuple):
    """Classes under `sonicmoe_kernels.cute` by their modules, and the steps of roofline.py."""

    classes: dict[str, str]
    steps: tuple[str, ...]


# One symbol serves both weight gradients, and one both aggregations.
EXPERTS = {
    "up": ExpertKernel({"up": "Up", "up_turned": "UpTurned"}, ("up",)),
    "down": ExpertKernel({"down": "Down", "plain_turned": "DownTurned"}, ("down",)),
    "d_hidden": ExpertKernel(
        {"d_hidden": "DHidden", "d_hidden_relayed": "DHiddenRelayed"}, ("d_hidden",)
    ),
    "d_input": ExpertKernel({"d_input": "DInput", "plain_turned": "DInputTurned"}, ("d_input",)),
    "d_weights": ExpertKernel({"grouped_gemm_k": "GroupedGemmK"}, ("d_weight2", "d_weight13")),
    "aggregate": ExpertKernel({"aggregate": "Aggregate"}, ("aggregate_out", "aggregate_dx")),
}
ROUTING = {
    "topk": "TopK",
    "topk_backward": "TopKGradient",
    "membership": "Membership",
    "balance": "Balance",
    "token_rounding": "TokenRounding",
    "plan_rows": "PlanRows",
    "score_gradient": "ScoreGradient",
}
# The official package's: gated, default and dgated GEMMs, and its one sum kernel.
OFFICIAL_EXPERTS = r"quackgemm_|token_gather_sum_kernel"


def symbol(module: str, name: str) -> str:
    """What a kernel's name contains once only letters, digits and _ are left of it."""
    return f"sonicmoe_kernelscute{module}{name}_object"


def plain(kernel: str) -> str:
    """A kernel's name with letters, digits and _ alone."""
    return re.sub(r"\W", "", kernel)


def expert_kernel(kernel: str) -> str | None:
    """Our name for a kernel of the experts, None for any other."""
    text = plain(kernel)
    for key, kernel_of_ours in EXPERTS.items():
        if any(symbol(module, name) in text for module, name in kernel_of_ours.classes.items()):
            return key
    return None


def is_experts(kernel: str, impl: str) -> bool:
    """Whether a kernel of `impl` ("sonicmoe" or "official") computes the experts."""
    if impl == "official":
        return re.search(OFFICIAL_EXPERTS, plain(kernel)) is not None
    return expert_kernel(kernel) is not None


GEMMS = [
    symbol(module, name)
    for key, kernel in EXPERTS.items()
    if key != "aggregate"
    for module, name in kernel.classes.items()
]
# Kinds of GPU work of a training step by what its name contains; the first match counts.
KINDS = {
    "experts: grouped GEMMs": "|".join([*GEMMS, "GroupProblem"]),
    "experts: aggregation": symbol("aggregate", "Aggregate"),
    "routing": "|".join([*(symbol(*item) for item in ROUTING.items()), "[Ss]ort", "[Tt]op[Kk]"])
    + "|searchsorted|[Ss]can",
    "attention": r"flash|fmha|sdpa|attention",
    "optimizer, gradient norm": r"multi_tensor|adam|lpnorm",
    "other GEMMs": r"nvjet|gemm|xmma|cublas|splitK",
    "compiled pointwise": r"triton_",
    "collectives": r"nccl",
    "copies": r"[Mm]emcpy|Memset|copy|fill|FillFunctor|CatArray|split_with|chunk_cat",
    "pointwise outside the compiler": r"elementwise",
}


def kind(kernel: str) -> str:
    """The kind of GPU work a kernel, copy or fill is."""
    text = plain(kernel)
    return next((k for k, pattern in KINDS.items() if re.search(pattern, text)), "other")
