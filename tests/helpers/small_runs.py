"""Training runs that take a second: two classes of coloured squares, and a model with a few thousand parameters."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from focalnet.cli.training import reader
from focalnet.training import Run, Settings, finetune
from focalnet.training.models import Start

CONFIG = {
    "patch_size": 4,
    "embed_dim": 8,
    "hidden_sizes": [16, 16],
    "depths": [1, 1],
    "focal_levels": [2, 1],
    "focal_windows": [3, 3],
    "encoder_stride": 8,
}
PLAIN = Settings(
    image_size=16,
    epochs=2,
    batch_size=8,
    learning_rate=3e-3,
    warmup_epochs=0.5,
    drop_path=0.0,
    label_smoothing=0.0,
    crop_scale=(1, 1),
    flip=0.0,
    crop_fraction=1.0,
    mask_patch_size=4,
    workers=0,
)
# All settings that draw random numbers or keep state.
EVERYTHING = PLAIN.but(
    accumulate=2,
    drop_path=0.3,
    ema=0.9,
    label_smoothing=0.1,
    mixup=0.8,
    cutmix=1.0,
    crop_scale=(0.3, 1.0),
    flip=0.5,
    rotate=10,
    randaugment=2,
    erase=0.25,
    layer_decay=0.8,
    save_steps=1,
)


def class_folders(root, classes=("blue", "red"), images=20, size=16):
    """``images`` noisy squares in the colour of each class."""
    rng = np.random.default_rng(0)
    colours = {"blue": (40, 40, 200), "red": (200, 40, 40), "green": (40, 200, 40)}
    for name in classes:
        (root / name).mkdir(parents=True)
        for index in range(images):
            pixels = rng.normal(colours.get(name, (99, 99, 99)), 60, (size, size, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:02d}.png")
    return root


def small_run(data, output, settings=PLAIN, **fields):
    start = fields.pop("start", Start(config=CONFIG))
    return Run(str(data), Path(output), settings, reader(), start, device="cpu", **fields)


def train(data, output, settings=PLAIN, task=finetune, events=None, **fields):
    return task(small_run(data, output, settings, **fields), events)


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
