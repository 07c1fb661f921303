"""
Trains the stages of this pack again, compares them bit for bit, and signs what came out.

    python audit.py --trainer their_script.py:make_trainer --signing-key mine.key

`make_trainer(output_dir)` returns the trainer of the system, with its data, base model and arguments, on that folder.
"""

import argparse
import importlib.util
import json
from pathlib import Path

from hf_s3t.operations.audits import MANIFEST, SYSTEM, signed_result
from hf_s3t.signing.keys import required_signer, signing_with


PACK = Path(__file__).resolve().parent


def main() -> None:
    """Run the audit of this pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", required=True, help="FILE:FUNCTION, which takes the folder and returns a trainer")
    parser.add_argument("--signing-key", help="a file with your private key; else HF_S3T_SIGNING_KEY has it")
    parser.add_argument("--output", type=Path, default=Path("audit-result.json"), help="where the signed result goes")
    options = parser.parse_args()
    with signing_with(options.signing_key):
        # Before hours of training.
        signer = required_signer()
        stages = sorted(json.loads((PACK / MANIFEST).read_bytes())["stages"])
        found = _function(options.trainer)(str(PACK / SYSTEM)).verify(stages=stages)
        with open(options.output, "xb") as file:
            file.write(signed_result(PACK, found, signer) + b"\n")
    print(found)
    print(f"the signed result is in {options.output}")


def _function(name: str):  # type: ignore[no-untyped-def]
    file, _, function = name.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{file} is no Python file. Name one that has the function {function}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


if __name__ == "__main__":
    main()
