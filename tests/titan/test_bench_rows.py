"""Every row of the training benchmark is a run that the recipes accept."""

from __future__ import annotations

from pathlib import Path

import bench_train
import pytest
from bench.train_plan import EVERYTHING
from bench.train_runs import MODELS, command

from sonicmoe_titan.check import check_run
from sonicmoe_titan.toml_config import load_config


@pytest.mark.parametrize("model", MODELS)
def test_recipes_accept_every_row_of_the_benchmark(model: str, tmp_path: Path) -> None:
    arguments = bench_train.parse(["speed"])
    rows = [row for row in EVERYTHING if row.model == model]
    for row in rows:
        run = bench_train.run_of(row, arguments, {"metrics.log_freq": arguments.log_freq})
        _, _, _, _, config_file, *options = command(run, dump=tmp_path)
        config = load_config(config_file, options)
        check_run(config, num_processes=None)
        assert config.model.moe == ("stock" if row.block == "stock" else "sonic")
        assert config.model.num_layers == MODELS[model].layers
        assert config.training.global_batch_size == MODELS[model].sequences
        assert config.model.aux_loss_coeff == config.model.z_loss_coeff == 0
