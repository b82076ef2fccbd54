"""An interpreter as a tool: programs that the model writes run in a sandbox (`rlhf_dist/sandbox/`), and it reads what
they print (ReTool's setting).

    <code>
    print(17 * 23)
    </code>
    391

A new interpreter for each call: no state goes from one to the next. Where nothing isolates programs, the run ends
before its first episode.
"""

from __future__ import annotations

import functools
import math
import threading
from dataclasses import dataclass, field

from rlhf_dist.environments.environment import Chat
from rlhf_dist.environments.outcomes import InfrastructureError
from rlhf_dist.environments.search_tool import shortened
from rlhf_dist.environments.tool_calls import TextCalls, ToolParser
from rlhf_dist.environments.tool_use import ToolUse
from rlhf_dist.sandbox import Limits, Sandbox, SandboxError

_LOCK = threading.Lock()


@functools.cache
def _made(limits: Limits) -> Sandbox:
    return Sandbox(limits)


def sandbox_of(limits: Limits) -> Sandbox:
    """The sandbox with such limits, one in a process; it ends with it."""
    with _LOCK:
        return _made(limits)


@dataclass(frozen=True, kw_only=True)
class PythonTool(ToolUse):
    """Questions with an interpreter at hand; 1 for the right answer."""

    parser: ToolParser = field(default_factory=TextCalls)
    """How programs are written."""
    sandbox: Limits = field(default_factory=lambda: Limits(wall_s=5.0))
    """What a program may take."""
    output_characters: int = 2000
    """Longest output that is shown; the rest is cut, which is said."""

    def prepare(self) -> None:
        """See Environment. Raises RuntimeError where nothing on this machine isolates programs."""
        refusal = sandbox_of(self.sandbox).refusal
        if refusal:
            raise RuntimeError(f"PythonTool runs programs in a sandbox, and there is none here: {refusal}")

    async def use(self, chat: Chat, argument: str) -> str:
        """See ToolUse. Raises InfrastructureError where the sandbox itself fails."""
        try:
            # A program's time is the sandbox's to count, and an episode's its own: waiting for a place costs no row.
            result = await chat.run(sandbox_of(self.sandbox).run, argument, seconds=math.inf)
        except SandboxError as error:
            raise InfrastructureError(str(error)) from error
        said = shortened(result.stdout.rstrip("\n"), self.output_characters)
        if result.ok:
            return said or "it printed nothing"
        wrong = (result.stderr.strip().splitlines() or [result.text])[-1] or result.text
        return "\n".join(part for part in (said, f"{result.outcome}: {shortened(wrong, 300)}") if part)
