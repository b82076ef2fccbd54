"""What was said becomes a prompt, or a part of one."""

import numpy as np

from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow import host_op


@host_op(reads=("prompt_ids", "response_ids", "finished"), writes=("prompt_ids",))
def written_prompt(batch: Batch, *, keep_prompt: bool) -> Batch:
    """Another model's prompt: the tokens of the prompt, if they stay, and of the response without its end. One of
    no tokens leaves the prompt."""
    made = []
    for row in range(batch.num_rows):
        said = batch["response_ids"].row(row)
        said = said[: len(said) - int(batch["finished"].values[row])]
        prompt = batch["prompt_ids"].row(row)
        made.append(np.concatenate([prompt, said]) if keep_prompt or not len(said) else said)
    return Batch({"prompt_ids": Column.ragged(made, dtype="int32")}, batch.num_rows)
