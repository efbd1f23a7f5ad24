"""What compression cost: protocols that run on dense and on compressed models alike."""

from oats_vision.evaluation.compare import Difference, paired_difference
from oats_vision.evaluation.features import Features, cached_features, extract_features
from oats_vision.evaluation.knn import knn
from oats_vision.evaluation.linear_probe import Probe, linear_probe, quick_probe
from oats_vision.evaluation.top1 import Top1, evaluate_top1

__all__ = [
    "Difference",
    "Features",
    "Probe",
    "Top1",
    "cached_features",
    "evaluate_top1",
    "extract_features",
    "knn",
    "linear_probe",
    "paired_difference",
    "quick_probe",
]
