"""Where a trainer's folder lies, when whoever has it made decides that: a worker of a cluster may not have it."""

from transformers import TrainingArguments

from ..model.scope import Scope


# A function from the `output_dir` that was given to the one to use, while a trainer is made.
ELSEWHERE = Scope("where a trainer's folder lies")


def settle(args: TrainingArguments) -> None:
    """Have a trainer that is made work where whoever has it made says."""
    place = ELSEWHERE.get()
    if place is not None:
        args.output_dir = place(str(args.output_dir))
