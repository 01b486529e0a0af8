"""Writes the tables of docs/performance.md and the plots from the committed rows: `make report`.

    python bench/report.py

Every part of the page between <!-- report: NAME --> and <!-- end --> is written anew from bench/results/. A part
without rows says so. Plots go to docs/plots/; those without rows are deleted. Nothing is measured here. Every table
and plot of measured figures names the processor.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from itertools import groupby

import gpu_tables
import learning_curves
import page
import plots
from learning_curves import Curve, curves
from plots import OURS, order, ratio_of
from scaling import fitted

from focalnet.benchmark import rows
from focalnet.benchmark.environment import ROOT

sys.path.append(str(ROOT / "bench" / "static"))
import predicted_calls
import predicted_tables

PAGE = ROOT / "docs" / "performance.md"
MISSING = "Not measured yet."

# The kinds of rows that plots show.
DRAWN = ("models", "operators", "kernels", "scaling", "learning")
HEADLINE = ("tiny_lrf", 224)
NAMES = {
    "focalnet": "focalnet",
    "focalnet, compile": "focalnet, `torch.compile`",
    "focalnet, max-autotune": "focalnet, `torch.compile`, max-autotune",
    "focalnet, reference": "focalnet, plain PyTorch",
    "focalnet, reference, compile": "focalnet, plain PyTorch, `torch.compile`",
    "focalnet, reference, max-autotune": "focalnet, plain PyTorch, `torch.compile`, max-autotune",
    "focalnet, without CPU kernels": "focalnet, where there are no CPU kernels (as on a GPU)",
    "transformers": "transformers",
    "transformers, compile": "transformers, `torch.compile`",
    "transformers, max-autotune": "transformers, `torch.compile`, max-autotune",
    "transformers, patched": "transformers, `focalnet.patch`",
    "timm": "timm",
    "timm, compile": "timm, `torch.compile`",
    "timm, max-autotune": "timm, `torch.compile`, max-autotune",
    "timm, channels-last": "timm, channels-last",
    "timm, channels-last, compile": "timm, channels-last, `torch.compile`",
    "timm, channels-last, max-autotune": "timm, channels-last, `torch.compile`, max-autotune",
    "timm, patched": "timm, `focalnet.patch`",
    "onnxruntime": "ONNX Runtime",
    "onnxruntime, int8": "ONNX Runtime, int8 (dynamic)",
    "openvino": "OpenVINO, float32",
    "openvino, int8": "OpenVINO, int8 (NNCF)",
    "openvino, default": "OpenVINO, default precision",
}
ARCHITECTURES = {
    "focalnet": "FocalNet-T LRF, focalnet",
    "transformers": "FocalNet-T LRF, transformers",
    "Swin-T": "Swin-T, transformers",
    "ConvNeXt-T": "ConvNeXt-T, transformers",
    "ViT-S": "ViT-S, transformers",
}


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text()))
    devices = {device for kind in DRAWN for device in rows.devices(kind)}
    drawn = [path for device in sorted(devices) for path in plots.all_of(device)]
    for path in drawn:
        print(path.relative_to(ROOT))
    for path in set(plots.PLOTS.glob("*.svg")) - set(drawn):
        path.unlink()


def filled(text: str) -> str:
    """``text`` with every marked part written anew."""

    def part(match: re.Match) -> str:
        return f"{match[1]}\n{PARTS[match[2]]()}\n{match[4]}"

    return re.sub(r"(<!-- report: ([\w-]+) -->)\n(.*?)\n?(<!-- end -->)", part, text, flags=re.S)


# ---- time and memory of models --------------------------------------------------------------------------------------


def headline(device: str) -> str:
    """The runtimes at the headline's image size, batch by batch."""
    return _headline("models", device)


def bfloat16(device: str) -> str:
    """The same in bfloat16, beside OpenVINO in its default precision."""
    return _headline("models-bfloat16", device)


def _headline(kind: str, device: str) -> str:
    return _runtime_table([row for row in rows.read(kind, device) if (row["variant"], row["size"]) == HEADLINE])


def shared_cores(device: str) -> str:
    """Inference on cores that another process uses too."""
    head = ["runtime", "quiet, ms", "beside a process, ms", "over quiet", "95th percentile", "two processes"]
    lines = [
        [NAMES[row["runtime"]], f"{row['quiet_s'] * 1e3:.0f}", f"{row['loaded_s'] * 1e3:.0f}"]
        + [f"{row[name]:.2f}" for name in ("loaded_ratio", "loaded_p95_ratio", "two_share")]
        for row in rows.read("shared_cores", device)
    ]
    return page.table(head, lines)


def training(device: str) -> str:
    """A training step, runtime by runtime, in float32 and under autocast to bfloat16."""
    kinds = {"float32": "training", "bfloat16 by autocast": "training-bfloat16"}
    found = {name: rows.read(kind, device) for name, kind in kinds.items()}
    return "\n\n".join(f"{name}:\n\n{_runtime_table(made)}" for name, made in found.items() if made)


def architectures(device: str) -> str:
    """Other networks of this size, with what they hold and compute."""
    measured = [row for row in rows.read("architectures", device) if row["case"] == "inference"]
    return _runtime_table(measured, ARCHITECTURES, _size)


def _size(row: dict) -> dict[str, str]:
    return {"M parameters": f"{row['parameters'] / 1e6:.1f}", "GFLOP": f"{row['flops'] / row['batch'] / 1e9:.1f}"}


def gpu() -> str:
    """Models and training steps on every device that has a driver."""
    parts = []
    for kind, title in (("models", "inference"), ("training", "a training step")):
        for device in rows.devices(kind):
            measured = [row for row in rows.read(kind, device) if "driver" in row]
            for (variant, size, dtype), of_case in groupby(measured, lambda row: _of(row, "variant", "size", "dtype")):
                parts.append(
                    f"{device}, {variant}, {size} x {size}, {dtype}, {title}:\n\n{_runtime_table(list(of_case))}"
                )
            if measured and kind == "models":
                bars = f"Bars: the time of other runtimes over focalnet's, {device}"
                parts.append(_image(bars, "inference", device).strip())
    return "\n\n".join(parts) or gpu_tables.MISSING


def _runtime_table(
    chosen: list[dict], names: dict[str, str] = NAMES, facts: Callable[[dict], dict[str, str]] = lambda row: {}
) -> str:
    """A line for each runtime; time, ratio and memory for each batch, and the model's share where a row has it."""
    batches = sorted({row["batch"] for row in chosen})
    memory = ["memory, MB", *(["of it the model's, MB"] if _have_model_memory(chosen) else [])]
    per_batch = [f for batch in batches for f in (f"batch {batch}, ms", "time over focalnet's", *memory)]
    head = ["runtime" if names is NAMES else "network", *facts(chosen[0]), *per_batch]
    lines = []
    for name, title in names.items():
        found = [_find(chosen, runtime=name, batch=batch) for batch in batches]
        if any(found):
            cells = [cell for batch, row in zip(batches, found, strict=True) for cell in _cells(chosen, batch, row)]
            lines.append([title, *facts(next(filter(None, found))).values(), *cells])
    return page.table(head, lines)


def _have_model_memory(chosen: list[dict]) -> bool:
    return any(row.get("model_memory_bytes") is not None for row in chosen)


def _cells(chosen: list[dict], batch: int, row: dict | None) -> list[str]:
    memory = ["peak_memory_bytes", *(["model_memory_bytes"] if _have_model_memory(chosen) else [])]
    if row is None:
        return ["", "", *("" for _ in memory)]
    ours = _find(chosen, runtime=OURS, batch=batch)
    times = f"{_milliseconds(row['median_s'])} / {_milliseconds(row['fastest_s'])}"
    megabytes = [f"{row[name] / 1e6:.0f}" if row.get(name) is not None else "" for name in memory]
    return [times, f"{ratio_of(row, ours):.2f}", *megabytes]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.{1 if seconds < 0.02 else 0}f}"


def ratios(device: str) -> str:
    """Every measured case: each runtime's time over focalnet's, and focalnet's share of the peak."""
    title = f"Bars: the time of other runtimes over focalnet's, {device}"
    return _ratios("models", device) + _image(title, "inference", device)


def bfloat16_ratios(device: str) -> str:
    """The same in bfloat16."""
    return _ratios("models-bfloat16", device)


def _ratios(kind: str, device: str) -> str:
    measured = rows.read(kind, device)
    cases = sorted({_of(row, "variant", "size", "batch") for row in measured}, key=order)
    present = [name for name in NAMES if name != OURS and any(row["runtime"] == name for row in measured)]
    head = ["variant", "image", "batch", "focalnet, ms", "of peak", *[NAMES[name] for name in present]]
    # The best of all runs is the machine's: a run in a noisy moment measures less.
    peak = max(row["fma_peak"] for row in measured)
    lines = []
    for variant, size, batch in cases:
        case = {"variant": variant, "size": size, "batch": batch}
        ours = _find(measured, runtime=OURS, **case)
        found = [_find(measured, runtime=name, **case) for name in present]
        share = f"{ours['flops'] / ours['median_s'] / peak:.0%}"
        lines.append(
            [variant, str(size), str(batch), f"{ours['median_s'] * 1e3:.0f}", share]
            + [f"{ratio_of(row, ours):.2f}" if row else "" for row in found]
        )
    return page.table(head, lines)


# ---- the operator, growth, counters ---------------------------------------------------------------------------------


def operators(device: str) -> str:
    """The operator stage by stage, with its floor."""
    measured = rows.read("operators", device)
    names = list(dict.fromkeys(row["backend"] for row in measured))
    ours, reference = names[0], names[-1]
    head = ["H x W x C", "", "floor, ms", *[f"{name}, ms" for name in names], f"{reference} over {ours}"]
    lines = []
    for (stage, case), of_stage in groupby(measured, key=lambda row: _of(row, "stage", "case")):
        by_backend = {row["backend"]: row for row in of_stage}
        times = [f"{by_backend[name]['median_s'] * 1e3:.1f}" for name in names]
        floor, ratio = by_backend[ours]["floor_s"], by_backend[reference]["ratio"]
        lines.append([stage, case, f"{floor * 1e3:.1f}", *times, f"{ratio:.2f}"])
    return page.table(head, lines) + _image(f"Roofline of the operator's stages, {device}", "roofline", device)


def growth(device: str) -> str:
    """The fitted exponents, and plots of time and memory."""
    grown = plots.lines_of(device)
    lines = []
    for line in grown:
        first, last = line[0], line[-1]
        memory = ""
        if "peak_memory_bytes" in first:
            memory = f"{first['peak_memory_bytes'] / 1e6:.0f} to {last['peak_memory_bytes'] / 1e6:.0f}"
        of = _of(first, "series", "subject", "runtime")
        lines.append([*of, f"{first['x']} to {last['x']}", f"{fitted(line):.2f}", memory])
    head = ["what grows", "of", "runtime", "range", "power p of time", "peak memory, MB"]
    series = dict.fromkeys(line[0]["series"] for line in grown)
    images = [_image(f"Cost against {name}, {device}", f"growth {name}", device) for name in series]
    return page.table(head, lines) + "".join(images)


def counters() -> str:
    """What no machine changes: operators, bytes moved, bytes kept for backward."""
    counted = rows.read("counters", rows.NOWHERE)
    if not counted:
        return MISSING
    head = ["runtime", "operators", "MB moved per image", "MB saved for backward per image"]
    lines = [
        [NAMES[row["runtime"]], str(row["operators"])]
        + [f"{row[name] / 1e6:.1f}" for name in ("bytes_per_image", "saved_bytes_per_image")]
        for row in counted
    ]
    return page.table(head, lines)


# ---- learning -------------------------------------------------------------------------------------------------------

LEVEL = 0.95


def learning(device: str) -> str:
    """Small networks of equal cost: accuracy, and epochs and seconds until most scans are read."""
    head = ["network", "thousand parameters", "MFLOP an image", "seeds", "step, ms", "accuracy, mean (range), percent"]
    head += [f"epochs to {LEVEL:.0%}", f"seconds to {LEVEL:.0%}"]
    lines = []
    for curve in curves(device, learning_curves.ALL):
        row, epochs = curve.row, curve.epochs_to(LEVEL)
        step = "" if curve.epoch_s is None else f"{curve.epoch_s / (row['images'] // row['batch']) * 1e3:.1f}"
        seconds = "" if epochs is None or curve.epoch_s is None else f"{epochs * curve.epoch_s:.0f}"
        sizes = [f"{row['parameters'] / 1e3:.0f}", f"{row['flops'] / 1e6:.2f}", str(len(curve.accuracies))]
        reached = "" if epochs is None else str(epochs)
        lines.append([learning_curves.NAMES[curve.network], *sizes, step, _percent(curve), reached, seconds])
    return page.table(head, lines) + _image(f"Accuracy against epochs and seconds, {device}", "learning", device)


def pretraining(device: str) -> str:
    """Few labels, from scratch and after pre-training, and the difference of the means."""
    after = {curve.network: curve for curve in curves(device, learning_curves.PRETRAINED)}
    lines = []
    for scratch in curves(device, learning_curves.FEW):
        if (pretrained := after.get(scratch.network)) is None:
            continue
        gain = f"{100 * (pretrained.mean[-1] - scratch.mean[-1]):+.1f}"
        name, seeds = learning_curves.NAMES[scratch.network], str(len(scratch.accuracies))
        lines.append([name, seeds, _percent(scratch), _percent(pretrained), gain])
    head = ["network", "seeds", "from scratch, mean (range), percent", "after SimMIM", "difference"]
    return page.table(head, lines) + _image(f"Accuracy with few labels, {device}", "pre-training", device)


def _percent(curve: Curve) -> str:
    return f"{100 * curve.mean[-1]:.1f} ({100 * curve.lowest[-1]:.1f} to {100 * curve.highest[-1]:.1f})"


def waiting_for_data(device: str) -> str:
    """What a first epoch waits for images."""
    head = ["images a step", "workers", "steps", "waited, s", "of, s", "share", "after the first batch"]
    head += ["images/s in training", "images/s of the loader alone"]
    lines = [
        [str(row[name]) for name in ("batch", "workers", "steps")]
        + [f"{row['waited_s']:.2f}", f"{row['total_s']:.1f}", f"{row['share']:.1%}", f"{row['share_after_first']:.1%}"]
        + [f"{row['images_per_s']:.1f}", f"{row['images_per_s_alone']:.0f}"]
        for row in rows.read("waiting_for_data", device)
    ]
    return page.table(head, lines)


def _on_each(kind: str, part: Callable[[str], str]) -> Callable[[], str]:
    """``part`` for every processor that has rows of ``kind``, under the processor's name."""

    def whole() -> str:
        return "\n\n".join(f"{device}:\n\n{part(device)}" for device in rows.processors(kind)) or MISSING

    return whole


PARTS: dict[str, Callable[[], str]] = {
    "headline": _on_each("models", headline),
    "ratios": _on_each("models", ratios),
    "bfloat16-ratios": _on_each("models-bfloat16", bfloat16_ratios),
    "bfloat16": _on_each("models-bfloat16", bfloat16),
    "shared-cores": _on_each("shared_cores", shared_cores),
    "training": _on_each("training", training),
    "architectures": _on_each("architectures", architectures),
    "learning": _on_each("learning", learning),
    "pre-training": _on_each("learning", pretraining),
    "waiting-for-data": _on_each("waiting_for_data", waiting_for_data),
    "operators": _on_each("operators", operators),
    "growth": _on_each("scaling", growth),
    "counters": counters,
    "gpu": gpu,
    "gpu-operators": gpu_tables.operators,
    "gpu-kernels": gpu_tables.kernels,
    "predicted": predicted_calls.page,
    "predicted-gpus": predicted_tables.of_gpus,
}


def _of(row: dict, *names: str) -> tuple:
    return tuple(row[name] for name in names)


def _find(among: Iterable[dict], **wanted: object) -> dict | None:
    return next((row for row in among if all(row[name] == value for name, value in wanted.items())), None)


def _image(text: str, what: str, device: str) -> str:
    return f"\n\n![{text}](plots/{plots.name_of(what, device)})"


if __name__ == "__main__":
    main()
