"""The routes of the server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from flashclient.batching.constraint import Constraint
from flashclient.batching.request import Progress
from flashclient.errors import FlashClientError, OptionError
from flashclient.server.access import Access
from flashclient.server.answer_formats import ANY_OBJECT
from flashclient.server.answers import AnswerForm, ChatForm, CompletionForm
from flashclient.server.hosted_model import Answer, Asked, HostedModel
from flashclient.server.metrics import Metrics
from flashclient.server.pages import add_page
from flashclient.server.problems import Problem, refused
from flashclient.server.schema import ChatBody, CompletionBody, SamplingBody
from flashclient.server.tools import ToolSet

POLL_S = 0.25  # how often a request that is not a stream looks whether its client has gone
Body = TypeVar("Body", bound=SamplingBody)

logger = logging.getLogger("flashclient.server")


def make_api(
    models: Mapping[str, HostedModel], access: Access, with_page: bool = False, origins: Sequence[str] = ()
) -> FastAPI:
    """The application for uvicorn.

    Args:
        origins: other sites whose pages may ask.
    """
    checks = [Depends(access.check_host)]
    api = FastAPI(title="flashclient", docs_url=None, redoc_url=None, openapi_url=None, dependencies=checks)
    routes = _Routes(models, access, Metrics(models))
    for path, give in (
        ("/health", routes.health),
        ("/metrics", routes.metrics),
        ("/v1/models", routes.list_models),
        ("/v1/models/", routes.list_models),
        ("/v1/models/{name:path}", routes.model),
    ):
        api.add_api_route(path, give, methods=["GET", "HEAD"])
    for path, answer in (("/v1/completions", routes.completions), ("/v1/chat/completions", routes.chat)):
        api.add_api_route(path, answer, methods=["POST"])
        api.add_api_route(f"{path}/", answer, methods=["POST"])  # a redirection is not followed by all clients
    if origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],  # clients in JavaScript tell their versions in headers of their own
            expose_headers=["Retry-After"],
        )
    if with_page:
        add_page(api, models, access)
    for kind in (Problem, FlashClientError):
        api.add_exception_handler(kind, _answer_problem)
    api.add_exception_handler(ClientDisconnect, _answer_nobody)
    api.add_exception_handler(HTTPException, _answer_unknown)
    api.add_exception_handler(Exception, _answer_unexpected)
    return api


async def _answer_problem(_: Request, error: Exception) -> Response:
    problem = Problem.of(error)
    return JSONResponse(problem.as_dict(), problem.status, problem.headers)


async def _answer_nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=499)


async def _answer_unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    there = "GET /v1/models, POST /v1/completions, POST /v1/chat/completions, GET /health and GET /metrics"
    message = f"no {request.method} {request.url.path}: this server has {there}"
    if request.method == "OPTIONS" and "origin" in request.headers:
        origin = request.headers["origin"]
        message = f"pages of {origin} may not use this server: start it with --allow-origin {origin}"
    return JSONResponse(Problem(error.status_code, message).as_dict(), error.status_code, error.headers)


async def _answer_unexpected(_: Request, error: Exception) -> Response:
    logger.error("a request failed", exc_info=error)
    problem = Problem.of(error)
    return JSONResponse(problem.as_dict(), problem.status)


class _Routes:
    def __init__(self, models: Mapping[str, HostedModel], access: Access, metrics: Metrics) -> None:
        self._models = models
        self._access = access
        self._metrics = metrics

    async def health(self) -> Response:
        for model in self._models.values():
            model.scheduler.check_runs()
        return JSONResponse({"status": "ok"})

    async def metrics(self) -> Response:
        text, kind = self._metrics.text()
        return PlainTextResponse(text, media_type=kind)

    async def list_models(self, request: Request) -> Response:
        self._access.check_key(request.headers)
        return JSONResponse({"object": "list", "data": [_described(model) for model in self._models.values()]})

    async def model(self, name: str, request: Request) -> Response:
        self._access.check_key(request.headers)
        return JSONResponse(_described(self._named(name)))

    async def completions(self, request: Request) -> Response:
        key, body = await self._body(request, CompletionBody)
        model = self._named(body.model)
        prompts = await run_in_threadpool(model.text_ids, body.prompts)
        asked = Asked(body.chosen(), body.max_tokens, body.stops, body.n or 1, body.logprobs, owner=key)
        form = CompletionForm(model.name, model.tokenizer, body.logprobs is not None)
        return await self._answer(request, body, form, model.ask(prompts, asked))

    async def chat(self, request: Request) -> Response:
        key, body = await self._body(request, ChatBody)
        model = self._named(body.model)
        ids, tools, constraint = await run_in_threadpool(_prepared, model, body)
        markers = {} if tools is None else tools.markers(model.tokenizer)
        chosen, count = body.chosen(), body.n or 1
        asked = Asked(chosen, body.tokens_max, body.stops, count, body.alternatives, constraint, markers, key)
        form = ChatForm(model.name, model.tokenizer, bool(body.logprobs), tools)
        return await self._answer(request, body, form, model.ask([ids], asked))

    def _named(self, name: str) -> HostedModel:
        model = self._models.get(name)
        if model is None:
            there = ", ".join(self._models)
            raise Problem(404, f"no model '{name}': this server has {there}", "model", "model_not_found")
        return model

    async def _body(self, request: Request, kind: type[Body]) -> tuple[int, Body]:
        """The number of the request's key, and its body."""
        key = self._access.check_key(request.headers)
        data = await self._access.read_body(request)
        try:
            return key, kind.model_validate_json(data)
        except ValidationError as error:
            raise refused(error, data) from None

    async def _answer(self, request: Request, body: SamplingBody, form: AnswerForm, answers: list[Answer]) -> Response:
        if body.stream:
            events = self._until_gone(form.stream(answers, _merged(answers), body.reports_usage), answers)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        whole = asyncio.ensure_future(form.whole(answers))
        try:
            while not whole.done():
                await asyncio.wait([whole], timeout=POLL_S)
                if not whole.done() and await request.is_disconnected():
                    return Response(status_code=499)  # nobody reads it
            return JSONResponse(whole.result())
        except Exception as error:
            raise Problem.of(error) from error
        finally:
            whole.cancel()
            self._end(answers)

    async def _until_gone(self, events: AsyncIterator[str], answers: Sequence[Answer]) -> AsyncIterator[str]:
        try:
            async for event in events:
                yield event
        finally:  # also when the client has gone
            self._end(answers)

    def _end(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            answer.request.cancel()
            self._metrics.count(answer)


async def _merged(answers: Sequence[Answer]) -> AsyncIterator[tuple[Answer, Progress]]:
    """The steps of all answers as they come."""
    steps = {answer.index: answer.steps() for answer in answers}
    next_of = {asyncio.ensure_future(anext(of)): index for index, of in steps.items()}
    by_index = {answer.index: answer for answer in answers}
    try:
        while next_of:
            done, _ = await asyncio.wait(next_of, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                index = next_of.pop(future)
                with suppress(StopAsyncIteration):
                    step = future.result()
                    yield by_index[index], step
                    next_of[asyncio.ensure_future(anext(steps[index]))] = index
    finally:
        for future in next_of:
            future.cancel()
            future.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody awaits it


def _prepared(model: HostedModel, body: ChatBody) -> tuple[list[int], ToolSet | None, Constraint | None]:
    """The prompt, the functions that the answer may call, and what the answer must be. Raises Problem, OptionError."""
    functions = body.functions
    described = [one.model_dump(exclude_none=True) for one in body.tools or ()] if functions else None
    ids = model.chat_ids(body.conversation(), body.layout, described)
    tools = None
    if functions:
        parameters = {name: function.parameters or ANY_OBJECT for name, function in functions.items()}
        tools = ToolSet(model.tool_format(described), parameters, body.must_call, body.parallel_tool_calls is False)
    schema = None if body.response_format is None else body.response_format.json_of
    param = "tools" if body.must_call else "response_format"
    try:
        if tools is not None and (tools.required or schema is not None):
            answer = None if tools.required else schema
            return ids, tools, model.grammars.lark(tools.grammar(model.tokenizer, answer))
        return ids, tools, None if schema is None else model.grammars.json(schema)
    except OptionError as error:
        raise Problem(400, f"{param}: {error}", param) from error


def _described(model: HostedModel) -> dict[str, Any]:
    told = {"id": model.name, "object": "model", "created": model.created_unix_s, "owned_by": "weightd"}
    return told if model.parent is None else told | {"parent": model.parent}
