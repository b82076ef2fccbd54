"""What the driver checks of a source before anything starts: cheap, only the first row is looked at."""

from __future__ import annotations

from pathlib import Path

from rlhf_dist.config import SourceConfig
from rlhf_dist.data.read import fields_of, read_rows
from rlhf_dist.data.tokenizer import has_chat_template, missing_template


def check_source(config: SourceConfig, where: str, *, tokenizer: str | Path | None = None, seed: int = 0) -> None:
    """Raises ValueError, beginning with `where` (e.g. "data.train"), for what a user can get wrong.

    File or generator missing (with the nearest name), arguments a generator refuses, fields that the first
    row lacks, chat data for a `tokenizer` folder without a chat template.
    """
    try:
        first = read_rows(config, seed, limit=1)[0]
        if tokenizer is not None:
            chat = config.chat or config.system is not None or isinstance(first[fields_of(config).prompt], list)
            if chat and not has_chat_template(tokenizer):
                raise ValueError(missing_template(tokenizer))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
