"""The generation contract: what every generation engine does, and how it comes by its weights.

    shards of other ranks ──> WeightSync ──> boxes of the model (receive_shards), where a trace knows them; else

    buckets of (name, tensor) ──> Arrivals: known? once? dtype? checksum? ──> _install ──> _finish_install
                                                  │ anything wrong                              │ read back
                                                  v                                             v
                                   WeightSyncError, on every rank of the            weights_version = version
                                   tensor-parallel group; generate refuses

Responses are asked for one by one (`add`), all that are in flight get a token at each `step`, and `generate` is one
wave of this: what is drawn for a request depends on its seed, never on what else is in flight.

An engine starts without weights and refuses to generate (`StaleWeights`) until a sync completes; a sync
that begins takes the old version away, so a stale or half-updated policy cannot be sampled from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_dist.config import ModelConfig
from rlhf_dist.reshard.checksum import full_checksum
from rlhf_dist.reshard.layout import Box
from rlhf_dist.reshard.shards import Shards
from rlhf_dist.sampling import Sampling

T = TypeVar("T")
Bucket: TypeAlias = list[tuple[str, Tensor]]
"""Some full parameters under their Hugging Face names, in the rollout dtype."""
SleepPart = Literal["weights", "cache"]
"""What a generation engine holds on its device."""
BOTH: tuple[SleepPart, ...] = ("weights", "cache")
DROPPED = "the weights were given up, since a sync was to come before they are used"
ShardSync: TypeAlias = Callable[[Shards, Callable[[], None], Callable[[int], None]], int]
"""(target shards, prepare, finish) -> version: calls `prepare`, fills the shards, calls `finish(version)`, and
verifies on all ranks."""


@dataclass(frozen=True, eq=False)
class Response:
    """One sampled response."""

    token_ids: NDArray[np.int32]
    """[T] tokens drawn, T >= 1; the end-of-sequence token included when the response ended itself."""
    log_probs: NDArray[np.float32]
    """[T] log-probs of those tokens under softmax(logits / temperature) over the *full* vocabulary, whatever
    top_p, top_k or greedy say: what the trainer recomputes at the same temperature."""
    versions: NDArray[np.int32]
    """[T] version of the weights that drew each token."""
    finished: bool
    """Ended itself; False when cut at max_tokens."""
    interrupted: bool = False
    """Neither ended nor cut: generation was asked to stop, T may be 0, and the rest may be drawn later."""


NOTHING_DRAWN = Response(
    np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int32), finished=False, interrupted=True
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One response that is asked for."""

    name: str
    """Unique among those in flight."""
    token_ids: NDArray[np.integer]
    """[P] all tokens before it, P >= 1."""
    sampling: Sampling
    """Its n is 1."""
    seed: int
    """Of its random stream, in [0, 2^63)."""


@dataclass(frozen=True)
class Ends:
    """What ends a response beside its end-of-text tokens and its limit; asked after every token."""

    last: int
    """How many of the last tokens it looks at."""
    says: Callable[[NDArray[np.int32]], bool]
    """Whether these are an end; [T], T <= last."""

    def after(self, before: NDArray[np.int32], more: Sequence[int]) -> bool:
        """Whether a response of tokens `before` and `more` is at its end."""
        here = np.asarray(more[-self.last :], dtype=np.int32)
        return self.says(np.concatenate([before, here])[-self.last :])


@dataclass(frozen=True)
class SyncReport:
    """What one weight sync moved into this engine."""

    parameters: int
    """Full parameters received."""
    bytes: int
    """Their bytes."""
    seconds: float
    """From the call to verified, waiting for the sender included."""


class WeightSyncError(RuntimeError):
    """Weights did not arrive as announced, or were not installed as they arrived."""

    def __init__(self, version: int, rule: str, parameters: Iterable[str] = ()) -> None:
        self.version, self.rule, self.parameters = version, rule, tuple(sorted(parameters))
        # What the class is called with: an exception is unpickled by calling its class with these.
        super().__init__(version, rule, self.parameters)

    def __str__(self) -> str:
        shown = ", ".join(self.parameters[:5]) + (", ..." if len(self.parameters) > 5 else "")
        which = f" ({len(self.parameters)} parameters: {shown})" if self.parameters else ""
        return (
            f"weight sync of version {self.version} failed: {self.rule}{which}; "
            "this engine generates nothing until a sync completes"
        )


class Untraceable(RuntimeError):
    """The engine's loader does something to a parameter that boxes do not express: it takes whole tensors only."""


class StaleWeights(RuntimeError):
    """Generation was asked of an engine that does not hold a verified version of the weights."""


class GenerationEngine(Protocol):
    """What the actor needs of an engine. Every rank of a tensor-parallel group makes every call, alike."""

    @property
    def weights_version(self) -> int:
        """Version of the weights held; -1 for none."""
        ...

    @property
    def ranks_of_copy(self) -> tuple[int, int]:
        """Which of the ranks that share this copy of the model this one is, and how many they are."""
        ...

    def told(self, said: T) -> T:
        """What the first rank of the copy says, on all of them, whatever they say; a collective."""
        ...

    def generate(
        self,
        prompts: Sequence[NDArray[np.integer]],
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        begun: Sequence[Response] | None = None,
        stop: Callable[[], bool] | None = None,
        ends: Ends | None = None,
        mixture: tuple[GenerationEngine, float] | None = None,
        done: Callable[[int, Response], None] | None = None,
    ) -> list[Response]:
        """Draw sampling.n responses per prompt.

        prompts: token ids, [T_i] each; zero prompts are fine. seeds: one per response, in [0, 2^63). Each
        response is drawn from its own random stream, so it does not depend on the rank, the other prompts
        or the batch size (up to float rounding). With `stop`, which makes it depend on the moment, the responses of
        one call may share a stream. Returns len(prompts) * n responses, the n of one prompt together.
        stop: asked after every token; once it is true on any rank of the copy, all that is not done is returned
        as interrupted. begun: what such a call returned; interrupted responses go on where they were.
        ends: what ends a response after any of its tokens, as finished.
        mixture: another engine of this process and its share s: tokens are drawn from (1 - s) own + s other logits.
        done: told of each response that ends in this call as soon as it does, with its place among all.
        Raises StaleWeights without verified weights, ValueError for prompts, limits or seeds that do not fit.
        """
        ...

    def add(self, request: Request) -> None:
        """Ask for one more response, whatever is in flight; weights stay as they are until none is.

        Raises StaleWeights without verified weights, ValueError for a request that does not fit or a name in flight.
        """
        ...

    def step(self) -> list[tuple[str, Response]]:
        """One token for every request in flight, once the prompts of new ones are read (as many as there is room for;
        the others wait). Returns those that are done, by name."""
        ...

    def abort(self, name: str) -> Response:
        """Let go of a request in flight; what it had drawn, as interrupted."""
        ...

    def receive_weights(self, version: int, buckets: Iterator[Bucket], expected: Mapping[str, int]) -> SyncReport:
        """Take the parameters of `version`; expected: name -> `full_checksum` of every parameter to come.

        Raises WeightSyncError; the engine then refuses to generate until a later call succeeds.
        """
        ...

    def load(self, model: ModelConfig, seed: int) -> None:
        """Take the weights that a model starts with, those that a training engine of the same seed would have, as
        version 0. For a role that never learns: nobody syncs it.

        Raises ValueError for a folder that lacks some.
        """
        ...

    def trace(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[Box]]:
        """Which boxes of the checkpoint's parameters this rank wants; shapes: whole shape by name.

        Raises Untraceable for a model that only `receive_weights` can load.
        """
        ...

    def receive_shards(self, sync: ShardSync) -> None:
        """Let `sync` write a version into the boxes that the last `trace` named, and verify it.

        Raises what `sync` raises; the engine then refuses to generate until a later call succeeds.
        """
        ...

    def refuse(self, reason: str) -> None:
        """Generate nothing until a sync completes: the weights held are stale, or not what was trained."""
        ...

    def held_bytes(self) -> dict[SleepPart, int]:
        """Bytes of each part on the device now."""
        ...

    def sleep(self, parts: Sequence[SleepPart] = BOTH, *, keep: bool = True) -> int:
        """Give the device's memory back; the cache never stays without weights. Returns bytes copied.

        keep False: the weights are not wanted again, since a sync comes before they are used; until then `generate`
        refuses.
        """
        ...

    def wake(self, parts: Sequence[SleepPart] = BOTH) -> int:
        """Take it again; weights that were kept are held as before. A sync needs the weights only. Returns bytes
        copied."""
        ...

    def close(self) -> None:
        """Free everything; the process group the engine was given stays. Calling it twice is fine."""
        ...


class Arrivals:
    """Checks what arrives in one sync against what was announced."""

    def __init__(self, version: int, expected: Mapping[str, int], dtype: torch.dtype) -> None:
        self._version, self._expected, self._dtype = version, expected, dtype
        self._seen: set[str] = set()
        self.bytes = 0

    @property
    def count(self) -> int:
        return len(self._seen)

    def check(self, bucket: Bucket) -> None:
        """Raise WeightSyncError for a name, dtype, repetition or checksum that was not announced."""
        names = [name for name, _ in bucket]
        if unknown := set(names) - self._expected.keys():
            raise WeightSyncError(self._version, "only announced parameters may arrive", unknown)
        if again := {name for name in names if name in self._seen or names.count(name) > 1}:
            raise WeightSyncError(self._version, "every parameter must arrive once", again)
        if wrong := {name for name, tensor in bucket if tensor.dtype != self._dtype}:
            raise WeightSyncError(self._version, f"parameters must arrive as {self._dtype}", wrong)
        if wrong := {name for name, tensor in bucket if full_checksum(tensor) != self._expected[name]}:
            raise WeightSyncError(self._version, "checksums must equal the sender's", wrong)
        self._seen.update(names)
        self.bytes += sum(tensor.nbytes for _, tensor in bucket)

    def check_complete(self) -> None:
        """Raise WeightSyncError when nothing arrived, or not all of it."""
        if not self._seen:
            raise WeightSyncError(self._version, "at least one parameter must arrive, got none", self._expected)
        if missing := self._expected.keys() - self._seen:
            raise WeightSyncError(self._version, "every announced parameter must arrive", missing)


class SyncedEngine(ABC):
    """The part of the contract that is the same for every engine: a verified sync, or no generation."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._version = -1
        self._refusal = "no weights have arrived yet"
        self._began = False
        """A sync has begun: what the model holds is no longer arbitrary."""

    @property
    def weights_version(self) -> int:
        """Version of the weights held; -1 for none."""
        return self._version

    def receive_weights(self, version: int, buckets: Iterator[Bucket], expected: Mapping[str, int]) -> SyncReport:
        """See GenerationEngine."""
        if version < 0:
            raise ValueError(f"version must be >= 0, got {version}")
        self._require_idle("take weights")
        started = perf_counter()
        self.refuse(f"the sync of version {version} did not complete")
        self._began = True
        arrivals = Arrivals(version, expected, self._dtype)
        failure: Exception | None = None
        try:
            self._begin_install()
            for bucket in buckets:
                # Buckets come out of collectives: after a failure the rest is still drawn, so that the other
                # ranks are not left waiting, and all of them hear of it below.
                failure = failure or self._attempt(arrivals, bucket)
            if failure is None:
                arrivals.check_complete()
                self._finish_install(version, expected)
        except Exception as error:  # noqa: BLE001 - whatever it was, the other ranks must learn of it
            failure = failure or error
        elsewhere = self._failures_of_peers(None if failure is None else str(failure))
        if failure is not None:
            raise (
                failure if isinstance(failure, WeightSyncError) else WeightSyncError(version, repr(failure))
            ) from failure
        if elsewhere:
            raise WeightSyncError(
                version, f"all ranks of the tensor-parallel group must succeed; {'; '.join(elsewhere)}"
            )
        self._version = version
        return SyncReport(arrivals.count, arrivals.bytes, perf_counter() - started)

    @property
    def ranks_of_copy(self) -> tuple[int, int]:
        """See GenerationEngine."""
        return 0, 1

    def told(self, said: T) -> T:
        """See GenerationEngine."""
        return said

    def load(self, model: ModelConfig, seed: int) -> None:
        """See GenerationEngine."""
        self.refuse(f"reading {model.path} did not complete")
        self._began = True
        self._read(Path(model.path), model.init, seed)
        self._version = 0

    def receive_shards(self, sync: ShardSync) -> None:
        """See GenerationEngine."""
        self._require_idle("take weights")
        self.refuse("the last weight sync did not complete")
        self._began = True
        self._version = sync(self._target_shards(), self._begin_shards, self._finish_shards)

    def refuse(self, reason: str) -> None:
        """See GenerationEngine."""
        self._version, self._refusal = -1, reason

    def _attempt(self, arrivals: Arrivals, bucket: Bucket) -> Exception | None:
        try:
            arrivals.check(bucket)
            self._install(bucket)
        except Exception as error:  # noqa: BLE001 - raised by receive_weights once the buckets are drawn
            return error
        return None

    def _require_weights(self) -> None:
        if self._version < 0:
            raise StaleWeights(f"generation needs a verified version of the weights: {self._refusal}; sync first")

    def _require_idle(self, what: str) -> None:
        if self._in_flight:
            raise RuntimeError(
                f"an engine must have no requests in flight to {what}, it has {len(self._in_flight)} "
                f"({next(iter(self._in_flight))!r} is the first); step until they are done, or abort them"
            )

    @property
    @abstractmethod
    def _in_flight(self) -> Collection[str]:
        """Names of requests that were added and are not done."""

    @abstractmethod
    def _begin_install(self) -> None:
        """Make what is installed unusable, so that whatever is not replaced shows."""

    @abstractmethod
    def _install(self, bucket: Bucket) -> None:
        """Write full parameters into the model."""

    @abstractmethod
    def _finish_install(self, version: int, expected: Mapping[str, int]) -> None:
        """Make the model ready to run; raise WeightSyncError unless what runs is what arrived."""

    @abstractmethod
    def _read(self, folder: Path, init: str, seed: int) -> None:
        """Write what a model starts with (see ModelConfig) into the model, and make it ready to run."""

    @abstractmethod
    def _target_shards(self) -> Shards:
        """The tensors to write, as the last trace named them."""

    @abstractmethod
    def _begin_shards(self) -> None:
        """Called before the first element is written."""

    @abstractmethod
    def _finish_shards(self, version: int) -> None:
        """Make the model ready to run on what was written; raise WeightSyncError where it is not."""

    def _failures_of_peers(self, failure: str | None) -> list[str]:
        """Tell the ranks sharing this copy of the model of this rank's failure; returns theirs."""
        return []


def check_request(
    prompts: Sequence[NDArray[np.integer]],
    sampling: Sampling,
    seeds: Sequence[int],
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
) -> None:
    """Raise ValueError for a generate() call that does not fit the engine's limits."""
    if len(seeds) != len(prompts) * sampling.n:
        raise ValueError(
            f"one seed per response: {len(prompts)} prompts x n={sampling.n} need {len(prompts) * sampling.n}, "
            f"got {len(seeds)}"
        )
    if any(not 0 <= seed < 1 << 63 for seed in seeds):
        raise ValueError(f"seeds must be in [0, 2^63), got {min(seeds)}..{max(seeds)}")
    lengths = [len(prompt) for prompt in prompts]
    if lengths and not 1 <= min(lengths) <= max(lengths) <= max_prompt_tokens:
        raise ValueError(
            f"prompts must have 1..{max_prompt_tokens} tokens (rollout.max_prompt_tokens), "
            f"got {min(lengths)}..{max(lengths)}; drop or cut them in the source"
        )
    if sampling.max_tokens > max_response_tokens:
        raise ValueError(
            f"max_tokens must be <= rollout.max_response_tokens ({max_response_tokens}), got {sampling.max_tokens}"
        )


def check_added(request: Request, in_flight: Collection[str], *, max_tokens: int) -> None:
    """Raise ValueError for a request that does not fit. max_tokens: prompt and response together, at most."""
    sampling = request.sampling
    if request.name in in_flight:
        raise ValueError(f"requests in flight have names of their own, and {request.name!r} is in flight")
    if sampling.n != 1:
        raise ValueError(f"a request is for one response, got n={sampling.n}; add as many requests")
    if sampling.stop:
        raise ValueError(f"a request ends at end-of-text tokens and its limit, got stop={sampling.stop!r}")
    if not 0 <= request.seed < 1 << 63:
        raise ValueError(f"seeds must be in [0, 2^63), got {request.seed}")
    if not 1 <= len(request.token_ids) <= max_tokens - sampling.max_tokens:
        raise ValueError(
            f"prompt and response must have at most {max_tokens} tokens (rollout.max_prompt_tokens + "
            f"max_response_tokens), the prompt at least one; got {len(request.token_ids)} + {sampling.max_tokens}"
        )


def resumed_seed(seed: int, tokens: int) -> int:
    """The seed of a response that goes on after `tokens` tokens: the streams that drew those are gone."""
    return seed if tokens == 0 else (seed + tokens * 0x9E3779B97F4A7C15) & ((1 << 63) - 1)


def continued(before: Response | None, more: Response) -> Response:
    """A response that was interrupted and the part drawn after that, as one."""
    if before is None:
        return more
    return Response(
        np.concatenate([before.token_ids, more.token_ids]),
        np.concatenate([before.log_probs, more.log_probs]),
        np.concatenate([before.versions, more.versions]),
        more.finished,
        more.interrupted,
    )


def stream_seed(seed: int) -> int:
    """A 32-bit seed that depends on all 64 bits of `seed`: torch's CPU generator reads only the low 32.

    The finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    mask = (1 << 64) - 1
    mixed = (seed + 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return (mixed ^ (mixed >> 31)) >> 32
