"""``focalnet app``: a local page that shows what models look at."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .compute import Backend, Device, DType, InDType, OnDevice, device_for, torch_dtype
from .errors import UserError, complain
from .images import load_processor
from .labels import LabelsFile, use_labels
from .models import Fields, UseEma, Variant, load_classifier, parse_fields, silence_transformers
from .output import require_matplotlib

if TYPE_CHECKING:
    from ..models.modeling import FocalNetForImageClassification
    from .looking import Looking

DEFAULT_MODEL = "digits"
_MOST = 2


def app(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="A directory, a checkpoint file, a hub id, or digits (the default); give two to compare.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Other machines can reach the page only if it is not 127.0.0.1.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
    variant: Variant = None,
    fields: Fields = None,
    use_ema: UseEma = None,
    labels: LabelsFile = None,
    backend: Backend = None,
    device: OnDevice = Device.auto,
    dtype: InDType = DType.float32,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Serve a local page: drop or paste an image, see answers, gates and modulators, of one model or two.

    Uploaded files go to a temporary folder, which is removed when the command ends (Ctrl-C). The page needs no network
    and sends nothing anywhere. --variant, --set and the like hold for both models.
    """
    silence_transformers()
    _require_gradio()
    names = models or [DEFAULT_MODEL]
    if len(names) > _MOST:
        raise UserError(f"--model: expected one or two models, got {len(names)}")
    where = device_for(device, backend)
    if host not in ("127.0.0.1", "localhost", "::1"):
        complain("note", f"whoever can reach {host} can use the page: it has no password")
    with tempfile.TemporaryDirectory(prefix="focalnet-app-") as folder:
        _keep_to(Path(folder))
        looking = []
        for name in names:
            classifier = load_classifier(name, variant, parse_fields(fields), use_ema)
            use_labels(classifier.config, labels)
            classifier = classifier.to(device=where, dtype=torch_dtype(dtype, where))  # type: ignore[call-arg]  # wrapped
            looking.append(_looking_at(name, classifier, backend))
        _serve(looking, host, port, open_browser)


def _looking_at(name: str, classifier: FocalNetForImageClassification, backend: str | None) -> Looking:
    from .looking import Looking

    return Looking(name, classifier, load_processor(name, classifier.config), backend)


def _serve(looking: list[Looking], host: str, port: int, open_browser: bool) -> None:
    from .page import build, serve

    page = build(looking)
    try:
        address = serve(page, host, port)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there: {error}") from None
    typer.echo(address)
    if open_browser:
        import webbrowser

        webbrowser.open(address)
    page.block_thread()


def _keep_to(folder: Path) -> None:
    """Set what gradio and matplotlib read when they are imported: they write to ``folder`` only and report nothing."""
    os.environ.update(
        GRADIO_TEMP_DIR=str(folder),
        GRADIO_ANALYTICS_ENABLED="False",
        HF_HUB_DISABLE_TELEMETRY="1",
        DO_NOT_TRACK="1",
        MPLCONFIGDIR=str(folder),
        # With each event gradio asks matplotlib for its backend, which would look for fonts to find one.
        MPLBACKEND="agg",
    )
    for opens in ("GRADIO_ALLOWED_PATHS", "GRADIO_SHARE", "GRADIO_ROOT_PATH"):
        os.environ.pop(opens, None)


def _require_gradio() -> None:
    require_matplotlib()
    # Not imported before its environment is set.
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs gradio, which is not installed; pip install 'focalnet[app]'")
