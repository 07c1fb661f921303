"""Versions of the libraries whose arithmetic a stage depends on."""

import platform
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version


_LIBRARIES = ("hf_s3t", "torch", "transformers", "peft", "accelerate", "trl", "bitsandbytes", "datasets", "tokenizers")


@lru_cache(maxsize=1)
def library_versions() -> dict[str, str]:
    """Name and version of Python and of every installed library that a stage's tensors may depend on."""
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def own_version() -> str:
    """The version of hf_s3t, as it is installed; `"unknown"` of a checkout that is not."""
    return library_versions().get("hf_s3t", "unknown")
