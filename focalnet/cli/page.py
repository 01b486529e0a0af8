"""The page of `focalnet app`, on Gradio: an image, and for each model its answers and a map over the image.

Nothing is kept between two events: each reads the uploaded file and runs the model again.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..pictures import html
from .errors import UserError
from .looking import Looking
from .uploads import MAX_BYTES

# The browser fetches nothing from elsewhere, whatever gradio's page asks for.
_POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"
_OPACITY = "(share) => { document.documentElement.style.setProperty('--fn-opacity', share); }"
_HEAD = """## What a FocalNet looks at
Gates choose how far context comes from, the modulator is what they let through. Drop an image, or paste one."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_UPLOADS_SECONDS = (60, 600)
"""How often old uploads are removed, and when they are old."""


def _upload() -> gr.Image:
    """An image component that gives the path of the uploaded file, unopened. It takes uploads only, no address."""
    image = gr.Image(
        sources=["upload", "clipboard"],
        image_mode=None,
        type="filepath",
        height=300,
        label="Image",
        elem_id="image",
    )
    # Not a class of its own: for each, gradio writes a file beside the module.
    move, async_move = image.move_resource_to_block_cache, image.async_move_resource_to_block_cache

    async def async_move_file(path: Any) -> str | None:
        return await async_move(_only_file(path))

    replaced = {
        "preprocess": lambda payload: None if payload is None else payload.path,
        "move_resource_to_block_cache": lambda path: move(_only_file(path)),
        "async_move_resource_to_block_cache": async_move_file,
    }
    for name, method in replaced.items():
        setattr(image, name, method)
    return image


def _only_file(path: Any) -> Any:
    if "://" in str(path):
        raise gr.Error("expected an uploaded file, got an address")
    return path


class _Policy:
    """Adds headers to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(sent: Message) -> None:
            if sent["type"] == "http.response.start":
                sent["headers"] = [
                    *sent.get("headers", []),
                    (b"content-security-policy", _POLICY),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(sent)

        await self.app(scope, receive, with_policy)


def build(models: list[Looking]) -> gr.Blocks:
    """The page with a column for each model."""
    with gr.Blocks(title="FocalNet", analytics_enabled=False, delete_cache=_UPLOADS_SECONDS, fill_width=True) as page:
        gr.Markdown(_HEAD)
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                upload = _upload()
                opacity = gr.Slider(0, 1, value=0.6, step=0.05, label="Opacity of the map", elem_id="opacity")
                opacity.input(None, opacity, None, js=_OPACITY, api_visibility="private")
            for index, model in enumerate(models):
                with gr.Column(scale=2, min_width=320, elem_id=f"model-{index}"):
                    _column(model, upload)
    page.queue(max_size=16, default_concurrency_limit=1)
    return page


def _column(model: Looking, upload: gr.Image) -> None:
    gr.Markdown(f"### {_plain(model.name)}")
    status = gr.Markdown(model.runs_on(), elem_classes="fn-status")
    answers = gr.HTML("", label="Answers")
    last = model.levels[-1]
    with gr.Row():
        stage = gr.Radio(_numbered(len(model.levels)), value=len(model.levels), label="Stage", elem_classes="fn-stage")
        block = gr.Radio(_numbered(len(last)), value=len(last), label="Block", elem_classes="fn-block")
    level = gr.Radio(_levels(last[-1]), value=last[-1] + 1, label="Map", elem_classes="fn-level")
    view = gr.HTML("")

    def look(path: str | None, stage: int, block: int, level: int) -> tuple[str, str, str]:
        if path is None:
            return model.runs_on(), "", ""
        try:
            explained, milliseconds = model.at(Path(path), stage - 1, block - 1)
        except UserError as error:
            return model.runs_on(), html.message(str(error)), ""
        (maps,) = explained.blocks
        chosen = min(level, maps.gates.shape[-1])
        status = f"{model.runs_on()}, {milliseconds:.3g} ms"
        return status, html.answers(explained.answers), html.view(explained.image, maps, chosen)

    def stage_chosen(path: str | None, stage: int, level: int) -> tuple[Any, ...]:
        depths = model.levels[stage - 1]
        levels = depths[-1]
        chosen = min(level, levels + 1)
        return (
            gr.Radio(_numbered(len(depths)), value=len(depths)),
            gr.Radio(_levels(levels), value=chosen),
            *look(path, stage, len(depths), chosen),
        )

    shown = [status, answers, view]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    gr.on(
        [upload.change, block.input, level.input], look, [upload, stage, block, level], shown,
        trigger_mode="always_last", **quiet,
    )  # fmt: skip
    stage.input(stage_chosen, [upload, stage, level], [block, level, *shown], **quiet)


def _numbered(count: int) -> list[tuple[str, int]]:
    return [(str(number), number) for number in range(1, count + 1)]


def _levels(levels: int) -> list[tuple[str, int]]:
    """Names and indices of the maps of a block: its gates, then the norm of its modulator."""
    return [(name, index) for index, name in enumerate([*html.map_names(levels), html.NORM])]


def _plain(text: str) -> str:
    """``text`` without anything that Markdown or HTML would read."""
    return "".join(
        character if character.isalnum() or character in " ./-" else f"&#{ord(character)};" for character in text
    )


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def serve(page: gr.Blocks, host: str, port: int) -> str:
    """Start to serve ``page`` in a thread and return its address.

    Raises:
        OSError: the port is taken, or the host is not of this machine.
    """
    middleware = [Middleware(_Policy)]
    if host in _LOOPBACK:
        # A name of another host that leads here is not ours, whoever made it so.
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"]))
    _, address, _ = page.launch(
        server_name=host,
        server_port=port or _free_port(host),
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=MAX_BYTES,
        allowed_paths=[],
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        run_history=False,
        footer_links=[],
        app_kwargs={"middleware": middleware, "docs_url": None, "redoc_url": None},
        # Fonts of the system: gradio's own would come from elsewhere.
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=html.STYLE,
        head=f"<script>{html.SCRIPT}</script>",
    )
    return address
