"""Whose code something is: an installed library's, which its version tells, or the user's."""

import functools
import os
import sys
import sysconfig
import types
from typing import Any


_PACKAGE = __name__.split(".")[0]
_HERE = [os.path.realpath(path) for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}]


def is_of_user(value: Any) -> bool:
    """Whether something is a function or class of the user's."""
    return isinstance(value, (types.FunctionType, type)) and not is_of_library(value)


def is_of_library(part: Any) -> bool:
    """Whether code is of an installed library, this one or Python: its version says which it is."""
    module = getattr(part, "__module__", None) or "builtins"
    top = module.split(".")[0]
    if top == "__main__":
        return False
    if top in sys.stdlib_module_names or top == _PACKAGE:
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and any(os.path.realpath(file).startswith(path + os.sep) for path in _installed())


@functools.cache
def _installed() -> tuple[str, ...]:
    """Where libraries are installed."""
    paths = {path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")}
    return tuple({os.path.realpath(path) for path in paths}.union(_HERE))


def qualified(part: Any) -> str:
    """
    Module and name, as records have it. What a script defines lies under the script's name, also where the script is
    imported; what this package does, under its module's, whatever room that is in.
    """
    module = getattr(part, "__module__", None) or ""
    if module.startswith(f"{_PACKAGE}."):
        # A trainer that moved is no other recipe: folders of every version tell of `hf_s3t.trainer.S3TTrainer`.
        module = f"{_PACKAGE}.{module.rpartition('.')[2]}"
    if module == "__main__":
        main = sys.modules["__main__"]
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        module = spec.name if spec is not None else os.path.splitext(os.path.basename(file))[0] if file else module
    name = getattr(part, "__qualname__", None) or getattr(part, "__name__", None) or type(part).__qualname__
    return f"{module}.{name}" if module else name
