"""The web server of the labelling page: a small JSON API over a `Session`.

    GET  /            the page                         GET  /api/next      the next item for a rater
    POST /api/answer  save an answer                   POST /api/skip, /api/undo, /api/revisit

Access: on 127.0.0.1, any user of this machine; the Host header must name localhost, which prevents DNS rebinding. On a
network, anyone with the token. Texts are sent as JSON and inserted as plain text, never as HTML.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, DispatchFunction, RequestResponseEndpoint
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from trl.errors import ConfigError, DataError, TrlError
from trl.label.session import Session
from trl.label.settings import LOCAL, ServerSettings
from trl.label.tasks import Item, text_of

PAGE = Path(__file__).parent / "page"
LONGEST_BODY = 1_000_000
LONGEST_NAME = 40

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


# ---- the API ----


def make_app(session: Session, settings: ServerSettings, token: str | None) -> Starlette:
    """The web application for a session."""
    api = _Api(session, settings)
    routes = [
        Route("/", _page),
        Route("/api/next", api.next),
        *(
            Route(f"/api/{name}", getattr(api, name), methods=["POST"])
            for name in ("answer", "skip", "undo", "revisit")
        ),
        Mount("/static", StaticFiles(directory=PAGE)),
    ]
    hosts = ["*"] if settings.share_on_lan else [LOCAL, "localhost"]
    guard = Middleware(BaseHTTPMiddleware, dispatch=_guard(token))
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts), guard]
    return Starlette(routes=routes, middleware=middleware, exception_handlers={TrlError: _refused})


async def _page(request: Request) -> Response:
    return Response((PAGE / "index.html").read_text(encoding="utf-8"), media_type="text/html")


async def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=400)


def _guard(token: str | None) -> DispatchFunction:
    """Middleware that requires the token, in a cookie that opening `/?token=…` sets, and adds `HEADERS` to all
    responses."""

    async def guarded(request: Request, call_next: RequestResponseEndpoint) -> Response:
        shown = request.cookies.get(_cookie(request), "")
        is_known = token is None or secrets.compare_digest(shown.encode(), token.encode())
        answer = await call_next(request) if is_known else _ask(request, token)
        answer.headers.update(HEADERS)
        return answer

    return guarded


def _ask(request: Request, token: str) -> Response:
    shown = request.query_params.get("token", "")
    if not secrets.compare_digest(shown.encode(), token.encode()):
        return PlainTextResponse("This page needs its token: open the address that trl label printed.", status_code=403)
    welcome = RedirectResponse("/", status_code=303)
    welcome.set_cookie(_cookie(request), token, httponly=True, samesite="strict", max_age=30 * 86400)
    return welcome


def _cookie(request: Request) -> str:
    """The name of the token's cookie, different for each port, because browsers share cookies between ports of a
    host."""
    return f"trl_label_{request.url.port or 80}"


class _Api:
    def __init__(self, session: Session, settings: ServerSettings) -> None:
        self.session, self.settings = session, settings

    async def next(self, request: Request) -> Response:
        return await self._next(_name(request.query_params.get("rater")))

    async def answer(self, request: Request) -> Response:
        given = await _body(request)
        rater = _name(given.get("rater"))
        item = self.session.items.get(str(given.get("item")))
        value = given.get("value")
        if self.session.task == "compare" and type(value) is int and item is not None:
            places = self.session.order(rater, item)
            value = places[value] if 0 <= value < len(places) else value
        await asyncio.to_thread(self.session.answer, rater, str(given.get("item")), value)
        return await self._next(rater)

    async def skip(self, request: Request) -> Response:
        given = await _body(request)
        rater = _name(given.get("rater"))
        await asyncio.to_thread(self.session.skip, rater, str(given.get("item")))
        return await self._next(rater)

    async def undo(self, request: Request) -> Response:
        rater = _name((await _body(request)).get("rater"))
        item, value = await asyncio.to_thread(self.session.undo, rater)
        if self.session.task == "compare" and type(value) is int:
            value = self.session.order(rater, item).index(value)
        return await self._answer(rater, item, before=value)

    async def revisit(self, request: Request) -> Response:
        rater = _name((await _body(request)).get("rater"))
        await asyncio.to_thread(self.session.revisit, rater)
        return await self._next(rater)

    async def _next(self, rater: str) -> Response:
        return await self._answer(rater, await asyncio.to_thread(self.session.next, rater))

    async def _answer(self, rater: str, item: Item | None, **more: Any) -> Response:
        progress = await asyncio.to_thread(self.session.progress, rater)
        shown = None if item is None else _shown(self.session, rater, item)
        facts = {"task": self.session.task, "live": self.session.live, "guidelines": self.settings.guidelines}
        return JSONResponse({"item": shown, "progress": asdict(progress), **facts, **more})


def _shown(session: Session, rater: str, item: Item) -> dict[str, Any]:
    completions = [item.completions[place] for place in session.order(rater, item)]
    shown = {"key": item.key, "prompt": item.prompt, "completions": completions}
    return {**shown, "text": text_of(item.completions[0])} if session.task == "correct" else shown


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object in a request. Requires the content type application/json, which forms on other sites cannot
    send."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise DataError("Send application/json.")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LONGEST_BODY:
            raise DataError(f"A request may have at most {LONGEST_BODY:,} bytes.")
    try:
        given = json.loads(body)
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise DataError("Send a JSON object.")
    return given


def _name(given: Any) -> str:
    name = given.strip() if isinstance(given, str) else ""
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise DataError(f"Give your name, in 1 to {LONGEST_NAME} printable characters.")
    return name


# ---- the server ----


class LabelServer:
    """Serves a session in a thread: `with LabelServer(session, settings) as server: print(server.url)`."""

    def __init__(self, session: Session, settings: ServerSettings) -> None:
        self.settings, self.token = settings, settings.with_token()
        self.socket = _listen(settings.host, settings.port)
        self.port = self.socket.getsockname()[1]
        app = make_app(session, settings, self.token)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=2
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self._serve, daemon=True, name="trl-label")

    def _serve(self) -> None:
        asyncio.run(self.server.serve(sockets=[self.socket]))

    @property
    def url(self) -> str:
        """The address on this machine, with the token if there is one."""
        return self._address("localhost" if self.token is None else LOCAL)

    @property
    def lan_url(self) -> str | None:
        """The address for other devices on the network; None without `share_on_lan`."""
        return self._address(_own_address()) if self.settings.share_on_lan else None

    def _address(self, host: str) -> str:
        return f"http://{host}:{self.port}/" + (f"?token={self.token}" if self.token else "")

    def __enter__(self) -> LabelServer:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=5)
        self.socket.close()


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError if the port is in use."""
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise ConfigError(
            f"port={port} cannot be used ({os.strerror(error.errno)}): give another, or 0 for a free one."
        ) from None


def _own_address() -> str:
    """This machine's address on the network. Connecting a UDP socket finds it without sending anything."""
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return socket.gethostname()
        return probe.getsockname()[0]
