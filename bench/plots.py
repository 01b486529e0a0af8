"""The plots of `make report`. Each function draws one from the rows, or returns None if there are no rows for it.

The same rows give the same file, byte for byte.
"""

from __future__ import annotations

from pathlib import Path

from scaling import fitted, grouped

from focalnet.benchmark import rows
from focalnet.benchmark.environment import ROOT
from focalnet.benchmark.floors import gpu_named

PLOTS = ROOT / "docs" / "plots"
OURS = "focalnet"


def name_of(what: str, device: str) -> str:
    """The file's name; links to it are made of it too."""
    return f"{what.replace(' ', '-')}-{rows.folder(device).name}.svg"


def all_of(device: str) -> list[Path]:
    """Every plot that the rows of a device allow."""
    series = dict.fromkeys(line[0]["series"] for line in lines_of(device))
    found = [speedup(device), roofline(device), *(growth(device, name) for name in series)]
    return [path for path in found if path]


def lines_of(device: str) -> list[list[dict]]:
    """Of the rows of scaling what makes a line: those of a series, subject and runtime."""
    return [line for line in grouped(rows.read("scaling", device)) if len(line) > 1]


def ratio_of(row: dict, ours: dict) -> float:
    """Time over ours, as measured round by round; rows from before that was recorded have the medians' only."""
    return row["ratio"] if row.get("ratio_to") == OURS else row["median_s"] / ours["median_s"]


def speedup(device: str) -> Path | None:
    """Bars: how many times faster focalnet is than each runtime, case by case."""
    measured = rows.read("models", device)
    cases = {}
    for row in measured:
        cases.setdefault((row["variant"], row["size"], row["batch"]), {})[row["runtime"]] = row
    cases = {case: found for case, found in sorted(cases.items(), key=lambda item: order(item[0])) if OURS in found}
    if not cases:
        return None
    present = [name for name in dict.fromkeys(row["runtime"] for row in measured) if name != OURS]
    figure, (axes,) = _figure(width=max(5, 1.5 + 1.3 * len(cases)))
    for place, name in enumerate(present):
        for position, found in enumerate(cases.values()):
            if name in found:
                x = position + (place - (len(present) - 1) / 2) * 0.8 / len(present)
                axes.bar(x, ratio_of(found[name], found[OURS]), 0.8 / len(present), color=f"C{place}")
        axes.bar([0], [0], color=f"C{place}", label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(cases)), [f"{variant}\n{size}, batch {batch}" for variant, size, batch in cases])
    axes.set_ylabel("time over focalnet's (higher: focalnet is faster)")
    axes.set_title(f"Inference, {measured[0]['dtype']}\n{device}", fontsize="medium")
    figure.legend(loc="outside lower center", ncols=3)
    return _save(figure, name_of("inference", device))


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
    figure, (axes,) = _figure(width=7)
    points = {}
    for row in measured:
        flops = 2 * (row["fma"] + row["matrix"])
        points.setdefault(_label(row), []).append((flops / row["least_bytes"], flops / row["median_s"] / 1e9))
    for index, (name, of_name) in enumerate(points.items()):
        axes.plot(*zip(*of_name, strict=True), "os^vDPX*"[index % 8], label=name)
    bandwidth, rates = peaks
    intensities = [x for of_name in points.values() for x, _ in of_name]
    for unit, rate in rates.items():
        ridge = rate / bandwidth
        ends = [min([*intensities, ridge]) / 2, ridge, max([*intensities, ridge]) * 2]
        roof = [min(rate, x * bandwidth) / 1e9 for x in ends]
        axes.loglog(ends, roof, label=f"{unit}: {rate / 1e9:.0f} GFLOP/s, memory: {bandwidth / 1e9:.0f} GB/s")
    axes.set_xlabel("operational intensity, FLOP / byte")
    axes.set_ylabel("GFLOP/s")
    first = measured[0]
    of = f"focal_modulation, {first['variant']}, batch {first['batch']}, {first['dtype']}"
    axes.set_title(f"{of}\n{device}", fontsize="medium")
    axes.legend(fontsize="small")
    return _save(figure, name_of("roofline", device))


def _operators(device: str) -> list[dict]:
    """Rows of focal_modulation, of one variant, batch and dtype: the first's."""
    everything = rows.read("operators", device) + rows.read("kernels", device)
    found = [row for row in everything if row["operator"].startswith("focal_modulation") and "median_s" in row]
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
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    has_memory = "peak_memory_bytes" in lines[0][0]
    figure, panels = _figure(width=9 if has_memory else 5, panels=2 if has_memory else 1)
    for line in lines:
        xs, runtime = [row["x"] for row in line], line[0]["runtime"]
        times = [row["median_s"] * 1e3 for row in line]
        panels[0].loglog(xs, times, "o-", label=f"{runtime}: power {fitted(line):.2f}")
        if has_memory:
            panels[1].semilogx(xs, [row["peak_memory_bytes"] / 1e6 for row in line], "o-", label=runtime)
    for axes, label in zip(panels, ("ms", "peak memory, MB"), strict=False):
        axes.set_xticks(xs, list(map(str, xs)))
        axes.minorticks_off()
        if axes.dataLim.ymax < 10 * axes.dataLim.ymin:  # powers of ten would leave the axis with one tick or none
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.set_xlabel(series)
        axes.set_ylabel(label)
        axes.legend()
    if has_memory:
        panels[1].set_ylim(bottom=0)
    figure.suptitle(f"{lines[0][0]['subject']}\n{device}", fontsize="medium")
    return _save(figure, name_of(f"growth {series}", device))


def _figure(width: float, panels: int = 1) -> tuple:
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "focalnet"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.5), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _save(figure, name: str) -> Path:
    PLOTS.mkdir(parents=True, exist_ok=True)
    path = PLOTS / name
    figure.savefig(path, metadata={"Date": None})
    return path
