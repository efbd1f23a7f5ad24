"""OATS: sparse plus low-rank, found after the columns are scaled by the second moment of their inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from oats_vision.compression.methods import LinearMethod, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from oats_vision.calibration.statistics import Gram, Statistic
    from oats_vision.compression.settings import Budgets, CompressionOptions, CompressionSettings
    from oats_vision.core.budget import Budget
    from oats_vision.core.correlations import Correlations
    from oats_vision.core.oats import Factors

START_ITERATIONS = 20  # at most, before joint rounds: what more of them would gain, the rounds find too
# joint rounds: one for each eight tokens that an input feature was seen on, at least 7 and at most 16. What more would
# find in fewer tokens is chance, which other data do not share
TOKENS_A_ROUND, FEWEST_ROUNDS, MOST_ROUNDS = 8, 7, 16
# of the fast solver, and of conjugate gradients after it: an error 10 to 70% too high, by about the same share in all
# layers
ROUGH_ITERATIONS, ROUGH_STEPS = 10, 3


@register
class OATS(LinearMethod):
    """W ~ S + U V; see `core/oats.py`, and `core/refit.py` for what is done with the inputs' correlations."""

    name = "oats"
    citation = "Zhang & Papyan, OATS: Outlier-Aware Pruning Through Sparse and Low Rank Decomposition, ICLR 2025"
    rank_ratio = None
    has_quality = True
    takes_values = True

    def check(self, options: CompressionOptions) -> None:
        """Raises ValueError if rank ratio auto is asked for with N:M, which fixes it, or values without moments."""
        super().check(options)
        levers = self.levers(options)
        if options.bits:
            self._check_bits(options)
        if (options.values or options.bits) and not (levers["refit"] or levers["joint"]):
            given = "values" if options.values else "bits"
            what = "quality best or fast, or refit" if options.scaling == "second_moment" else "scaling second_moment"
            raise ValueError(f"{given} rounds by the inputs' second moments: use {what}")
        if options.rank_ratio == "auto" and (options.values or options.density):
            raise ValueError("rank_ratio auto is for floating values and a rate")
        if options.rank_ratio == "auto" and options.pattern not in (None, "row", "layer"):
            raise ValueError("rank_ratio auto is for method oats with pattern row or layer")

    def _check_bits(self, options: CompressionOptions) -> None:
        for name in ("rate", "values", "factors", "density", "rank_ratio", "pattern"):
            if getattr(options, name) is not None:
                raise ValueError(f"{name} and `bits` are both given, and bits chooses it: leave one of them out")
        if options.budget not in (None, "measured"):
            raise ValueError(f"budget must be measured (or left out) with bits, got {options.budget}")
        if given := self._of_format(options):
            raise ValueError(f"{given} must be left out with bits, which chooses the format")

    def levers(self, options: CompressionOptions) -> dict[str, bool]:
        """By quality, where none is named; all but targets need the second moments that scaling second_moment takes."""
        moments, best = options.scaling == "second_moment", options.quality in (None, "best")
        refit = moments and (options.quality != "plain" if options.refit is None else options.refit)
        joint = moments and (best and refit if options.joint is None else options.joint)
        targets = moments and best if options.targets is None else options.targets
        sensitivity = joint and (best if options.sensitivity is None else options.sensitivity)
        return {"refit": refit, "joint": joint, "targets": targets, "sensitivity": sensitivity}

    def needs(self, lever: str) -> str:
        return "weighs the joint rounds: give joint too" if lever == "sensitivity" else super().needs(lever)

    def budget(self, options: CompressionOptions) -> Budgets:
        """Measured with sensitivity, unless the pattern fixes each layer's density, or speed its rank ratio."""
        if options.bits:
            return "measured"
        free = options.pattern in (None, "row", "layer") and options.rank_ratio != "auto" and options.density is None
        return "measured" if free and self.levers(options)["sensitivity"] else "uniform"

    def statistic(self, settings: CompressionSettings, in_features: int, device: torch.device) -> Statistic:
        from oats_vision.calibration.statistics import SCALES, Gram

        if settings.refit or settings.joint:
            return Gram(in_features, device)
        return SCALES[settings.scaling](in_features, device)

    def decompose(self, weight: Tensor, statistic: Statistic, budget: Budget, settings: CompressionSettings) -> Factors:
        return self.decompose_for_output(weight, statistic, budget, settings, None)

    def decompose_for_output(
        self,
        weight: Tensor,
        statistic: Statistic,
        budget: Budget,
        settings: CompressionSettings,
        outputs: Correlations | None,
    ) -> Factors:
        from oats_vision.calibration.statistics import Gram
        from oats_vision.core.joint import joint
        from oats_vision.core.refit import refit

        factors = self._start(
            weight,
            statistic,
            budget,
            solver=settings.solver,
            iterations=min(settings.iterations, START_ITERATIONS) if settings.joint else settings.iterations,
            tolerance=settings.tolerance,
        )
        if not isinstance(statistic, Gram):
            return factors
        whole = keeps_all(weight, budget)
        if settings.joint and not whole:
            factors = joint(
                weight,
                factors,
                budget,
                statistic.correlations(),
                outputs,
                rounds=joint_rounds(statistic.tokens, weight.shape[1]),
            )
        if settings.refit and not whole:
            # after the joint rounds S, U and V are nearly there
            rounds, steps = (1, 4) if settings.joint else (3, 5)
            moments = statistic.shares(factors.S.dtype)
            factors = refit(weight, factors, moments, outputs, rounds=rounds, steps=steps)
        return self._rounded(weight, factors, statistic, budget, rounds=2)

    def decompose_roughly(
        self, weight: Tensor, statistic: Statistic, budget: Budget, settings: CompressionSettings
    ) -> Factors:
        from oats_vision.calibration.statistics import Gram
        from oats_vision.core.refit import refit

        few = min(settings.iterations, ROUGH_ITERATIONS)
        factors = self._start(weight, statistic, budget, iterations=few)
        if not isinstance(statistic, Gram):
            return factors
        if settings.refit and not keeps_all(weight, budget):
            factors = refit(
                weight, factors, statistic.shares(factors.S.dtype), rounds=1, steps=ROUGH_STEPS, judged=False
            )
        return self._rounded(weight, factors, statistic, budget, rounds=1)

    def _start(self, weight: Tensor, statistic: Statistic, budget: Budget, **how: Any) -> Factors:
        """The paper's algorithm.

        Args:
            how: what `oats` takes besides.
        """
        from oats_vision.core.oats import Factors, arithmetic, oats
        from oats_vision.kernels.thresholding import sparse_term

        D = statistic.scale()
        if keeps_all(weight, budget) and not budget.rank:  # and nothing is to be found
            return Factors.sparse(arithmetic(weight), arithmetic(weight), D.to(arithmetic(weight)))
        return oats(weight, D, budget, sparse_term=sparse_term, **how)

    def _rounded(self, weight: Tensor, factors: Factors, statistic: Gram, budget: Budget, rounds: int) -> Factors:
        """With values of few bits, where the budget has them."""
        from oats_vision.core.quantise import quantised

        if not budget.grid:
            return factors
        kept = None if keeps_all(weight, budget) else factors.S != 0
        known = statistic.inverse_factor()
        return quantised(
            weight,
            factors,
            statistic.compute(),
            budget.grid,
            kept,
            rounds=rounds,
            factor=known,
            int8_factors=budget.int8_factors,
        )

    def working_set(self, settings: CompressionSettings) -> tuple[int, int]:
        matrices, moments = (11, 2 * 8 + 4) if settings.refit or settings.joint else (8, 0)
        if settings.grid:
            moments = 5 * 8 + 4  # as of SparseGPT
        return matrices + 8 * (settings.rank_ratio == "auto"), moments  # the results for the other rank ratios


def joint_rounds(tokens: int, in_features: int) -> int:
    """As many as what is known of the inputs is worth."""
    return min(max(tokens // (TOKENS_A_ROUND * in_features), FEWEST_ROUNDS), MOST_ROUNDS)


def keeps_all(weight: Tensor, budget: Budget) -> bool:
    """Whether S keeps every weight: what U V leave is all in it then, and nothing is to be chosen."""
    return budget.nonzeros == weight.numel()
