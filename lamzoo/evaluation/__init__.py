"""Scores and predictions: of image classifiers, and of text-video retrieval."""

from lamzoo.evaluation.classification import EvalProgress, evaluate
from lamzoo.evaluation.moments import moment_metrics
from lamzoo.evaluation.partial import default_state_path
from lamzoo.evaluation.prediction import Prediction, class_names, label_names, predict, preprocess
from lamzoo.evaluation.retrieval import dual_softmax, retrieval_metrics
from lamzoo.evaluation.runtime import Precision, check_batches, resolve_device
from lamzoo.evaluation.tally import EvalResult

__all__ = [
    "EvalProgress",
    "EvalResult",
    "Precision",
    "Prediction",
    "check_batches",
    "class_names",
    "default_state_path",
    "dual_softmax",
    "evaluate",
    "label_names",
    "moment_metrics",
    "predict",
    "preprocess",
    "resolve_device",
    "retrieval_metrics",
]
