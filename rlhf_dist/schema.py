"""What every batch column means: the one place where shapes, dtypes and units are written down.

B is the number of rows (trajectories), T_i the number of *response* tokens of row i. Per-token columns
are aligned with the response: `values[i][j]` belongs to `response_ids[i][j]`. A prompt is its own
ragged column, so nothing is padded and no offset has to be remembered.

    prompt_ids    [B, P_i]   w w w w
    response_ids  [B, T_i]           y y y y y
    response_mask [B, T_i]           1 1 1 1 1      0 where the token must not be trained on
    log_probs, values, rewards, ...  one number per response token, or one per row
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Shape = Literal["[B]", "[B, T]", "[B, P]", "[B, K]", "[B, T, K]"]


@dataclass(frozen=True, kw_only=True)
class ColumnSpec:
    """One column: `shape` in rows B, response tokens T, prompt tokens P, and K numbers for each where it has several;
    `dtype` a numpy name or "text"."""

    shape: Shape
    dtype: str
    meaning: str

    @property
    def per_token(self) -> bool:
        """Whether the column has one entry for each response token."""
        return self.shape in ("[B, T]", "[B, T, K]")


def _spec(shape: Shape, dtype: str, meaning: str) -> ColumnSpec:
    return ColumnSpec(shape=shape, dtype=dtype, meaning=meaning)


FIELD_KINDS = ("float32", "int64", "text", "json")
"""What a field of a data file may be as a column of its own: a number a row, text, or anything as JSON text."""

COLUMNS: dict[str, ColumnSpec] = {
    # What the controller knows of every row: any op may read them, none writes them.
    "row_id": _spec("[B]", "int64", "the row itself; unique within a run"),
    "parent_id": _spec("[B]", "int64", "row_id of the row it was made of: a response's prompt; -1 for a source's row"),
    # What a source emits.
    "group_id": _spec("[B]", "int64", "rows of one prompt (or one preference set) share it; unique within a run"),
    "prompt_ids": _spec("[B, P]", "int32", "token ids of the prompt, chat template applied"),
    "prompt": _spec("[B]", "text", "the prompt before the chat template, for rewards and people"),
    "answer": _spec("[B]", "text", "ground truth for a verifier; JSON when the verifier needs more than a string"),
    "source": _spec("[B]", "text", "where the row comes from: fresh, replay, expert or a data set's name"),
    "fields": _spec("[B]", "text", "the row's other fields in the data file, as a JSON object"),
    # What generation emits.
    "response_ids": _spec("[B, T]", "int32", "token ids of the response, end-of-sequence token included"),
    "response_mask": _spec("[B, T]", "uint8", "1 where a token counts in losses and returns"),
    "response": _spec("[B]", "text", "the response as text, special tokens removed"),
    "raw_response": _spec("[B]", "text", "the response as text, special tokens and all"),
    "finished": _spec("[B]", "uint8", "1 if the response ended itself, 0 if the token limit cut it"),
    "rollout_log_probs": _spec("[B, T]", "float32", "log pi(y_t) as the generation engine sampled it, nats"),
    "policy_version": _spec("[B, T]", "int32", "weight version that sampled each token (0 is the initial model)"),
    # What episodes emit besides.
    "turn": _spec("[B, T]", "int32", "which turn of the episode drew the token, from 0; -1 for what was said to it"),
    "turns": _spec("[B]", "int32", "turns that the model had in the episode"),
    "outcome": _spec("[B]", "text", "how the episode ended: finished, length, turns or policy_error"),
    "speaker": _spec("[B]", "text", "who drew the row: the role whose op it was, or a name among its speakers"),
    "transcript": _spec("[B]", "text", "the episode piece by piece, for people: a JSON list"),
    # What episodes that branch or compact their context emit besides.
    "tree": _spec("[B]", "int64", "rows of one episode share it; unique within a run"),
    "branch": _spec(
        "[B]", "text", "path of branches from the start, such as 0/2; .k behind it once k contexts were closed"
    ),
    "leaf": _spec(
        "[B]", "uint8", "1 where an episode, or a branch of it, ended; 0 for a context that was closed before"
    ),
    "segment": _spec(
        "[B, T]", "int32", "stretch between two forks of the tree; rows of one tree share the tokens of one segment"
    ),
    "text_ends": _spec("[B, T]", "int32", "characters of `response` that are there after each token"),
    # What forward passes emit.
    "old_log_probs": _spec("[B, T]", "float32", "log pi_old(y_t) recomputed by the training engine, nats"),
    "log_probs": _spec("[B, T]", "float32", "log pi(y_t) under a language model, whoever wrote the response, nats"),
    "ref_log_probs": _spec("[B, T]", "float32", "log pi_ref(y_t) under the frozen reference, nats"),
    "entropy": _spec("[B, T]", "float32", "entropy of the policy before y_t, nats"),
    "values": _spec("[B, T]", "float32", "V(s_t) under the critic, in reward units"),
    "scores": _spec("[B, K]", "float32", "what a reward model with K labels says of the row, in reward units"),
    "hidden": _spec(
        "[B, T, K]", "float32", "last states of a model that it predicts y_t from, K wide; 4 K bytes a token"
    ),
    "attention": _spec("[B, T]", "float32", "share of a value model's attention at its last token that y_t has"),
    "logits": _spec("[B, T]", "float32", "logit of y_t as the model's head gives it, at no temperature"),
    "largest_logits": _spec("[B, T]", "float32", "the largest logit of all tokens in place of y_t"),
    "top_ids": _spec("[B, T, K]", "int32", "the K most likely tokens in place of y_t, the likeliest first"),
    "top_log_probs": _spec("[B, T, K]", "float32", "log-probs of top_ids, nats"),
    "top_log_rest": _spec("[B, T]", "float32", "log of the probability of all tokens but top_ids, nats"),
    # Rewards, advantages.
    "rewards": _spec("[B]", "float32", "terminal reward of the trajectory; missing where it failed"),
    "token_rewards": _spec("[B, T]", "float32", "reward received after each token; sums to the return at gamma 1"),
    "advantages": _spec("[B, T]", "float32", "A(s_t, y_t) in reward units (or normalised, as the recipe says)"),
    "returns": _spec("[B, T]", "float32", "target of the critic at s_t, in reward units"),
    # Preferences: rows of one group, labelled.
    "label": _spec("[B]", "int8", "+1 chosen, -1 rejected, 0 neither, among the rows of a group"),
    "margin": _spec("[B]", "float32", "strength of the preference, in reward units; 0 when unknown"),
    "weight": _spec("[B]", "float32", "weight of the row in its loss; 1 when all count alike"),
}

ROW_IDS: tuple[str, ...] = ("row_id", "parent_id")
"""What the controller knows of every row, so that no node writes it."""

SEQUENCE: tuple[str, ...] = ("prompt_ids", "response_ids")
"""What a forward pass needs of a row."""

GENERATED: tuple[str, ...] = (
    *("response_ids", "response_mask", "response", "raw_response", "finished"),
    *("rollout_log_probs", "policy_version"),
)
"""What generation writes of a row."""

TREE: tuple[str, ...] = ("tree", "branch", "leaf", "segment")
"""What episodes write besides that may become several rows."""

TRAINABLE: tuple[str, ...] = (*SEQUENCE, "response_mask", "group_id")
"""What every update reads besides what its loss asks for."""
