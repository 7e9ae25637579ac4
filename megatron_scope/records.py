"""The typed records that pass between the stages of a step (numpy and plain Python; no torch)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

FinishReason = Literal["stop", "length", "abort"]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One problem, tokenised once; the same ids go to the server and to the trainer."""

    id: str
    token_ids: tuple[int, ...]
    answer: str
    task: str


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How responses are drawn. `top_p=1` and `top_k=-1` leave the distribution whole."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One sampled response as the engine gave it.

    `output_ids` keep a matched stop token. `engine_logprobs` holds one float per output id, in nats, of the
    temperature-scaled distribution (not renormalised by top-p or top-k).
    """

    prompt: Prompt
    sample: int
    output_ids: tuple[int, ...]
    text: str
    engine_logprobs: tuple[float, ...]
    finish_reason: FinishReason
    weight_version: int


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the verifier says of one response; `error` tells why it could not judge (then `correct` is
    False).
    """

    correct: bool
    extracted: str | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class JudgedRollout:
    """A rollout with its verdict."""

    rollout: Rollout
    verdict: Verdict


@dataclasses.dataclass(frozen=True)
class Response:
    """One verified response as the training ranks see it.

    `index` is its number: its place among the step's rollouts while they arrive, and in the canonical order
    of the usable ones once all are there. `prompt_ids` [P] and `output_ids` [R] are int64; `engine_logprobs`
    [R] is float32 and NaN where no engine reported one. `stopped` tells that its last token is a stop token,
    not the length limit's.
    """

    index: int
    correct: bool
    stopped: bool
    prompt_ids: np.ndarray
    output_ids: np.ndarray
    engine_logprobs: np.ndarray

    @property
    def num_input_tokens(self) -> int:
        """Tokens that the model reads: all but the last output token, which is only a target."""
        return len(self.prompt_ids) + len(self.output_ids) - 1


@dataclasses.dataclass(frozen=True)
class SequenceLimits:
    """What every model of a run can take: token ids below `vocab_size`, `max_positions` tokens in a row."""

    vocab_size: int
    max_positions: int


@dataclasses.dataclass(frozen=True)
class RolloutCounts:
    """What became of a step's rollouts; `aborted`, `empty` and `dropped_truncated` ones are not learnt
    from.
    """

    prompts: int
    sampled: int
    aborted: int
    empty: int
    truncated: int
    dropped_truncated: int
    verify_errors: int
    skipped_prompts: int  # since the run began: prompts over data.max_prompt_tokens


@dataclasses.dataclass(frozen=True)
class ResponseTable:
    """What every rank knows of all N usable responses of a step, in canonical order.

    `group` int64 [N], `update` int64 [N] (which of the step's optimizer updates learns from it, a whole
    prompt in one), `correct` bool [N], `num_tokens` int64 [N] (response tokens), `num_input_tokens` int64
    [N].
    """

    group: np.ndarray
    update: np.ndarray
    correct: np.ndarray
    num_tokens: np.ndarray
    num_input_tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.group)


@dataclasses.dataclass(frozen=True)
class ServerProbe:
    """A few responses that one rollout server has drawn, for the trainer to score itself. Indices number the
    responses of all servers.
    """

    url: str
    responses: tuple[Response, ...]


@dataclasses.dataclass(frozen=True)
class StepPart:
    """The usable responses that have arrived since the part before, by place; `is_last` ends the step."""

    responses: tuple[Response, ...]
    is_last: bool


@dataclasses.dataclass(frozen=True)
class StepSummary:
    """What is known of a step once all its rollouts are there.

    `table` has its N usable responses in canonical order, `places` int64 [N] their places among the rollouts,
    and `names` ("prompt id, sample") what messages call them. `last_arrival_s` is the time of the last
    verdict by the machine's monotonic clock.
    """

    table: ResponseTable
    places: np.ndarray
    names: tuple[str, ...]
    counts: RolloutCounts
    oldest_version: int  # of the weights that made these responses
    last_arrival_s: float


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Sequences packed end to end: T input tokens, of which R positions predict a response token.

    `tokens`, `positions` int64 [T]; `cu_seqlens` int32 [S+1] with `cu_seqlens[-1] == T` (tail padding is a
    segment of its own); `rows` int64 [R] indexes the T positions; `targets` int64 [R]; `response` int64 [R]
    is the canonical index of the response that a row belongs to, whose rows lie together and in order; `stop`
    bool [R] marks the stop token that ended a response; `engine_logprobs` float32 [R].
    """

    tokens: np.ndarray
    positions: np.ndarray
    cu_seqlens: np.ndarray
    rows: np.ndarray
    targets: np.ndarray
    response: np.ndarray
    stop: np.ndarray
    engine_logprobs: np.ndarray

    @classmethod
    def of_padding(cls, num_tokens: int) -> MicroBatch:
        """One without responses, so that all replicas can run the same number."""
        none = np.zeros(0, dtype=np.int64)
        return cls(
            tokens=np.zeros(num_tokens, dtype=np.int64),
            positions=np.arange(num_tokens),
            cu_seqlens=np.array([0, num_tokens], dtype=np.int32),
            rows=none,
            targets=none,
            response=none,
            stop=np.zeros(0, dtype=bool),
            engine_logprobs=np.zeros(0, dtype=np.float32),
        )


@dataclasses.dataclass(frozen=True)
class ResponseCoefficients:
    """The factors of each response's tokens in the loss, float64 [N], 0 where a response has no such term.

    `likelihood` multiplies the likelihood term of a token (Eq. 2), `distill` the distillation term (Eq. 3),
    `advantage` the policy-gradient term and carries its sign, `reference_kl` the KL to the initial student.
    All denominators are folded in, so the loss of an update is a plain sum over tokens.
    """

    likelihood: np.ndarray
    distill: np.ndarray
    advantage: np.ndarray
    reference_kl: np.ndarray

    def only(self, chosen: np.ndarray) -> ResponseCoefficients:
        """The same with 0 for every response that is not `chosen`, bool [N]."""
        return ResponseCoefficients(
            *(np.where(chosen, getattr(self, field.name), 0.0) for field in dataclasses.fields(self))
        )

    def times(self, factor: np.ndarray) -> ResponseCoefficients:
        """The same with each response's multiplied by its `factor`, float64 [N]."""
        return ResponseCoefficients(
            *(factor * getattr(self, field.name) for field in dataclasses.fields(self))
        )


@dataclasses.dataclass(frozen=True)
class WeightBucket:
    """Tensors that travel together as one flat run of bytes, in this order and without gaps, by their
    Hugging Face names; dtypes are torch's names ("float32").
    """

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """What a rollout server tells of itself: its ranks, its weights' version and the model it was given."""

    url: str
    tensor_parallel: int
    weight_version: str
    model_path: str
    architectures: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class StageTransfer:
    """The weights of one pipeline stage: its buckets in order, and the process group that carries them."""

    group_name: str
    buckets: tuple[WeightBucket, ...]


@dataclasses.dataclass(frozen=True)
class WeightTransfer:
    """One publish without disk, as the servers hear of it.

    In every group rank 0 is a rank of the trainer; the tensor-parallel ranks of each server follow from its
    entry of `rank_offsets` (by URL) on. Groups that are `new` are made first, over the store at
    `master_address:master_port`.
    """

    version: int
    stages: tuple[StageTransfer, ...]
    rank_offsets: dict[str, int]
    world_size: int
    backend: str  # "nccl" or "gloo"
    master_address: str
    master_port: int
    new: bool
