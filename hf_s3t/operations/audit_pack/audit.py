"""
Trains the stages of this pack again, compares them bit for bit, and signs what came out.

    python audit.py --trainer their_script.py:make_trainer --signing-key mine.key

`make_trainer(output_dir)` returns the trainer of the system, with its data, base model and arguments, on that folder.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_s3t.errors import S3TError
from hf_s3t.operations.audits import SYSTEM, read_audit_pack, signed_result
from hf_s3t.signing.keys import required_signer, signing_with


PACK = Path(__file__).resolve().parent


def main() -> None:
    """Run the audit of this pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", required=True, help="FILE:FUNCTION, which takes the folder and returns a trainer")
    parser.add_argument("--signing-key", help="a file with your private key; else HF_S3T_SIGNING_KEY has it")
    parser.add_argument("--output", type=Path, default=Path("audit-result.json"), help="where the signed result goes")
    options = parser.parse_args()
    try:
        audit(options)
    except S3TError as error:
        raise SystemExit(f"Error: {error}") from None


def audit(options: argparse.Namespace) -> None:
    """Train, compare, sign; whatever can be refused is refused before hours of training."""
    with signing_with(options.signing_key):
        signer = required_signer()
        stages = sorted(read_audit_pack(PACK)["stages"])
        make_trainer = _function(options.trainer)
        if options.output.exists():
            raise SystemExit(f"Error: {options.output} is there, and a result is not written over. Name a new file.")
        if not options.output.absolute().parent.is_dir():
            raise SystemExit(f"Error: the folder of {options.output} is not there. Name another file.")
        found = make_trainer(str(PACK / SYSTEM)).verify(stages=stages)
        with open(options.output, "xb") as file:
            file.write(signed_result(PACK, found, signer) + b"\n")
    print(found)
    print(f"the signed result is in {options.output}")


def _function(name: str) -> Callable[[str], Any]:
    file, _, function = name.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise SystemExit(
            f"Error: got --trainer {name}, expected a Python file that is there and a function in it, FILE:FUNCTION."
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[str], Any] | None = getattr(module, function, None)
    if not callable(found):
        raise SystemExit(
            f"Error: {file} has no function {function}. Name the one that takes the folder and returns a trainer."
        )
    return found


if __name__ == "__main__":
    main()
