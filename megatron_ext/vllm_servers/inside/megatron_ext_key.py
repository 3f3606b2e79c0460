"""For the interpreter of a vLLM server: every route asks for the key.

vLLM's own `--api-key` guards /v1 and a few more; the routes that replace weights (VLLM_SERVER_DEV_MODE=1) it leaves open to
whoever reaches the port. Standard library only:

    PYTHONPATH=<this folder> MEGATRON_EXT_VLLM_KEY=... python -m vllm.entrypoints.openai.api_server \\
        --middleware megatron_ext_key.KeyOnEveryRoute ...
"""

import hmac
import os

__all__ = ["KeyOnEveryRoute"]


class KeyOnEveryRoute:
    """ASGI middleware: 401 unless the header says `Authorization: Bearer <MEGATRON_EXT_VLLM_KEY>`; /health is open."""

    def __init__(self, app):
        self.app = app
        self.expected = b"Bearer " + os.environ["MEGATRON_EXT_VLLM_KEY"].encode()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] == "/health"):
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if scope["type"] == "http" and hmac.compare_digest(given, self.expected):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})
        else:
            await send({"type": "websocket.close", "code": 1008})
