"""A model that the page looks into: for an image and a place in the network, answers, a map, and how long it took."""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .compute import backend_for
from .errors import UserError
from .explain import Explained, explain_pixels
from .images import Skipped
from .uploads import read_upload

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import BaseImageProcessor

    from ..models.modeling import FocalNetForImageClassification


@dataclass
class Looking:
    """A classifier with its processor. One image at a time: an inspection puts hooks on the model.

    Attributes:
        levels: the number of focal levels, by stage and block from 0.
        backend: the one asked for, or None.
    """

    name: str
    classifier: FocalNetForImageClassification
    processor: BaseImageProcessor
    backend: str | None = None
    levels: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        from ..inspection import places

        self._lock = threading.Lock()
        self.levels = []
        for (stage, _), (_, module) in places(self.classifier).items():
            focal_layers: Any = module.focal_layers
            if stage == len(self.levels):
                self.levels.append([])
            self.levels[stage].append(len(focal_layers))

    def at(self, path: Path, stage: int, block: int) -> tuple[Explained, float]:
        """The model's answers and maps for a file, and the milliseconds of a forward pass. ``block`` may be too large.

        Raises:
            UserError: the file is not taken; the message says why.
        """
        image = read_upload(path)
        stage = min(stage, len(self.levels) - 1)
        place = (stage, min(block, len(self.levels[stage]) - 1))
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        with self._lock, self._backend():
            milliseconds = self._time(pixels)
            explained = explain_pixels(self.classifier, self.processor, path, pixels, [place])
        if isinstance(explained, Skipped):
            raise UserError(explained.error)
        return explained, milliseconds

    def runs_on(self) -> str:
        """The backend of the operators, and the device."""
        from ..backends.registry import backends

        device: torch.device = self.classifier.device
        known = backends()
        order = ("triton", "cuda", "reference") if device.type == "cuda" else ("cpu", "reference")
        chosen = self.backend or next(name for name in order if known[name] is None)
        return f"backend {chosen} on {device}"

    def _backend(self) -> AbstractContextManager[Any]:
        return backend_for(self.backend)

    def _time(self, pixels: Tensor) -> float:
        import torch

        images = pixels[None].to(self.classifier.device, self.classifier.dtype)
        with torch.inference_mode():
            start = time.perf_counter()
            self.classifier(images).logits.float().sum().item()  # waits for the device
            return (time.perf_counter() - start) * 1e3
