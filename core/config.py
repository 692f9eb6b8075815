"""Every option of a run: its type, its default, one line of meaning. One YAML file is one `RunConfig`.

The defaults are the recommended setting, so a run's file states only what is particular to the run. `core.loading`
reads files and overrides into this tree. Options of methods and rewards are not here: they are the keyword arguments
of the functions that use them (`alignlab ls methods`, `alignlab ls rewards`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from core.learner_config import LearnerConfig
from core.section import Count, DType, NonNegative, Positive, PositiveFloat, Section, Share


class LoraConfig(Section):
    """Adapters: matrices A and B beside each frozen W, which acts as W + alpha / rank * B A (learner/adapters.py)."""

    rank: Positive = 8
    """Rows of A and columns of B: capacity, memory and bytes of a hand-off grow with it."""
    alpha: PositiveFloat = 32.0
    """The product counts alpha / rank times, so the learning rate need not change with the rank."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Linear layers by name (q_proj, or model.layers.0.mlp.up_proj); all-linear is each but the output head."""


class ModelConfig(Section):
    path: str
    """Folder or hub name of a causal language model that transformers loads."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); none is the hub's default."""
    reference: str | None = None
    """Folder or hub name of the frozen reference policy; none is the model as the run starts."""
    reference_every: Count = 0
    """Steps between moves of the reference towards the policy; 0 keeps it where it is."""
    reference_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """How far a move goes: 1 is a reset to the policy, less a moving average (TRL: 0.6 every 512 steps)."""
    dtype: DType = "float32"
    """Precision of the learner's forward and backward pass; master weights are always float32."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers in the learner."""
    lora: LoraConfig | None = None
    """Train adapters only, at about ten times the learning rate; none trains all weights. A reference that is not named
    is then the policy without its adapters, which takes no memory."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.lora is not None and self.reference_every:
            raise ValueError(
                f"model.reference_every {self.reference_every} moves the reference towards the policy, but with "
                "model.lora the base model stays where it is; leave one of them out"
            )
        return self


class SourcesConfig(Section):
    """Prompts of several sources, drawn with probabilities that a mixer moves."""

    column: str = "source"
    """Column that names a row's source."""
    mixer: dict[str, Any] = {"name": "dga"}
    """{name: dga, and its options}: how the probabilities move (rewards/sources.py)."""
    signal: Literal["advantage", "gradient"] = "advantage"
    """What the mixer is told of a source: mean |advantage|, or its gradient's agreement with the target's."""
    target: str | None = None
    """Source whose gradient the others are compared with (signal gradient); none is all of them together."""


class DataConfig(Section):
    path: str
    """JSONL file, or hub name of a dataset (needs the `hub` extra)."""
    split: str = "train"
    """Split of a hub dataset; ignored for a file."""
    prompt_column: str = "question"
    """Column that holds the question (a string), or the chat messages (a list of {role, content})."""
    completion_column: str | None = None
    """Column that holds the demonstration; for methods that learn from demonstrations (`sft`), and only for them."""
    rejected_column: str | None = None
    """Column that holds the completion to which the other was preferred; for methods that learn from pairs (`dpo`)."""
    baseline_column: str | None = None
    """Column with a number per prompt that its rewards are compared with; for methods that take it from the data."""
    sources: SourcesConfig | None = None
    """Draw prompts by source with moving probabilities; none takes the rows as they come."""
    system: str | None = None
    """System message put before every question; none leaves it out."""
    template: str = "{prompt}"
    """What the user message says; {prompt} and any other column may be named."""
    chat_template: bool = True
    """Render with the tokenizer's chat template; false continues the bare text."""
    max_prompt_tokens: Positive = 512
    """Longer prompts are left out (counted and said at the start)."""
    shuffle: bool = True
    """A new order each pass over the data, a pure function of (seed, position); false keeps the file's order."""
    limit: Positive | None = None
    """Use only the first rows; none uses all."""


class RolloutConfig(Section):
    prompts: Positive = 32
    """P: prompts per step."""
    group_size: Positive = 8
    """G: completions of each prompt."""
    max_tokens: Positive = 512
    """Longest completion in tokens; what reaches it counts as truncated."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; log-probabilities are taken at the same temperature everywhere."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling; 1 is off. The learner's log-probabilities assume 1."""
    top_k: Count = 0
    """Sample among the k likeliest tokens; 0 is off. The learner's log-probabilities assume 0."""
    min_p: Share = 0.0
    """Drop tokens below this share of the likeliest token's probability; 0 is off. The learner assumes 0."""
    stop: list[str] = []
    """Strings that end a completion (kept in its text)."""
    max_staleness: Count = 0
    """S: (S + 1) x P groups are under way at once, so generation goes on while the learner works; 0 is on-policy."""
    window: Count | None = None
    """Updates within which a group is trained after its admission: a batch waits for what would be left behind longer.
    None is 10 S: narrower windows wait for the longest completions."""
    max_token_age: Count | None = None
    """Tokens whose weights lie more updates behind are left out of the loss, and counted. None is 2 S."""
    deterministic: bool = False
    """Every group is sampled by one version, which depends on its place in the stream alone, and batches are taken in
    order: a run killed anywhere ends with the same parameters. Costs overlap."""
    timeout: PositiveFloat = 3600.0
    """Seconds a group may take on an actor; then another one gets it."""
    max_attempts: Positive = 3
    """How often a group may be lost with its actor, or run into the timeout, before it is dropped with the reason."""

    @property
    def group_age(self) -> int:
        """`window`, where it is not given what it stands for."""
        return 10 * self.max_staleness if self.window is None else self.window

    @property
    def token_age(self) -> int | None:
        """`max_token_age`, where it is not given what it stands for: on-policy no token is old."""
        return (2 * self.max_staleness or None) if self.max_token_age is None else self.max_token_age

    @model_validator(mode="after")
    def _check(self) -> RolloutConfig:
        if self.group_age < self.max_staleness:
            raise ValueError(f"window {self.window} is less than max_staleness {self.max_staleness}; leave it out")
        return self


class ActorsConfig(Section):
    count: Positive = 1
    """Rollout actors; each is one engine."""
    max_count: Positive | None = None
    """More join, up to so many, whenever the cluster has room; none keeps it at `count`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where engines run; auto is cuda when the cluster has GPUs."""
    tensor_parallel: Positive = 1
    """GPUs (or CPU processes) of one engine."""
    dtype: DType | None = None
    """Precision of the engine; none is the model's `dtype`."""
    max_model_len: Positive | None = None
    """Longest prompt plus completion; none is max_prompt_tokens + the larger max_tokens of rollout and eval."""
    max_num_seqs: Positive = 256
    """Sequences an engine decodes at once."""
    prefix_caching: bool = True
    """Share the cache of common prompt prefixes, within one weight version."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that an engine takes."""
    kv_cache_gib: PositiveFloat = 1.0
    """Cache of an engine on CPU, in GiB; on GPU the utilisation decides."""
    enforce_eager: bool | None = None
    """Run without compilation and CUDA graphs; none is true on CPU (it starts faster) and false on GPU."""
    threads: Positive = 1
    """Compute threads of an engine on CPU."""
    weight_transfer: Literal["auto", "nccl", "object_store"] = "auto"
    """How new weights travel: nccl between GPU pools, Ray's object store otherwise; auto picks by device."""
    start_timeout: PositiveFloat = 600.0
    """Seconds an actor may take from its placement to serving."""
    suspect_timeout: PositiveFloat = 30.0
    """Seconds without a sign of life after which an actor's groups go to others; it may come back."""
    silence_timeout: PositiveFloat = 120.0
    """Seconds without a sign of life after which an actor is presumed dead and replaced."""
    publish_timeout: PositiveFloat = 300.0
    """Seconds an actor may take to verify and load a new version; over NCCL, joining and the broadcast together."""

    @model_validator(mode="after")
    def _check(self) -> ActorsConfig:
        if self.max_count is not None and self.max_count < self.count:
            raise ValueError(
                f"actors.max_count {self.max_count} is less than actors.count {self.count}; leave it out or raise it"
            )
        return self


class RewardModelsConfig(Section):
    """The third pool: processes that hold reward models and judges."""

    count: Positive = 1
    """Processes; each holds every component that wants a model, and they score side by side."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where they run; auto is cuda when the cluster has GPUs."""
    threads: Positive = 1
    """Compute threads of each on CPU."""
    batch: Positive = 64
    """Completions that are handed over at once, of as many groups as are waiting."""
    timeout: PositiveFloat = 120.0
    """Seconds such a batch may take; then its completions are `timeout` and the process is replaced."""
    start_timeout: PositiveFloat = 600.0
    """Seconds a process may take to load its models."""


class AlarmConfig(Section):
    """When a component that is kept out of the reward says that the reward is being gamed."""

    window: Positive = 5
    """Steps over which both are averaged."""
    margin: NonNegative = 0.02
    """How far the gold component may fall below its peak while the objectives are above theirs."""
    stop: bool = False
    """Stop the run at the alarm, instead of saying it."""


class RewardsConfig(Section):
    components: dict[str, dict[str, Any]] = {}
    """Name -> {weight: 1.0, fn: name or my_rewards.py:function (default: the name), shape, bounds, keys, references,
    members, and the function's own options}."""
    weighting: dict[str, Any] = {"policy": "static"}
    """{policy: name, and its options}: how much each component counts in each step (`alignlab ls weightings`)."""
    threshold_search: dict[str, Any] | None = None
    """Search for the thresholds of a constrained policy during the run: {gold: benchmark/accuracy, highest: ...}."""
    gold: str | None = None
    """Component that is scored and watched but never rewarded; the alarm compares the reward with it."""
    alarm: AlarmConfig = AlarmConfig()
    accuracy: str | None = None
    """Component that filters judge (dynamic sampling looks at correctness, not at style); none is the total."""
    renormalize_missing: bool = False
    """Rescale the sum of a completion that lacks components to the weight of all of them."""
    workers: Positive = 1
    """Processes that score; each can be killed without harm to the run."""
    timeout: PositiveFloat = 10.0
    """Seconds one component may take for one completion; then its status is `timeout` and its worker is replaced."""
    memory_gib: PositiveFloat = 4.0
    """Memory one scoring process may take."""
    max_failed: Share = 0.5
    """Share of a step's completions that a component may fail to score (timeout, error) before the run stops."""
    models: RewardModelsConfig = RewardModelsConfig()


class DeadlinesConfig(Section):
    """Seconds that a part of a step may take before the run says what it waits for, and recovers or ends."""

    score: PositiveFloat = 900.0
    """Rewards of one group, those of models included."""
    weigh: PositiveFloat = 900.0
    """Columns and weights of a step, rewards with state and the comparison of gradients included."""
    evaluate: PositiveFloat = 7200.0
    """All benchmarks of one evaluation."""
    checkpoint: PositiveFloat = 1800.0
    """Writing one checkpoint."""
    ledger: PositiveFloat = 120.0
    """Anything that keeps the driver itself from answering, such as a disk that hangs."""


class LedgerConfig(Section):
    sync_seconds: PositiveFloat = 1.0
    """How long records may wait until the disk has them for certain; a killed process loses none in any case."""
    payload_gib: PositiveFloat = 20.0
    """Room for completions and scores; beyond it the oldest that no resume needs are removed (a replay needs them)."""


class CheckpointConfig(Section):
    every: Count = 0
    """Steps between checkpoints; 0 saves only at the end (and at Ctrl-C)."""
    keep: Positive = 2
    """How many of the newest are kept."""


class EvalConfig(Section):
    benchmarks: list[str] = []
    """Names from `alignlab ls benchmarks`, or JSONL files."""
    data: str | None = None
    """Folder with the benchmarks' JSONL files; none loads from the hub."""
    every: Count = 0
    """Steps between evaluations during training; 0 evaluates before the first and after the last step only."""
    limit: Positive | None = None
    """Problems per benchmark; none uses all."""
    samples: Positive = 1
    """k: completions per problem."""
    temperature: NonNegative = 1.0
    """0 is greedy."""
    max_tokens: Positive | None = None
    """Longest completion; none is the rollout's."""


class ClusterConfig(Section):
    address: str | None = None
    """Address of a running Ray cluster ("auto" finds the one of this machine); none starts one here, on loopback."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray's placement strategy within each pool."""
    start_timeout: PositiveFloat = 300.0
    """Seconds the cluster may take to provide the pools."""
    pin_cores: bool | None = None
    """Keep each actor and learner rank on CPU on cores of its own. None does it where they work at the same time
    (max_staleness above 0) and this machine has cores for all of them."""


class RunConfig(Section):
    """One run. `alignlab train FILE key=value ...` reads it, `alignlab check` prints it resolved."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder of the run below `output_dir`: letters, digits, dot, dash, underscore."""
    output_dir: str = "runs"
    """Where runs are kept; every machine of a cluster must see it at the same path."""
    seed: Count = 0
    """Everything random derives from it."""
    steps: Positive
    """Steps of the whole run; a resumed run goes on to the same number."""
    method: str | dict[str, Any] = "grpo"
    """A row of `alignlab ls methods`; or a mapping {row: NAME, part: choice, ...} that changes parts of a row."""
    profile: bool = False
    """Profile the third step: each learner rank's operators, and a timeline of all processes, below `profile/`."""
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    actors: ActorsConfig = ActorsConfig()
    rewards: RewardsConfig = RewardsConfig()
    learner: LearnerConfig = LearnerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    cluster: ClusterConfig = ClusterConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()
    ledger: LedgerConfig = LedgerConfig()

    @property
    def longest(self) -> int:
        """Most tokens of a prompt and its completion, in training and in evaluation."""
        return self.data.max_prompt_tokens + max(self.rollout.max_tokens, self.eval.max_tokens or 0)

    def sum_of_longest(self) -> str:
        """`longest` as a sum of options, for error messages."""
        part = "rollout" if self.rollout.max_tokens >= (self.eval.max_tokens or 0) else "eval"
        return f"data.max_prompt_tokens + {part}.max_tokens = {self.longest}"

    @model_validator(mode="after")
    def _combinations(self) -> RunConfig:
        if self.rollout.prompts % self.learner.minibatches:
            raise ValueError(
                f"rollout.prompts {self.rollout.prompts} cannot be split into learner.minibatches "
                f"{self.learner.minibatches} equal parts; make the first a multiple of the second"
            )
        if self.learner.old_logprobs == "rollout" and self.rollout.max_staleness:
            raise ValueError(
                "learner.old_logprobs rollout: with rollout.max_staleness the engine's log-probabilities are of older "
                "policies; use recompute, or a method whose ratio is to them (method.ratio.token.anchor=rollout)"
            )
        if self.actors.weight_transfer == "nccl" and "cpu" in (self.actors.device, self.learner.device):
            raise ValueError(
                "actors.weight_transfer nccl needs GPUs on both sides, but a device is cpu; use auto or object_store"
            )
        if self.actors.max_model_len is not None and self.actors.max_model_len < self.longest:
            raise ValueError(
                f"actors.max_model_len {self.actors.max_model_len} is less than {self.sum_of_longest()}; "
                "raise the first or lower the others"
            )
        return self
