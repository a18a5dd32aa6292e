"""Moment retrieval and highlight detection."""

from lamzoo.tasks.base import MetricSpec, Task

MOMENTS = Task(
    name="moments",
    about="moment retrieval",
    items="queries",
    model_kind="a model of the family lam_moment_detr",
    kinds=("qvhighlights", "charades", "tvsum", "grid"),
    metrics=(
        MetricSpec("R1@0.7", ("brief", "MR-full-R1@0.7"), "R1@0.7 (%)", "R1@0.7", column="R1_07"),
        MetricSpec("R1@0.5", ("brief", "MR-full-R1@0.5"), "R1@0.5 (%)", "R1@0.5", column="R1_05"),
        MetricSpec("mAP", ("brief", "MR-full-mAP"), "mAP (%)", "mAP"),
        MetricSpec("HL_mAP", ("brief", "HL-min-VeryGood-mAP"), "highlights mAP (%)"),
        MetricSpec("HL_Hit1", ("brief", "HL-min-VeryGood-Hit1"), "highlights Hit@1 (%)"),
    ),
    open="lamzoo.data.moments.factory:create_moment_dataset",
    evaluate="lamzoo.evaluation.moments.evaluate:score_moments",
    table="lamzoo.evaluation.moments.metrics:score_table",
    recipe="lamzoo.training.moments.recipe:MomentRecipe",
    run="lamzoo.training.moments.run:MomentRun",
    defaults="lamzoo.training.defaults:for_moments",
    predictions=(".jsonl", ".jsonl.gz"),
    score_predictions="lamzoo.evaluation.moments.submissions:score_submission",
    write_predictions="lamzoo.evaluation.moments.submissions:write_submission",
    explain="lamzoo.report.moment_pictures:explain_query",
    explains="queries",
    explore="lamzoo.report.explorer.queries:explore_query",
    takes_videos=True,
    figure="lamzoo.report.paper_figure:figure_query",
    listed="mAP",
    describe_input="lamzoo.evaluation.moments.evaluate:describe_input",
)
