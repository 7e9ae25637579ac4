"""One exception tree. Every message says what was got, what was expected and how to mend it."""


class ScopeError(Exception):
    """A failure that the user can act on; the command line prints its message without a traceback."""

    exit_code = 1
    on_every_rank = False  # raised on all ranks at once, so that rank 0's report is enough


class ConfigError(ScopeError):
    """The configuration or the command line is wrong; raised before any work is done."""

    exit_code = 2


class DataError(ScopeError):
    """A file that the user gave (prompts, rollouts, model folder) cannot be used as it is."""

    exit_code = 2


class RolloutError(ScopeError):
    """A rollout server is unreachable, refuses a request or answers nonsense."""


class SyncError(ScopeError):
    """New weights did not reach a rollout server, or the server reports another version."""


class StorageError(ScopeError):
    """A rank could not write what it had to: a full disk, a folder without permission."""

    on_every_rank = True


class ScoringError(ScopeError):
    """A log-probability that the loss needs is missing or not finite, or the teacher gives none."""

    on_every_rank = True


class ParityError(ScopeError):
    """The trainer's log-probs lie further from the rollout engine's than allowed; nothing is learnt from its
    responses.
    """

    on_every_rank = True


class TrainingError(ScopeError):
    """The loss or the gradient is not finite; the optimizer was not touched."""

    on_every_rank = True


class CheckpointError(ScopeError):
    """A checkpoint is missing, broken or belongs to another run."""
