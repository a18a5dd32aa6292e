"""Exceptions; each message is one sentence that names the cause and a way out."""


def class_name(thing: object) -> str:
    """Returns the full name of a class, or of an object's class, for messages: ``timm.models.beit.Attention``."""
    cls = thing if isinstance(thing, type) else type(thing)
    return f"{cls.__module__}.{cls.__qualname__}"


class LamzooError(Exception):
    """Base of all errors that a user can fix; the command line prints one line and exits with 2."""


class ConfigError(LamzooError, ValueError):
    """Invalid settings, such as a :class:`~lamzoo.LamConfig` field or a combination of arguments."""


class UnknownArgumentError(ConfigError, TypeError):
    """An argument that the function which builds a model doesn't take."""


class MissingExtraError(LamzooError, ImportError):
    """A required optional dependency is not installed; the message names the extra to install."""


class MaskShapeError(LamzooError, ValueError):
    """Mask factors whose shapes or dtypes do not match the queries and keys."""


class UnsupportedHostError(LamzooError, TypeError):
    """A model, or a block of it, without an adapter."""


class RegistryError(LamzooError):
    """A registry card or plug-in that cannot be read."""


class UnknownModelError(RegistryError, LookupError):
    """A model name or tag that is not registered; the message lists the closest ones."""


class UnknownTaskError(RegistryError, LookupError):
    """A task name that is not registered; the message lists the tasks."""


class DuplicateModelError(RegistryError, ValueError):
    """Two registrations of one name of a model or task."""


class WeightsError(LamzooError):
    """Weights that cannot be loaded or saved."""


class WeightsNotFoundError(WeightsError, FileNotFoundError):
    """Weights that are neither bundled nor cached and cannot be downloaded."""


class HubUnreachableError(WeightsNotFoundError):
    """A hub file that is not in the cache, in offline mode or with an unreachable hub.

    The message has three lines, the arguments.

    Args:
        missing: the missing file, and why it cannot be downloaded.
        works: alternatives that need no download.
        bring: how to copy the file to this machine.
    """

    def __init__(self, missing: str, works: str, bring: str) -> None:
        super().__init__(missing, works, bring)
        self.missing, self.works, self.bring = missing, works, bring

    def __str__(self) -> str:
        return "\n".join((self.missing, self.works, self.bring))


class HashMismatchError(WeightsError):
    """A file with another sha256 than the card states."""


class UnsafeWeightsError(WeightsError):
    """A pickle file; only safetensors are read by default."""


class StateDictError(WeightsError):
    """A state dict whose keys or shapes do not match the model."""


class ExportError(LamzooError):
    """A model that can't be exported, or an exported program that can't be used."""


class UntrustedProgramError(ExportError):
    """A torch.export program that the user neither exported nor trusts; loading one can run any code."""


class RecipeError(LamzooError, ValueError):
    """A training recipe with an unknown key, a wrong type or an impossible value."""


class DivergedError(LamzooError, ArithmeticError):
    """The loss of a training run is no longer finite."""

    way_out = "Lower optimizer.lr, set optimizer.clip_grad or train with run.precision=no."


class DataError(LamzooError):
    """A data set, image, video or folder that cannot be read."""


class MissingSplitError(DataError):
    """The dataset has no such split; the message lists the available ones."""


class UnsplitError(MissingSplitError):
    """A split of data without splits, which can only be taken whole.

    Args:
        message: the sentence.
        whole: the data, all of it.
    """

    def __init__(self, message: str, whole: object = None) -> None:
        super().__init__(message)
        self.whole = whole
