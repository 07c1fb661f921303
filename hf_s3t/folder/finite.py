"""Numbers that are none: tensors of NaN or infinity, found in the bytes of an adapter file, without torch."""

import json

import numpy as np


# By its name in a safetensors file, how a kind of number is read, and the bits that are all set if it is not finite.
_EXPONENTS = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("<u1", 0x7C),
    "F8_E4M3": ("<u1", 0x7F),
}
# How many numbers are looked at together.
_PIECE = 2**20

NOT_FINITE = (
    "What answers with it answers nothing, and silences its ensemble. Remove the folders of this stage and of those "
    "that stand on it, and train them again without what made it so: `train()` names the step at which it does."
)


def non_finite_tensors(data: bytes) -> list[str]:
    """
    The names of the tensors in the bytes of a safetensors file that hold NaN or infinity.

    Args:
        data (`bytes`): The bytes.

    Returns:
        `list[str]`: Their names, sorted.
    """
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    found = []
    for name, about in sorted(header.items()):
        if about["dtype"] not in _EXPONENTS:
            continue
        kind, exponent = _EXPONENTS[about["dtype"]]
        begin, end = (8 + size + offset for offset in about["data_offsets"])
        bits = np.frombuffer(memoryview(data)[begin:end], dtype=kind)
        pieces = (bits[start : start + _PIECE] & exponent for start in range(0, bits.size, _PIECE))
        if any((piece == exponent).any() for piece in pieces):
            found.append(name)
    return found


def named(names: list[str]) -> str:
    """Some names, as a message says them."""
    return names[0] + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")
