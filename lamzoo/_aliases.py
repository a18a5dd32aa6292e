"""Names of lamzoo 0.1 that have moved; they work until 0.3, with a ``DeprecationWarning``."""

# Module to module, or dotted name to ``module:name``. A package that has taken the place of a module of the same name
# points to the file in which that module's names are now.
ALIASES: dict[str, str] = {
    "lamzoo.cards": "lamzoo.registry.cards",
    "lamzoo.foreign": "lamzoo.registry.external",
    "lamzoo.names": "lamzoo.registry.catalog",
    "lamzoo.statedict": "lamzoo.weights.loading",
    "lamzoo.weightfiles": "lamzoo.weights.files",
    "lamzoo.weights": "lamzoo.registry.saving",
}
