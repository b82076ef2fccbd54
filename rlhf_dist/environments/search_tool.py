"""A search engine as a tool: BM25 over a corpus of passages that lies on disk (Search-R1's setting without a server).

    <tool_call>{"name": "search", "arguments": {"query": "capital of France"}}</tool_call>
    [1] Paris is the capital and largest city of France. ...

    Search(corpus="wiki.parquet", column="text")       a Parquet or JSON-lines file with a text a row

Needs the package bm25s (the extra `environments`). An index is made once in each process, when episodes begin.
"""

from __future__ import annotations

import functools
import importlib
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_dist.environments.environment import Chat, Row
from rlhf_dist.environments.tool_calls import JsonCalls, ToolParser
from rlhf_dist.environments.tool_use import ToolUse

_LOCK = threading.Lock()


class Index:
    """BM25 (Lucene's variant) over texts."""

    def __init__(self, texts: list[str]) -> None:
        """Raises ValueError where there is nothing to index."""
        self._library = library("bm25s", "Search")
        self.texts = texts
        tokens = self._library.tokenize(texts, stopwords=None, show_progress=False)
        if not any(len(ids) for ids in tokens.ids):
            raise ValueError(f"a corpus needs words to be found by, its {len(texts)} texts have none")
        self._index = self._library.BM25(backend="numpy")
        self._index.index(tokens, show_progress=False)

    def search(self, query: str, most: int) -> list[tuple[int, float]]:
        """(place, score) of the passages that share a word with the query, the best first, equal ones in file order."""
        words = self._library.tokenize([query], stopwords=None, show_progress=False, return_ids=False)
        if not words[0]:
            return []
        scores = self._index.get_scores(words[0])
        found = np.flatnonzero(scores > 0)
        order = found[np.argsort(-scores[found], kind="stable")[:most]]
        return [(at, float(scores[at])) for at in order.tolist()]


def read_corpus(file: str | Path, column: str) -> list[str]:
    """The texts of a Parquet file, or one of JSON lines. Raises ValueError for what is none."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"a corpus is a Parquet or JSON-lines file, and there is no {path}")
    found: list[Any] | None
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        names = parquet.read_schema(path).names
        found = parquet.read_table(path, columns=[column])[column].to_pylist() if column in names else None
    else:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        names = sorted({name for row in rows for name in row})
        found = [row.get(column) for row in rows] if column in names else None
    if found is None:
        raise ValueError(f"{path} has no column {column!r}; it has {', '.join(names)}")
    wrong = next((at for at, text in enumerate(found) if not isinstance(text, str)), None)
    if wrong is not None:
        raise ValueError(f"{path}: column {column!r} must be text, row {wrong} is {type(found[wrong]).__name__}")
    return found


@functools.cache
def _made(file: str, column: str) -> Index:
    return Index(read_corpus(file, column))


def index_of(file: str, column: str) -> Index:
    """The index of a file, made once in a process."""
    with _LOCK:
        return _made(file, column)


def library(name: str, who: str) -> Any:
    """A library that an environment needs. Raises ValueError with how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{who} needs {name}, which is not installed; run pip install 'rlhf-dist[environments]'"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Search(ToolUse):
    """Questions with a search engine at hand; 1 where the answer holds the row's, whatever stands around it."""

    corpus: str
    """Parquet or JSON-lines file of passages, on every machine that generates."""
    column: str = "text"
    """Its column of passages."""
    results: int = 3
    """Passages that a query is answered with, at most."""
    passage_characters: int = 500
    """Longest passage that is shown; the rest is cut, which is said."""
    parser: ToolParser = field(default_factory=lambda: JsonCalls(names=("search",)))
    """How calls are written."""
    argument: str = "query"
    """The argument of a call that is searched for."""

    def prepare(self) -> None:
        """See Environment."""
        index_of(self.corpus, self.column)

    async def use(self, chat: Chat, argument: str) -> str:
        """See ToolUse."""
        found = await chat.run(self._search, argument)
        return "\n".join(f"[{number}] {text}" for number, text in enumerate(found, start=1)) or "nothing was found"

    def score(self, answer: str, row: Row) -> float:
        """See ToolUse."""
        wanted = " ".join(row.answer.lower().split())
        return float(bool(wanted) and wanted in " ".join(answer.lower().split()))

    def _search(self, query: str) -> list[str]:
        index = index_of(self.corpus, self.column)
        return [shortened(index.texts[at], self.passage_characters) for at, _ in index.search(query, self.results)]


def shortened(text: str, most: int) -> str:
    """The text, or its beginning and how much is missing."""
    return text if len(text) <= most else f"{text[:most]} ... ({len(text) - most} characters more)"
