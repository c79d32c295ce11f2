"""The page of `flashclient serve --ui`, and what it shows of the models and their weightd."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from flashclient.server.access import Access
from flashclient.server.hosted_model import HostedModel

FOLDER = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(api: FastAPI, models: Mapping[str, HostedModel], access: Access) -> None:
    """Adds the page. It needs no key; what it shows does."""
    for path, (name, kind) in FILES.items():
        api.add_api_route(path, _giver((FOLDER / name).read_bytes(), kind), methods=["GET"])

    async def state(request: Request) -> Response:
        access.check_key(request.headers)
        return JSONResponse(await run_in_threadpool(state_of, models))

    api.add_api_route("/ui/state", state, methods=["GET"])


def _giver(content: bytes, kind: str) -> Any:
    async def give() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return give


def state_of(models: Mapping[str, HostedModel]) -> dict[str, Any]:
    """Counts since the start, of which the page shows differences. Raises FlashClientError without a weightd."""
    daemon = next(iter(models.values())).client.loaded.connection.stats()
    of_daemon = {one.name: one for one in daemon.models}
    now_s = time.monotonic()
    told = []
    for name, model in models.items():
        scheduler, loaded, counted = model.scheduler, model.client.loaded, of_daemon.get(name)
        running, waiting = scheduler.load
        waits = dict(loaded.built.ffn.clock.layer_waits_s)
        told.append(
            {
                "name": name,
                "mode": loaded.mode,
                "at_s": now_s,
                "running": running,
                "waiting": waiting,
                "steps": scheduler.steps,
                "made_tokens": scheduler.made_tokens,
                "kept_tokens": scheduler.kept_tokens,
                "hits": 0 if counted is None else counted.hits,
                "misses": 0 if counted is None else counted.misses,
                "read_bytes": 0 if counted is None else counted.read_bytes,
                "layer_waits_s": [waits.get(layer, 0.0) for layer in range(len(loaded.record.layers))],
            }
        )
    names = ("dram_limit_bytes", "dram_pool_bytes", "dram_resident_bytes", "dram_tables_bytes")
    return {"models": told, "weightd": {name: getattr(daemon, name) for name in names}}
