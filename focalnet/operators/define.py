"""Defining an operator from a typed function: its schema is the function's signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def operator(function: Function) -> Function:
    """Registers ``torch.ops.focalnet.<name of the function>``, which runs ``function`` on every device.

    No argument is written to, and no output is a view of one. Fake tensors and autograd are registered beside it. An
    argument at the end that is left at its default does not count among autograd's ``needs_input_grad``.
    """
    name = f"focalnet::{function.__name__}"
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "CompositeExplicitAutograd")(function)
    return function
