"""`sonicmoe memory CONFIG`: activation memory, predicted and measured, and whether the run fits.

Legend: T tokens of one microbatch on one rank.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torchtitan.config import derive
from torchtitan.distributed.activation_checkpoint import SelectiveAC

from sonicmoe_titan import plots
from sonicmoe_titan.config_tree import ConfigError
from sonicmoe_titan.cpu import prepare_cpu
from sonicmoe_titan.memory_fit import (
    DEFAULT_GPU,
    FRAGMENTATION,
    GIB,
    GPUS,
    MIB,
    Layout,
    checkpointing_of,
    fits,
    layout_of,
    rank_items,
    shape_of,
)
from sonicmoe_titan.memory_model import LayerShape, Term, layer_terms, total
from sonicmoe_titan.memory_peaks import BACKWARD_STAGES, FORWARD_STAGES, peak
from sonicmoe_titan.memory_peers import Peer, peers
from sonicmoe_titan.selective_ac import SonicSelectiveAC
from sonicmoe_titan.toml_config import load_config
from sonicmoe_titan.trainer import SonicTrainer

CPU_TOKENS = 512  # a measurement on a CPU takes seconds with these


@dataclass(frozen=True)
class Comparison:
    """A prediction beside its measurement, in bytes."""

    what: str
    predicted: int
    measured: int


def main(argv: list[str]) -> int:
    """Print the tables, write `memory.csv` and `memory.png`; 1 if the run will not fit the GPU."""
    parser = argparse.ArgumentParser(
        prog="sonicmoe memory",
        description="Predict a run's activation memory, measure it, compare with other "
        "implementations, and check that the run fits a GPU.",
        epilog="Every other --table.key value changes the config, as in training.",
    )
    parser.add_argument("config", metavar="CONFIG", help="TOML file of the run")
    parser.add_argument("--gpu", default=DEFAULT_GPU, help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--gpus", type=int, help="GPUs of the run (from its parallel degrees)")
    parser.add_argument(
        "--tokens", type=int, help=f"tokens of the measurement (GPU: the run's; CPU: {CPU_TOKENS})"
    )
    parser.add_argument("--no-measure", action="store_true", help="predict only")
    parser.add_argument("--out", type=Path, help="folder for memory.csv and memory.png (CONFIG's)")
    given, overrides = parser.parse_known_args(argv)

    prepare_cpu()
    config = load_config(given.config, overrides)
    out = given.out or Path(config.dump_folder)
    try:
        layout = layout_of(config, num_gpus=given.gpus)
        expected = shape_of(config, layout, load="expected")
        bound = shape_of(config, layout, load="bound")
        items = rank_items(config, layout, load="expected")
        fit, needed = fits(items, given.gpu)
        worst_fits, worst = fits(rank_items(config, layout, load="bound"), given.gpu)
        compared = [] if given.no_measure else _measure(expected, config, tokens=given.tokens)
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{given.config}: {error}") from None

    console = Console()
    console.print(_layer_table(config, layout, expected, bound))
    kept, unchecked = (
        total(layer_terms(expected, policy)) for policy in (checkpointing_of(config), "none")
    )
    if kept > unchecked:
        console.print(
            f"[yellow]note[/]: without activation checkpointing a layer would keep less "
            f"({_size(unchecked)} MiB): selective keeps what collectives and experts return\n"
        )
    if config.compile.enable:
        console.print("These are eager PyTorch's; torch.compile keeps less between fused parts.\n")
    console.print(_peak_table(expected))
    if compared:
        console.print(_comparison_table(compared, _measured_shape(expected, given.tokens)))
    rivals = peers(expected)
    console.print(_peer_table(rivals, expected))
    console.print(_fit_table(items, needed, layout, given.gpu))
    _write_csv(out / "memory.csv", expected, config, compared, rivals, items)
    _draw(out / "memory.png", rivals, expected, Path(given.config).stem)
    print(f"wrote {out / 'memory.csv'} and {out / 'memory.png'}")
    if not fit:
        console.print(
            f"[bold red]warning[/]: {needed:.1f} GiB do not fit {given.gpu} ({GPUS[given.gpu]} "
            "GiB): shard over more GPUs, lower training.local_batch_size, or turn on "
            "activation checkpointing"
        )
    elif not worst_fits:
        console.print(
            f"[yellow]note[/]: if the routing sent every token to one rank's experts, that rank "
            f"would need {worst:.1f} GiB, more than {given.gpu} has"
        )
    return 0 if fit else 1


def _size(size: int) -> str:
    """MiB with as many digits as mean something."""
    mib = size / MIB
    return f"{mib:,.0f}" if mib >= 1000 else f"{mib:.1f}" if mib >= 10 else f"{mib:.3g}"


def _layer_table(
    config: SonicTrainer.Config, layout: Layout, expected: LayerShape, bound: LayerShape
) -> Table:
    policy = checkpointing_of(config)
    table = Table(
        title=f"Kept for the backward by one decoder layer, {expected.num_tokens:,} tokens a "
        f"microbatch, activation checkpointing: {policy}",
        title_justify="left",
    )
    parallel = layout.expert > 1
    for column in ("part", "tensor", "shape"):
        table.add_column(column)
    table.add_column("MiB, expected" if parallel else "MiB", justify="right")
    if parallel:
        table.add_column("MiB, bound", justify="right")
    terms, bounds = layer_terms(expected, policy), layer_terms(bound, policy)
    previous = terms[0].part
    for term, limit in zip(terms, bounds, strict=True):
        if term.part != previous:
            table.add_section()
        previous = term.part
        cells = [_size(term.bytes)] + ([_size(limit.bytes)] if parallel else [])
        table.add_row(term.part, term.name, term.shape, *cells)
    table.add_section()
    sums = [_size(total(terms))] + ([_size(total(bounds))] if parallel else [])
    table.add_row("layer", "", "", *sums, style="bold")
    layers = config.model.num_layers
    sums = [_size(layers * total(terms))] + ([_size(layers * total(bounds))] if parallel else [])
    table.add_row("model", f"{layers} layers", "", *sums, style="bold")
    return table


def _peak_table(shape: LayerShape) -> Table:
    table = Table(
        title="Needed for a while by the experts' kernels beside what is kept (hopper backend)",
        title_justify="left",
    )
    for column in ("pass", "fullest while", "buffers (MiB)"):
        table.add_column(column)
    table.add_column("MiB", justify="right")
    for name, stages in (("forward", FORWARD_STAGES), ("backward", BACKWARD_STAGES)):
        stage, terms = peak(shape, stages)
        buffers = ", ".join(f"{term.name} {_size(term.bytes)}" for term in terms)
        table.add_row(name, stage, buffers, _size(total(terms)))
    return table


def _measured_shape(shape: LayerShape, tokens: int | None) -> LayerShape:
    from sonicmoe_titan.memory_measure_model import measured_shape

    return measured_shape(shape, tokens=tokens, cpu_tokens=CPU_TOKENS)


def _measure(
    shape: LayerShape, config: SonicTrainer.Config, *, tokens: int | None
) -> list[Comparison]:
    from sonicmoe_titan.memory_measure_model import measure_layer

    policy = config.activation_checkpoint
    if type(policy) is SelectiveAC.Config:  # as `parallelize_decoder` does
        policy = derive(policy, SonicSelectiveAC.Config)
    built = None if policy is None else policy.build(dump_folder=config.dump_folder)
    rows = measure_layer(
        _measured_shape(shape, tokens), policy=built, checkpointing=checkpointing_of(config)
    )
    return [Comparison(*row) for row in rows]


def _comparison_table(compared: Sequence[Comparison], shape: LayerShape) -> Table:
    device = "GPU" if shape.on_gpu else "CPU"
    table = Table(
        title=f"Predicted against what autograd keeps on this {device}, "
        f"{shape.num_tokens:,} tokens, one rank",
        title_justify="left",
    )
    table.add_column("")
    for column in ("predicted (bytes)", "measured (bytes)", "difference"):
        table.add_column(column, justify="right")
    for row in compared:
        off = row.measured / row.predicted - 1
        table.add_row(row.what, f"{row.predicted:,}", f"{row.measured:,}", f"{off:+.3%}")
    return table


def _peer_table(rivals: Sequence[Peer], shape: LayerShape) -> Table:
    table = Table(
        title=f"Kept by the experts of one layer, {shape.num_tokens:,} tokens, by implementation",
        title_justify="left",
    )
    for column in ("implementation", "keeps"):
        table.add_column(column)
    for column in ("MiB", "ratio"):
        table.add_column(column, justify="right")
    table.add_column("source")
    ours = rivals[0].bytes
    for peer in rivals:
        table.add_row(
            peer.name, peer.formula, _size(peer.bytes), f"{peer.bytes / ours:.2f}x", peer.source
        )
    return table


def _fit_table(items: dict[str, int], needed: float, layout: Layout, gpu: str) -> Table:
    table = Table(
        title=f"The fullest of {layout.num_gpus} GPUs (replicate {layout.replicate}, shard "
        f"{layout.shard}, context {layout.context}, tensor {layout.tensor}, pipeline "
        f"{layout.pipeline}, expert {layout.expert})",
        title_justify="left",
    )
    table.add_column("")
    table.add_column("GiB", justify="right")
    for name, size in items.items():
        table.add_row(name, f"{size / GIB:.3f}")
    table.add_section()
    table.add_row(f"sum and {FRAGMENTATION:.0%} fragmentation", f"{needed:.3f}", style="bold")
    table.add_row(f"{gpu} has", f"{GPUS[gpu]:.1f}")
    return table


def _write_csv(
    path: Path,
    shape: LayerShape,
    config: SonicTrainer.Config,
    compared: Sequence[Comparison],
    rivals: Sequence[Peer],
    items: dict[str, int],
) -> None:
    def rows(table: str, terms: Sequence[Term]) -> list[list[object]]:
        return [[table, term.part, term.name, term.shape, term.bytes, ""] for term in terms]

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["table", "part", "name", "shape", "predicted_bytes", "measured_bytes"])
        writer.writerows(rows("layer", layer_terms(shape, checkpointing_of(config))))
        for name, stages in (("forward", FORWARD_STAGES), ("backward", BACKWARD_STAGES)):
            writer.writerows(rows(f"{name} peak", peak(shape, stages)[1]))
        for row in compared:
            writer.writerow(["measured", "", row.what, "", row.predicted, row.measured])
        for peer in rivals:
            writer.writerow(["implementation", "", peer.name, peer.formula, peer.bytes, ""])
        for name, size in items.items():
            writer.writerow(["rank", "", name, "", size, ""])


def _draw(path: Path, rivals: Sequence[Peer], shape: LayerShape, name: str) -> None:
    args = shape.args
    caption = (
        f"{name}: D {args.dim}, F {args.expert_dim}, E {args.num_experts}, K {args.top_k}, "
        f"{shape.num_tokens:,} tokens, {8 * shape.value_bytes}-bit values; predicted, "
        f"weights not counted; {datetime.now(UTC):%Y-%m-%d}"
    )
    shown = sorted(rivals, key=lambda peer: peer.bytes, reverse=True)
    with plots.figure(path, caption=caption, height=3.6) as (_, axes):
        colours = [plots.colour(0 if peer is rivals[0] else 4) for peer in shown]
        bars = axes.barh(
            [peer.name for peer in shown], [peer.bytes / MIB for peer in shown], color=colours
        )
        axes.bar_label(
            bars,
            [f"{_size(peer.bytes)} ({peer.bytes / rivals[0].bytes:.1f}x)" for peer in shown],
            padding=4,
        )
        axes.margins(x=0.22)
        axes.grid(visible=False, axis="y")
        axes.set(
            title="Kept for the backward by the experts of one layer",
            xlabel="MiB per microbatch (times SonicMoE)",
        )
