"""The error tree: what a user can mend is a QwenError, shown in one line with exit code 2 (or a 4xx)."""


class QwenError(Exception):
    """Base of all errors meant for the user; the message says what, where and how to mend it."""


class ConfigError(QwenError, ValueError):
    """A config.json, YAML file or setting is missing, malformed, or of another model."""


class CheckpointError(QwenError, ValueError):
    """A weights file is missing, damaged, incomplete, or does not fit the config."""


class VocabularyError(QwenError, ValueError):
    """The vocabulary file is missing or corrupt."""


class PromptError(QwenError, ValueError):
    """A prompt is empty, too long, or holds ids or control tokens it may not hold."""


class RequestError(QwenError, ValueError):
    """A request or a sampling value is invalid."""


class BusyError(QwenError, RuntimeError):
    """The queue is full: the same request may succeed a little later."""


class ClosedError(QwenError, RuntimeError):
    """The scheduler takes no new requests: it is shutting down or its model has failed."""


class KernelError(QwenError, RuntimeError):
    """A device backend is not available here, or a kernel could not be built."""


class LogitsError(QwenError, ArithmeticError):
    """A row of logits from which no token can be chosen: NaN, +inf, or every token banned."""


class DataError(QwenError, ValueError):
    """A file of training samples is missing, malformed, or holds a sample that cannot be learned from."""


class TrainingError(QwenError, RuntimeError):
    """Training cannot start, go on or be resumed: a changed setting, a diverged loss, a full disk."""
