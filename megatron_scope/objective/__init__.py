"""What is learnt from a step's responses: weights, per-token coefficients and the loss of a micro-batch."""

from megatron_scope.objective.objectives import Objective, TokenTerms, build_objective

__all__ = ["Objective", "TokenTerms", "build_objective"]
