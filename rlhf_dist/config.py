"""Every setting there is: frozen, keyword-only dataclasses, a line under each field.

Hydra composes them from `rlhf_dist/conf/`, the recipe's YAML and the command line (`rlhf_dist/compose.py`). A config
stops at the constructor of what it configures; nothing deeper reads it, nothing changes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

MISSING: Any = "???"
"""Value of a setting that somebody must give."""
PathText = Annotated[str, "path"]
"""Text that names a file or folder: a `~` in front and `$NAME` are put in when the settings are read."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Hugging Face model folder."""

    path: PathText = MISSING
    """Folder with config.json, weights and tokenizer; relative paths are taken from where the command runs."""
    init: str = "pretrained"
    """`pretrained` loads the weights; `random` builds them from config.json and the run's seed."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-5
    """Peak learning rate, per optimizer step."""
    schedule: str = "constant"
    """`constant`, `linear` or `cosine` decay after the warm-up."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up from 0; 0 for none."""
    total_steps: int = 0
    """Optimizer steps at which `linear` and `cosine` reach min_lr_ratio; not used by `constant`."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end of the decay, as a share of lr."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay; norms and biases are left out."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 for no clipping."""
    lr_scale: dict[str, float] = field(default_factory=dict)
    """Regular expression -> factor on the learning rate of parameters whose name it finds, e.g. {score: 10}; the
    first that finds one counts; 0 holds them still."""
    nonfinite: str = "stop"
    """A loss or gradient that is NaN or infinite: `stop` ends the run, `skip` makes no step and counts it. The weights
    are unchanged, and the rows go to the run's folder, either way."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: only they are trained."""

    rank: int = 16
    """Rank of the adapters."""
    alpha: float = 32.0
    """The adapters' product is scaled by alpha / rank."""
    targets: str = "all-linear"
    """`all-linear`, or a regular expression that names modules, e.g. `.*(q|v)_proj`."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a role's model is held and trained."""

    name: str = "fsdp"
    """Training engine: `fsdp` or `deepspeed`; `actor.engine=deepspeed` is short for `actor.engine.name=deepspeed`."""
    dtype: str = "float32"
    """Compute and gather dtype: `float32`, `bfloat16`, or `auto`: what the machine is fast in. Master weights and
    gradients reduce in float32."""
    micro_batch_tokens: int = 4096
    """Most tokens (prompt + response) in one forward pass of one rank; a longer row gets a pass of its own."""
    logit_chunk_tokens: int = 1024
    """Tokens whose logits exist at one time."""
    packing: bool = True
    """Rows lie one after the other without padding. False pads every row to the longest, to compare."""
    share_prompts: bool = True
    """What rows of one forward pass begin with, a prompt or more of a tree, is computed once (not with
    `sequence_parallel`)."""
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass."""
    compile: bool = False
    """torch.compile each layer (fsdp)."""
    offload: str = "none"
    """What stays in host memory between uses, on a GPU: `none`, `optimizer` (deepspeed) or `all`."""
    zero_stage: int = 3
    """What is sharded: 1 optimizer states (deepspeed), 2 also gradients, 3 also parameters.

    With fsdp, 2 keeps parameters gathered from the forward to the backward pass; between steps they are sharded."""
    sequence_parallel: int = 1
    """Ranks that share the tokens of one pack (Ulysses; fsdp). Must divide attention and key-value heads."""
    tensor_parallel: int = 1
    """Ranks that share every linear layer (DTensor; fsdp). Must divide attention and key-value heads."""
    replicas: int = 1
    """Copies of the sharded parameters (hybrid sharding; fsdp): shards within, sums of gradients between them."""
    router_aux_loss: float = 0.0
    """Weight of the load-balancing loss of a mixture of experts, averaged over rows; 0 for none, whatever config.json
    says. Rows do not share prompts then, and each has its tokens on one rank (no tensor or sequence parallelism)."""
    export_dtype: str | None = None
    """Dtype of exported weights: `float32` or `bfloat16`. None: that of the folder training started from."""
    lora: LoraConfig | None = None
    """Train adapters and leave the model as it is (fsdp); None trains the model."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Generation."""

    engine: str = "vllm"
    """`vllm`, or `transformers` as the embedded fallback."""
    tensor_parallel: int = 1
    """Ranks that share one copy of the model; data parallel over the rest."""
    dtype: str = "float32"
    """Dtype of the generation weights and KV cache: `float32`, `bfloat16`, or `auto`: what the machine is fast in."""
    max_prompt_tokens: int = 256
    """Longer prompts are dropped by the source, and counted."""
    max_response_tokens: int = 64
    """A response is cut here."""
    temperature: float = 1.0
    """Sampling temperature; also divides the logits when log-probs are recomputed. 0 is not allowed: use greedy."""
    top_p: float = 1.0
    """Nucleus; 1 for the whole vocabulary (anything else makes rollout and training policies differ)."""
    top_k: int = 0
    """Most likely tokens kept; 0 for all."""
    kv_cache_bytes: int | None = 64 << 20
    """KV cache per rank, bytes; on CUDA 0 lets vLLM take `gpu_memory_share`. None: 64 MiB on a CPU, 0 on CUDA."""
    gpu_memory_share: float | None = 0.5
    """Share of the GPU's memory for vLLM when kv_cache_bytes is 0. None: 0.5 beside other models, 0.85 alone."""
    ratio_tolerance: float = 0.0
    """Largest mean |pi_train / pi_rollout - 1| over a step's tokens where both hold the same weights; more is an
    error. 0: 0.01 in float32, 0.5 in bfloat16."""
    bucket_bytes: int | None = None
    """Most bytes of weights on their way at one time in a weight sync, per rank; None: 1 GiB on CUDA, 64 MiB on a
    CPU."""
    sleeps: bool = True
    """Weights and cache leave the device while other roles of the pool need the room. False: they never do."""
    canary_tolerance: float = 0.0
    """After each weight sync compare the log-probs of a few tokens with the trainer's, and fail above this; measured:
    5e-7 in float32, outliers of 0.5 in bfloat16. 0: no canary."""


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """A language model: actor, reference, opponent. What a recipe does not do with it is not used."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Where it starts."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How it is held, and trained where the recipe updates it."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How it learns, where the recipe updates it."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How it generates, where the recipe generates with it."""


@dataclass(frozen=True, kw_only=True)
class ValueModelConfig:
    """A value model: the trunk of a language model with a linear head."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Where the trunk starts; a sequence-classification folder brings its head along."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How it is trained."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How it learns."""


@dataclass(frozen=True, kw_only=True)
class FunctionConfig:
    """A function on CPU processes: derive a dataclass from it whose fields are the function's settings."""

    model: ClassVar[None] = None
    engine: ClassVar[EngineConfig] = EngineConfig()


@dataclass(frozen=True, kw_only=True)
class RemoteJudgeConfig(FunctionConfig):
    """A judge behind an OpenAI-compatible endpoint."""

    url: str = ""
    """Its address up to and with the version, http://HOST:PORT/v1."""
    served_model: str = ""
    """Name of the model, as the endpoint calls it."""
    key_variable: str = ""
    """Name of the environment variable that holds the key; empty for none. The key itself is written nowhere."""
    concurrency: int = 16
    """Requests under way at one time, in each of placement.host_processes."""
    timeout_s: float = 60.0
    """Longest that one request may take."""
    deadline_s: float = 300.0
    """Longest that a question may take, all tries together."""
    tries: int = 6
    """Times that a question is sent."""
    backoff_s: float = 1.0
    """Wait before the second try, which doubles with each; a random share of it, at least a half."""
    backoff_most_s: float = 30.0
    """Longest wait that it grows to; what a Retry-After asks for is kept."""
    max_tokens: int = 512
    """Most tokens of an answer."""
    most_failed: float = 0.1
    """Share of the questions of a step that may stay without an answer, which is a verdict that is missing; more ends
    the run."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "timeout_s", "deadline_s", "tries", "max_tokens"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if not 0 <= self.most_failed <= 1:
            raise ValueError(f"most_failed must be in [0, 1], got {self.most_failed}")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Rewards from a function of the text, or from a sequence-classification model. Exactly one is set."""

    function: str | None = None
    """`package.module:name`, `file.py:name`, or a name in the recipe's own file. None: use `model`."""
    timeout_s: float = 60.0
    """Longest that one call of the function may take, seconds; its process is ended then."""
    memory_bytes: int = 4 << 30
    """Most memory of the process that calls the function, with all that it starts."""
    concurrency: int = 16
    """Calls of an `async def` function under way at one time, in each of placement.host_processes."""
    environment: tuple[str, ...] = ()
    """Names of environment variables that the function's process gets, such as [JUDGE_API_KEY]; without, it has none of
    the run's secrets."""
    failed_reward: float | Literal["missing"] | None = None
    """Of a row whose call raised, hung or ended its process, counted as `failed_rows`: missing, which is in no baseline
    and not trained on; or a reward. None: the run ends, naming function and row."""
    model: ModelConfig | None = None
    """A sequence-classification folder with one label. None: use `function`."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How the model is held."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How it learns; only recipes that train the reward model use it."""


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """One part of a mixture: rows of its own; what is None here is as in the source."""

    path: PathText | None = None
    """As in the source; a part has a path or a generator."""
    generator: str | None = None
    """As in the source."""
    generator_args: dict[str, Any] | None = None
    """Arguments of the generator."""
    size: int | None = None
    """Rows a generator makes before it starts over."""
    weight: float | None = None
    """Share of the rows of every step, relative to the other parts. None for all: every row once an epoch."""
    prompt_key: str | None = None
    """Field with the prompt."""
    response_key: str | None = None
    """Field with the response."""
    chosen_key: str | None = None
    """Field with the preferred response."""
    rejected_key: str | None = None
    """Field with the other response."""
    answer_key: str | None = None
    """Field with the ground truth."""
    system: str | None = None
    """A system message put before every prompt."""
    chat: bool | None = None
    """Apply the chat template."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where rows come from: exactly one of `path`, `generator` and `mix`. A field's name may be nested: `a.b`."""

    path: PathText | None = None
    """Parquet, JSON lines (also .gz) or Arrow: a file, a folder, a pattern such as `data/train-*.parquet`, or several
    of these with commas between them."""
    generator: str | None = None
    """A reasoning-gym data set's name, e.g. `basic_arithmetic`, or `file.py:name` of a function (index) -> row dict."""
    generator_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the generator, e.g. {min_digits: 1}."""
    size: int = 1000
    """Rows a generator makes before it starts over."""
    mix: dict[str, PartConfig] = field(default_factory=dict)
    """Name -> part of a mixture, e.g. {math: {path: math.jsonl, weight: 3}, code: {path: code.jsonl, weight: 1}}."""
    rows: str = "prompts"
    """`prompts`, `examples` (prompt and response) or `preferences` (prompt, chosen, rejected)."""
    prompt_key: str | None = None
    """Field with the prompt: text, or a list of chat messages. None: `prompt`, else `messages`, `conversations`."""
    response_key: str | None = None
    """Field with the response, for examples. None: `response`, `completion`; for `messages` what the assistant says."""
    chosen_key: str | None = None
    """Field with the preferred response, with or without the prompt before it. None: `chosen`."""
    rejected_key: str | None = None
    """Field with the other response. None: `rejected`."""
    answer_key: str | None = None
    """Field with the ground truth. None: `answer`, else `reward_model.ground_truth`; missing values are counted."""
    turns: str = "all"
    """Assistant's turns of a conversation that examples train: `all`, or `last`."""
    system: str | None = None
    """A system message put before every prompt; needs a tokenizer with a chat template."""
    chat: bool | None = None
    """Apply the chat template. None: only where the row holds a list of messages."""
    template_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template, e.g. {enable_thinking: false}."""
    shuffle: bool = True
    """A new order each epoch, drawn from the run's seed."""
    rows_per_step: int = 0
    """Rows (pairs, for preferences) of each step; 0: `data.prompts_per_step`."""

    @property
    def rows_per_item(self) -> int:
        """Rows of a batch that one row of the file makes: a pair makes two."""
        return 2 if self.rows == "preferences" else 1


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training and held-out rows."""

    train: SourceConfig = field(default_factory=SourceConfig)
    """Rows to train on: of every source parameter of the recipe that has no section of its own in `sources`."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Source parameter -> where its rows come from, e.g. {experts: {path: demos.jsonl, rows_per_step: 8}}."""
    heldout: SourceConfig | None = None
    """Rows to evaluate on; None for no evaluation."""
    prompts_per_step: int = 32
    """Rows the source emits each step (pairs, for preferences)."""
    epochs: int = 0
    """Passes over the training rows; sets `steps`, the last step filled up from the next pass. 0: `steps` as it is."""
    max_prompt_tokens: int = 256
    """Longer prompts are dropped, and counted."""
    max_response_tokens: int = 256
    """Longer given responses (examples, preferences) are cut, and counted."""


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """A set of slots (a GPU, or a process on a machine without one); roles in one pool share its processes."""

    slots: int = 1
    """Processes, one per GPU; with `nodes`, on each of them. 0: all GPUs, or two processes on a machine without (one
    where it has one core), divided among the pools that say 0."""
    nodes: int = 0
    """Nodes the pool spans, `slots` on each; 0: `slots` in all, on as few nodes as have room."""
    share: float = 0.0
    """Slots as a share of `placement.slots` instead, rounded down; 0 for `slots`."""
    device: str = "auto"
    """`auto` (cuda where there is one), `cuda` or `cpu`."""
    device_bytes: int | None = None
    """Most bytes that the roles' weights, optimizer states and caches may have on the device of a slot; what is not at
    work waits in host memory. None: what the GPU has; on a CPU no limit, and nothing moves."""


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """Which role runs where, and how far generation may run ahead."""

    pools: dict[str, PoolConfig] = field(default_factory=dict)
    """Pool name -> its slots."""
    roles: dict[str, str] = field(default_factory=dict)
    """Role -> pool. A key may be a role of the recipe, a kind of role (`Critic`), or `default` for all others."""
    rollout: str | dict[str, str] | None = None
    """Pool that generates, with weights of its own, or one for each role: {actor: a, opponent: b}. None, and for roles
    that are not named: the pool where the role trains."""
    max_staleness: int = 0
    """Updates that the policy which generates may be behind; 0 is synchronous. Above 0 needs a rollout pool."""
    interrupt: bool = False
    """Interrupt generation at a weight update and continue the responses, and episodes, with the new weights; for
    max_staleness above 0. False: the update waits until they are done."""
    pieces: int = 1
    """In how many pieces models of other pools (reference, critic, reward models) and rules take responses and
    episodes, each as soon as its own are over, while others are still made. Rows are cut in their order, so that
    results do not depend on time; in the last bits they do on this number. 1: models wait for all of a step."""
    slots: int = 0
    """Slots that pools with a `share` divide; 0 where none has one."""
    cluster: str | None = None
    """Cluster that placement=auto plans for, e.g. 2x8xH100; None: this machine."""
    calibration: PathText | None = None
    """File of `rlhf-dist profile` that placement=auto plans with; None: typical efficiencies."""
    host_processes: int = 1
    """CPU processes for sources, rule rewards and host ops."""


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """How the controller reaches Ray."""

    address: str | None = None
    """`auto` or host:port of a running cluster that this machine is a node of; None starts one on this machine,
    whatever RAY_ADDRESS says, and ends it with the run."""
    object_store_bytes: int = 512 << 20
    """Object store of a cluster started here."""
    spare_slots: int = 0
    """Slots beyond those of the pools that a cluster started here has, for pools that grow while the run goes."""
    ready_timeout_s: float = 120.0
    """Longest wait for slots to become free."""
    call_timeout_s: float = 1800.0
    """Longest a single operation may take before the run fails, naming it."""
    worker_env: dict[str, str] = field(default_factory=dict)
    """Environment variables of worker processes, beside those of this one that libraries read (NCCL_*, HF_*, ...).
    `$NAME` is the value that NAME has where the run is started: secrets are given so, and are written nowhere."""


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """What a run does when a process, a node or a connection fails; failures of data and code always end it."""

    retries: int = 3
    """Recoveries in any `window_steps` steps before the run ends; 0: the first failure ends it, for `resume=auto`."""
    window_steps: int = 100
    """Steps that `retries` counts in."""
    backoff_s: float = 5.0
    """Wait before the second recovery at one step; it doubles with each further one. The first begins at once."""
    settle_s: float = 120.0
    """Longest wait for the processes that live to end what they are at; those that do not are rebuilt as well."""
    memory_every: int = 0
    """Steps between copies of what every rank has learned, kept in the memory of another node where there is one: a run
    goes back to the newest copy or checkpoint. 0: none. Takes 12 bytes a trained parameter (float32 weights and both
    moments), twice while one is made."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What the run leaves behind."""

    root: PathText = "runs"
    """Folder of all runs; this run writes to root/name."""
    checkpoint_every: int | None = 0
    """Steps between checkpoints, and one after the last step; 0 for the last one only, null for none at all."""
    keep_checkpoints: int = 2
    """Older checkpoints are deleted once a new one is complete; 0 keeps all."""
    store: str | None = None
    """Where checkpoints are copied to while the run goes on, and a resumed run finds them: a URL of any file system
    that fsspec knows, e.g. s3://bucket/prefix (extra `s3`), file:///mnt/backup; the run's name is added. None: none."""
    store_options: dict[str, Any] = field(default_factory=dict)
    """Options of that file system, e.g. {endpoint_url: "http://host:9000"}; no secrets, config.yaml keeps them."""
    store_retry_s: float = 600.0
    """Longest that a copy which fails is tried again, with waits that double, and that a run which has ended waits for
    the next file; then it is said."""
    save_model: bool = True
    """Write the trained models as Hugging Face folders when the run ends."""
    evaluate_every: int = 0
    """Steps between evaluations on `data.heldout`; 0 for before the first and after the last step only."""
    evaluate_beside: bool = False
    """Evaluate beside the steps, in the pool that generates, while others train: only the next weight sync waits for
    it. For roles with `placement.rollout` in a pool of its own, and evaluate_every. False: steps wait for it."""
    rollouts_every: int = 10
    """Steps between Parquet dumps of sampled rollouts; 0 for none."""
    rollout_rows: int = 16
    """Rows in such a dump."""
    inputs_every: int = 0
    """Steps between those whose nodes' inputs and outputs are kept, for `rlhf-dist replay`; 0: only the inputs of calls
    that fail, which are kept always."""
    inputs_nodes: tuple[str, ...] = ()
    """Nodes whose inputs are kept, e.g. [actor.update_actor]; [] for all."""
    keep_inputs: int = 2
    """Older steps are deleted once there are so many; 0 keeps no inputs at all, of failures neither."""
    notice_file: PathText | None = None
    """When this file appears the run saves, and ends with exit code 75, as on SIGTERM; null: what the environment's
    RLHF_DIST_NOTICE_FILE says, or none."""
    notice_s: float = 25.0
    """From such a notice to the end: the step under way has half of it."""
    tracker: str = "none"
    """`wandb` or `mlflow` (extra `tracking`), `trackio` or `swanlab` (extras of that name) beside metrics.jsonl and
    TensorBoard; all of them stay in the run's folder."""
    prometheus_port: int | None = None
    """Port of http://127.0.0.1:PORT/metrics, for Prometheus: the run's metrics, seconds of nodes, this machine and its
    GPUs (extra `prometheus`); 0 takes a free one. None: nothing listens."""
    prometheus_host: str = "127.0.0.1"
    """Address it listens on; another than this machine's own wants RLHF_DIST_PROMETHEUS_TOKEN in the environment."""


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Traces of what processes do, for Perfetto or chrome://tracing."""

    steps: tuple[int, ...] = ()
    """Steps of which every op on every rank writes a trace and what it did to memory, e.g. [3]; [] for none."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The root: what all recipes share. A recipe's roles and its own `algorithm` section are added to it."""

    name: str = MISSING
    """Name of the run and of its folder."""
    steps: int = 100
    """Steps to run; one step is one pass over the recipe."""
    seed: int = 0
    """Of everything random: data order, initial heads, sampling."""
    resume: str = "never"
    """`never` (an earlier run of this name is an error), `auto` (continue from its newest good checkpoint; a run
    without one is kept under another name), `step_N` (from that one), `overwrite` (delete it)."""
    resume_changes: tuple[str, ...] = ()
    """Settings that may be others than a checkpoint was made with, e.g. [actor.optimizer.lr, data.*]; what decides
    what a step sees is compared, and a change of another is refused."""
    data: DataConfig = field(default_factory=DataConfig)
    """Rows in."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Where roles run."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The cluster."""
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    """What happens when a part of it fails."""
    output: OutputConfig = field(default_factory=OutputConfig)
    """Files out."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Where the time of a step goes."""
