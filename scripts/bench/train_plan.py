"""Which training runs are timed, the most wanted first, and how records name them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

from bench.train_runs import BALANCES, BLOCKS, MODELS, MODES

OURS = ("sonic", "sonic rounding")
BOTH = ("stock", *OURS)
FULL_MODELS = ("1.4b_k2", "1.4b_k8")
BEST, NO_GRAPHS = "compiled+graphs", "compiled"
EAGER = ("eager+graphs", "eager")


class Row(NamedTuple):
    """One combination to time."""

    model: str
    block: str
    mode: str
    balance: str


def _rows(
    models: Iterable[str], blocks: Iterable[str], modes: Iterable[str], balances: Iterable[str]
) -> list[Row]:
    return [Row(*row[::-1]) for row in product(balances, modes, blocks, models)]


# Most wanted first; stock stands beside ours in every entry that compares them.
PLAN = tuple(
    dict.fromkeys(
        [
            *_rows(("7b_proxy",), BOTH, (BEST,), ("natural",)),
            *_rows(("7b_proxy",), ("stock", "sonic"), (BEST,), ("forced",)),
            *_rows(("7b_proxy",), ("stock",), (NO_GRAPHS,), ("natural", "forced")),
            *_rows(FULL_MODELS, BOTH, (BEST,), ("natural",)),
            *_rows(("7b_proxy",), ("stock", "sonic"), EAGER, ("natural",)),
            *_rows(("7b_proxy",), OURS, (NO_GRAPHS,), ("natural", "forced")),
            *_rows(("7b_proxy",), ("stock", "sonic"), EAGER, ("forced",)),
            *_rows(("7b_proxy",), ("sonic rounding",), MODES, ("natural", "forced")),
        ]
    )
)
EVERYTHING = tuple(_rows(MODELS, BLOCKS, MODES, BALANCES))


def labels(row: Row) -> dict[str, object]:
    """How a record names a row."""
    options = BLOCKS[row.block]
    return {
        "model": row.model,
        "impl": "stock" if row.block == "stock" else "sonicmoe",
        "backend": options.get("model.backend", "stock"),
        "router": options.get("model.router", "topk"),
        "balance": row.balance,
        "compile": bool(MODES[row.mode]["compile.enable"]),
        "cuda_graphs": not MODES[row.mode]["training.disable_cuda_graphs"],
    }
