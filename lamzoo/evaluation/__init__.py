"""Scores and predictions: of image classifiers, of text-video retrieval, and of moments in videos."""

from lamzoo.evaluation.classification import EvalProgress, evaluate
from lamzoo.evaluation.finding import Finding, MomentResult, evaluate_moments, find_moments
from lamzoo.evaluation.moments import moment_metrics
from lamzoo.evaluation.partial import default_state_path
from lamzoo.evaluation.prediction import Prediction, class_names, label_names, predict, preprocess
from lamzoo.evaluation.retrieval import dual_softmax, retrieval_metrics
from lamzoo.evaluation.runtime import Precision, check_batches, resolve_device
from lamzoo.evaluation.submissions import read_submission, write_submission
from lamzoo.evaluation.tally import EvalResult

__all__ = [
    "EvalProgress",
    "EvalResult",
    "Finding",
    "MomentResult",
    "Precision",
    "Prediction",
    "check_batches",
    "class_names",
    "default_state_path",
    "dual_softmax",
    "evaluate",
    "evaluate_moments",
    "find_moments",
    "label_names",
    "moment_metrics",
    "predict",
    "preprocess",
    "read_submission",
    "resolve_device",
    "retrieval_metrics",
    "write_submission",
]
