"""How an episode ends, and the errors that say whose doing an end is. Who raises one classifies it, once.

    finished               episode() returned, or chat.end() was called        }
    length                 the row's tokens are used up                        }  the policy's doing: these rows
    turns                  as many generations as allowed                      }  are in the batch, and train
    policy_error           what the model wrote cannot be used (PolicyError)   }
    deadline               the episode took too long                           }
    step_deadline          all episodes of the step together did               }
    environment_error      its code raised, hung, or said what is no text      }  not the policy's: these rows are
    infrastructure_error   what it needs is not there (InfrastructureError,    }  missing from the batch, counted
                           ConnectionError), after all retries                 }  and written to the log
    surplus                more groups were begun than the step keeps          }  (surplus: counted alone)

Tokens and turns are limits of the policy and the same on every machine; seconds are the machine's, so that a deadline
says nothing about what was drawn.
"""

from __future__ import annotations

from typing import Literal

Outcome = Literal[
    "finished",
    "length",
    "turns",
    "policy_error",
    "deadline",
    "step_deadline",
    "environment_error",
    "infrastructure_error",
    "surplus",
]
OF_POLICY: tuple[Outcome, ...] = ("finished", "length", "turns", "policy_error")
"""Ends that are the policy's doing."""
OF_OTHERS: tuple[Outcome, ...] = (
    "deadline",
    "step_deadline",
    "environment_error",
    "infrastructure_error",
    "surplus",
)


class PolicyError(Exception):
    """What the model wrote cannot be used: a tool call that does not parse, a move that is none."""


class InfrastructureError(Exception):
    """Something that the environment needs is not there: a sandbox, a server. The episode is started again."""


class ToolTimeout(Exception):
    """A function that was called with `chat.run` took longer than it may."""
