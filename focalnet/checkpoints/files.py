"""Files of tensors: safetensors and PyTorch's own, read without ever running code from them."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

# What training scripts wrap a state dict in, in the order of preference.
WRAPPERS = ("model", "state_dict")
# What a directory in transformers' format keeps its weights in, safetensors first.
IN_DIRECTORY = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
PICKLE_SUFFIXES = (".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)

_AGAIN = "fetch or copy the file again"


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU: safetensors by content or suffix, otherwise what torch.save wrote.

    Of a training script's file, its "model" or "state_dict" is taken and everything beside it ignored.

    Raises:
        ValueError: the file is damaged, holds something other than a state dict, or would run code when unpickled,
            which is refused; the message names the file and says what to do.
        OSError: the file cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise ValueError(f"{path}: the file is empty; {_AGAIN}")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path}: this is a pointer of Git LFS, not the weights; run `git lfs pull` where it came from"
        )
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _read_safetensors(path)
    return _state_dict(_unpickle(path), path)


def read_directory(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict of a directory as save_pretrained writes it, in one file or several.

    Raises:
        ValueError, OSError: as `read_tensors`; FileNotFoundError: none of the known files is there.
    """
    path = Path(path)
    for name in IN_DIRECTORY:
        if not (path / name).is_file():
            continue
        tensors: dict[str, Tensor] = {}
        for part in parts_of(path / name):
            tensors.update(read_tensors(part))
        return tensors
    raise FileNotFoundError(f"{path}: expected one of {', '.join(IN_DIRECTORY)} in this directory, found none")


def parts_of(path: Path) -> list[Path]:
    """The files that hold the tensors: ``path`` itself, or all that it lists if it is an index."""
    if path.suffix != ".json":
        return [path]
    index = read_json(path).get("weight_map")
    # The names come from outside: they may only point into this directory.
    if not isinstance(index, dict) or not all(isinstance(n, str) and n == Path(n).name for n in index.values()):
        raise ValueError(f'{path}: expected "weight_map" to map tensors to files in this directory; {_AGAIN}')
    return [path.parent / name for name in sorted(set(index.values()))]


def read_json(path: Path) -> dict:
    """A JSON object; ValueError, naming the file, if it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}; {_AGAIN}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}; {_AGAIN}")
    return content


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], wrapper: str | None = None) -> Path:
    """Write a state dict: safetensors for that suffix, otherwise torch.save, there under the key ``wrapper`` if any.

    An existing file is replaced only once the new one is complete.
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of unusual kinds: the error that follows says it
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged pickle raises is not to be foreseen
        if (asked := re.search(r"GLOBAL (\S+)", str(error))) is not None:
            raise ValueError(
                f"{path}: refused, since unpickling it would run code or build objects: it asks for "
                f"{asked.group(1)}. Only tensors and plain containers are read. If you trust the file, save its "
                f'tensors alone where it was made: torch.save({{"model": model.state_dict()}}, ...), or as safetensors'
            ) from None
        raise ValueError(
            f"{path}: expected a safetensors file, or tensors that torch.save wrote, but it is damaged, cut off, of "
            f"another kind, or a pickle that could run code, which is refused ({_brief(error)}); {_AGAIN}, or save "
            f"the state dict anew"
        ) from None


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict in what was unpickled, out of its wrapper."""
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if isinstance(content, Mapping) and content:
        strange = [
            name for name, value in content.items() if not isinstance(value, Tensor) or not isinstance(name, str)
        ]
        if not strange:
            return {name: tensor.detach() for name, tensor in content.items()}
        held = f"a dict with {', '.join(repr(name) for name in strange[:5])} that are not tensors"
    else:
        held = "an empty dict" if isinstance(content, Mapping) else type(content).__name__
    raise ValueError(
        f"{path}: expected a state dict, names to tensors, by itself or under "
        f"{' or '.join(repr(wrapper) for wrapper in WRAPPERS)}, got {held}; save that part alone and give its file"
    )


def _brief(error: Exception) -> str:
    """What an error says, without the pages of advice that torch puts around it."""
    message = re.sub(r"(?s)\AWeights only load failed.*?WeightsUnpickler error:", "", str(error)).strip()
    return re.split(r"\n|\. ", message or type(error).__name__)[0].rstrip(".")[:200]
