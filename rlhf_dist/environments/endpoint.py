"""An OpenAI-compatible endpoint on the loopback, through which an agent speaks with the model of an episode.

    POST /v1/chat/completions     messages, max_tokens, tools, stream; one choice
    GET  /v1/models

    messages so far (as they were answered) | new ones        said; then the model draws a turn
    messages of the last request, again                       its answer again: a client that tries again
    anything else                                             400

Sampling is the role's: a request for another temperature would be answered with tokens of another policy than the rows
say. A turn that nobody waits for any more is drawn to its end: a client that lost patience and asks again gets it. One
server for all episodes of an event loop, which stops with the last of them.
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
_SHUTDOWN_S = 0.3
"""What requests have to end with their server: less than a cancelled episode has (`workers/episodes/play.py`)."""


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
    """To the last request; None while what it said has none."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    """Requests under way, those that nobody waits for among them."""

    async def answered(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """See complete; it goes on where whoever asked goes away, so that nothing is said twice to who asks again."""
        task = asyncio.ensure_future(self.complete(request))
        self.tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled():
            task.exception()  # it is looked at, so that asyncio does not complain that nobody did

    async def complete(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request. Raises BadRequest, and what the chat raises."""
        messages, most = self._checked(request), _most_tokens(request)
        async with self.lock:
            keys = [_key(message) for message in messages]
            if self.answer is not None and keys == self.known[:-1]:
                return self.answer
            new = messages[len(self.known) :]
            silent = not new and keys[-1][0] == "assistant"  # what was said and not answered may be asked for again
            if keys[: len(self.known)] != self.known or silent or any(one["role"] == "assistant" for one in new):
                raise BadRequest(
                    f"messages must be the {len(self.known)} of the conversation so far, as they were sent and "
                    "answered, and new ones behind them that are not the assistant's; rows are what the model was "
                    "given and drew"
                )
            self._check_lengths(new)
            for message in new:
                self.chat.say(_text(message), role=_ROLES[message["role"]])
            self.known, self.answer = keys, None
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

    def _check_lengths(self, messages: Sequence[Mapping[str, Any]]) -> None:
        most = self.chat.limits.message_characters
        longest = max((len(_text(message)) for message in messages), default=0)
        if longest > most:
            raise BadRequest(
                f"a message has at most {most} characters (EpisodeLimits.message_characters), got {longest}; cut it "
                "where that is meant"
            )

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


def _most_tokens(request: Mapping[str, Any]) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        most = request.get(name)
        if most is None:
            continue
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise BadRequest(f"{name} must be a number >= 1, got {most!r}; leave it out for what the episode has left")
        return int(most)
    return None


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
        self._runner = self._web.AppRunner(
            application, access_log=None, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_S
        )
        await self._runner.setup()
        site = self._web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    async def stop(self) -> None:
        runner, self._runner, self.url = self._runner, None, ""
        if runner is not None:
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
            answer = await session.answered(given)
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
    token, session = secrets.token_urlsafe(24), Session(chat, tools, parser)
    server = _SERVERS.get(loop) or _SERVERS.setdefault(loop, _Server())
    server.sessions[token] = session  # from here on whoever leaves lets it run
    try:
        async with server.lock:
            if not server.url:
                await server.start()
        yield Endpoint(url=server.url, token=token)
    finally:
        server.sessions.pop(token, None)  # before anything is awaited: an episode may be cancelled here, too
        for task in list(session.tasks):
            task.cancel()
        async with server.lock:
            if not server.sessions:
                # A lock that was waited for refers to the loop, and so would its own entry.
                if _SERVERS.get(loop) is server:
                    del _SERVERS[loop]
                await server.stop()
