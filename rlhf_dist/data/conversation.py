r"""A conversation as tokens, while it is held: what was drawn stays as it was drawn, what is said is tokenised once.

    prompt    <user> 2+2 <end> <assistant>                    rendered, or the row's own
    drawn     4 <end>                                         the model's tokens, never read again as text
    said      \n <tool> ok <end> <assistant>                  the template's text after that, tokenised as one piece
    drawn     so 4 <end>

What stands between two turns is what the role's chat template writes behind the assistant's message when the
conversation goes on: the conversation is rendered with a marker in place of that message, and what follows the marker
is taken. So it does not depend on what was drawn, and a template that would write earlier turns otherwise once others
follow (thoughts taken out, say) cannot change them. The end of a turn that the model drew itself is not written again.

A tokenizer without a chat template, or a row whose prompt is its plain text, is continued as plain text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_dist.data.messages import Messages
from rlhf_dist.data.tokenizer import TextTokenizer

_MARKER = "rlhf-dist-9d1c-what-the-assistant-said"


@dataclass(frozen=True, eq=False)
class Piece:
    """Tokens that came at one time."""

    token_ids: NDArray[np.int32]
    turn: int
    """Which turn drew them, from 0; -1 for what was said."""
    log_probs: NDArray[np.float32]
    """Zeros for what was said."""
    versions: NDArray[np.int32]
    """Those of the turn before, for what was said."""


@dataclass(eq=False)
class Conversation:
    """One conversation. `say` and `drew` alternate as they come; `context` is what the model is given next."""

    tokenizer: TextTokenizer
    row_prompt: Sequence[int]
    """The row's own prompt as tokens."""
    row_text: str
    """The same as text, before any template."""
    ends: Collection[int]
    """Tokens that end a turn."""
    tools: Sequence[Mapping[str, Any]] = ()
    prompt: list[int] = field(default_factory=list)
    """As it is once something was drawn."""
    pieces: list[Piece] = field(default_factory=list)
    turns: int = 0
    _messages: Messages = field(default_factory=list)
    _said: Messages = field(default_factory=list)
    _chat: bool = False

    @property
    def response_tokens(self) -> int:
        """Tokens behind the prompt."""
        return sum(len(piece.token_ids) for piece in self.pieces)

    @property
    def messages(self) -> Messages:
        """The whole conversation, as messages."""
        return [*self._messages, *self._said]

    def copy(self) -> Conversation:
        """This conversation, to go on by itself; tokens are shared."""
        return replace(
            self,
            prompt=list(self.prompt),
            pieces=list(self.pieces),
            _messages=[dict(message) for message in self._messages],
            _said=list(self._said),
        )

    def anew(self) -> Conversation:
        """The same row's conversation before anything was said."""
        return Conversation(self.tokenizer, self.row_prompt, self.row_text, self.ends, self.tools)

    def say(self, role: str, text: str) -> None:
        """Put a message behind what is there."""
        self._said.append({"role": role, "content": text})

    def context(self) -> NDArray[np.int32]:
        """[P] all tokens that the model is to go on from.

        Raises ValueError where the last turn ended itself and nothing was said since, or the template cannot render it.
        """
        if not self.prompt:
            self._begin()
        elif self._said:
            self._append(self._between())
        elif self._ended:
            raise ValueError(
                "the last turn has ended, and nothing was said since; call chat.say() before chat.generate()"
            )
        self._messages += self._said
        self._said = []
        return np.concatenate([np.array(self.prompt, np.int32), *(piece.token_ids for piece in self.pieces)])

    def drew(
        self, token_ids: NDArray[np.int32], log_probs: NDArray[np.float32], versions: NDArray[np.int32]
    ) -> tuple[str, str]:
        """What the model has drawn from `context`; the turn's text without and with special tokens."""
        goes_on = bool(self.pieces) and self.pieces[-1].turn == self.turns - 1
        self.pieces.append(Piece(token_ids, self.turns, log_probs, versions))
        self.turns += 1
        ids = token_ids.tolist()
        text, raw = (self.tokenizer.decode(ids, special_tokens=special) for special in (False, True))
        if goes_on and self._messages:  # the turn before was cut: this is the rest of it
            self._messages[-1]["content"] += text
        else:
            self._messages.append({"role": "assistant", "content": text})
        return text, raw

    @property
    def _ended(self) -> bool:
        return bool(self.pieces) and int(self.pieces[-1].token_ids[-1]) in self.ends

    def _begin(self) -> None:
        if self._said:
            self._chat = self.tokenizer.has_chat_template
            text = self._render(self._said) if self._chat else "".join(message["content"] for message in self._said)
            self.prompt = self.tokenizer.encode([text], special_tokens=not self._chat)[0]
            return
        self.prompt = list(self.row_prompt)
        plain = self.tokenizer.encode([self.row_text], special_tokens=True)[0]
        self._chat = self.tokenizer.has_chat_template and plain != self.prompt
        self._messages = [{"role": "user", "content": self.row_text}]

    def _between(self) -> list[int]:
        if not self._chat:
            text = "".join(message["content"] for message in self._said)
            return self.tokenizer.encode([text], special_tokens=False)[0]
        rendered = self._render([*self._messages[:-1], {"role": "assistant", "content": _MARKER}, *self._said])
        before, found, text = rendered.partition(_MARKER)
        if not found:
            raise ValueError(
                f"the chat template of {self.tokenizer.folder} leaves the assistant's message out once {self._said} "
                "follow, so that a conversation cannot go on"
            )
        ids = self.tokenizer.encode([text], special_tokens=False)[0]
        drawn = int(self.pieces[-1].token_ids[-1])
        return ids[1:] if self._ended and ids[:1] == [drawn] else ids

    def _render(self, messages: Messages) -> str:
        return self.tokenizer.render(messages, tools=list(self.tools) or None)

    def _append(self, ids: list[int]) -> None:
        version = self.pieces[-1].versions[-1]
        tokens = np.array(ids, dtype=np.int32)
        zeros = np.zeros(len(ids), dtype=np.float32)
        self.pieces.append(Piece(tokens, -1, zeros, np.full(len(ids), version, dtype=np.int32)))
