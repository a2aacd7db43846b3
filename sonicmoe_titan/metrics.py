"""What a run reports: throughput in tokens per day, what the routers do, activation memory.

Every number goes to the console, to TensorBoard and Weights & Biases if they are on, and, whatever
is on, to `metrics.jsonl` in the dump folder, from which `sonicmoe report` draws.
"""

from __future__ import annotations

import netrc
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components.metrics import (
    BaseLogger,
    LoggerContainer,
    MetricsProcessor,
    WandBLogger,
    _get_metrics_rank,
)
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from sonicmoe_titan.peak_flops import known_peak_flops
from sonicmoe_titan.routing_metrics import gather_stats, routing_metrics
from sonicmoe_titan.runlog import RunLog, run_header, write_load
from sonicmoe_titan.stats import KERNEL_TILE_ROWS, collect
from sonicmoe_titan.throughput import Throughput

WANDB_PROJECT = "sonicmoe-titan"
WANDB_HOST = "api.wandb.ai"
GIB = 2**30


class SonicMetrics(MetricsProcessor):
    """TorchTitan's metrics, and at every log step:

    - tokens/day, tokens/s per GPU, GPU-days per billion tokens and the ETA, of the last window and
      on average since the warm-up; neither knows the warm-up steps or the time of validation;
    - the routers' numbers (`routing_metrics`), over all ranks, for the model and per layer;
    - the activation bytes that the memory model predicts for the run.

    The routers' sums live on the device and are read and set to zero here, outside any captured
    graph. `log` is collective: every rank calls it.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        warmup_steps: int = 5
        """Steps of a process that no throughput counts (compilation, CUDA graph capture); the first
        log step at or after them starts the count."""

        per_layer: bool = True
        """Log the routers' numbers of every layer beside the model's."""

        report: bool = True
        """Write the summary table and the figures into the dump folder when the run ends."""

        def __post_init__(self) -> None:
            for key, least in (("log_freq", 1), ("warmup_steps", 0)):
                if getattr(self, key) < least:
                    raise ValueError(
                        f"metrics.{key} = {getattr(self, key)}: expected {least} or more"
                    )

    config: Config  # pyrefly: ignore[bad-override-mutable-attribute]
    activation_bytes: int | None = None
    """Set by the trainer: what the memory model predicts that this rank's layers keep."""

    def __init__(
        self,
        config: Config,
        *,
        dump_folder: str = "./outputs",
        config_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if config.enable_wandb:
            _prepare_wandb()
        self._is_reporter = False
        self._steps_begun = 0
        self._has_logged = False
        self._folder = Path(dump_folder)
        self._device_name = utils.device_module.get_device_name()
        super().__init__(config, dump_folder=dump_folder, config_dict=config_dict, **kwargs)
        run = config_dict or {}
        self.throughput = Throughput(
            num_gpus=dist.get_world_size() if dist.is_initialized() else 1,
            warmup_steps=config.warmup_steps,
            total_steps=run.get("training", {}).get("steps"),
        )
        if self._is_reporter:
            _warn_of_partial_tiles(run.get("model") or {})

    def _build_metric_logger(
        self,
        *,
        dump_folder: str,
        pp_schedule: str,
        config_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> BaseLogger:
        parallel_dims = kwargs["parallel_dims"]
        stock = super()._build_metric_logger(
            dump_folder=dump_folder, pp_schedule=pp_schedule, config_dict=config_dict, **kwargs
        )
        # Of a pipeline TorchTitan lets the rank speak that has the loss; a launcher shows rank 0.
        self._is_reporter = not dist.is_initialized() or dist.get_rank() == 0
        self._loss_rank = _get_metrics_rank(parallel_dims=parallel_dims, pp_schedule=pp_schedule)
        if not self._is_reporter:
            return stock
        loggers = stock if isinstance(stock, LoggerContainer) else LoggerContainer()
        peak = known_peak_flops(self._device_name)
        header = run_header(
            config_dict or {},
            device_name=self._device_name,
            num_devices=dist.get_world_size() if dist.is_initialized() else 1,
            peak_tflops=None if peak is None else peak / 1e12,
        )
        loggers.add_logger(RunLog(self._folder, header))
        return loggers

    def should_log(self, step: int) -> bool:
        """Whether to log after this step; the trainer asks before each one, on every rank."""
        self.throughput.begin_step(step)
        self._steps_begun += 1
        if self._steps_begun == 2 and self.parallel_dims.pp_enabled:
            for _, stats in collect(self.model_parts or []):
                stats.reset()
        return super().should_log(step)

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Log a training step; see TorchTitan's `MetricsProcessor.log` for the arguments."""
        global_avg_loss, global_max_loss = self.of_last_stage(global_avg_loss, global_max_loss)
        extra = {**(extra_metrics or {}), **self._throughput_metrics(step)}
        routing = self._routing_metrics(step)
        if self.activation_bytes is not None:
            extra["memory/activations_predicted(GiB)"] = self.activation_bytes / GIB
        super().log(
            step, global_avg_loss, global_max_loss, grad_norm, extra_metrics={**extra, **routing}
        )
        self._has_logged = True
        if self._is_reporter:
            line = _console_line({**extra, **routing}, self.throughput.eta_s)
            if line:
                logger.info(f"{self.color.cyan}{line}{self.color.reset}")

    def of_last_stage(self, *losses: float) -> list[float]:
        """What the losses are on the last stage of a pipeline, which alone knows; collective."""
        if not self.parallel_dims.pp_enabled:
            return list(losses)
        known = torch.tensor(losses, dtype=torch.float64, device=utils.device_type)
        dist.broadcast(known, src=self._loss_rank)
        return known.tolist()

    def close(self) -> None:
        """Write the run's table and figures if asked, and end the loggers.

        A process that logged no step, such as one whose checkpoint was refused, has no run to
        report: what lies in the folder is an earlier one's.
        """
        if self._is_reporter and self._has_logged and self.config.report:
            try:
                self._report()
            except Exception as error:  # a figure must not fail a finished run
                logger.warning(f"No report of this run: {error}")
        super().close()

    def _report(self) -> None:
        from sonicmoe_titan.report import report_run

        figures = [path for path in report_run(self._folder) if path.suffix == ".png"]
        for backend in getattr(self.logger, "_loggers", ()):
            if isinstance(backend, WandBLogger):
                images = {f"report/{path.stem}": backend.wandb.Image(str(path)) for path in figures}
                backend.wandb.log(images)

    def _throughput_metrics(self, step: int) -> dict[str, float]:
        replicas = self.throughput.num_gpus / self.parallel_dims.non_data_parallel_size
        self.throughput.update(
            step,
            tokens=self.ntokens_since_last_log * replicas,
            seconds=time.perf_counter() - self.time_last_log,
        )
        metrics: dict[str, float] = {}
        for prefix, rate in (
            ("throughput", self.throughput.window),
            ("throughput_average", self.throughput.average),
        ):
            if rate is None:
                continue
            metrics[f"{prefix}/tokens_per_day"] = rate.tokens_per_day
            metrics[f"{prefix}/tokens_per_second_per_gpu"] = rate.tokens_per_second_per_gpu
            metrics[f"{prefix}/gpu_days_per_billion_tokens"] = rate.gpu_days_per_billion_tokens
            if self.knows_peak_flops:
                flops = rate.tokens_per_second_per_gpu * self.num_flops_per_token
                metrics[f"{prefix}/mfu(%)"] = 100 * flops / self.gpu_peak_flops
        if self.throughput.eta_s is not None:
            metrics["throughput/eta_hours"] = self.throughput.eta_s / 3600
        return metrics

    @property
    def knows_peak_flops(self) -> bool:
        """Whether MFU means anything: not with quantised arithmetic."""
        return not self.has_quantization and known_peak_flops(self._device_name) is not None

    def _routing_metrics(self, step: int) -> dict[str, float]:
        device = torch.device(utils.device_type)
        gathered = gather_stats(self.model_parts or [], device)
        # In its first step a pipeline also sends uninitialised tensors through, to learn shapes.
        if gathered is None or (self._steps_begun == 1 and self.parallel_dims.pp_enabled):
            return {}
        if self._is_reporter:
            write_load(self._folder, gathered.load_LE.tolist(), step=step)
        metrics = routing_metrics(gathered)
        if self.config.per_layer:
            return metrics
        return {name: value for name, value in metrics.items() if name.startswith("moe/")}


def _console_line(metrics: Mapping[str, float], eta_s: float | None) -> str:
    """The numbers that tell whether a run is well, in one line."""
    shown = []
    if (tokens_per_day := metrics.get("throughput/tokens_per_day")) is not None:
        shown.append(f"tokens/day: {tokens_per_day:.3g}")
    if eta_s is not None:
        shown.append(f"ETA: {timedelta(seconds=round(eta_s))}")
    if "moe/padding_waste" in metrics:
        shown.append(f"padding: {metrics['moe/padding_waste']:.1%}")
        shown.append(
            f"rows: +{metrics['moe/rows_added']:.1%} -{metrics['moe/rows_dropped']:.1%}",
        )
        shown.append(f"max/mean load: {metrics['moe/max_over_mean_load']:.2f}")
        shown.append(f"entropy: {metrics['moe/router_entropy']:.3f}")
        shown += [
            f"{name.replace('_', ' ')}: {metrics[f'moe/{name}']:.4g}"
            for name in ("aux_loss", "z_loss")
            if metrics[f"moe/{name}"]
        ]
    return "  ".join(shown)


def _prepare_wandb() -> None:
    """Without a key wandb would ask for one and stop the run: log to files instead, and say so."""
    os.environ.setdefault("WANDB_PROJECT", WANDB_PROJECT)
    if os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY") or _has_wandb_login():
        return
    os.environ["WANDB_MODE"] = "offline"
    logger.info(
        "Weights & Biases: no WANDB_API_KEY, so this run is recorded offline; "
        "`wandb sync DUMP_FOLDER/tb/*/wandb/offline-run-*` uploads it later"
    )


def _has_wandb_login() -> bool:
    try:
        return netrc.netrc().authenticators(WANDB_HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _warn_of_partial_tiles(model: Mapping[str, Any]) -> None:
    tile = model.get("rounding_tile")
    if model.get("router") == "token_rounding" and tile and tile % KERNEL_TILE_ROWS:
        logger.warning(
            f"model.rounding_tile = {tile} is no multiple of the kernels' {KERNEL_TILE_ROWS} rows: "
            "rounding changes the routing but leaves partly filled tiles (see moe/padding_waste)"
        )
