"""Every setting with its one default. Units are in the names: `_s` seconds, `_tokens` tokens.

Settings of the paper (arXiv:2604.10688, Table 3) are the defaults where it states one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from enum import StrEnum
from typing import Any


class Engine(StrEnum):
    SGLANG = "sglang"
    EMBEDDED = "embedded"
    REPLAY = "replay"


class Truncated(StrEnum):
    KEEP = "keep"
    DROP = "drop"


class Correction(StrEnum):
    NONE = "none"
    TRUNCATED_IMPORTANCE = "truncated_importance"


class ObjectiveName(StrEnum):
    SCOPE = "scope"
    OPD = "opd"
    GRPO = "grpo"
    KD = "kd"
    SFT = "sft"


class Divergence(StrEnum):
    SAMPLED = "sampled"
    REVERSE_KL = "reverse_kl"
    FORWARD_KL = "forward_kl"
    JSD = "jsd"


class Preset(StrEnum):
    PAPER = "paper"
    OFFICIAL = "official"


class Aggregation(StrEnum):
    SEQUENCE_SUM = "sequence_sum"
    SEQUENCE_MEAN = "sequence_mean"
    TOKEN_MEAN = "token_mean"


class WeightScale(StrEnum):
    SUM_TO_ONE = "sum_to_one"
    MEAN_ONE = "mean_one"


class CorrectPath(StrEnum):
    RATIO = "ratio"
    LOG_LIKELIHOOD = "log_likelihood"


class Precision(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Recompute(StrEnum):
    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"


class Overflow(StrEnum):
    FILE = "file"
    RECOMPUTE = "recompute"


class Schedule(StrEnum):
    CONSTANT = "constant"
    COSINE = "cosine"
    LINEAR = "linear"


class Transport(StrEnum):
    DISK = "disk"
    BROADCAST = "broadcast"


COMPANIONS = "hf"  # the folder in a Megatron checkpoint with the Hugging Face config and tokenizer


@dataclasses.dataclass(frozen=True)
class RunConfig:
    output_dir: str | None = None  # required by `train`
    seed: int = 1234
    steps: int = 100
    dump_gradients: str | None = None  # write the first update's gradient here, in Hugging Face names


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    hf: str | None = None  # Hugging Face folder: config.json, safetensors, tokenizer
    # torch_dist checkpoint to read the weights from; `hf` beside it gives config and tokenizer only
    megatron: str | None = None
    pipeline_layers: tuple[int, ...] | None = None  # layers of each pipeline stage; null spreads them evenly

    @property
    def companions(self) -> str:
        """The folder with the model's config.json and tokenizer."""
        return str(self.hf) if self.hf is not None else f"{self.megatron}/{COMPANIONS}"


@dataclasses.dataclass(frozen=True)
class TeacherConfig(ModelConfig):
    # URLs of SGLang servers, all of one model, that score in the place of a model on the ranks; `hf` beside
    # them gives config and tokenizer only
    server: tuple[str, ...] | None = None
    api_key_env: str | None = None  # environment variable that holds the servers' API key
    start_timeout_s: float = 900.0  # how long a server may take to become healthy
    request_timeout_s: float = 600.0
    request_tokens: int = 16384  # of the responses that share a request; one longer response goes alone
    max_concurrent_requests: int = 8  # per server
    # Mean difference of two servers' log-probs of one fixed sequence, nats per token. Logits in bfloat16 lie
    # 0.06 to 0.13 apart, which averages out to about 0.03; two models differ by more than 0.5.
    canary_tolerance: float = 0.05
    # The teacher's own end token where it differs from the student's (a base student under a chat teacher): a
    # response's stop token is scored as this one. null scores the token that the student wrote.
    stop_token_id: int | None = None
    # For exact divergences: host memory of a rank for the teacher's hidden states. What does not fit goes to
    # a file ("file"), or the teacher reads the responses again in the update, as many as fit at a time.
    hidden_states_gb: float = 64.0
    hidden_states_overflow: Overflow = Overflow.FILE


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    sequence: bool = False


@dataclasses.dataclass(frozen=True)
class DataConfig:
    train: str | None = None  # JSON lines {id, prompt, answer, task}; for sft {prompt, response}
    max_prompt_tokens: int = 4096
    system_prompt: str | None = None
    prompt_template: str | None = None  # with a {prompt} field; null uses the tokenizer's chat template
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    stop_token_ids: tuple[int, ...] | None = None  # null takes them from the model's generation config
    shuffle: bool = True


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    engine: Engine = Engine.SGLANG
    servers: tuple[str, ...] = ()
    servers_file: str | None = None  # instead of `servers`: one URL a line; read again while the run goes on
    router: str | None = None  # URL of a router before all servers; weights and health pass it by
    any_sglang_version: bool = False  # also versions that were not tested
    file: str | None = None  # for engine=replay: rows as RUN/rollouts holds them (a file or a folder)
    prompts_per_step: int = 256
    samples_per_prompt: int = 8
    max_new_tokens: int = 12288
    temperature: float = 0.6
    top_p: float = 1.0
    top_k: int = -1
    truncated: Truncated = Truncated.KEEP
    # Score responses while others are still being generated; then sums follow the order of arrival, and two
    # runs agree to rounding only. null does so with engine=sglang.
    overlap_scoring: bool | None = None
    max_concurrent_requests: int = 512  # per server
    request_timeout_s: float = 3600.0
    # how long a server may take to become healthy, and how long to wait for one when none is left
    start_timeout_s: float = 900.0
    health_interval_s: float = 10.0  # between looks at each server while responses are drawn
    health_timeout_s: float = 30.0  # for an answer to such a look; a server that gives none is taken out
    api_key_env: str | None = None  # environment variable that holds the servers' API key
    # Of the gap between the engine that draws a token and the trainer: each drawn token's loss is multiplied
    # by min(pi_old / pi_engine, correction_cap).
    correction: Correction = Correction.NONE
    correction_cap: float = 2.0
    # Mean |trainer - engine| log-prob, in nats per token, over which a step stops before its optimizer
    # update; null never stops.
    logprob_gap_limit: float | None = None


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
    workers: int = 1
    timeout_s: float = 10.0  # per answer


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Defaults are the paper's SCOPE; `presets.py` has those that another name or preset implies."""

    name: ObjectiveName = ObjectiveName.SCOPE
    preset: Preset = Preset.PAPER
    tau: float = 1.0
    student_exponent: float = 1.0  # of PPL_S over correct responses (Eq. 4); 0 uniform, -1 reversed
    teacher_exponent: float = -1.0  # of PPL_T over incorrect responses (Eq. 5); 0 uniform, +1 reversed
    weight_scale: WeightScale = WeightScale.SUM_TO_ONE  # of a set's weights; mean_one multiplies by its size
    correct_path: CorrectPath = CorrectPath.RATIO  # -rho (Eq. 2), or plain -log pi
    divergence: Divergence = Divergence.SAMPLED
    aggregation: Aggregation = Aggregation.SEQUENCE_SUM  # from tokens to the loss
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    ratio_clip: float | None = None  # of rho, to 1 +- this; null never clips
    kl_coefficient: float = 0.0  # of the k3 estimate of KL(student || initial student); grpo only


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    micro_batch_tokens: int = 16384  # packed tokens of one micro-batch; one longer response stands alone
    updates_per_batch: int = 1  # optimizer updates a step, each on its share of the prompts
    path_gradients_every: int = 0  # steps between measurements of each path's gradient norm; 0 never
    precision: Precision = Precision.BFLOAT16
    recompute: Recompute = Recompute.NONE


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 5e-5
    schedule: Schedule = Schedule.CONSTANT
    warmup_steps: int = 0
    min_lr: float = 0.0  # what a cosine or linear schedule comes down to after the last step
    weight_decay: float = 0.01  # of every parameter, norms and biases too, as AdamW in the paper's code
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0  # 0 turns clipping off


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 50  # steps; 0 saves none
    keep: int = 2


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    max_new_tokens: int = 32768
    bootstrap_resamples: int = 1000
    diversity_responses: int = 4  # correct responses of a problem that are compared; fewer leave it out
    diversity_tokens: int = 2048  # words and signs of each that count


@dataclasses.dataclass(frozen=True)
class SyncConfig:
    # Through a folder on a disk that trainer and servers share, or over process groups (NCCL; gloo on a CPU),
    # which is faster and needs no disk: for models above 8B or so.
    transport: Transport = Transport.DISK
    timeout_s: float = 600.0  # for a server to load a folder, for one whole broadcast
    # Tensors that travel together in a broadcast; a larger one travels alone. A sending rank holds two of
    # these beside its shards.
    bucket_mb: float = 512.0
    # Where the servers reach rank 0's host; null: 127.0.0.1 if they are all on this one, else MASTER_ADDR or
    # the host's name.
    master_address: str | None = None
    # Where rank 0's store listens, for servers and sending ranks to find each other; 0 takes a free port.
    master_port: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    student: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
