"""The README's tables and the plots, made from the committed rows: `make report`.

    python bench/report.py

Each part of the README between <!-- report: NAME --> and <!-- end --> is written anew from bench/results/; plots go to
docs/plots/. A part whose rows are missing says so. Nothing here measures anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import rows
from scaling import fitted

from focalnet.benchmark.environment import ROOT

README = ROOT / "README.md"
PLOTS = ROOT / "docs" / "plots"
CPU = "AMD EPYC"

OURS = "focalnet"
HEADLINE = ("tiny_lrf", 224)
NAMES = {
    "focalnet": "focalnet",
    "transformers": "transformers",
    "transformers, compile": "transformers, `torch.compile`",
    "transformers, patched": "transformers, `focalnet.patch`",
    "timm": "timm",
    "timm, patched": "timm, `focalnet.patch`",
    "timm, channels-last, compile": "timm, channels-last, `torch.compile`",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}


def main() -> None:
    README.write_text(filled(README.read_text()))
    for path in (speedup_plot(), *scaling_plots()):
        print(path.relative_to(ROOT))


def filled(text: str) -> str:
    """``text`` with every marked part written anew."""

    def part(match: re.Match) -> str:
        return f"{match[1]}\n{PARTS[match[2]]()}\n{match[4]}"

    return re.sub(r"(<!-- report: ([\w-]+) -->)\n(.*?)\n?(<!-- end -->)", part, text, flags=re.S)


# ---- tables ---------------------------------------------------------------------------------------------------------


def headline() -> str:
    """The runtimes at the headline's image size, batch by batch."""
    chosen = [row for row in rows.read("models", CPU) if (row["variant"], row["size"]) == HEADLINE]
    return _runtime_table(chosen)


def training() -> str:
    """A training step, runtime by runtime."""
    return _runtime_table(rows.read("training", CPU))


def _runtime_table(chosen: list[dict]) -> str:
    if not chosen:
        return "Not measured yet."
    batches = sorted({row["batch"] for row in chosen})
    head = ["runtime", *[f for batch in batches for f in (f"batch {batch}, ms", "time over focalnet's", "memory, MB")]]
    lines = []
    for name, title in NAMES.items():
        found = [_find(chosen, runtime=name, batch=batch) for batch in batches]
        if any(found):
            lines.append(
                [title, *[f for batch, row in zip(batches, found, strict=True) for f in _cells(chosen, batch, row)]]
            )
    return _markdown(head, lines)


def _cells(chosen: list[dict], batch: int, row: dict | None) -> list[str]:
    if row is None:
        return ["", "", ""]
    ours = _find(chosen, runtime=OURS, batch=batch)
    times = f"{row['median_s'] * 1e3:.0f} / {row['fastest_s'] * 1e3:.0f}"
    return [times, f"{row['median_s'] / ours['median_s']:.2f}", f"{row['peak_memory_bytes'] / 1e6:.0f}"]


def ratios() -> str:
    """Every measured case: each runtime's time over focalnet's, and focalnet's share of the FMA peak."""
    measured = rows.read("models", CPU)
    cases = sorted({(row["variant"], row["size"], row["batch"]) for row in measured}, key=_order)
    present = [name for name in NAMES if name != OURS and any(row["runtime"] == name for row in measured)]
    head = ["variant", "image", "batch", "focalnet, ms", "of FMA peak", *[NAMES[name] for name in present]]
    # The best of all runs is the machine's: a run in a noisy moment measures less.
    peak = max((row["fma_peak"] for row in measured), default=0.0)
    lines = []
    for variant, size, batch in cases:
        of_case = [row for row in measured if (row["variant"], row["size"], row["batch"]) == (variant, size, batch)]
        ours = _find(of_case, runtime=OURS)
        found = [_find(of_case, runtime=name) for name in present]
        share = f"{ours['flops'] / ours['median_s'] / peak:.0%}"
        lines.append(
            [variant, str(size), str(batch), f"{ours['median_s'] * 1e3:.0f}", share]
            + [f"{row['median_s'] / ours['median_s']:.2f}" if row else "" for row in found]
        )
    return _markdown(head, lines) if lines else "Not measured yet."


def growth() -> str:
    """The fitted exponents."""
    lines = [
        [
            of_series[0]["series"],
            of_series[0]["subject"],
            f"{of_series[0]['x']} to {of_series[-1]['x']}",
            f"{fitted(of_series):.2f}",
        ]
        for of_series in _series(rows.read("scaling", CPU))
    ]
    return (
        _markdown(["what grows", "of", "range", "time grows with its power"], lines) if lines else "Not measured yet."
    )


PARTS: dict[str, Callable[[], str]] = {"headline": headline, "ratios": ratios, "training": training, "growth": growth}


def _order(case: tuple[str, int, int]) -> tuple:
    variant, size, batch = case
    return (["tiny", "small", "base", "large"].index(variant.split("_")[0]), variant, size, batch)


def _find(among: Iterable[dict], **wanted: object) -> dict | None:
    return next((row for row in among if all(row[name] == value for name, value in wanted.items())), None)


def _series(measured: list[dict]) -> list[list[dict]]:
    names = dict.fromkeys(row["series"] for row in measured)
    return [sorted((row for row in measured if row["series"] == name), key=lambda row: row["x"]) for name in names]


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])


# ---- plots ----------------------------------------------------------------------------------------------------------


def speedup_plot() -> Path:
    """Bars: how many times faster focalnet is than each runtime, case by case."""
    measured = rows.read("models", CPU)
    cases = sorted({(row["variant"], row["size"], row["batch"]) for row in measured}, key=_order)
    present = [name for name in NAMES if name != OURS and any(row["runtime"] == name for row in measured)]
    figure, axes = _figure(width=1.5 + 1.3 * len(cases))
    for place, name in enumerate(present):
        for position, (variant, size, batch) in enumerate(cases):
            case = {"variant": variant, "size": size, "batch": batch}
            ours, row = _find(measured, runtime=OURS, **case), _find(measured, runtime=name, **case)
            if row:
                x = position + (place - (len(present) - 1) / 2) * 0.8 / len(present)
                axes.bar(x, row["median_s"] / ours["median_s"], 0.8 / len(present), color=f"C{place}")
        axes.bar([0], [0], color=f"C{place}", label=NAMES[name].replace("`", ""))
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(cases)), [f"{variant}\n{size}, batch {batch}" for variant, size, batch in cases])
    axes.set_ylabel("time over focalnet's (higher: focalnet is faster)")
    axes.set_title(f"CPU inference, float32, {CPU}, 2 cores")
    figure.legend(loc="outside lower center", ncols=3)
    return _save(figure, "cpu-inference")


def scaling_plots() -> list[Path]:
    """Time against what grows, both axes logarithmic."""
    paths = []
    for of_series in _series(rows.read("scaling", CPU)):
        first = of_series[0]
        figure, axes = _figure(width=5)
        xs, ys = [row["x"] for row in of_series], [row["median_s"] * 1e3 for row in of_series]
        axes.loglog(xs, ys, "o-", label=f"{first['subject']}: power {fitted(of_series):.2f}")
        axes.set_xticks(xs, list(map(str, xs)))
        axes.minorticks_off()
        axes.set_xlabel(first["series"])
        axes.set_ylabel("ms")
        axes.legend()
        paths.append(_save(figure, f"scaling-{first['series'].replace(' ', '-')}"))
    return paths


def _figure(width: float) -> tuple:
    import matplotlib

    # The same rows give the same file, byte for byte.
    matplotlib.rcParams["svg.hashsalt"] = "focalnet"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.5), layout="constrained")
    return figure, figure.subplots()


def _save(figure, name: str) -> Path:
    PLOTS.mkdir(parents=True, exist_ok=True)
    path = PLOTS / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    return path


if __name__ == "__main__":
    main()
