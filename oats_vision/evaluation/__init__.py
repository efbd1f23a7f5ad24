"""What compression cost: protocols that run on dense and on compressed models alike."""

from oats_vision.evaluation.compare import Difference, Ratio, paired_difference, paired_ratio
from oats_vision.evaluation.features import Features, cached_features, extract_features
from oats_vision.evaluation.knn import knn
from oats_vision.evaluation.linear_probe import Probe, linear_probe, quick_probe
from oats_vision.evaluation.perplexity import Perplexity, perplexity
from oats_vision.evaluation.top1 import Top1, evaluate_top1

__all__ = [
    "Difference",
    "Features",
    "Perplexity",
    "Probe",
    "Ratio",
    "Top1",
    "cached_features",
    "evaluate_top1",
    "extract_features",
    "knn",
    "linear_probe",
    "paired_difference",
    "paired_ratio",
    "perplexity",
    "quick_probe",
]
