"""Image classification."""

from lamzoo.tasks.base import MetricSpec, Task

CLASSIFICATION = Task(
    name="classification",
    about="image classification",
    items="images",
    model_kind="a classifier",
    kinds=("imagefolder", "imagelist", "npz", "torchvision", "hfds", "wds"),
    metrics=(
        MetricSpec("top1", ("top1",), "top-1 (%)"),
        MetricSpec("top5", ("top5",), "top-5 (%)"),
        MetricSpec("loss", ("loss",), "loss", decimals=4, higher_is_better=False, column="eval_loss"),
    ),
    open="lamzoo.data.images.factory:create_dataset",
    open_scored="lamzoo.data.trained:open_scored",
    evaluate="lamzoo.evaluation.classification.evaluate:score_classifier",
    table="lamzoo.evaluation.classification.evaluate:score_table",
    recipe="lamzoo.training.recipe:Recipe",
    run="lamzoo.training.classification.run:ClassificationRun",
    defaults="lamzoo.training.defaults:for_images",
    options=("class_map", "real_labels", "on_bad_input", "limit", "state", "resume"),
    explain="lamzoo.report.mask_pictures:explain",
    explore="lamzoo.report.explorer.runs:explore_image",
    figure="lamzoo.report.paper_figure:figure_image",
    describe_input="lamzoo.evaluation.classification.evaluate:describe_input",
    reads_images=True,
)
