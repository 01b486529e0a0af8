"""Recipes: named sets of a model and settings. Each is a small YAML file that gives the source of its numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from .settings import Settings

TASKS = ("finetune", "pretrain")
_KEYS = ("task", "source", "model", "config", "settings")


@dataclass(frozen=True)
class Recipe:
    """A model and its settings.

    ``model`` is the name of a published variant, or None if ``config``, fields of FocalNetConfig, defines the model.
    """

    name: str
    task: str
    source: str
    settings: Settings
    model: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


def recipe_names(task: str | None = None) -> list[str]:
    """The recipes that come with the package, those of one task or all."""
    found = sorted(
        path.name.removesuffix(".yaml") for path in files("focalnet.recipes").iterdir() if _is_yaml(path.name)
    )
    return found if task is None else [name for name in found if load_recipe(name).task == task]


def load_recipe(name_or_path: str) -> Recipe:
    """Load a recipe by name or from a .yaml file.

    Raises:
        ValueError: there is no such recipe, or it has an invalid entry; the message lists the valid ones.
    """
    path = Path(name_or_path).expanduser()
    if _is_yaml(path.name):
        if not path.is_file():
            raise ValueError(f"recipe {name_or_path}: no such file")
        return _parse(path.stem, path.read_text(encoding="utf-8"))
    resource = files("focalnet.recipes") / f"{name_or_path}.yaml"
    if not resource.is_file():
        raise ValueError(
            f"recipe {name_or_path}: expected one of {', '.join(recipe_names())}, or the path of a .yaml file"
        )
    return _parse(name_or_path, resource.read_text(encoding="utf-8"))


def _is_yaml(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _parse(name: str, text: str) -> Recipe:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {name}: not readable as YAML: {error}") from None
    if not isinstance(content, dict) or not set(content) <= set(_KEYS):
        raise ValueError(f"recipe {name}: expected a mapping with keys of {', '.join(_KEYS)}")
    if content.get("task") not in TASKS:
        raise ValueError(f"recipe {name}: task: expected one of {', '.join(TASKS)}, got {content.get('task')!r}")
    try:
        settings = Settings().but(**content.get("settings", {}))
    except ValueError as error:
        raise ValueError(f"recipe {name}: {error}") from None
    return Recipe(
        name=name,
        task=content["task"],
        source=" ".join(str(content.get("source", "")).split()),
        settings=settings,
        model=content.get("model"),
        config=content.get("config", {}),
    )
