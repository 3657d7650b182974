"""The outermost layer of the app: every request gets its id, every error an answer. Imports no torch."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foreword.serve.http.exchange import error_response, translated
from foreword.serve.watch.logs import REQUEST_ID, request_id


class Edge:
    """Gives each request its id (the client's, where it is plain), and an error that nothing else caught its answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        id = request_id(Headers(scope=scope).get("x-request-id"))
        header = (b"x-request-id", id.encode())
        token = REQUEST_ID.set(id)
        has_begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_begun
            if not has_begun:
                has_begun = True
                message["headers"] = [*message["headers"], header]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            known = translated(error)
            if not has_begun:
                await error_response(known)(scope, receive, send_with_id)
        finally:
            REQUEST_ID.reset(token)
