"""The preprocessing used to evaluate the published models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import BaseImageProcessor

    from ..configuration import FocalNetConfig


def published_processor(
    config: FocalNetConfig,
    crop_fraction: float = 224 / 256,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> BaseImageProcessor:
    """An image processor that resizes, crops the centre and normalises.

    Args:
        config: its ``image_size`` is the size of the crop.
        crop_fraction: longer side of the crop divided by the shorter side of the resized image.
        mean: of each channel; None means ImageNet's.
        std: of each channel; None means ImageNet's.
    """
    import transformers
    from PIL import Image
    from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    from .patch_embeddings import as_pair

    height, width = as_pair(config.image_size)
    # Early versions 5 of transformers have the Pillow processor under the plain name.
    processor_class = getattr(transformers, "BitImageProcessorPil", None) or transformers.BitImageProcessor
    return processor_class(
        size={"shortest_edge": int(max(height, width) / crop_fraction)},
        crop_size={"height": height, "width": width},
        resample=Image.Resampling.BILINEAR,
        image_mean=list(mean or IMAGENET_DEFAULT_MEAN),
        image_std=list(std or IMAGENET_DEFAULT_STD),
    )
