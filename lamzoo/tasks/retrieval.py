"""Text-video retrieval."""

from lamzoo.tasks.base import MetricSpec, Task

#: Headings of the directions in :func:`lamzoo.evaluation.retrieval_metrics`.
DIRECTIONS = {"t2v": "text to video", "v2t": "video to text"}

_METRICS = (
    MetricSpec("t2v_R1", ("t2v", "R1"), "text to video R@1 (%)", "R@1"),
    MetricSpec("t2v_R5", ("t2v", "R5"), "text to video R@5 (%)", "R@5"),
    MetricSpec("t2v_R10", ("t2v", "R10"), "text to video R@10 (%)", "R@10"),
    MetricSpec("t2v_MedianR", ("t2v", "MedianR"), "text to video median rank", "MedR", higher_is_better=False),
    MetricSpec("v2t_R1", ("v2t", "R1"), "video to text R@1 (%)", "video to text: R@1"),
    MetricSpec("v2t_R5", ("v2t", "R5"), "video to text R@5 (%)", "R@5"),
    MetricSpec("v2t_R10", ("v2t", "R10"), "video to text R@10 (%)", "R@10"),
    MetricSpec("v2t_MedianR", ("v2t", "MedianR"), "video to text median rank", "MedR", higher_is_better=False),
)

RETRIEVAL = Task(
    name="retrieval",
    about="text-video retrieval",
    items="videos",
    model_kind="a model of the family lam_clip4clip",
    kinds=("msrvtt", "msvd", "videos", "wds", "grid", "flickr8k"),
    metrics=_METRICS,
    open="lamzoo.data.retrieval.factory:create_retrieval_dataset",
    evaluate="lamzoo.evaluation.retrieval.evaluate:score_retrieval",
    table="lamzoo.evaluation.retrieval.metrics:score_table",
    recipe="lamzoo.training.retrieval.recipe:RetrievalRecipe",
    run="lamzoo.training.retrieval.run:RetrievalRun",
    defaults="lamzoo.training.defaults:for_videos",
    explains="queries",
    explore="lamzoo.report.explorer.retrieval_page:explore_retrieval",
    explore_video="lamzoo.report.explorer.retrieval_page:explore_video",
    explain_hint="give --html FILE.html",
    options=("fps", "slicing", "dual_softmax", "rerank", "on_bad_input"),
    describe_input="lamzoo.evaluation.retrieval.evaluate:describe_input",
    reads_images=True,
)
