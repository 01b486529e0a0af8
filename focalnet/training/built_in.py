"""Data that needs no download: the digits of scikit-learn, and patches of scikit-image's photographs."""

from __future__ import annotations

import io

import datasets
import numpy as np
from PIL import Image

PATCH = 64
"""Side in pixels of a patch of a photograph. Patches do not overlap."""

# Colour photographs that scikit-image's package contains, so that nothing is downloaded.
_PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")


def digits() -> datasets.Dataset:
    """The 1,797 scans of 8 x 8 pixels (UCI, "Optical Recognition of Handwritten Digits"), in scikit-learn's order."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    # Scale 0..16 to 8 bits, as in an image file: a model then sees the same pixels in files and in this data set.
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
        # Otherwise the smooth patches of one megapixel photograph would outnumber all patches of the others.
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
