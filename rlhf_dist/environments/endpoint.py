"""An OpenAI-compatible endpoint on the loopback, through which an agent speaks with the model of an episode.

    POST /v1/chat/completions     messages, max_tokens, tools, stream; one choice
    GET  /v1/models

    messages so far (as they were answered) | new ones        said; then the model draws a turn
    messages of the last request, again                       its answer again: a client that tries again
    anything else                                             400

Sampling is the role's: a request for another temperature would be answered with tokens of another policy than the rows
say. One server for all episodes of an event loop, which stops with the last of them.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from rlhf_dist.environments.environment import Chat, Reply
from rlhf_dist.environments.outcomes import PolicyError
from rlhf_dist.environments.search_tool import library
from rlhf_dist.environments.tool_calls import ToolParser

MODEL = "policy"
_TAKEN = frozenset(
    "model messages max_tokens max_completion_tokens tools stream stream_options n user metadata".split()
)
_ROLES = {"system": "system", "developer": "system", "user": "user", "tool": "tool"}
_LIMIT_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where an agent finds the model of its episode."""

    url: str
    """Base address, as `openai.OpenAI(base_url=...)` takes it."""
    token: str
    """Of this episode alone."""
    model: str = MODEL


class BadRequest(ValueError):
    """A request that cannot be answered token for token; its text tells the agent why."""


@dataclass(eq=False)
class Session:
    """One episode's side of the endpoint."""

    chat: Chat
    tools: Sequence[Mapping[str, Any]] = ()
    parser: ToolParser | None = None
    known: list[tuple[Any, ...]] = field(default_factory=list)
    """Messages so far, the model's among them, as `_key` has them."""
    answer: dict[str, Any] | None = None
    """To the last request."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    async def complete(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request. Raises BadRequest, and what the chat raises."""
        messages = self._checked(request)
        async with self.lock:
            keys = [_key(message) for message in messages]
            if self.answer is not None and keys == self.known[:-1]:
                return self.answer
            new = messages[len(self.known) :]
            if keys[: len(self.known)] != self.known or not new or any(one["role"] == "assistant" for one in new):
                raise BadRequest(
                    f"messages must be the {len(self.known)} of the conversation so far, as they were sent and "
                    "answered, and new ones behind them that are not the assistant's; rows are what the model was "
                    "given and drew"
                )
            for message in new:
                self.chat.say(_text(message), role=_ROLES[message["role"]])
            most = request.get("max_completion_tokens") or request.get("max_tokens")
            reply = await self.chat.generate(max_tokens=most)
            message = self._message(reply)
            self.known = [*keys, _key(message)]
            self.answer = _completion(message, reply)
            return self.answer

    def _checked(self, request: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        other = {name: value for name, value in request.items() if name not in _TAKEN and value is not None}
        if other:
            name = next(iter(other))
            raise BadRequest(
                f"{name}={other[name]!r} is not served: what is drawn is the role's own (its rollout settings); leave "
                "it out"
            )
        if (request.get("n") or 1) != 1:
            raise BadRequest(f"n must be 1, got {request['n']}: an episode is one conversation")
        if list(request.get("tools") or []) != list(self.tools):
            raise BadRequest(
                "tools must be those of the environment; write OpenAIAgent(tools=[...]) with the same schemas"
            )
        messages = request.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
            raise BadRequest("messages must be a list of objects with role and content, at least one")
        for message in messages:
            if message.get("role") not in (*_ROLES, "assistant"):
                raise BadRequest(
                    f"a message's role is one of {', '.join((*_ROLES, 'assistant'))}, got {message.get('role')!r}"
                )
            _text(message)
        return messages

    def _message(self, reply: Reply) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": reply.text}
        try:
            calls = self.parser.calls(reply.text) if self.parser is not None else []
        except PolicyError:  # the agent sees the text, and says what it makes of it
            calls = []
        if calls:
            message["tool_calls"] = [
                {
                    "id": f"call_{len(self.known)}_{number}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments))},
                }
                for number, call in enumerate(calls)
            ]
        return message


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if content is None and message["role"] == "assistant":
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part["text"]) for part in content)
    if not isinstance(content, str):
        raise BadRequest(f"the content of a message is text, got {type(content).__name__}")
    return content


def _key(message: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two messages the same: a client adds fields of its own to those that it was sent."""
    calls = tuple(call.get("id") for call in message.get("tool_calls") or ())
    return message["role"], _text(message), calls, message.get("tool_call_id")


def _completion(message: Mapping[str, Any], reply: Reply) -> dict[str, Any]:
    reason = "tool_calls" if "tool_calls" in message else "stop" if reply.finished else "length"
    return {
        "id": f"chatcmpl-{secrets.token_hex(8)}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": reason, "logprobs": None}],
    }


def _as_chunks(answer: Mapping[str, Any]) -> bytes:
    """The whole answer as the one chunk of a stream."""
    (choice,) = answer["choices"]
    delta = dict(choice["message"])
    if "tool_calls" in delta:
        delta["tool_calls"] = [{**call, "index": number} for number, call in enumerate(delta["tool_calls"])]
    chunk = {**answer, "object": "chat.completion.chunk", "choices": [{**choice, "delta": delta}]}
    del chunk["choices"][0]["message"]
    return f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode()


class _Server:
    """Of one event loop."""

    def __init__(self) -> None:
        self._web = library("aiohttp.web", "OpenAIAgent")
        self.sessions: dict[str, Session] = {}
        self._runner: Any = None
        self.url = ""
        self.lock = asyncio.Lock()

    async def start(self) -> None:
        application = self._web.Application(client_max_size=_LIMIT_BYTES)
        application.router.add_post("/v1/chat/completions", self._complete)
        application.router.add_get("/v1/models", self._models)
        self._runner = self._web.AppRunner(application, access_log=None, handler_cancellation=True)
        await self._runner.setup()
        site = self._web.TCPSite(self._runner, "127.0.0.1", 0, shutdown_timeout=1.0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    async def stop(self) -> None:
        runner, self._runner, self.url = self._runner, None, ""
        await runner.cleanup()

    async def _models(self, request: Any) -> Any:
        if self._session(request) is None:
            return self._error(401, "no episode has this token")
        return self._web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def _complete(self, request: Any) -> Any:
        session = self._session(request)
        if session is None:
            return self._error(401, "no episode has this token")
        try:
            given = await request.json()
            if not isinstance(given, dict):
                raise BadRequest("a request is a JSON object")
            task = asyncio.ensure_future(session.complete(given))
            session.tasks.add(task)
            try:
                answer = await task
            finally:
                session.tasks.discard(task)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - whoever asked is told; its own code decides what follows
            return self._error(400, f"{error}")
        except BaseException as ended:  # noqa: BLE001 - the episode is over, whatever the agent does now
            return self._error(410, f"the episode has ended: {ended}")
        if given.get("stream"):
            return self._web.Response(body=_as_chunks(answer), content_type="text/event-stream")
        return self._web.json_response(answer)

    def _session(self, request: Any) -> Session | None:
        return self.sessions.get(request.headers.get("Authorization", "").removeprefix("Bearer "))

    def _error(self, status: int, message: str) -> Any:
        return self._web.json_response({"error": {"message": message, "type": "invalid_request_error"}}, status=status)


_SERVERS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Server] = weakref.WeakKeyDictionary()


@asynccontextmanager
async def served(
    chat: Chat, *, tools: Sequence[Mapping[str, Any]] = (), parser: ToolParser | None = None
) -> AsyncIterator[Endpoint]:
    """The endpoint of an episode, while it is open. What is still asked at its end is let go of."""
    loop = asyncio.get_running_loop()
    if loop not in _SERVERS:
        _SERVERS[loop] = _Server()
    server = _SERVERS[loop]
    token, session = secrets.token_urlsafe(24), Session(chat, tools, parser)
    async with server.lock:
        if not server.sessions:
            await server.start()
        server.sessions[token] = session
    try:
        yield Endpoint(url=server.url, token=token)
    finally:
        for task in session.tasks:
            task.cancel()
        async with server.lock:
            del server.sessions[token]
            if not server.sessions:
                await server.stop()
