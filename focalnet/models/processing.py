"""The preprocessing that the published models were evaluated with."""

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
    """Resizes, and cuts out the centre, ``crop_fraction`` of the resized image's side; ImageNet's statistics, if none
    are given."""
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
