"""Runs with and without validation, in several layouts, for test_validate.py."""

import dataclasses
import math
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss

from sonicmoe_titan.model import with_sequence_positions
from sonicmoe_titan.stats import collect
from sonicmoe_titan.validate import SonicValidator
from tests.titan.tiny import VALIDATION, TinyTrainer, config, train

STEPS, BATCHES = 3, 3
WHOLE = {"steps": STEPS, "local_batch_size": 4}
UNTIED = {"tie_embeddings": False, "init_std": 0.2}  # pipelines cannot tie
STOCHASTIC = {"router": "token_rounding", "rounding": "stochastic"}
EVERY_STEP = SonicValidator.Config(enable=True, freq=1, steps=BATCHES, dataloader=VALIDATION)


def two_ranks(folder: Path) -> dict[str, Any]:
    """The same four sequences a step in several layouts, from the weights of the run alone.

    Weights are drawn differently in every layout, so each goes on from one checkpoint.
    """
    alone = folder.parent / f"{__name__.rsplit('.')[-1]}.one_rank/alone/checkpoint/step-1"
    start = {"initial_load_path": str(alone), "initial_load_model_only": False}
    run = {"model": UNTIED, "checkpoint": start, "validator": EVERY_STEP}
    pipeline = {
        "pipeline_parallel_degree": 2,
        "pipeline_parallel_schedule": "1F1B",
        "pipeline_parallel_microbatch_size": 2,
    }
    chunked = ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config())
    halves, whole = {"training": {"steps": STEPS}}, {"training": WHOLE}
    layouts: dict[str, dict[str, Any]] = {
        "fsdp2": halves,
        "fsdp2, chunked loss": halves | {"loss": chunked},
        "ep2": halves | {"parallelism": {"expert_parallel_degree": 2}},
        "tp2": whole | {"parallelism": {"tensor_parallel_degree": 2}},
        "pp2": whole | {"parallelism": pipeline},
    }
    return {name: train(config(folder / name, **run, **layout)) for name, layout in layouts.items()}


def one_rank(folder: Path) -> dict[str, Any]:
    """One process: the reference, whether training notices a validation, and a rerun by hand."""
    saved = {"enable_first_step_checkpoint": True}
    alone = config(
        folder / "alone", model=UNTIED, training=WHOLE, validator=EVERY_STEP, checkpoint=saved
    )
    results: dict[str, Any] = {"alone": train(alone)}
    for name, validator in (
        ("stochastic", dataclasses.replace(EVERY_STEP, enable=False)),
        ("stochastic, validated", EVERY_STEP),
    ):
        run = config(folder / name, model=STOCHASTIC, training=WHOLE, validator=validator)
        results[name] = train(run)
    results["by hand"] = _by_hand(folder)
    return results


def _by_hand(folder: Path) -> dict[str, Any]:
    """Validate a token-rounding model twice, and with a plain loop over the loader."""
    training = {"steps": 1, "local_batch_size": 4}
    trainer: TinyTrainer = config(
        folder / "by hand",
        model={"router": "token_rounding", "rounding": "up", "init_std": 0.3},
        training=training,
        validator=dataclasses.replace(EVERY_STEP, freq=100),
    ).build()
    with mock.patch("time.sleep"):
        trainer.train()
    logged: list[dict[str, Any]] = []
    trainer.metrics_processor.logger.log = lambda metrics, step: logged.append(metrics)
    trainer.metrics_processor.ntokens_since_last_log = 1234
    before = [s.values_V.clone() for _, s in collect(trainer.model_parts)]
    trainer.validator.validate(trainer.model_parts, 1)
    trainer.validator.validate(trainer.model_parts, 1)
    after = [s.values_V.clone() for _, s in collect(trainer.model_parts)]
    model = trainer.model_parts[0]
    mode = model.training
    loader = VALIDATION.build(
        dp_world_size=1, dp_rank=0, tokenizer=trainer.tokenizer, seq_len=64, local_batch_size=4
    )
    nats, tokens, num_bytes, train_nats = 0.0, 0, 0, 0.0
    for _, (inputs, labels) in zip(range(BATCHES), loader, strict=False):
        inputs = with_sequence_positions(inputs, trainer.model_config)
        for train_mode in (False, True):
            model.train(train_mode)
            with torch.no_grad():
                logits = model(inputs["input"], positions=inputs["positions"])
            loss = torch.nn.functional.cross_entropy(
                logits.double().flatten(0, 1), labels.flatten(), reduction="sum"
            ).item()
            nats, train_nats = nats + (not train_mode) * loss, train_nats + train_mode * loss
        tokens += labels.numel()
        text = trainer.tokenizer.decode(labels.flatten().tolist(), skip_special_tokens=False)
        text = text.replace("<|endoftext|>", "")
        assert "\ufffd" not in text  # no character is cut apart at a sequence's edge
        num_bytes += len(text.encode())
    return {
        "logged": logged,
        "loss": nats / tokens,
        "loss with rounding": train_nats / tokens,
        "bits per byte": nats / math.log(2) / num_bytes,
        "statistics kept": all(map(torch.equal, before, after)),
        "counter kept": trainer.metrics_processor.ntokens_since_last_log == 1234,
        "train mode": mode,
        "ranks": dist.get_world_size(),
    }
