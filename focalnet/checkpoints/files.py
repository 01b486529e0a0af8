"""Reads and writes files of tensors, safetensors and PyTorch's own. Reading never runs code from a file."""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from . import inert_pickle
from .training_files import Weights, choose, refuse_average

# The files that may hold the weights in a directory of transformers' format, in the order of preference.
IN_DIRECTORY = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
PICKLE_SUFFIXES = (".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)

_AGAIN = "fetch or copy the file again"


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of `read_weights`."""
    return read_weights(path).tensors


def read_weights(path: str | os.PathLike[str], use_ema: bool | None = None) -> Weights:
    """The state dict in a file, on the CPU. The file is safetensors (by content or suffix) or written by torch.save.

    Only the weights are read from a training script's file. Other objects in it are neither constructed nor imported.

    Args:
        path: the file.
        use_ema: which weights to read from a file that also holds their average over training; see
            `training_files.choose`.

    Raises:
        ValueError: the file is damaged, holds something other than a state dict, or tries to run code; the message
            names the file and says what to do.
        OSError: the file cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(64)
    _check_kind(path, start)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        refuse_average(str(path), use_ema)
        return Weights(_read_safetensors(path))
    return choose(_unpickle(path), str(path), use_ema)


def _check_kind(path: Path, start: bytes) -> None:
    if not start:
        raise ValueError(f"{path}: the file is empty; {_AGAIN}")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path}: this is a pointer of Git LFS, not the weights; run `git lfs pull` where it came from"
        )
    # A safetensors file may begin with "{" too, as the low byte of the header's length, but the high bytes are then 0.
    if path.suffix == ".json" or (start.lstrip().startswith(b"{") and b"\0" not in start[:8]):
        beside = [name for name in IN_DIRECTORY if (path.parent / name).is_file()]
        advice = f"pass its folder, {path.parent}" if beside else "pass the file of the weights, or a folder with both"
        raise ValueError(f"{path}: this is JSON, such as a configuration, and holds no weights; {advice}")


def read_directory(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of `weights_of_directory`."""
    return weights_of_directory(path).tensors


def weights_of_directory(path: str | os.PathLike[str], use_ema: bool | None = None) -> Weights:
    """The state dict of a directory as save_pretrained writes it, in one file or several.

    Raises:
        ValueError, OSError: as `read_weights`.
        FileNotFoundError: the directory has none of the known files.
    """
    path = Path(path)
    for name in IN_DIRECTORY:
        if (path / name).is_file():
            parts = [read_weights(part, use_ema) for part in parts_of(path / name)]
            tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
            return Weights(tensors, tuple({note: None for part in parts for note in part.notes}))
    raise FileNotFoundError(f"{path}: expected one of {', '.join(IN_DIRECTORY)} in this directory, found none")


def parts_of(path: Path) -> list[Path]:
    """The files that hold the tensors: ``path`` itself, or all files listed in it if it is an index."""
    if path.suffix != ".json":
        return [path]
    index = read_json(path).get("weight_map")
    # The names are untrusted input: they must not point outside this directory.
    if not isinstance(index, dict) or not all(isinstance(n, str) and n == Path(n).name for n in index.values()):
        raise ValueError(f'{path}: expected "weight_map" to map tensors to files in this directory; {_AGAIN}')
    return [path.parent / name for name in sorted(set(index.values()))]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. ValueError, naming the file, if the file holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}; {_AGAIN}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}; {_AGAIN}")
    return content


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], wrapper: str | None = None) -> Path:
    """Write a state dict as safetensors if ``path`` has that suffix, otherwise with torch.save. Returns the path.

    torch.save stores the tensors under the key ``wrapper``, if one is given. An existing file is replaced only when
    the new one is complete.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    own = _independent(tensors)
    try:
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(own, unfinished, metadata={"format": "pt"})
        else:
            torch.save(own if wrapper is None else {wrapper: own}, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses shared memory, and torch.save would write the whole storage for a view of a part.
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if not tensor.is_contiguous() or storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage().data_ptr())
        own[name] = tensor
    return own


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, ValueError, RuntimeError, OSError) as error:
        raise ValueError(
            f"{path}: expected a safetensors file, but it is damaged or cut off ({_brief(error)}); {_AGAIN}"
        ) from None


def _unpickle(path: Path) -> object:
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # torch warns about unusual pickles, but the error below is clearer
            try:
                return torch.load(file, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                # The file holds other objects besides tensors. TorchScript and tar files, which torch reads without an
                # unpickler, have raised other exceptions by now.
                file.seek(0)
                return torch.load(file, map_location="cpu", weights_only=False, pickle_module=inert_pickle)
    except inert_pickle.Hostile as error:
        raise ValueError(
            f"{path}: refused, since {error}, which malicious files use and files of weights do not need; "
            f"nothing of it was run. If you trust the file, save only its tensors where it was made: "
            f'torch.save({{"model": model.state_dict()}}, ...), or as safetensors'
        ) from None
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(
            f"{path}: expected a safetensors file, or tensors that torch.save wrote, but it is damaged, cut off or of "
            f"another kind ({_brief(error)}); {_AGAIN}, or save the state dict anew"
        ) from None


def _brief(error: Exception) -> str:
    """The first sentence of an error message, without the long advice that torch adds."""
    message = re.sub(r"(?s)\AWeights only load failed.*?WeightsUnpickler error:", "", str(error)).strip()
    return re.split(r"\n|\. ", message or type(error).__name__)[0].rstrip(".")[:200]
