# SPDX-License-Identifier: Apache-2.0
"""What a run shows: the loss curve, `report.json`, and the table at the end."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import files

_FOREGROUND = "#333333"
_TRAIN = "#4477aa"
_HELD_OUT = "#cc3311"


def peak_memory_bytes() -> int:
    """The most memory this process has held: on the GPU if there is one, else resident in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def plot_loss(path: Path, report: dict[str, Any], history: list[dict[str, float]]) -> None:
    """Draw the training loss of every step, and the held-out loss before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    steps, losses = [entry["step"] for entry in history], [entry["loss"] for entry in history]
    window = max(1, len(losses) // 10)
    means = [sum(part) / len(part) for part in (losses[max(0, i - window + 1) : i + 1] for i in range(len(losses)))]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, losses, color=_TRAIN, linewidth=0.8, alpha=0.5, label="training, each step")
    axes.plot(steps, means, color=_TRAIN, linewidth=2, label=f"training, mean of the last {window} steps")
    for name, step, side in (("before", 0, "left"), ("after", report["training"]["steps"], "right")):
        loss = report["held_out"][name]["loss"]
        label = "held out, before and after" if name == "before" else None
        axes.plot([step], [loss], "o", color=_HELD_OUT, markersize=8, zorder=3, label=label)
        axes.annotate(
            f"{loss:.3f}", (step, loss), xytext=(0, 9), textcoords="offset points", color=_HELD_OUT, ha=side, zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
        )  # fmt: skip
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(
        f"{report['model']}, {report['settings']['method']}, on {Path(report['data']).name}", color=_FOREGROUND
    )
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.margins(x=0.03, y=0.12)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    files.write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    pyplot.close(figure)


def rank_grid(ranks: dict[str, int]) -> tuple[list[str], list[str], list[list[float]]]:
    """(kinds of module, layers, rank of each kind in each layer, nan where there is none): a name is split at its first
    number, which is that of the layer."""
    cells: dict[tuple[str, str], int] = {}
    for name, rank in ranks.items():
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        layer, kind = ("-", parts) if number is None else (parts[number], parts[number + 1 :] or parts[:number])
        cells[".".join(kind), layer] = rank
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    layers = sorted({layer for _, layer in cells}, key=lambda layer: (not layer.isdigit(), layer.zfill(6)))
    return kinds, layers, [[cells.get((kind, layer), float("nan")) for layer in layers] for kind in kinds]


def plot_ranks(path: Path, report: dict[str, Any]) -> None:
    """Draw AdaLoRA's final ranks as a heat map, layer by module."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds, layers, grid = rank_grid(report["ranks"])
    size = (max(4.0, 2.6 + 0.32 * len(layers)), max(2.2, 1.3 + 0.36 * len(kinds)))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    top = report["settings"]["init_rank"]
    image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=top, aspect="auto")
    for y, row in enumerate(grid):
        for x, rank in enumerate(row):
            if rank == rank:
                color = "black" if rank > 0.6 * top else "white"
                axes.text(x, y, f"{rank:.0f}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(layers)), layers)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("layer")
    axes.set_title(f"final ranks, {sum(report['ranks'].values())} in {len(report['ranks'])} layers", color=_FOREGROUND)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="rank")
    files.write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    pyplot.close(figure)


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write `report.json`."""
    files.write_atomic(path, json.dumps(report, indent=2) + "\n")


def print_report(console: Console, report: dict[str, Any]) -> None:
    """Print the samples and the table of results."""
    console.print(f"\nprompt        {_one_line(report['samples']['prompt'])}", markup=False, highlight=False)
    console.print(f"\nbefore        {_one_line(report['samples']['before'])}", markup=False, highlight=False)
    console.print(f"\nafter         {_one_line(report['samples']['after'])}\n", markup=False, highlight=False)
    table = Table(title=f"{report['model']} on {report['data']}", show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in table_rows(report):
        table.add_row(name, value)
    console.print(table, markup=False, highlight=False)


def table_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the final table, as text."""
    settings, size, training, check = report["settings"], report["size"], report["training"], report["reload_check"]
    before, after = report["held_out"]["before"], report["held_out"]["after"]
    exact = "logits equal, bit for bit" if check["max_abs_difference"] == 0 else "logits equal within the tolerance"
    verdict = exact if check["passed"] else "FAILED: logits differ"
    ranks = sorted(report["ranks"].values())
    spread = (
        [("ranks at the end", f"{ranks[0]} to {ranks[-1]}, {sum(ranks)} in all, see {report['files']['ranks']}")]
        if ranks
        else []
    )
    return [
        (
            "method",
            f"{settings['method']}, r = {settings['rank']}, alpha = {settings['alpha']:g}, "
            f"{size['adapted_layers']} layers",
        ),
        ("trainable parameters", f"{size['trainable_parameters']:,}"),
        (
            "base weights",
            f"{size['base_bits_per_parameter']:.2f} bits per parameter ({size['adapted_weights']:,} in adapted layers)",
        ),
        (
            "training",
            f"{training['steps']} steps, {training['seconds']:.0f} s, {training['tokens_per_second']:.0f} tokens/s",
        ),
        (
            "held-out loss",
            f"{before['loss']:.4f} -> {after['loss']:.4f} ({report['held_out']['change_percent']:+.1f}%)",
        ),
        ("held-out perplexity", f"{before['perplexity']:.2f} -> {after['perplexity']:.2f}"),
        *spread,
        ("peak memory", f"{report['peak_memory_bytes'] / 2**30:.2f} GiB ({report['device']})"),
        ("adapter reload check", f"{verdict} (max abs difference {check['max_abs_difference']:g})"),
        ("total time", f"{report['total_seconds']:.0f} s"),
        ("adapter", report["files"]["adapter"]),
        ("loss curve, report", f"{report['files']['plot']}, {report['files']['report']}"),
    ]


def _one_line(text: str) -> str:
    return " ".join(text.split())
