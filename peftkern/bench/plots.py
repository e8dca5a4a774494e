# SPDX-License-Identifier: Apache-2.0
"""The figures of a run as PNG files, and one HTML page that holds them and the table."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..files import write_whole
from .measure import Ceilings
from .providers import FLOOR, OURS
from .report import Result

_PALETTE = [
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee7733",
    "#222222", "#999933", "#882255", "#44aa99", "#bbbbbb", "#ddaacc", "#997700",
]  # fmt: skip
SWEPT = {"M": lambda c: c.rows, "r": lambda c: c.r, "threads": lambda c: c.threads, "layers": lambda c: c.layers}


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _colours(results: Sequence[Result]) -> dict[str, str]:
    """A colour for each provider, the same in every figure."""
    providers = list(dict.fromkeys([OURS, *(p for r in results for p in r.timings)]))
    return {p: _PALETTE[i % len(_PALETTE)] for i, p in enumerate(providers)}


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def speed(results: Sequence[Result]) -> Any:
    """Each peer's time over ours, case by case: right of 1 we are faster."""
    results = [r for r in results if not r.case.sweep and len(r.timings) > 1]
    colours = _colours(results)
    figure, axes = _pyplot().subplots(figsize=(9, 1.2 + 0.42 * len(results)), layout="constrained")
    for at, result in enumerate(reversed(results)):
        for provider in result.timings:
            if provider != OURS:
                marker = "|" if provider == FLOOR else "o"
                axes.plot(
                    result.ratio(provider), at, marker, color=colours[provider], markersize=12 if marker == "|" else 7
                )
    for provider in colours:
        if provider != OURS:
            axes.plot([], [], "|" if provider == FLOOR else "o", color=colours[provider], label=provider)
    axes.axvline(1, color="#333333", linewidth=1)
    axes.set_yticks(range(len(results)), [r.case.name for r in reversed(results)], fontsize=8)
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 5, 10, 50, 100], ["0.5", "1", "2", "5", "10", "50", "100"])
    axes.set_xlabel("time of the provider / time of peftkern (medians of alternating runs)")
    axes.legend(
        frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.35, -0.06 - 0.5 / (len(results) + 1)), ncols=3
    )
    _finish(axes)
    return figure


def roofline(results: Sequence[Result], ceilings: Ceilings) -> Any:
    """What our calls reach, below the ceilings measured in the same run: arithmetic, and traffic where that is all."""
    figure, (left, right) = _pyplot().subplots(1, 2, figsize=(11, 4.5), layout="constrained", width_ratios=(3, 2))
    colours = dict(zip(ceilings.flops_per_second, _PALETTE, strict=False))
    intensities = [2.0 ** (i / 8) for i in range(-16, 97)]
    for dtype, peak in ceilings.flops_per_second.items():
        roof = [min(peak, x * ceilings.bytes_per_second) / 1e9 for x in intensities]
        left.plot(intensities, roof, color=colours[dtype], label=f"ceiling, {dtype}")
    seen = set()
    for r in results:
        if r.flops and not r.case.threads:
            label = f"peftkern, {r.case.dtype}"
            reached = r.flops / r.timings[OURS].p50 / 1e9
            left.plot(
                r.flops / r.nbytes, reached, "o", color=colours.get(r.case.dtype, "#333333"), alpha=0.8,
                label=None if label in seen else label,
            )  # fmt: skip
            seen.add(label)
    left.set(xscale="log", yscale="log", xlabel="FLOPs per byte that has to move", ylabel="GFLOP/s")
    left.legend(frameon=False, fontsize=8)
    moved = [r for r in results if not r.flops and not r.case.threads]
    names = [r.case.name for r in moved]
    right.barh(names[::-1], [r.fraction for r in moved][::-1], color=_PALETTE[0])
    right.axvline(1, color="#333333", linewidth=1)
    right.tick_params(axis="y", labelsize=8)
    right.set_xlabel("fraction of the copy bandwidth")
    for axes in (left, right):
        _finish(axes)
    return figure


def scaling(results: Sequence[Result]) -> Any:
    """Time against one size at a time, on logarithmic axes: a straight line of slope 1 is linear growth."""
    pyplot = _pyplot()
    swept = {sweep: size for sweep, size in SWEPT.items() if any(r.case.sweep == sweep for r in results)}
    figure, (panels,) = pyplot.subplots(
        1, len(swept), figsize=(1 + 3.6 * len(swept), 4.2), layout="constrained", squeeze=False
    )
    for axes, (sweep, size) in zip(panels, swept.items(), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for r in (r for r in results if r.case.sweep == sweep):
            label = f"{r.case.op} {r.case.in_features}x{r.case.out_features}"
            if sweep == "threads" and r.case.rows:
                label += f" M={r.case.rows}"
            for provider in (OURS, "HF PEFT") if sweep != "threads" else (OURS,):
                if provider in r.timings:
                    name = label if provider == OURS else f"{label}, {provider}"
                    lines.setdefault(name, []).append((size(r.case), 1e3 * r.timings[provider].p50))
        for i, (name, points) in enumerate(lines.items()):
            style = "--" if name.endswith("HF PEFT") else "-"
            axes.plot(
                *zip(*sorted(points), strict=True), style, marker="o", color=_PALETTE[i % len(_PALETTE)], label=name
            )
        axes.set(xscale="log", yscale="log", xlabel=sweep, ylabel="ms")
        axes.set_xscale("log", base=2)
        axes.legend(frameon=False, fontsize=7)
        _finish(axes)
    return figure


def write(
    folder: Path, env: dict[str, Any], ceilings: Ceilings, results: Sequence[Result], markdown: str
) -> list[Path]:
    """Writes what there are results for: speed.png, roofline.png, scaling.png, and bench.html with all of it."""
    figures: dict[str, Callable[[], Any]] = {}
    if any(not r.case.sweep for r in results):
        figures["speed"] = lambda: speed(results)
        figures["roofline"] = lambda: roofline([r for r in results if not r.case.sweep], ceilings)
    if any(r.case.sweep for r in results):
        figures["scaling"] = lambda: scaling(results)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in figures.items():
        figure = draw()
        paths.append(folder / f"{name}.png")
        write_whole({paths[-1]: lambda temporary, f=figure: f.savefig(temporary, dpi=130, format="png")})
        _pyplot().close(figure)
    page = folder / "bench.html"
    write_whole({page: lambda temporary, p=tuple(paths): temporary.write_text(_page(env, p, markdown))})
    return [*paths, page]


def _page(env: dict[str, Any], figures: Sequence[Path], markdown: str) -> str:
    """Nothing on the page is fetched from elsewhere."""
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]

    def row(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    images = "\n".join(
        f'<img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in figures
    )
    return f"""<!doctype html>
<meta charset="utf-8"><title>peftkern bench</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em }}
img {{ max-width: 100%; display: block; margin: 1.5em 0 }}
table {{ border-collapse: collapse; font-size: 13px }}
td, th {{ padding: .15em .7em; text-align: right; border-bottom: 1px solid #ddd }}
td:nth-child(-n+2), th:nth-child(-n+2) {{ text-align: left }}
</style>
<h1>peftkern bench</h1>
<p>{html.escape(f"{env['date']}; {env['cpu']}, {env['threads']} threads, {env['isa']}; {versions}")}</p>
<p>ratio: the provider's median time over peftkern's in alternating runs of one process, above 1 peftkern is faster.
Times are in milliseconds. The ceilings are measured in the same run.</p>
{images}
<table>{row(head, "th")}{"".join(row(cells, "td") for cells in rows)}</table>
"""
