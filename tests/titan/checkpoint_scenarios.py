"""Runs that save, stop and resume, for test_checkpoint.py: what happens inside the processes."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import DebugConfig
from torchtitan.distributed import ParallelDims
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.models.common.moe import MoE
from torchtitan.trainer import Trainer

from sonicmoe_titan.data import TextDataLoader
from tests.titan.distributed import to_stock
from tests.titan.test_data_streams import write_dataset
from tests.titan.tiny import ARGS, TOKENIZER, Result, config, digest, forget_meshes, train

STOCHASTIC = {"router": "token_rounding", "rounding": "stochastic"}
EVERY_2 = {"interval": 2}
LOUD = {"init_std": 0.3}  # experts that a loss or a logit notices
OTHER_SEED = DebugConfig(seed=77)


def alone(action: Any, *args: Any) -> None:
    """Let rank 0 do something to files while the others wait."""
    if dist.get_rank() == 0:
        action(*args)
    dist.barrier()


def until_step_2(source: Path, target: Path) -> Path:
    """Copy a run as if it had been stopped right after its checkpoint of step 2."""
    alone(shutil.copytree, source / "checkpoint/step-2", target / "checkpoint/step-2")
    return target


def two_ranks(folder: Path) -> dict[str, Any]:
    """Everything that needs two processes."""
    return {
        **_exact(folder),
        **_streamed(folder),
        **_expert_parallel(folder),
        **_degree(folder),
        **_exported(folder),
    }


def _exact(folder: Path) -> dict[str, Any]:
    run = {"model": STOCHASTIC, "training": {"steps": 4}, "checkpoint": EVERY_2}
    whole = train(config(folder / "whole", **run))
    stopped = until_step_2(folder / "whole", folder / "stopped")
    resumed = train(config(stopped, **run, debug=OTHER_SEED))
    # The same without generator state shows that the routing depends on it.
    stopped = until_step_2(folder / "whole", folder / "without generators")
    run["checkpoint"] = EVERY_2 | {"exclude_from_loading": ["generators"]}
    redrawn = train(config(stopped, **run, debug=OTHER_SEED))
    return {"whole": whole, "resumed": resumed, "redrawn": redrawn}


def _streamed(folder: Path) -> dict[str, Any]:
    """A streamed corpus, saved in the background while training goes on."""
    dataset = folder / "dataset"
    alone(lambda: (dataset.mkdir(), write_dataset(dataset)))
    loader = TextDataLoader.Config(corpus="c4", dataset_path=str(dataset))
    saving = EVERY_2 | {"async_mode": "async"}
    run = {"model": STOCHASTIC, "training": {"steps": 4}, "checkpoint": saving}
    run["dataloader"] = loader
    whole = train(config(folder / "streamed", **run))
    stopped = until_step_2(folder / "streamed", folder / "streamed stopped")
    resumed = train(config(stopped, **run, debug=OTHER_SEED))
    return {"streamed": whole, "streamed resumed": resumed}


def _expert_parallel(folder: Path) -> dict[str, Any]:
    run = {"model": LOUD, "training": {"steps": 4}, "checkpoint": EVERY_2}
    ep2 = train(config(folder / "ep2", parallelism={"expert_parallel_degree": 2}, **run))
    stopped = until_step_2(folder / "ep2", folder / "ep1")
    return {"ep2": ep2, "ep1 resumed": train(config(stopped, **run))}


def _degree(folder: Path) -> dict[str, Any]:
    run = config(folder / "degree 2", model=LOUD, training={"steps": 4}, checkpoint=EVERY_2)
    return {"degree 2": train(run)}


def _exported(folder: Path) -> dict[str, Any]:
    """Save the last step for transformers under EP2, and load it back into another layout."""
    last = {"last_save_model_only": True, "last_save_in_hf": True}
    run = config(
        folder / "exported",
        model=LOUD | {"qk_norm": False},
        training={"steps": 2},
        parallelism={"expert_parallel_degree": 2},
        checkpoint={"interval": 100, **last},
    ).build()
    run.train()
    logits = evaluate(run)
    load = {"initial_load_path": str(folder / "exported/checkpoint/step-2")}
    loaded = config(
        folder / "imported",
        model=LOUD | {"qk_norm": False},
        checkpoint={**load, "initial_load_in_hf": True},
        debug=OTHER_SEED,
    ).build()
    loaded.checkpointer.load()
    return {"exported logits": logits, "imported logits": evaluate(loaded)}


@torch.no_grad()
def evaluate(trainer: Trainer) -> torch.Tensor:
    """The logits of fixed tokens, (2, 32, V), in evaluation mode."""
    tokens = torch.randint(0, ARGS.vocab_size, (2, 32), generator=torch.Generator().manual_seed(3))
    model = trainer.model_parts[0].eval()
    return model(tokens, positions=torch.arange(32).expand(2, 32).contiguous())


class StockTrainer(Trainer):
    """TorchTitan's own trainer, inside a process group that outlives it."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

    def init_distributed(self) -> ParallelDims:
        forget_meshes()
        return ParallelDims.from_config(self.config.parallelism, dist.get_world_size())


def stock_config(folder: Path, dataset: Path, **checkpoint: Any) -> StockTrainer.Config:
    """A run of TorchTitan's parts alone: its MoE block, loader, tokenizer, checkpoint manager."""
    ours = config(folder)
    for layer in ours.model_spec.model.layers:
        layer.moe = to_stock(layer.moe)
        assert type(layer.moe) is MoE.Config
    adamw = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    group = ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs=adamw)
    return StockTrainer.Config(
        model_spec=ours.model_spec,
        hf_assets_path=TOKENIZER.build(tokenizer_path="").tokenizer_path,
        dump_folder=str(folder),
        tokenizer=HuggingFaceTokenizer.Config(),
        dataloader=HuggingFaceTextDataLoader.Config(dataset="c4", dataset_path=str(dataset)),
        optimizer=OptimizersContainer.Config(param_groups=[group]),
        lr_scheduler=ours.lr_scheduler,
        training=ours.training,
        loss=ours.loss,
        metrics=ours.metrics,
        activation_checkpoint=None,
        debug=ours.debug,
        checkpoint=CheckpointManager.Config(
            enable=True, interval=2, last_save_model_only=False, **checkpoint
        ),
    )


def loaded(run: Trainer.Config) -> dict[str, Any]:
    """Load a run's newest checkpoint and tell what came of it; an error as its text."""
    trainer = run.build()
    try:
        trainer.checkpointer.load(step=run.checkpoint.load_step)
    except ValueError as error:
        return {"error": str(error)}
    return {"step": trainer.step, "digest": digest(trainer)}


def one_rank(folder: Path) -> dict[str, Any]:
    """Everything that needs one process; reads what two_ranks left beside it."""
    two = folder.parent / f"{__name__.rsplit('.')[-1]}.two_ranks"
    results: dict[str, Any] = {}

    # 2 ranks x 2 sequences were saved: 1 rank x 2 microbatches of 2 goes on from there.
    stopped = until_step_2(two / "degree 2", folder / "degree 1")
    training = {"steps": 4, "global_batch_size": 4}
    run = config(stopped, model=LOUD, training=training, checkpoint=EVERY_2)
    results["degree 1 resumed"] = train(run)

    stopped = until_step_2(two / "streamed", folder / "streamed degree 1")
    loader = TextDataLoader.Config(corpus="c4", dataset_path=str(two / "dataset"))
    run = {"model": STOCHASTIC, "dataloader": loader}
    results["streamed degree 1"] = loaded(config(stopped, checkpoint=EVERY_2, **run))

    results.update(_stock(folder, two / "dataset"))
    results.update(_passed_over(folder))
    export = {"last_save_in_hf": True, "last_save_model_only": True}
    run = config(folder / "shared", model={"shared_expert_dim": 16}, checkpoint=export)
    results["export"] = refusal(run)
    results["vocabulary"] = refusal(config(folder / "vocabulary", model={"vocab_size": 256}))
    return results


def refusal(run: Trainer.Config) -> str:
    """Why a run cannot be built."""
    try:
        run.build()
    except ValueError as error:
        return str(error)
    return "it was built"


def _stock(folder: Path, dataset: Path) -> dict[str, Any]:
    stock = train(stock_config(folder / "stock", dataset))
    shutil.copytree(folder / "stock", folder / "stock to ours")
    ours = loaded(config(folder / "stock to ours", checkpoint=EVERY_2))
    # Further in ours, then back into stock.
    there = train(config(folder / "stock to ours", training={"steps": 5}, checkpoint=EVERY_2))
    exclude = {"exclude_from_loading": ["dataloader"]}
    back = loaded(stock_config(folder / "stock to ours", dataset, **exclude))
    return {"stock": stock, "stock in ours": ours, "ours": there, "ours in stock": back}


def _passed_over(folder: Path) -> dict[str, Any]:
    """A model-only last step, a torn file, leftovers of a save; and asking for one of them."""
    out = folder / "passed over"
    run = {"training": {"steps": 5}}
    only = {"interval": 2, "last_save_model_only": True}
    train(config(out, checkpoint=only, **run))
    results = {"steps": sorted(path.name for path in (out / "checkpoint").iterdir())}
    results["model only"] = loaded(config(out, checkpoint=only, **run))
    results["model only asked for"] = loaded(config(out, checkpoint=only | {"load_step": 5}, **run))
    data = out / "checkpoint/step-4/__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    leftover = out / "checkpoint/step-6"
    leftover.mkdir()
    (leftover / "__0_0.distcp").write_bytes(b"half")
    (leftover / ".metadata.tmp").write_bytes(b"half")
    results["torn"] = loaded(config(out, checkpoint=only, **run))
    results["leftover exists"] = leftover.exists()
    other = config(out, model={"num_experts": 16}, checkpoint=only, **run)
    results["other model"] = loaded(other)
    deeper = config(out, model={"num_layers": 3}, checkpoint=only, **run)
    results["deeper model"] = loaded(deeper)
    return results


# Two 100 MB moments and as much of parameters: a save lasts long enough to be killed in.
BIG = {"vocab_size": 100_000, "dim": 256}


def saves_until_killed(folder: Path) -> None:
    """Save steps 1 and 2, go back to step 1, and save step 2 again."""
    run = {"model": BIG, "training": {"steps": 3, "seq_len": 16, "local_batch_size": 1}}
    first = config(
        folder, checkpoint={"interval": 1}, **run | {"training": run["training"] | {"steps": 2}}
    )
    result = train(first)
    torch.save(result.losses, folder / "losses.pt")
    (folder / "going back").touch()
    train(config(folder, checkpoint={"interval": 1, "load_step": 1}, **run))


def resumes_after_kill(folder: Path) -> Result:
    """Resume what saves_until_killed left in the folder beside, to step 2."""
    out = folder.parent / "killed"
    training = {"steps": 2, "seq_len": 16, "local_batch_size": 1}
    return train(config(out, model=BIG, training=training, checkpoint={"interval": 1}))
