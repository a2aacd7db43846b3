"""Tables and curves of study_token_rounding.py's records, written into docs/token_rounding.md."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from study_arms import TOKEN_CHOICE, Arm

from sonicmoe_titan import plots

DOCUMENT = "token_rounding.md"
LABELS = {
    "topk": "token choice",
    "nearest": "rounding, nearest",
    "balance": "rounding, balance",
    "stochastic": "rounding, stochastic",
    "score_stochastic": "rounding, by score",
    "up": "rounding up",
    "down": "dropping (down)",
}
# Validation perplexity in arXiv 2512.14080 v2, tables 6 (routings), 7 (rows per expert) and 8
# (tiles), of the models with 2 of 64 experts (0.5B, 40B tokens) and 8 of 256 (1.8B, 40B tokens).
PAPER_TOKEN_CHOICE = (15.94, 13.12)
PAPER = {  # (routing, tile, rows per expert over tile)
    ("nearest", 128, 4): (15.92, 13.10),
    ("stochastic", 128, 4): (15.93, 13.08),
    ("score_stochastic", 128, 4): (15.91, 13.09),
    ("balance", 128, 4): (15.93, 13.08),
    ("up", 128, 4): (15.89, 13.07),
    ("down", 128, 4): (16.10, 13.19),
    ("nearest", 128, 8): (15.91, 13.08),
    ("nearest", 128, 2): (15.98, 13.12),
    ("nearest", 128, 1): (16.11, 13.55),
    ("nearest", 64, 8): (15.90, 13.07),
    ("nearest", 256, 2): (16.00, 13.13),
    ("nearest", 512, 1): (16.17, 13.56),
}
# Student's t, two-sided 95%, by degrees of freedom: the half-width of a mean of few seeds
T_95 = (math.nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

HOPPERS = ("H100", "H200")  # the same multiprocessors, which run the same kernels

Runs = dict[Arm, dict[int, dict]]  # arm -> seed -> record


def write_report(records: list[dict], docs: Path) -> list[Path]:
    """Replace each study's part of DOCUMENT and draw its figures; returns what was written.

    A part stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; a new one goes to the end.
    Everything else in the document is left as it is.
    """
    path = docs / DOCUMENT
    text = path.read_text() if path.is_file() else "# Does token rounding keep quality?\n"
    written = [path]
    for name, group in by_study(records).items():
        runs = by_arm(group)
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        lines = [begin, describe(group), "", *table(runs), ""]
        for title, figure in draw(runs, docs / "figures", f"token_rounding_{name}"):
            lines.append(f"![{title}](figures/{figure.name})")
            written.append(figure)
        part = "\n".join([*lines, end])
        before, found, rest = text.partition(begin)
        text = before + part + rest.partition(end)[2] if found else f"{text}\n{part}\n"
    docs.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return written


def by_study(records: list[dict]) -> dict[str, list[dict]]:
    """Records that may be compared: of one study, budget, kind of device and corpus."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        kind = "Hopper" if any(name in record["device"] for name in HOPPERS) else record["device"]
        shared = (record["study"], record["tokens"], kind, record["corpus_key"])
        groups.setdefault(shared, []).append(record)
    names: dict[str, list[dict]] = {}
    for (study, tokens, *_), group in groups.items():
        name = study if study not in names else f"{study}_{plots.count(tokens)}"
        names[name if name not in names else f"{name}_{len(names)}"] = group
    return names


def by_arm(records: list[dict]) -> Runs:
    runs: Runs = {}
    for record in records:
        runs.setdefault(Arm.parse(record["arm"]), {})[record["seed"]] = record
    return runs


def baseline(runs: Runs, arm: Arm) -> dict[int, dict]:
    """Token choice with the same experts, by seed: with the same microbatch where there is one."""
    twin = dataclasses.replace(arm, routing=TOKEN_CHOICE)
    others = (
        seeds
        for other, seeds in runs.items()
        if other.routing == TOKEN_CHOICE and other.experts == arm.experts
    )
    return runs.get(twin) or next(others, {})


def differences(runs: Runs, arm: Arm, value: Callable[[dict], float]) -> list[float]:
    """An arm's value less token choice's of the same seed."""
    base = baseline(runs, arm)
    return [value(record) - value(base[seed]) for seed, record in runs[arm].items() if seed in base]


def percent(loss_difference: float) -> float:
    """A difference of losses in nats as per cent of perplexity."""
    return 100 * math.expm1(loss_difference)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and the half-width of its 95% confidence interval; nan for one value."""
    number = len(values)
    if number < 2:
        return values[0], math.nan
    return statistics.mean(values), (
        T_95[min(number, len(T_95)) - 1] * statistics.stdev(values) / math.sqrt(number)
    )


def spread(values: Sequence[float], written: str) -> str:
    """Mean and standard deviation; the value alone when it is one."""
    mean = format(statistics.mean(values), written)
    return mean if len(values) < 2 else f"{mean} ± {format(statistics.stdev(values), written)}"


def order(arm: Arm) -> tuple:
    return arm.experts, list(LABELS).index(arm.routing), arm.tile, -arm.ratio


def table(runs: Runs) -> list[str]:
    """Markdown: a line for each arm."""
    lines = [
        "| routing | E, K | tile x tiles per expert | seeds | validation perplexity | "
        "against token choice | paper, 2/64 and 8/256 | rows added, dropped | padding |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in sorted(runs, key=order):
        records = list(runs[arm].values())
        perplexities = [math.exp(r["validation_loss"]) for r in records]
        apart = [percent(d) for d in differences(runs, arm, lambda r: r["validation_loss"])]
        against = "-"
        if arm.routing != TOKEN_CHOICE and apart:
            mean, half = interval(apart)
            against = f"{mean:+.2f}%" + ("" if math.isnan(half) else f" ± {half:.2f}")
        published = PAPER.get((arm.routing, arm.tile, arm.ratio))
        paper = "-"
        if published:
            pairs = zip(published, PAPER_TOKEN_CHOICE, strict=True)
            paper = ", ".join(f"{100 * (ours / base - 1):+.2f}%" for ours, base in pairs)
        added, dropped, padding = (
            statistics.mean(r[key] for r in records)
            for key in ("rows_added", "rows_dropped", "padding_waste")
        )
        lines.append(
            f"| {LABELS[arm.routing]} | {arm.num_experts}, {arm.top_k} | "
            f"{arm.tile} x {arm.ratio} | "
            f"{len(records)} | {spread(perplexities, '.2f')} | {against} | {paper} | "
            f"{added:.1%}, {dropped:.1%} | {padding:.1%} |"
        )
    return lines


def devices(records: Iterable[dict]) -> str:
    """What the records ran on."""
    return " and ".join(sorted({record["device"] for record in records}))


def describe(group: list[dict]) -> str:
    """What ran, from the records themselves."""
    first = group[0]
    dates = sorted({record["date"] for record in group})
    installed = {name: v for name, v in first["versions"].items() if v != "unknown"}
    versions = ", ".join(f"{name} {version}" for name, version in installed.items())
    sizes = sorted({(r["parameters"], r["active_parameters"]) for r in group})
    models = " and ".join(
        f"{plots.count(total)} parameters ({plots.count(active)} active)" for total, active in sizes
    )
    epochs = first["tokens"] / first["corpus_tokens"]
    commits = ", ".join(sorted({record["commit"] for record in group}))
    return (
        f"{len(group)} runs of {plots.count(first['tokens'])} tokens, {first['steps']} steps of "
        f"{first['step_tokens']:,} tokens; {models}; corpus {first['corpus']}, "
        f"{plots.count(first['corpus_tokens'])} training tokens, read {epochs:.2f} times. "
        f"{devices(group)}, "
        f"{versions}, commit {commits}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}; "
        f"`python scripts/study_token_rounding.py {first['study']}`. Perplexity: mean and standard "
        "deviation over seeds. Against token choice: of the same seed, mean and 95% confidence "
        "interval (Student's t). Padding: of the kernels' 128-row tiles."
    )


def curves(records: list[dict], value: Callable[[dict], list[float]]) -> list[list[float]]:
    """One list a validation: the value of every seed."""
    return [list(values) for values in zip(*map(value, records), strict=True)]


def tokens_axis(record: dict) -> list[float]:
    return [step * record["step_tokens"] for step in record["validation_steps"]]


def draw(runs: Runs, folder: Path, name: str) -> Iterator[tuple[str, Path]]:
    """Yield title and file of two figures for every number of experts, or of one without a pair."""
    for experts in sorted({arm.experts for arm in runs}):
        same = {arm: seeds for arm, seeds in runs.items() if arm.experts == experts}
        stem = f"{name}_e{experts[0]}k{experts[1]}"
        yield "Validation loss", draw_losses(same, folder / f"{stem}_loss.png")
        if path := draw_differences(same, folder / f"{stem}.png"):
            yield "Perplexity against token choice", path


def draw_losses(runs: Runs, path: Path) -> Path:
    """Validation loss over tokens: mean over seeds, smallest to largest shaded."""
    with plots.figure(path, caption=caption(runs)) as (_, axes):
        for index, arm in enumerate(sorted(runs, key=order)):
            records = list(runs[arm].values())
            # without the first step's, that of the initial weights
            losses = curves(records, lambda r: r["validation_losses"][1:])
            _band(axes, tokens_axis(records[0])[1:], losses, index, label(arm))
        axes.set(title="Validation loss, top-k routing", xlabel="tokens", ylabel="nats per token")
        plots.format_axis(axes.xaxis, plots.count)
        axes.legend()
    return path


def draw_differences(runs: Runs, path: Path) -> Path | None:
    """Perplexity against token choice of the same seed, over tokens."""
    drawn = [arm for arm in sorted(runs, key=order) if arm.routing != TOKEN_CHOICE]
    drawn = [arm for arm in drawn if set(runs[arm]) & set(baseline(runs, arm))]
    if not drawn:
        return None
    with plots.figure(path, caption=caption(runs)) as (_, axes):
        axes.axhline(0, color="black", linewidth=1)
        for index, arm in enumerate(drawn, start=1):
            base = baseline(runs, arm)
            apart = [
                [percent(a - b) for a, b in zip(*both, strict=True)]
                for seed, record in runs[arm].items()
                if seed in base
                and (both := (record["validation_losses"], base[seed]["validation_losses"]))
            ]
            tokens = tokens_axis(next(iter(runs[arm].values())))
            # the first step's loss is the initial weights', the same in every arm
            _band(axes, tokens[1:], curves(apart, lambda c: c[1:]), index, label(arm))
        axes.set(
            title="Validation perplexity against token choice, same seed",
            xlabel="tokens",
            ylabel="difference (%)",
        )
        plots.format_axis(axes.xaxis, plots.count)
        axes.legend()
    return path


def _band(axes, tokens: list[float], values: list[list[float]], index: int, name: str) -> None:
    colour = plots.colour(index)
    axes.plot(tokens, [statistics.mean(v) for v in values], color=colour, label=name, marker=".")
    axes.fill_between(
        tokens, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.12
    )


def label(arm: Arm) -> str:
    plural = "" if arm.ratio == 1 else "s"
    tiles = "" if arm.routing == TOKEN_CHOICE else f", {arm.ratio} tile{plural} of {arm.tile}"
    return f"{LABELS[arm.routing]}{tiles} (E {arm.num_experts}, K {arm.top_k})"


def caption(runs: Runs) -> str:
    records = [record for of_arm in runs.values() for record in of_arm.values()]
    first = records[0]
    return (
        f"{plots.count(first['parameters'])} parameters, {first['corpus']}, {devices(records)}, "
        f"{first['date']}; lines: mean over seeds, shaded: smallest to largest"
    )
