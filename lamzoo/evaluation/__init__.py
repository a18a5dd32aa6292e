"""Evaluation and prediction: image classification, text-video retrieval, moment retrieval and captioning."""

from typing import TYPE_CHECKING

from lamzoo.evaluation.accuracy import EvalResult
from lamzoo.evaluation.captions.coco_results import read_captions, write_captions
from lamzoo.evaluation.captions.metrics import caption_metrics, neighbour_recall, word_error_rate, word_overlap
from lamzoo.evaluation.classification.evaluate import EvalProgress, evaluate
from lamzoo.evaluation.classification.prediction import Prediction, class_names, label_names, predict, preprocess
from lamzoo.evaluation.moments.evaluate import MomentPrediction, MomentResult, evaluate_moments, find_moments
from lamzoo.evaluation.moments.metrics import moment_metrics
from lamzoo.evaluation.moments.submissions import read_submission, write_submission
from lamzoo.evaluation.resume import default_state_path
from lamzoo.evaluation.retrieval.metrics import dual_softmax, retrieval_metrics
from lamzoo.evaluation.runtime import Precision, check_batches, resolve_device
from lamzoo.lazy import submodules_of

__all__ = [
    "EvalProgress",
    "EvalResult",
    "MomentPrediction",
    "MomentResult",
    "Precision",
    "Prediction",
    "caption_metrics",
    "check_batches",
    "class_names",
    "default_state_path",
    "dual_softmax",
    "evaluate",
    "evaluate_moments",
    "find_moments",
    "label_names",
    "moment_metrics",
    "neighbour_recall",
    "predict",
    "preprocess",
    "read_captions",
    "read_submission",
    "resolve_device",
    "retrieval_metrics",
    "word_error_rate",
    "word_overlap",
    "write_captions",
    "write_submission",
]

if not TYPE_CHECKING:  # hidden from type checkers, which would accept any name
    __getattr__ = submodules_of(__name__)
