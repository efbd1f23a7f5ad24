"""The errors that a user can cause and mend; the CLI prints their one line and stops."""


class OatsVisionError(Exception):
    """Base of all errors that say what was given, what is allowed and what to do."""


class ConfigError(OatsVisionError, ValueError):
    """A setting is out of range or settings contradict each other."""


class ModelError(OatsVisionError):
    """A model is unknown, cannot be built, or belongs to no supported family."""


class DataError(OatsVisionError):
    """A data source is missing, empty or unreadable."""


class CheckpointError(OatsVisionError):
    """A checkpoint cannot be written or is not a valid checkpoint."""
