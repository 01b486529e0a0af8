"""Registers an operator from a typed function. The schema is inferred from the function's signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def operator(function: Function) -> Function:
    """Register ``torch.ops.focalnet.<name of the function>``, which runs ``function`` on every device.

    The function must not write to its arguments or return views of them. Fake tensors and autograd are registered
    separately. autograd's ``needs_input_grad`` omits trailing arguments that are left at their defaults.
    """
    name = f"focalnet::{function.__name__}"
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "CompositeExplicitAutograd")(function)
    return function
