"""A server of chat completions as OpenAI's API has them, on mlx-lm's: one model, one machine."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from typing import Any

from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.server import APIHandler, ResponseGenerator

from localrl.errors import ConfigError, LocalRLError
from localrl.serving.model import ServedModel
from localrl.serving.requests import Refused, error_body, read_body, read_request
from localrl.utils.hosts import is_loopback, is_own_origin, names_this_machine, own_names

CHAT = ("/v1/chat/completions", "/chat/completions")
SLOW_S = 60.0
"""Seconds after which a connection that says nothing is closed."""
LOOK_S = 0.5
"""Seconds between two looks at whether the model still answers."""
LEAST_LOGPROB = -9999.0
"""The API's number for a token that cannot be: JSON has no infinity."""


class ChatServer(ThreadingHTTPServer):
    """An HTTP server of one model, whose answers one thread generates in batches.

    Use it as a context manager; leaving it ends the generating thread.
    """

    daemon_threads = True

    def __init__(self, model: ServedModel, host: str, port: int) -> None:
        """Listen; port 0 takes a free one.

        Raises: ConfigError if the address cannot be used.
        """
        self.model = model
        self.own_names = own_names(host)
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), self._handle)
        except OSError as error:
            raise ConfigError(
                f"The model cannot be served on {host}, port {port}: {error.strerror or error}. "
                "Choose another --port; 0 takes a free one."
            ) from error
        self.generator = ResponseGenerator(model, LRUPromptCache(model.cli_args.prompt_cache_size))

    def server_close(self) -> None:
        """Stop listening and generating."""
        super().server_close()
        if hasattr(self, "generator"):
            self.generator.stop_and_join()

    @property
    def url(self) -> str:
        """Base address for clients."""
        host, port = self.server_address[:2]
        return f"http://{f'[{host!s}]' if ':' in str(host) else host!s}:{port}/v1"

    def _handle(self, *arguments: Any) -> ChatHandler:
        generator: Any = _Recording(self.generator)
        return ChatHandler(generator, *arguments, system_fingerprint="localrl")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away."""


def serve(model: ServedModel, host: str, port: int, tell: Callable[[str], None]) -> None:
    """Serve the model until Ctrl-C.

    Raises: ConfigError if the address cannot be used; LocalRLError if the model fails for good.
    """
    with ChatServer(model, host, port) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        if not is_loopback(host):
            tell(
                f"warning: whoever reaches {host} can use this model; there is no password. Leave "
                "out --host to serve this machine alone."
            )
        names = model.names
        shown = f"{names.adapter} (with the adapter), " if names.adapter else ""
        tell(f"{server.url}  models: {shown}{names.base} (the base); Ctrl-C ends it")
        try:
            pause = threading.Event()
            while server.generator.generation_available():
                pause.wait(LOOK_S)
            raise LocalRLError(
                "The model failed while it answered, most likely because memory ran out: ask for "
                "fewer tokens, or set --max-tokens lower. The reason is logged above."
            )
        except KeyboardInterrupt:
            tell("\nno longer served")
        finally:
            server.shutdown()


class _Recording:
    """mlx-lm's generator, for one request: it keeps the tokens of the answer."""

    def __init__(self, generator: ResponseGenerator) -> None:
        self._generator = generator
        self._tokens: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    def generate(self, *arguments: Any, **options: Any) -> tuple[Any, Iterator[Any]]:
        """Return the context of an answer, and its tokens as they come."""
        context, tokens = self._generator.generate(*arguments, **options)
        return context, self._kept(tokens)

    def take(self) -> list[Any]:
        """Return the tokens since the last call, without the one that ends the answer."""
        tokens, self._tokens = self._tokens, []
        return [token for token in tokens if token.finish_reason != "stop"]

    def _kept(self, tokens: Iterator[Any]) -> Iterator[Any]:
        for token in tokens:
            self._tokens.append(token)
            yield token


class ChatHandler(APIHandler):
    """mlx-lm's handler, for checked chat requests from this machine."""

    server: ChatServer  # pyright: ignore[reportIncompatibleVariableOverride]
    response_generator: _Recording  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = SLOW_S
    server_version, sys_version = "localrl", ""

    def parse_request(self) -> bool:
        """Read the request's head, and refuse one that was sent to another name or by a page of
        the web."""
        if not super().parse_request():
            return False
        names = self.server.own_names
        if not names_this_machine(self.headers.get("Host", ""), names):
            self._refuse("this server answers to its own name only", 421)
        elif not is_own_origin(self.headers.get("Origin"), names):
            self._refuse("pages of other sites are not answered", 403)
        else:
            return True
        return False

    def do_POST(self) -> None:
        """Answer a chat request."""
        try:
            if self.path not in CHAT:
                raise Refused(f"there is no {self.path!r:.80}; post to {CHAT[0]}", 404)
            body = read_request(read_body(self.headers, self.rfile), self.server.model.facts)
        except Refused as error:
            self._refuse(str(error), error.status)
            return
        data = json.dumps(body).encode()
        self.rfile = io.BytesIO(data)
        del self.headers["Content-Length"]
        self.headers["Content-Length"] = str(len(data))
        super().do_POST()

    def do_GET(self) -> None:
        """Answer with the models, or the server's health."""
        if self.path in ("/v1/models", "/models"):
            self.handle_models_request()
        elif self.path == "/health":
            self.handle_health_check()
        else:
            self._refuse(f"there is no {self.path!r:.80}", 404)

    def handle_models_request(self) -> None:
        """List the names of the model, and none of the Hub's cache."""
        entries = [
            {"id": name, "object": "model", "created": self.created, "owned_by": "localrl"}
            for name in self.server.model.names.all
        ]
        self._send({"object": "list", "data": entries}, HTTPStatus.OK)

    def generate_response(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Return a part of the answer, with log-probabilities in the API's form, which mlx-lm's are
        not, and while it is streamed too."""
        response = super().generate_response(*arguments, **options)
        choice = response["choices"][0]
        choice.pop("logprobs", None)
        tokens = self.response_generator.take()
        if self.logprobs:
            choice["logprobs"] = {"content": [self._logprob(token) for token in tokens]}
        return response

    def _logprob(self, token: Any) -> dict[str, Any]:
        entry = self._entry(token.token, token.logprob)
        entry["top_logprobs"] = [self._entry(top["id"], top["logprob"]) for top in token.top_tokens]
        return entry

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.server.model.tokenizer.text_of(token)
        return {
            "token": text,
            "bytes": list(text.encode()),
            "logprob": max(logprob, LEAST_LOGPROB),
        }

    def _refuse(self, message: str, status: int) -> None:
        self._send(error_body(message), status)

    def _send(self, value: Any, status: int) -> None:
        data = json.dumps(value).encode()
        self._set_completion_headers(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of single requests."""
