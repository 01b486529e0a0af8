"""The settings of a training run: one flat list, each checked by name."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Settings:
    """How to train. A recipe is a file of settings, and the command line overrides single ones.

    Attributes:
        epochs: passes over the training images.
        max_minutes: time after which a run ends early, to be resumed; None for no limit.
        batch_size: images in one pass of one process.
        accumulate: passes per optimizer step.
        learning_rate: peak rate of AdamW, for a global batch of ``learning_rate_batch`` images.
        learning_rate_batch: all three rates scale linearly from this batch size to the run's; None for no scaling.
        min_learning_rate: the rate at the end of the cosine that follows the warm-up.
        warmup_learning_rate: the rate at the start of the linear warm-up.
        warmup_epochs: length of the warm-up.
        weight_decay: AdamW's weight decay.
        betas: decay rates of AdamW's two moments.
        eps: term in the denominator of AdamW's update.
        clip: largest norm of the gradient; 0 for no clipping.
        layer_decay: factor of the rate for each block between a layer and the head; 1 for equal rates.
        image_size: side of the training images in pixels.
        drop_path: rate of stochastic depth.
        ema: decay of the averaged weights; 0 for no average.
        gradient_checkpointing: recompute blocks in backward to save memory.
        bf16: compute in bfloat16 and keep the weights in float32.
        label_smoothing: smoothing of the labels in the cross entropy.
        mixup: alpha of the Beta distribution; 0 for no mixup.
        cutmix: alpha of the Beta distribution; 0 for no CutMix.
        mix_probability: probability that a batch is mixed.
        cutmix_share: share of CutMix among mixed batches, if both methods are on.
        crop_scale: smallest and largest share of the area in a random crop; (1, 1) for the whole image.
        flip: probability of mirroring.
        rotate: largest rotation in degrees.
        shift: largest shift as a share of the side.
        zoom: smallest and largest factor.
        shear: largest shear in degrees.
        randaugment: number of RandAugment's operations; 0 for none.
        magnitude: strength of RandAugment's operations, out of 10.
        erase: probability that a rectangle is erased.
        crop_fraction: share of the resized image's side that the centre crop of an evaluation keeps; 1 for all.
        image_mean: mean of red, green and blue, for normalisation.
        image_std: standard deviation of red, green and blue, for normalisation.
        mask_ratio: share of the squares that are masked.
        mask_patch_size: side of these squares in pixels.
        seed: seed of all random numbers.
        workers: processes that prepare images.
        save_steps: steps between checkpoints; None for a checkpoint each epoch.
    """

    epochs: float = 30
    max_minutes: float | None = None
    batch_size: int = 64
    accumulate: int = 1
    learning_rate: float = 1e-3
    learning_rate_batch: int | None = None
    min_learning_rate: float = 1e-5
    warmup_learning_rate: float = 1e-6
    warmup_epochs: float = 2
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 5.0
    layer_decay: float = 1.0
    image_size: int = 224
    drop_path: float = 0.1
    ema: float = 0.0
    gradient_checkpointing: bool = False
    bf16: bool = False
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    cutmix_share: float = 0.5
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    rotate: float = 0.0
    shift: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0
    randaugment: int = 0
    magnitude: float = 9.0
    erase: float = 0.0
    crop_fraction: float = 0.875
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD
    mask_ratio: float = 0.6
    mask_patch_size: int = 32
    seed: int = 0
    workers: int = 2
    save_steps: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is invalid; the message names it, its value and the expected values."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, field.name, value)
            if field.name in _OPTIONAL and value is None:
                continue
            expectation, fits = _RULES[field.name]
            if not fits(value):
                raise ValueError(f"{field.name}: expected {expectation}, got {value!r}")

    def but(self, **changes: Any) -> Settings:
        """A copy with some settings replaced; None keeps the current value.

        Raises:
            ValueError: there is no such setting, or it is out of range.
        """
        names = [field.name for field in fields(self)]
        for name in changes:
            if name not in names:
                raise ValueError(f"{name}: no such setting; there are {', '.join(names)}")
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def rates(self, global_batch: int) -> tuple[float, float, float]:
        """The learning rates at the peak, at the end and at the start, for steps of ``global_batch`` images."""
        factor = 1.0 if self.learning_rate_batch is None else global_batch / self.learning_rate_batch
        return (
            self.learning_rate * factor,
            self.min_learning_rate * factor,
            self.warmup_learning_rate * factor,
        )


def parse_setting(text: str) -> tuple[str, Any]:
    """``"crop_scale=[0.5, 1]"`` -> ``("crop_scale", [0.5, 1])``.

    Raises:
        ValueError: there is no ``=``.
    """
    name, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"expected NAME=VALUE, got {text!r}")
    try:
        parsed = ast.literal_eval(value.strip().replace("true", "True").replace("false", "False"))
    except (ValueError, SyntaxError):
        parsed = value.strip()
    return name.strip(), parsed


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(expectation: str, fits: Callable[[float], bool]) -> tuple[str, Callable[[object], bool]]:
    return expectation, lambda value: _is_number(value) and fits(value)


def _numbers(count: int, expectation: str, fits: Callable[..., bool]) -> tuple[str, Callable[[object], bool]]:
    def check(value: object) -> bool:
        return isinstance(value, tuple) and len(value) == count and all(map(_is_number, value)) and fits(*value)

    return expectation, check


def _integer(least: int) -> tuple[str, Callable[[object], bool]]:
    return f"a whole number of at least {least}", lambda value: type(value) is int and value >= least


_ABOVE_0 = _number("a number above 0", lambda value: value > 0)
_FROM_0 = _number("a number of at least 0", lambda value: value >= 0)
_SHARE = _number("a number from 0 to 1", lambda value: 0 <= value <= 1)
_BELOW_1 = _number("a number from 0 to less than 1", lambda value: 0 <= value < 1)
_FLAG = ("true or false", lambda value: isinstance(value, bool))
_COLOUR = "three numbers above 0, one for each of red, green and blue"
_RANGE = "two numbers above 0, the smaller one first"

_OPTIONAL = ("max_minutes", "learning_rate_batch", "save_steps")
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "epochs": _ABOVE_0,
    "max_minutes": _ABOVE_0,
    "batch_size": _integer(1),
    "accumulate": _integer(1),
    "learning_rate": _ABOVE_0,
    "learning_rate_batch": _integer(1),
    "min_learning_rate": _FROM_0,
    "warmup_learning_rate": _FROM_0,
    "warmup_epochs": _FROM_0,
    "weight_decay": _FROM_0,
    "betas": _numbers(2, "two numbers from 0 to less than 1", lambda a, b: 0 <= a < 1 and 0 <= b < 1),
    "eps": _ABOVE_0,
    "clip": _FROM_0,
    "layer_decay": _number("a number above 0 and up to 1", lambda value: 0 < value <= 1),
    "image_size": _integer(1),
    "drop_path": _SHARE,
    "ema": _BELOW_1,
    "gradient_checkpointing": _FLAG,
    "bf16": _FLAG,
    "label_smoothing": _BELOW_1,
    "mixup": _FROM_0,
    "cutmix": _FROM_0,
    "mix_probability": _SHARE,
    "cutmix_share": _SHARE,
    "crop_scale": _numbers(2, f"{_RANGE}, up to 1", lambda low, high: 0 < low <= high <= 1),
    "flip": _SHARE,
    "rotate": _FROM_0,
    "shift": _BELOW_1,
    "zoom": _numbers(2, _RANGE, lambda low, high: 0 < low <= high),
    "shear": _FROM_0,
    "randaugment": _integer(0),
    "magnitude": _number("a number above 0 and below 10", lambda value: 0 < value < 10),
    "erase": _SHARE,
    "crop_fraction": _number("a number above 0 and up to 1", lambda value: 0 < value <= 1),
    "image_mean": _numbers(3, _COLOUR, lambda *values: min(values) >= 0),
    "image_std": _numbers(3, _COLOUR, lambda *values: min(values) > 0),
    "mask_ratio": _number("a number above 0 and below 1", lambda value: 0 < value < 1),
    "mask_patch_size": _integer(1),
    "seed": _integer(0),
    "workers": _integer(0),
    "save_steps": _integer(1),
}
