"""The digest of a system: over the adapters of its stages, as anybody who has the folder can compute it."""

import hashlib
from collections.abc import Mapping


def stages_digest(stages: Mapping[str, str]) -> str:
    """
    The digest of a system that has these stages and no others.

    It is what this prints in the system's folder, where that holds no other stages:

        LC_ALL=C sha256sum stages/*/*/adapter_model.safetensors | sha256sum

    Args:
        stages (mapping from `str` to `str`): Names of stages (`shard-0/2-0`), and the SHA-256 of their adapters.

    Example:

    ```python
    >>> from hf_s3t.signing.stages_digest import stages_digest

    >>> stages_digest({})[:12]
    'e3b0c44298fc'
    ```
    """
    # In the order of bytes of the whole paths, as the shell has them.
    files = sorted((f"stages/{name}/adapter_model.safetensors", digest) for name, digest in stages.items())
    return hashlib.sha256("".join(f"{digest}  {file}\n" for file, digest in files).encode()).hexdigest()
