"""The arms of study_token_rounding.py, the model and the budget that they share.

Legend: T tokens of a microbatch, E experts, K experts per token, T_e = T K / E rows per expert.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from sonicmoe_titan.config_registry import CONFIGS
from sonicmoe_titan.model_args import Rounding
from sonicmoe_titan.toml_config import load_config

TOKEN_CHOICE = "topk"
ROUTINGS = (TOKEN_CHOICE, *get_args(Rounding))
MAIN = (TOKEN_CHOICE, "nearest", "balance", "down")
ARM_NAME = re.compile(r"(?P<routing>[a-z_]+)-e(\d+)k(\d+)-tile(\d+)-ratio(\d+)")


@dataclass(frozen=True)
class Arm:
    """A routing at a number of rows per expert: `ratio` tiles of `tile` rows in a microbatch.

    Token choice knows no tile; its arm has one for the microbatch that the others have. Raises
    ValueError for an unknown routing.
    """

    routing: str
    num_experts: int
    top_k: int
    tile: int
    ratio: int

    def __post_init__(self) -> None:
        if self.routing not in ROUTINGS:
            raise ValueError(f"routing {self.routing!r}: expected one of {', '.join(ROUTINGS)}")

    @classmethod
    def parse(cls, name: str) -> Arm:
        """Read `nearest-e64k4-tile128-ratio4`; raises ValueError."""
        match = ARM_NAME.fullmatch(name)
        if not match:
            raise ValueError(f"arm {name!r}: expected ROUTING-eEXPERTSkTOP_K-tileROWS-ratioTILES")
        return cls(match["routing"], *map(int, match.groups()[1:]))

    @property
    def experts(self) -> tuple[int, int]:
        """E and K."""
        return self.num_experts, self.top_k

    @property
    def name(self) -> str:
        experts = f"e{self.num_experts}k{self.top_k}"
        return f"{self.routing}-{experts}-tile{self.tile}-ratio{self.ratio}"

    @property
    def rows_per_expert(self) -> int:
        """Mean rows of an expert in a microbatch, T_e of the paper."""
        return self.ratio * self.tile

    def microbatch_tokens(self) -> int:
        """Tokens that give an expert `rows_per_expert` rows: T = T_e E / K."""
        tokens, rest = divmod(self.rows_per_expert * self.num_experts, self.top_k)
        if rest:
            raise ValueError(f"arm {self.name}: K does not divide {self.rows_per_expert} E")
        return tokens

    def options(self) -> dict[str, object]:
        """The keys of the run that this arm sets."""
        keys: dict[str, object] = {"num_experts": self.num_experts, "top_k": self.top_k}
        if self.routing == TOKEN_CHOICE:
            keys["router"] = "topk"
        else:
            keys |= {"router": "token_rounding", "rounding": self.routing}
            keys["rounding_tile"] = self.tile
        return {f"model.{key}": value for key, value in keys.items()}


@dataclass(frozen=True)
class Study:
    """A model, a budget and its arms.

    step_tokens: of one optimizer step, the same for every arm; tokens: of one run;
    validation_tokens: the held-out tokens, the same for every arm; validations: a run's, besides
    the first step's.
    """

    config: Path
    step_tokens: int
    tokens: int
    validation_tokens: int
    validations: int
    groups: dict[str, list[Arm]]

    def run_options(self, arm: Arm, seed: int, tokens: int) -> dict[str, object]:
        """Every key that a run of this study sets over its file; raises ValueError."""
        seq_len = load_config(self.config).training.seq_len
        microbatch = arm.microbatch_tokens()
        for what, whole in (("a step's", self.step_tokens), ("the", self.validation_tokens)):
            if microbatch % seq_len or whole % microbatch:
                raise ValueError(
                    f"arm {arm.name}: microbatches of {microbatch} tokens are no whole number of "
                    f"sequences of {seq_len}, or do not divide {what} {whole} tokens"
                )
        every, rest = divmod(tokens, self.step_tokens * self.validations)
        if rest or not every:
            raise ValueError(
                f"--tokens {tokens}: expected a multiple of {self.step_tokens * self.validations}, "
                f"{self.validations} validations after as many steps of {self.step_tokens} tokens"
            )
        steps = every * self.validations
        return {
            **arm.options(),
            "training.local_batch_size": microbatch // seq_len,
            "training.global_batch_size": self.step_tokens // seq_len,
            "training.steps": steps,
            "lr_scheduler.warmup_steps": max(1, steps // 10),
            "validator.enable": True,
            "validator.steps": self.validation_tokens // microbatch,
            "validator.freq": every,
            "metrics.log_freq": max(1, every // 2),
            "metrics.report": False,
            "debug.seed": seed,
            "dataloader.seed": seed,
        }


def main_arms(num_experts: int, top_k: int) -> list[Arm]:
    """The routings at the paper's 512 rows per expert and tile of 128."""
    return [Arm(routing, num_experts, top_k, 128, 4) for routing in MAIN]


STUDIES = {
    # configs/debug.toml with 2 of 16 experts: its microbatch of 4096 tokens is 512 rows per expert
    "cpu": Study(
        config=CONFIGS / "debug.toml",
        step_tokens=4096,
        tokens=120 * 4096,
        validation_tokens=8 * 4096,
        validations=6,
        groups={
            "main": main_arms(16, 2),
            "ratio": [Arm("nearest", 16, 2, 128, ratio) for ratio in (2, 1)],
            "tile": [Arm("nearest", 16, 2, 512, 1)],
        },
    ),
    "h100": Study(
        config=CONFIGS / "token_rounding.toml",
        step_tokens=32768,
        tokens=2048 * 32768,
        validation_tokens=16 * 32768,
        validations=8,
        groups={
            "main": main_arms(128, 2),
            "ratio": [Arm("nearest", 128, 2, 128, ratio) for ratio in (2, 1)],
            "tile": [Arm("nearest", 128, 2, 64, 8)],
            "wide": main_arms(64, 4),
        },
    ),
}
