"""Selects the weights in a training script's file: the plain ones, or their average over training (EMA)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .inert_pickle import Inert

# Keys under which training scripts store a state dict, in the order of preference.
WRAPPERS = ("model", "state_dict")
# Keys of the exponential moving average of the weights; timm's come first, in its order.
AVERAGES = ("state_dict_ema", "model_ema", "ema_model", "ema_state_dict", "ema")
# Keys of the state dict inside an average that also stores its bookkeeping.
_INNER = ("module", "state_dict", "model")


@dataclass(frozen=True)
class Weights:
    """A state dict, and notes for the user about how it was chosen."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def choose(content: Any, source: str, use_ema: bool | None = None) -> Weights:
    """Select the state dict from the content of a file.

    Args:
        content: the unpickled object.
        source: the file, for messages.
        use_ema: True for the averaged weights, False for the plain ones, None for the averaged if there are any, as in
            timm.

    Raises:
        ValueError: there is no state dict, or not the one that ``use_ema`` requests.
    """
    plain, average = _candidates(content)
    if use_ema and average is None:
        raise ValueError(
            f"use_ema: expected averaged weights under {_either(AVERAGES)}, since True was given, {source} has "
            f"{_described(content)}; leave use_ema out"
        )
    if use_ema is False and average is not None and plain is None:
        raise ValueError(
            f"use_ema: False asks for plain weights, but {source} has only averaged ones, under {average!r}; "
            f"leave use_ema out"
        )
    if average is None or use_ema is False:
        notes = () if average is None else (f"took the plain weights under {plain!r}, not the average ({average!r})",)
        return Weights(_state_dict(content if plain is None else _unwrapped(content[plain]), source), notes)
    others = "the only weights there" if plain is None else f"not the plain ones under {plain!r} (use_ema=False does)"
    note = f"took the weights averaged over training (EMA) under {average!r}, {others}"
    return Weights(_state_dict(_unwrapped(content[average]), source), (note,))


def refuse_average(source: str, use_ema: bool | None) -> None:
    """Raise ValueError if ``use_ema`` is True: a safetensors file does not mark averaged weights."""
    if use_ema:
        raise ValueError(
            f"use_ema: expected a training script's file with averaged weights, since True was given, {source} has "
            f"one set of weights; leave use_ema out"
        )


def _candidates(content: object) -> tuple[str | None, str | None]:
    """The keys of the plain weights and of their average, each None if the file has none."""
    if not isinstance(content, Mapping):
        return None, None
    plain = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
    average = next((name for name in AVERAGES if _holds_tensors(content.get(name))), None)
    if plain == "state_dict" and average == "ema_state_dict" and _is_of_mmengine(content):
        return average, plain  # its EMAHook swaps the two when it saves
    return plain, average


def _is_of_mmengine(content: Mapping[Any, Any]) -> bool:
    meta = content.get("meta")
    return "message_hub" in content or (isinstance(meta, Mapping) and "mmengine_version" in meta)


def _holds_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(entry, Tensor) for entry in _unwrapped(value).values())


def _unwrapped(value: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """``value``, or the mapping inside it that holds the tensors."""
    inner = next((value[name] for name in _INNER if isinstance(value.get(name), Mapping)), None)
    return value if inner is None else inner


def _state_dict(content: object, source: str) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and content and not _not_tensors(content):
        return {name: tensor.detach() for name, tensor in content.items()}
    if isinstance(content, Inert):
        raise ValueError(
            f"{source}: holds an object of {content.names}, not its weights, and building it would run code; on a "
            f'machine with that class, save its state dict: torch.save({{"model": model.state_dict()}}, ...)'
        )
    raise ValueError(
        f"{source}: expected a state dict, names to tensors, by itself or under {_either((*WRAPPERS, *AVERAGES))}, "
        f"got {_described(content)}; save that part alone and give its file"
    )


def _described(content: object) -> str:
    if not isinstance(content, Mapping):
        return content.names if isinstance(content, Inert) else type(content).__name__
    if not content:
        return "an empty dict"
    strange = _not_tensors(content)
    if not strange:
        return "one state dict"
    shown = ", ".join(_entry(name, content[name]) for name in strange[:5])
    return f"a dict with {shown} that are not tensors"


def _not_tensors(content: Mapping[Any, Any]) -> list[object]:
    """The keys of all entries that do not belong in a state dict."""
    return [name for name, value in content.items() if not (isinstance(name, str) and isinstance(value, Tensor))]


def _entry(name: object, value: Any) -> str:
    return f"{name!r} (of {value.names})" if isinstance(value, Inert) else repr(name)


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(map(repr, names))
