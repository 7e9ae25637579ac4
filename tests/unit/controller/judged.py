"""Judged rollouts, made from the few fields that a test cares about."""

from megatron_scope.records import JudgedRollout, Prompt, Rollout, Verdict


def judged(prompt="p", sample=0, *, output=(5, 6, 1), finish="stop", correct=True, error=None, **changes):
    """A rollout with its verdict; `prompt` is the prompt's id, `changes` are other fields of the rollout."""
    fields = {
        "prompt": Prompt(prompt, (2, 3), "42", "math"),
        "sample": sample,
        "output_ids": tuple(output),
        "text": "text",
        "engine_logprobs": tuple(-0.5 * (place + 1) for place in range(len(output))),
        "finish_reason": finish,
        "weight_version": 3,
    }
    return JudgedRollout(Rollout(**{**fields, **changes}), Verdict(correct, "42", error))
