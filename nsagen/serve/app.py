"""The endpoints, with FastAPI: completions, chat, models and health."""

from __future__ import annotations  # FastAPI reads the endpoints' annotations from this module

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from nsagen.core.errors import InvalidInputError
from nsagen.model.requests import Request as BatchRequest
from nsagen.model.requests import TooLongError
from nsagen.serve.answers import Call, Piece, sampling_of
from nsagen.serve.engine import Busy, Engine, Failed, Stopped
from nsagen.serve.protocol import ChatRequest, CompletionRequest, SamplingFields
from nsagen.serve.text import Tokenizer

_log = logging.getLogger("nsagen.serve")

DONE = "data: [DONE]\n\n"


class NoModel(Exception):
    """A request names another model."""


def make_app(engine: Engine, tokenizer: Tokenizer, name: str) -> FastAPI:
    """The application; the engine runs as long as it does.

    Args:
        name: of the model, which requests must give.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()

    # No pages of documentation: theirs fetch scripts from elsewhere.
    app = FastAPI(title="nsagen serve", lifespan=lifespan, docs_url=None, redoc_url=None)
    server = _Server(engine, tokenizer, name, int(time.time()))
    for kind, status in _STATUS.items():
        app.add_exception_handler(kind, _handler(status))
    app.add_exception_handler(HTTPException, _from_framework)

    @app.get("/health")
    async def health() -> JSONResponse:
        content = {"running": engine.running, "waiting": engine.waiting}
        if engine.stopping:
            return JSONResponse({"status": "stopping", **content}, 503)
        return JSONResponse({"status": "ok", **content})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [server.card]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        server.check_model(model)
        return server.card

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        server.check_model(body.model)
        requests = await _aside(server.completion, body)
        return await server.answer(requests, _Completion(name), body, request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        server.check_model(body.model)
        requests = await _aside(server.chat, body)
        return await server.answer(requests, _Chat(name), body, request)

    return app


async def _aside(work: Callable[[Any], Any], given: Any) -> Any:
    """Work in a thread: a long prompt becomes tokens while other requests are answered."""
    return await to_thread.run_sync(work, given, abandon_on_cancel=True)


@dataclass(frozen=True)
class _Server:
    engine: Engine
    tokenizer: Tokenizer
    name: str
    created: int

    @property
    def card(self) -> dict[str, Any]:
        owner = {"created": self.created, "owned_by": "nsagen"}
        return {"id": self.name, "object": "model", **owner}

    def check_model(self, model: str) -> None:
        if model != self.name:
            raise NoModel(f"model: must be {self.name!r}; got {model!r}; see /v1/models")

    def completion(self, body: CompletionRequest) -> list[BatchRequest]:
        """A completion's requests, one for each prompt."""
        prompts = [p if isinstance(p, list) else self._tokens(p) for p in body.prompts]
        return self._checked(body, prompts, body.max_tokens or 16)

    def chat(self, body: ChatRequest) -> list[BatchRequest]:
        """A chat's only request."""
        said = [message.said for message in body.messages]
        for message in said:
            _check_text("messages", message["content"])
        prompt = self.tokenizer.chat(said)
        left = max(1, self.engine.batch.limits.longest - len(prompt))  # so a longer is refused
        return self._checked(body, [prompt], body.limit or left)

    def _tokens(self, prompt: str) -> list[int]:
        _check_text("prompt", prompt)
        return self.tokenizer.encode(prompt)

    def _checked(
        self, body: SamplingFields, prompts: list[list[int]], limit: int
    ) -> list[BatchRequest]:
        for stop in body.stops:
            _check_text("stop", stop)
        sampling, batch = sampling_of(body), self.engine.batch
        options: dict[str, Any] = {"max_new_tokens": limit, "sampling": sampling}
        options["drafter"] = self.engine.drafter
        return [
            batch.checked("prompt", tokens, self.tokenizer.stop, **options) for tokens in prompts
        ]

    async def answer(
        self, requests: list[BatchRequest], shape: _Shape, body: SamplingFields, request: Request
    ) -> Response:
        with_usage = body.with_usage
        call = Call(self.engine, self.tokenizer, requests, body.stops)
        if body.stream:
            return _Events(call, _events(call, shape, with_usage))
        texts: dict[int, str] = {}
        ends: dict[int, str] = {}

        async def collect() -> None:
            async for piece in call.pieces():
                texts[piece.place] = texts.get(piece.place, "") + piece.text
                ends[piece.place] = piece.finish

        if not await _unless_gone(collect(), request):
            return Response(status_code=499)  # nobody reads it
        choices = [shape.whole(place, texts[place], ends[place]) for place in sorted(texts)]
        return JSONResponse(shape.body(choices, shape.kind, usage=_usage(call)))


def _check_text(name: str, text: str) -> None:
    """Refuse half a character, which JSON can say and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        raise InvalidInputError(f"{name}: must be text in UTF-8; got {half!r}; remove it") from None


async def _unless_gone(work: Any, request: Request) -> bool:
    """Do work unless the client goes away, which ends it; returns whether it was done."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            _log.info("a client went away; its request ends")
            return False
        await task
        return True
    finally:
        for one in (task, gone):
            one.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Events(StreamingResponse):
    """Server-sent events; frees a call's slots even if the client leaves before the first."""

    media_type = "text/event-stream"

    def __init__(self, call: Call, events: AsyncIterator[str]) -> None:
        super().__init__(events)
        self._call = call

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.close()


async def _events(call: Call, shape: _Shape, with_usage: bool) -> AsyncIterator[str]:
    """The answer as server-sent events."""
    try:
        async for piece in call.pieces():
            for choice in shape.parts(piece):
                more = {"usage": None} if with_usage else {}
                yield _event(shape.body([choice], shape.part_kind, **more))
        if with_usage:
            yield _event(shape.body([], shape.part_kind, usage=_usage(call)))
        yield DONE
    except (Failed, Stopped) as error:
        yield _event(_error(error))


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _usage(call: Call) -> dict[str, int]:
    new = call.completion_tokens
    sums = {"prompt_tokens": call.prompt_tokens, "completion_tokens": new}
    return {**sums, "total_tokens": call.prompt_tokens + new}


class _Shape:
    """How an endpoint's answers look."""

    prefix, kind, part_kind = "", "", ""

    def __init__(self, model: str) -> None:
        self._common = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def body(self, choices: list[Any], kind: str, **more: Any) -> dict[str, Any]:
        return {**self._common, "object": kind, "choices": choices, **more}

    def whole(self, place: int, text: str, finish: str) -> dict[str, Any]:
        raise NotImplementedError

    def parts(self, piece: Piece) -> list[dict[str, Any]]:
        raise NotImplementedError


class _Completion(_Shape):
    prefix, kind, part_kind = "cmpl", "text_completion", "text_completion"

    def whole(self, place: int, text: str, finish: str) -> dict[str, Any]:
        return {"index": place, "text": text, "logprobs": None, "finish_reason": finish}

    def parts(self, piece: Piece) -> list[dict[str, Any]]:
        return [self.whole(piece.place, piece.text, piece.finish or None)]  # type: ignore[arg-type]


class _Chat(_Shape):
    prefix, kind, part_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    _begun = False

    def whole(self, place: int, text: str, finish: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": place, "message": message, "logprobs": None, "finish_reason": finish}

    def parts(self, piece: Piece) -> list[dict[str, Any]]:
        deltas: list[tuple[dict[str, str], str | None]] = []
        if not self._begun:
            self._begun = True
            deltas.append(({"role": "assistant", "content": ""}, None))
        if piece.text:
            deltas.append(({"content": piece.text}, None))
        if piece.finish:
            deltas.append(({}, piece.finish))
        common = {"index": piece.place, "logprobs": None}
        return [{**common, "delta": delta, "finish_reason": finish} for delta, finish in deltas]


_STATUS: dict[type[Exception], int] = {
    RequestValidationError: 400,
    InvalidInputError: 400,
    NoModel: 404,
    Busy: 429,
    Stopped: 503,
    Failed: 500,
}


def _handler(status: int) -> Callable[[Request, Exception], Any]:
    async def handle(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(_error(error), status)

    return handle


async def _from_framework(request: Request, error: Any) -> JSONResponse:
    """For paths and methods that there are not, and bodies that are no JSON."""
    return JSONResponse(_error(error), error.status_code, error.headers)


def _error(error: Exception) -> dict[str, Any]:
    """The body of an error, as OpenAI has it."""
    text, kind, code = str(error), "invalid_request_error", None
    if isinstance(error, HTTPException):
        text = str(error.detail)
    if isinstance(error, RequestValidationError):
        text = "; ".join(_problem(one) for one in error.errors())
    elif isinstance(error, NoModel):
        code = "model_not_found"
    elif isinstance(error, TooLongError):
        length, new = error.length, error.new_tokens
        text = (
            f"prompt and new tokens together must be at most {error.most} here, "
            f"got {length} + {new} = {length + new}; shorten the prompt, or ask for fewer tokens"
        )
        code = "context_length_exceeded"
    elif isinstance(error, Busy):
        text, kind = "too many requests wait; try again later", "overloaded"
    elif isinstance(error, Stopped):
        text, kind = "the server ends; this request was not finished", "stopped"
    elif isinstance(error, Failed):
        text, kind = f"the request failed: {text}", "internal_error"
    return {"error": {"message": text, "type": kind, "param": None, "code": code}}


def _problem(one: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in one["loc"] if part != "body")
    if one["type"] == "json_invalid":
        return f"the body must be JSON, and is not at character {place}"
    if one["type"] == "string_unicode" and not place:  # half a character in a parameter's name
        return f"{json.dumps(one['input'])}: is no parameter of this endpoint; leave it out"
    if not place:
        return "the body must be a JSON object, sent with Content-Type: application/json"
    if one["type"] == "extra_forbidden":
        return f"{place}: is no parameter of this endpoint; leave it out"
    shown = json.dumps(one.get("input"), default=repr)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return f"{place}: {one['msg'].removeprefix('Value error, ')}; got {shown}"
