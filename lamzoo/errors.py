"""The exceptions that lamzoo raises on purpose; each message is one sentence that names the culprit and the way out."""


def class_name(thing: object) -> str:
    """Returns the full name of a class, or of an object's class, for messages: ``timm.models.beit.Attention``."""
    cls = thing if isinstance(thing, type) else type(thing)
    return f"{cls.__module__}.{cls.__qualname__}"


class LamzooError(Exception):
    """Base of all errors that a user can put right; the command line prints it as one line and exits with 2."""


class ConfigError(LamzooError, ValueError):
    """A :class:`~lamzoo.LamConfig` field, or a combination of fields, that means nothing."""


class MissingExtraError(LamzooError, ImportError):
    """An optional dependency that is needed and not installed; the message names the extra to install."""


class MaskShapeError(LamzooError, ValueError):
    """Mask factors whose shapes or dtypes do not fit the queries and keys."""


class UnsupportedHostError(LamzooError, TypeError):
    """A model, or a block of it, that no adapter can serve."""


class RegistryError(LamzooError):
    """A registry card or plug-in that cannot be read."""


class UnknownModelError(RegistryError, LookupError):
    """A model name or tag that is not registered; the message lists the closest ones."""


class DuplicateModelError(RegistryError, ValueError):
    """Two registrations of one model name."""


class WeightsError(LamzooError):
    """Weights that cannot be used."""


class WeightsNotFoundError(WeightsError, FileNotFoundError):
    """Weights that are neither bundled, cached nor to be downloaded from here."""


class HubUnreachableError(WeightsNotFoundError):
    """A file of the hub that is not in the cache, where the hub was not asked (offline mode) or did not answer.

    The message has three lines, which are its arguments.

    Args:
        missing: what is not here, and why it doesn't come.
        works: what works without it.
        bring: how to bring it to this machine.
    """

    def __init__(self, missing: str, works: str, bring: str) -> None:
        super().__init__(missing, works, bring)
        self.missing, self.works, self.bring = missing, works, bring

    def __str__(self) -> str:
        return "\n".join((self.missing, self.works, self.bring))


class HashMismatchError(WeightsError):
    """A file whose sha256 is not the one its card promises."""


class UnsafeWeightsError(WeightsError):
    """A pickle where only safetensors are accepted."""


class StateDictError(WeightsError):
    """A state dict whose keys or shapes do not fit the model."""


class ExportError(LamzooError):
    """A model that can't be exported, or an exported program that can't be used."""


class RecipeError(LamzooError, ValueError):
    """A training recipe with an unknown key, a wrong type or an impossible value."""


class DivergedError(LamzooError, ArithmeticError):
    """A training whose loss is not finite any more."""

    way_out = "Lower optimizer.lr, set optimizer.clip_grad or train with run.precision=no."


class DataError(LamzooError):
    """A data set, image or folder that cannot be read."""


class MissingSplitError(DataError):
    """A split that a data set has not; the message lists those that it has."""


class UnsplitError(MissingSplitError):
    """A split of data without splits, which can only be taken whole."""
