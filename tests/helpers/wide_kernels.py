"""Calls a modulation with wide kernels in bfloat16 in every possible way, and prints a line after each call.

oneDNN's channels-last kernel never returns from some of these convolutions (`focalnet.onednn`). This is a script, so
that its caller can kill it. A line has the way, the error against float64, and the same error of transformers' module,
whose maps are NCHW. Whether the kernel returns depends on the map, the channels and the number of threads.
"""

import copy

import torch
from transformers import FocalNetConfig
from transformers.models.focalnet.modeling_focalnet import FocalNetModulation

import focalnet

THREADS = 2  # With one thread, the kernel returns on the second and third of these maps.
MAPS = ((1, 37, 64, 9), (3, 1, 64, 24), (1, 5, 64, 144))
CONFIG = FocalNetConfig(focal_windows=[15], focal_levels=[2])


def hooked(module):
    module.focal_layers[0][0].register_forward_hook(lambda *_: None)
    return module


def with_backend(module, backend):
    module.backend = backend
    return module


def under_autocast(module, image):
    with torch.autocast("cpu", torch.bfloat16):
        return hooked(module.float())(image.float())


def patched(module, image):
    theirs = FocalNetModulation(CONFIG, 0, module.dim).bfloat16().eval()
    theirs.load_state_dict(module.state_dict())
    focalnet.patch(theirs)
    return torch.compile(hooked(theirs))(image)


WAYS = {
    "reference": lambda module, image: with_backend(module, "reference")(image),
    "first backend": lambda module, image: module(image),
    "vmap": lambda module, image: torch.vmap(module)(image[None])[0],
    "module by module": lambda module, image: hooked(module)(image),
    "channels-last weights": lambda module, image: hooked(module).to(memory_format=torch.channels_last)(image),
    "autocast": under_autocast,
    "compiled": lambda module, image: torch.compile(hooked(module))(image),
    "patched and compiled": patched,
}
CASES = [(way, MAPS[0]) for way in WAYS] + [("reference", shape) for shape in MAPS[1:]]


def name_of(case):
    way, shape = case
    return f"{way}, {'x'.join(map(str, shape))}"


@torch.no_grad()
def errors(way, shape):
    torch.manual_seed(0)
    theirs = FocalNetModulation(CONFIG, 0, shape[-1]).bfloat16().eval()
    ours = focalnet.FocalModulation(shape[-1], focal_window=15, focal_level=2).bfloat16().eval()
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(shape).bfloat16()
    exact = copy.deepcopy(theirs).double()(image.double())
    return [(out - exact).abs().max().item() for out in (WAYS[way](ours, image), theirs(image))]


def main():
    torch.set_num_threads(THREADS)
    for case in CASES:
        print(name_of(case), *errors(*case), sep="; ", flush=True)


if __name__ == "__main__":
    main()
