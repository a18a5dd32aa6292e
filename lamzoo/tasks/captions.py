"""Captioning and audio description of clips."""

from lamzoo.tasks.base import MetricSpec, Task

CAPTIONS = Task(
    name="captions",
    about="captions of clips",
    items="clips",
    model_kind="a model of the family lam_describer",
    kinds=("mad", "lsmdc", "videos", "grid", "flickr8k"),
    metrics=(
        MetricSpec("WER", ("WER",), "word error rate (%)", higher_is_better=False),
        MetricSpec("sentence_accuracy", ("sentence_accuracy",), "sentences right (%)"),
        MetricSpec("CIDEr", ("CIDEr",), "CIDEr", decimals=3),
        MetricSpec("Bleu_4", ("Bleu_4",), "BLEU-4", decimals=3),
        MetricSpec("ROUGE_L", ("ROUGE_L",), "ROUGE-L", decimals=3),
    ),
    open="lamzoo.data.captions.factory:create_caption_dataset",
    evaluate="lamzoo.evaluation.captions.evaluate:score_captions",
    watched="lamzoo.evaluation.captions.evaluate:watched_metric",
    table="lamzoo.evaluation.captions.evaluate:score_table",
    recipe="lamzoo.training.captions.recipe:CaptionRecipe",
    run="lamzoo.training.captions.run:CaptionRun",
    defaults="lamzoo.training.defaults:for_captions",
    options=("beams", "context"),
    predictions=(".json", ".json.gz"),
    score_predictions="lamzoo.evaluation.captions.evaluate:score_file",
    write_predictions="lamzoo.evaluation.captions.coco_results:write_captions",
    explains="queries",
    explore="lamzoo.report.explorer.description_page:explore_description",
    takes_videos=True,
    explain_hint="give --html FILE.html, or `lamzoo describe VIDEO --explain FILE.png`, which draws masks and words",
    listed="CIDEr",
    describe_input="lamzoo.evaluation.captions.evaluate:describe_input",
)
