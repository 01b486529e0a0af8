"""Reads tests/data/golden: small random models of the authors' code and of timm, and the results of that code.

manifest.json holds the source and configuration of each model. Each safetensors file has ``param.NAME``, ``input``,
``output.I``, ``cotangent.I`` (the gradient passed to each output), and ``grad.NAME`` (always with ``grad.input``).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parents[1] / "data" / "golden"
MODELS = {entry["name"]: entry for entry in json.loads((FOLDER / "manifest.json").read_text())}


def tensors_of(name, part):
    """The tensors ``part.X`` of a model, by X."""
    stored = load_file(FOLDER / f"{name}.safetensors")
    return {key.removeprefix(f"{part}."): tensor for key, tensor in stored.items() if key.startswith(f"{part}.")}


def input_of(name):
    return load_file(FOLDER / f"{name}.safetensors")["input"]


def format_of(name):
    source = MODELS[name]["source"]
    return {"timm": "timm", "microsoft/FocalNet detection": "authors-detection"}.get(source, "authors")


def settings_of(name):
    """The settings that the weights do not determine and a user has to give."""
    config = MODELS[name]["config"]
    settings = {"normalize_modulator": config.get("normalize_modulator", False)}
    if format_of(name) != "timm":
        settings["use_post_layernorm"] = config.get("use_postln", False)
    if format_of(name) == "authors-detection" and config.get("use_conv_embed"):
        settings["stem_padding"] = 3  # in the authors' mmdet code; all other detectors have 2
    return settings


def write(name, folder):
    """Save the model's weights in the format of its source. Returns the path."""
    if format_of(name) == "timm":
        path = folder / f"{name}.safetensors"
        save_file(tensors_of(name, "param"), path)
    else:
        path = folder / f"{name}.pth"
        torch.save({"model": tensors_of(name, "param")}, path)
    return path
