"""Data that needs no download: the digits of scikit-learn, and patches of scikit-image's photographs."""

from __future__ import annotations

import io

import datasets
import numpy as np
from PIL import Image

PATCH = 64
"""Side in pixels of a patch of a photograph; patches do not overlap."""

# Colour photographs that come inside scikit-image's package: no download.
_PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")


def digits() -> datasets.Dataset:
    """The 1,797 scans of 8 x 8 pixels (UCI, "Optical Recognition of Handwritten Digits"), in scikit-learn's order."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    # 0..16 to 8 bits: as a file would hold it, so that files and the data set are the same to a model.
    pixels = np.round(scans.images * (255 / 16)).astype(np.uint8)
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)]),
        }
    )
    rows = [_png(Image.fromarray(scan), f"digit-{index:04d}.png") for index, scan in enumerate(pixels)]
    return datasets.Dataset.from_dict({"image": rows, "label": scans.target.tolist()}, features=features)


def photographs() -> datasets.Dataset:
    """Patches of 64 x 64 pixels of the seven colour photographs in scikit-image, row by row, without labels."""
    from skimage import data

    rows = []
    for name in _PHOTOGRAPHS:
        picture = Image.fromarray(getattr(data, name)()).convert("RGB")
        # A megapixel photograph has more smooth patches than the others have patches at all.
        picture.thumbnail((768, 768))
        for top in range(0, picture.height - PATCH + 1, PATCH):
            for left in range(0, picture.width - PATCH + 1, PATCH):
                patch = picture.crop((left, top, left + PATCH, top + PATCH))
                rows.append(_png(patch, f"{name}-{top:04d}-{left:04d}.png"))
    return datasets.Dataset.from_dict(
        {"image": rows}, features=datasets.Features({"image": datasets.Image(decode=False)})
    )


def _png(image: Image.Image, name: str) -> dict[str, object]:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": name}


BUILT_IN = {"digits": digits, "photographs": photographs}
