"""Names of lamzoo 0.1 that have moved; they work until 0.3, with a ``DeprecationWarning``."""

# Module to module, or dotted name to ``module:name``. A package that has taken the place of a module of the same name
# points to the file in which that module's names are now.
ALIASES: dict[str, str] = {
    "lamzoo.adapters.pruning": "lamzoo.reduction.hooks",
    "lamzoo.adapters.pruning_loss": "lamzoo.reduction.hooks:pruning_loss",
    "lamzoo.adapters.remove_pruning": "lamzoo.reduction.hooks:remove_pruning",
    "lamzoo.adapters.slots": "lamzoo.adapters.hosts",
    "lamzoo.cards": "lamzoo.registry.cards",
    "lamzoo.foreign": "lamzoo.registry.external",
    "lamzoo.lam.tables": "lamzoo.lam.resize",
    "lamzoo.models.caption_decoder": "lamzoo.models.describer.decoder",
    "lamzoo.models.clip4clip": "lamzoo.models.clip4clip.model",
    "lamzoo.models.clip4clip_heads": "lamzoo.models.clip4clip.heads",
    "lamzoo.models.describer": "lamzoo.models.describer.model",
    "lamzoo.models.generation": "lamzoo.models.describer.generation",
    "lamzoo.models.gpt2_decoder": "lamzoo.models.describer.gpt2",
    "lamzoo.models.joint_encoder": "lamzoo.models.describer.encoder",
    "lamzoo.models.moment_detr": "lamzoo.models.moment_detr.model",
    "lamzoo.models.moment_layers": "lamzoo.models.moment_detr.layers",
    "lamzoo.models.qd_detr": "lamzoo.models.moment_detr.qd_detr",
    "lamzoo.models.spans": "lamzoo.models.moment_detr.spans",
    "lamzoo.names": "lamzoo.registry.catalog",
    "lamzoo.pruning": "lamzoo.reduction.budget",
    "lamzoo.statedict": "lamzoo.weights.loading",
    "lamzoo.weightfiles": "lamzoo.weights.files",
    "lamzoo.weights": "lamzoo.registry.saving",
}
