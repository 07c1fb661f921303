"""
The errors of hf_s3t: every one is an `S3TError` and also what Python callers would expect to catch.

- S3TError
    - ConfigError (ValueError)
    - IsolationError (ValueError)
    - LayersNotFoundError (ValueError)
    - ExampleIdError (ValueError)
    - UnknownExampleError (KeyError)
    - ContentChangedError (ValueError)
    - EmptySliceError (ValueError)
    - DivergedError (ArithmeticError)
    - CheckpointError (RuntimeError)
    - FolderError (OSError)
        - FormatVersionError
        - KeyMissingError
    - ReceiptError (ValueError)
    - SigningKeyError (ValueError)
    - BaseModelMismatchError (ValueError)
    - ExhaustedError (RuntimeError)
    - CallStoppedError (RuntimeError)
    - StaleCacheError (RuntimeError)
    - NotServedError (AttributeError)
    - HubError (OSError)
        - TransferError
        - MergeNeededError
    - ClusterError (RuntimeError)

And how what they say, as all else that is said, names a number of things: `counted`.
"""


class S3TError(Exception):
    """Base class of every error that hf_s3t raises on purpose."""


class ConfigError(S3TError, ValueError):
    """A setting is out of range, unknown, or contradicts another one."""


class IsolationError(S3TError, ValueError):
    """A setting or model would let a stage depend on data outside its prefix (contract E1, refused by E6)."""


class LayersNotFoundError(S3TError, ValueError):
    """The transformer layers, or the modules a PEFT config targets in them, could not be identified."""


class ExampleIdError(S3TError, ValueError):
    """Example ids are missing, duplicated, of mixed type, or of a type that cannot be an id."""


class UnknownExampleError(S3TError, KeyError):
    """An id or group that this system never trained on."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which turns a sentence into a quoted string.
        return Exception.__str__(self)


class ContentChangedError(S3TError, ValueError):
    """The content of a training example is not what it was at the first training."""


class EmptySliceError(S3TError, ValueError):
    """A slice has no examples at the first training."""


class DivergedError(S3TError, ArithmeticError):
    """The tensors of a stage are NaN or infinite."""


class CheckpointError(S3TError, RuntimeError):
    """A stage in training cannot go on from a checkpoint as if it had never stopped."""


class FolderError(S3TError, OSError):
    """A system's folder is missing a file, or a file is truncated, altered or unreadable."""


class FormatVersionError(FolderError):
    """The folder was written in a format that this version of hf_s3t does not know."""


class KeyMissingError(FolderError):
    """The secret that the folder's digests are keyed with is not available."""


class ReceiptError(S3TError, ValueError):
    """A receipt does not show what it was to show: it was altered, cut, signed by another key, or is another's."""


class SigningKeyError(S3TError, ValueError):
    """A key to sign with, or to check signatures by, is missing or no such key."""


class BaseModelMismatchError(S3TError, ValueError):
    """The base model is not the one that the stages were trained on."""


class ExhaustedError(S3TError, RuntimeError):
    """No shard has a stage left to serve."""


class CallStoppedError(S3TError, RuntimeError):
    """A deletion removed a stage that a running call was using, and stopped the call."""


class StaleCacheError(S3TError, RuntimeError):
    """A key/value cache was made with stages that have been unlearned since."""


class NotServedError(S3TError, AttributeError):
    """Something of the base model that would pass by the stages that serve, or change what they stand on."""


class HubError(S3TError, OSError):
    """The Hub refuses, cannot be reached, or does not hold what was asked for."""


class TransferError(HubError):
    """A file could not be brought to the Hub or from there."""


class MergeNeededError(HubError):
    """The Hub knows of deletions that the folder to be pushed does not."""


class ClusterError(S3TError, RuntimeError):
    """Workers of a cluster cannot be had, do not agree with each other, or are lost for good."""


def counted(number: float, what: str) -> str:
    """A number of things, as a sentence says it: `1 stage`, `2 stages`."""
    shown = f"{number:g}" if isinstance(number, float) else str(number)
    return f"{shown} {what}" + ("" if number == 1 else "s")
