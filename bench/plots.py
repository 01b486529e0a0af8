"""The plots of `make report`. Each function draws one from the rows, or returns None if there are no rows for it.

The same rows give the same file, byte for byte.
"""

from __future__ import annotations

from pathlib import Path

import learning_curves
from learning_curves import Curve, curves
from scaling import fitted, grouped

from focalnet.benchmark import rows
from focalnet.benchmark.environment import ROOT
from focalnet.benchmark.floors import gpu_named
from focalnet.pictures import measurements, style

PLOTS = ROOT / "docs" / "plots"
OURS = "focalnet"
SUFFIX = ".svg"


def name_of(what: str, device: str) -> str:
    """The file's name; links to it are made of it too."""
    return f"{what.replace(' ', '-')}-{rows.folder(device).name}.svg"


def all_of(device: str) -> list[Path]:
    """Every plot that the rows of a device allow."""
    series = dict.fromkeys(line[0]["series"] for line in lines_of(device))
    with style.styled():
        found = [speedup(device), roofline(device), *(growth(device, name) for name in series)]
        found += [learning(device), pretraining(device)]
    return [path for path in found if path]


def lines_of(device: str) -> list[list[dict]]:
    """Of the rows of scaling what makes a line: those of a series, subject and runtime."""
    return [line for line in grouped(rows.read("scaling", device)) if len(line) > 1]


def ratio_of(row: dict, ours: dict) -> float:
    """Time over ours, as measured round by round; rows from before that was recorded have the medians' only."""
    return row["ratio"] if row.get("ratio_to") == OURS else row["median_s"] / ours["median_s"]


def speedup(device: str) -> Path | None:
    """Bars: the time of each runtime over focalnet's, case by case."""
    measured = rows.read("models", device)
    cases = {}
    for row in measured:
        cases.setdefault((row["variant"], row["size"], row["batch"]), {})[row["runtime"]] = row
    cases = {case: found for case, found in sorted(cases.items(), key=lambda item: order(item[0])) if OURS in found}
    if not cases:
        return None
    groups = [(_case(case, found[OURS]), _ratios(found)) for case, found in cases.items()]
    halves = _columns(groups)
    height = max(map(measurements.height_of, halves))
    figure, panels = _figure(12, 0.9 + height, len(halves))
    for panel, half in zip(panels, halves, strict=True):
        measurements.bars(panel, half, height)
    title = f"Inference, {measured[0]['dtype']}: time over focalnet's. Above 1, focalnet is faster"
    figure.suptitle(f"{title}\n{device}", x=0.01, ha="left")
    return _save(figure, name_of("inference", device))


def _case(case: tuple[str, int, int], ours: dict) -> str:
    variant, size, batch = case
    return f"{variant}, {size} × {size}, batch {batch}: focalnet {ours['median_s'] * 1e3:.0f} ms"


def _ratios(found: dict[str, dict]) -> list[measurements.Bar]:
    of_case = [(name, ratio_of(row, found[OURS])) for name, row in found.items()]
    return [(name, ratio, f"{ratio:.2f}") for name, ratio in sorted(of_case, key=lambda bar: bar[1])]


def _columns(groups: list) -> list[list]:
    """The groups in one column, or in two of about the same height."""
    total = measurements.height_of(groups)
    if total < 3:
        return [groups]
    split = next(n for n in range(1, len(groups) + 1) if measurements.height_of(groups[:n]) >= total / 2)
    return [half for half in (groups[:split], groups[split:]) if half]


def order(case: tuple[str, int, int]) -> tuple:
    """How tables and plots sort variant, image size, batch."""
    variant, size, batch = case
    return (["tiny", "small", "base", "large", "xlarge", "huge"].index(variant.split("_")[0]), variant, size, batch)


def roofline(device: str) -> Path | None:
    """The operator's stages under the roof: FLOP/s against FLOP per byte that must move. GELUs count nothing."""
    measured = _operators(device)
    peaks = _peaks(device, measured)
    if not peaks:
        return None
    figure, (axes,) = _figure(9, 5)
    points = {}
    for row in measured:
        flops = 2 * (row["fma"] + row["matrix"])
        points.setdefault(_label(row), []).append((flops / row["least_bytes"], flops / row["median_s"] / 1e9))
    ends = []
    for index, (name, of_name) in enumerate(points.items()):
        colour = style.COLOURS[index % len(style.COLOURS)]
        axes.loglog(*zip(*sorted(of_name), strict=True), style.MARKERS[index % 8], linestyle=":", color=colour)
        ends.append((name, *max(of_name), colour))
    bandwidth, rates = peaks
    intensities = [x for of_name in points.values() for x, _ in of_name]
    for unit, rate in rates.items():
        ridge = rate / bandwidth
        roof_x = [min([*intensities, ridge]) / 2, ridge, max([*intensities, ridge]) * 1.3]
        axes.loglog(roof_x, [min(rate, x * bandwidth) / 1e9 for x in roof_x], color=style.FAINT)
        ends.append((f"{unit}: {rate / 1e9:.0f} GFLOP/s", roof_x[-1], rate / 1e9, style.FAINT))
    axes.set_xlim(roof_x[0], roof_x[-1])
    axes.annotate(
        f"memory: {bandwidth / 1e9:.0f} GB/s", (roof_x[0], roof_x[0] * bandwidth / 1e9),
        xytext=(8, -2), textcoords="offset points", va="top", fontsize=9, color=style.FAINT,
    )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_xlabel("operational intensity, FLOP / byte")
    axes.set_ylabel("GFLOP/s")
    axes.grid(which="major")
    style.label_ends(axes, ends)
    first = measured[0]
    of = f"focal_modulation, {first['variant']}, batch {first['batch']}, {first['dtype']}"
    figure.suptitle(f"{of}, each point a stage\n{device}", x=0.01, ha="left")
    return _save(figure, name_of("roofline", device))


def has_roofline(device: str) -> bool:
    return _peaks(device, _operators(device)) is not None


def _operators(device: str) -> list[dict]:
    """Rows of focal_modulation, of one variant, batch and dtype: the first's."""
    everything = rows.read("operators", device) + rows.read("kernels", device)
    # Rows of a device, of its clocks and of single launches have no count of operations.
    counted = [row for row in everything if "least_bytes" in row and "median_s" in row]
    found = [row for row in counted if row["operator"].startswith("focal_modulation")]
    shared = ("variant", "batch", "dtype")
    return [row for row in found if all(row[name] == found[0][name] for name in shared)]


def _label(row: dict) -> str:
    return f"{row['backend']}, {row['case']}" if "backend" in row else f"{row['runtime']}, {row['operator']}"


def _peaks(device: str, measured: list[dict]) -> tuple[float, dict[str, float]] | None:
    """Bytes/s, and FLOP/s of each unit: a GPU's from its data sheet, a processor's the best that its rows saw."""
    gpu = gpu_named(device)
    if measured and gpu is not None:
        return gpu.bandwidth, {"FMA": gpu.fp32, "tensor cores, 16 bit": gpu.tensor16}
    found = [row for row in measured if "bandwidth" in row]
    return (_best(found, "bandwidth"), {"FMA": _best(found, "fma_peak")}) if found else None


def _best(found: list[dict], name: str) -> float:
    return max(row[name] for row in found)


def growth(device: str, series: str) -> Path | None:
    """Time, and where it was measured peak memory, against what grows; time and what grows on logarithmic axes."""
    lines = [line for line in lines_of(device) if line[0]["series"] == series]
    if not lines:
        return None
    from matplotlib.ticker import MaxNLocator

    has_memory = "peak_memory_bytes" in lines[0][0]
    figure, panels = _figure(12 if has_memory else 7, 4.5, 2 if has_memory else 1)
    ends = ([], [])
    for index, line in enumerate(lines):
        xs, colour = [row["x"] for row in line], style.COLOURS[index]
        times = [row["median_s"] * 1e3 for row in line]
        panels[0].loglog(xs, times, f"{style.MARKERS[index]}-", color=colour)
        ends[0].append((f"{line[0]['runtime']}, ~ x^{fitted(line):.2f}", xs[-1], times[-1], colour))
        if has_memory:
            memory = [row["peak_memory_bytes"] / 1e6 for row in line]
            panels[1].semilogx(xs, memory, f"{style.MARKERS[index]}-", color=colour)
            ends[1].append((line[0]["runtime"], xs[-1], memory[-1], colour))
    for axes, label in zip(panels, ("time, ms", "peak memory, MB"), strict=False):
        axes.set_xticks(xs, list(map(str, xs)))
        axes.minorticks_off()
        if axes.dataLim.ymax < 10 * axes.dataLim.ymin:  # powers of ten would leave the axis with one tick or none
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(series)
        axes.set_title(label)
        axes.grid(axis="y")
    if has_memory:
        panels[1].set_ylim(bottom=0)
    for axes, of_axes in zip(panels, ends, strict=False):
        style.label_ends(axes, of_axes)
    figure.suptitle(f"{lines[0][0]['subject']}\n{device}", x=0.01, ha="left")
    return _save(figure, name_of(f"growth {series}", device))


def learning(device: str) -> Path | None:
    """Accuracy on held-out images against epochs, and where steps were timed against seconds."""
    found = curves(device, learning_curves.ALL)
    if not found:
        return None
    timed = [curve for curve in found if curve.epoch_s is not None]
    figure, panels = _figure(12 if timed else 7, 4.5, 2 if timed else 1)
    _accuracies(panels[0], [(curve, learning_curves.NAMES[curve.network]) for curve in found], "epochs")
    if timed:
        names = [(curve, learning_curves.NAMES[curve.network]) for curve in timed]
        _accuracies(panels[1], names, "seconds of training steps")
    title = f"{found[0].row['images']} scans of digits to learn from: mean and range of {found[0].seeds}"
    figure.suptitle(f"{title}\n{device}", x=0.01, ha="left")
    return _save(figure, name_of("learning", device))


def pretraining(device: str) -> Path | None:
    """Accuracy with few labels against epochs, from scratch and after pre-training: a panel for each network."""
    after = {curve.network: curve for curve in curves(device, learning_curves.PRETRAINED)}
    few = curves(device, learning_curves.FEW)
    both = [(scratch, after[scratch.network]) for scratch in few if scratch.network in after]
    if not both:
        return None
    figure, panels = _figure(12, 4, len(both))
    for axes, (scratch, pretrained) in zip(panels, both, strict=True):
        _accuracies(axes, [(scratch, "from scratch"), (pretrained, "after SimMIM")], "epochs", lowest=0)
        axes.set_title(f"{learning_curves.NAMES[scratch.network]}, {scratch.seeds}")
    row = both[0][0].row
    title = f"{row['images']} labelled scans of digits: mean and range over seeds"
    figure.suptitle(f"{title}\n{device}", x=0.01, ha="left")
    return _save(figure, name_of("pre-training", device))


def _accuracies(axes, named: list[tuple[Curve, str]], against: str, lowest: float | None = None) -> None:
    """Lines of means with bands from the lowest to the highest seed, in percent, from ``lowest`` on.

    By default that leaves room for the last third of the lowest line.
    """
    ends = []
    for index, (curve, name) in enumerate(named):
        each = 1 if against == "epochs" else curve.epoch_s
        xs, colour = [epoch * each for epoch in curve.epochs], style.COLOURS[index]
        low, mean, high = ([100 * one for one in ys] for ys in (curve.lowest, curve.mean, curve.highest))
        axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(xs, mean, color=colour)
        ends.append((name, xs[-1], mean[-1], colour))
    axes.set_ylim(max(0, 3 * min(end[2] for end in ends) - 200) if lowest is None else lowest, 100)
    axes.set_xlim(left=0)
    axes.set_xlabel(against)
    axes.set_ylabel("held-out accuracy, percent")
    axes.grid(axis="y")
    style.label_ends(axes, ends)


def _figure(width: float, height: float, panels: int = 1) -> tuple:
    figure = style.new_figure(width, height)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _save(figure, name: str) -> Path:
    PLOTS.mkdir(parents=True, exist_ok=True)
    return style.save(figure, (PLOTS / name).with_suffix(SUFFIX))
