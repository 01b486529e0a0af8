"""Tensors of 2^31 elements and more: no address wraps around.

Nothing is loaded or stored: the interpreter's loads and stores are replaced by ones that keep the addresses, so a
tensor can be as large as it likes.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from focalnet.kernels import gated_aggregation, modulator
from focalnet.kernels.gated_aggregation_bwd import Backward
from focalnet.kernels.launch_table import LevelConfig
from focalnet.kernels.plan import H100, Case
from triton.runtime import interpreter

# The last images of 4.3 million maps of 4 x 4 x 32: elements 2.2e9 and on.
LAST = 4_300_000
CASE = Case.packed(LAST + 2, 4, 4, 32, (3,), torch.bfloat16, has_bias=True, mask=(True,) * 6)
PACKED = replace(CASE, gradient_pitch=CASE.q_pitch)
LEVELS = LevelConfig(8, 32, rows=4, back_rows=4, whole_plane=True)


def addresses_of(launch, tensors, monkeypatch):
    """(loaded, stored): all addresses that the programs of a launch touch."""
    loaded, stored = [], []

    def load(builder, pointers, mask, other, *_):
        wanted, addresses = np.broadcast_arrays(mask.data, pointers.data)
        loaded.append(addresses[wanted])
        element = pointers.get_element_ty()
        return interpreter.TensorHandle(np.zeros(addresses.shape, interpreter._get_np_dtype(element)), element)

    def store(builder, pointers, value, mask, *_):
        wanted, addresses = np.broadcast_arrays(mask.data, pointers.data)
        stored.append(addresses[wanted])

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", load)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", store)
    arguments = {name: tensors[value] if isinstance(value, str) else value for name, value in launch.arguments.items()}
    launch.kernel[launch.grid](**arguments, **launch.constexprs, num_warps=launch.num_warps)
    return np.concatenate(loaded), np.concatenate(stored)


def elements_of_the_last_images(tensor, images, pitch, channels):
    """Addresses of the channels of every position of ``images`` images from LAST on."""
    positions = np.arange(LAST * CASE.positions, (LAST + images) * CASE.positions, dtype=np.uint64)
    elements = positions[:, None] * np.uint64(pitch) + np.arange(channels, dtype=np.uint64)
    assert elements.max() > 2**31
    return np.uint64(tensor.data_ptr()) + elements * np.uint64(tensor.itemsize)


def launches(case):
    """One of each kernel that takes tensors of all images, on two images or one."""
    groups = 1
    down, sums = Backward(case, H100, LEVELS, (True, True, True), 1).launches(LAST, 1, "agg", 0)
    return {
        "modulator_fwd_kernel": modulator.modulator_launch(case, H100, LAST, 2, "ieee"),
        "modulator_bwd_kernel": modulator.modulator_bwd_launch(case, H100, groups, LAST, 2, True, "ieee"),
        "gated_aggregation_fwd_kernel": gated_aggregation.forward_launches(case, H100, LEVELS, LAST, 1)[0][0],
        "gated_aggregation_bwd_kernel": down,
        "sum_partials_kernel": sums,
    }


TOUCHED = [
    ("modulator_fwd_kernel", 2, {"q": "q_pitch"}, {"out": "channels"}),
    ("modulator_bwd_kernel", 2, {"q": "q_pitch", "dout": "channels"}, {"dq": "dctx_pitch"}),
    ("gated_aggregation_fwd_kernel", 1, {"ctx": "ctx_pitch"}, {}),
    ("gated_aggregation_bwd_kernel", 1, {"ctx": "ctx_pitch"}, {"dctx": "dctx_pitch"}),
    ("sum_partials_kernel", 1, {}, {"dgates": "dgates_pitch"}),
]


@pytest.mark.parametrize(
    "case, kernel, images, loaded, stored",
    # dgates alone are fewer than 2^31.
    [(CASE, *touched) for touched in TOUCHED[:-1]] + [(PACKED, *touched) for touched in TOUCHED],
)
def test_no_offset_wraps_around(case, kernel, images, loaded, stored, monkeypatch):
    launch = launches(case)[kernel]
    floats = ("mean", "packed", "back_packed", "dfocal", "dgates_parts", "dbias_parts")
    tensors = {
        value: torch.empty(1, dtype=torch.float32 if value in floats else torch.bfloat16)
        for value in launch.arguments.values()
        if isinstance(value, str)
    }
    if kernel.startswith("modulator"):
        launch = replace(launch, grid=(-(-case.channels // launch.constexprs["BLOCK_N"]), 1, 1))
    touched = addresses_of(launch, tensors, monkeypatch)
    for found, wanted in zip(touched, (loaded, stored), strict=True):
        for name, pitch in wanted.items():
            columns = case.levels + 1 if name == "dgates" else case.channels
            expected = elements_of_the_last_images(tensors[name], images, getattr(case, pitch), columns)
            assert np.isin(expected, found).all(), f"{kernel} does not reach all of {name}"
