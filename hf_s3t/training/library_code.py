"""Whose code something is: an installed library's, which its version tells, or the user's."""

import functools
import os
import sys
import sysconfig
import types
from typing import Any


_HERE = [os.path.realpath(path) for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}]
# Records name trainers of this package by the modules that these were in first: a folder goes on wherever they move.
_RECORDED_MODULES = {
    "hf_s3t.training.trainer": "hf_s3t.trainer",
    "hf_s3t.training.sft_trainer": "hf_s3t.sft_trainer",
    "hf_s3t.baselines.methods": "hf_s3t.baselines",
}


def is_of_user(value: Any) -> bool:
    """Whether something is a function or class of the user's."""
    return isinstance(value, (types.FunctionType, type)) and not is_of_library(value)


def is_of_library(part: Any) -> bool:
    """Whether code is of an installed library, this one or Python: its version says which it is."""
    module = getattr(part, "__module__", None) or "builtins"
    top = module.split(".")[0]
    if top == "__main__":
        return False
    if top in sys.stdlib_module_names or top == __name__.split(".")[0]:
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
    Module and name, as records have them. What a script defines lies under the script's name, also where the script is
    imported.
    """
    module = getattr(part, "__module__", None) or ""
    if module == "__main__":
        main = sys.modules["__main__"]
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        module = spec.name if spec is not None else os.path.splitext(os.path.basename(file))[0] if file else module
    name = getattr(part, "__qualname__", None) or getattr(part, "__name__", None) or type(part).__qualname__
    return f"{_RECORDED_MODULES.get(module, module)}.{name}" if module else name
