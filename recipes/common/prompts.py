"""The prompts around an instruction: Alpaca's, as published and without the opening words."""

_PREAMBLE = "Below is an instruction that describes a task. "
_PREAMBLE_INPUT = "Below is an instruction that describes a task, paired with an input that provides further context. "
_REQUEST = "Write a response that appropriately completes the request.\n\n"
PROMPT_TEMPLATES = ("alpaca", "alpaca-short")


def render_prompt(instruction: str, context: str = "", template: str = "alpaca") -> str:
    """
    The Alpaca prompt, up to where the answer begins.

    Args:
        instruction (`str`): The task.
        context (`str`, defaults to `""`): The example's input; its part of the prompt is left out when empty.
        template (`str`, defaults to `"alpaca"`): `"alpaca"` as published, `"alpaca-short"` without the opening words.
    """
    if template not in PROMPT_TEMPLATES:
        raise ValueError(f"`prompt_template` must be one of {', '.join(PROMPT_TEMPLATES)}, got {template!r}.")
    opening = (_PREAMBLE_INPUT if context else _PREAMBLE) + _REQUEST if template == "alpaca" else ""
    middle = f"### Input:\n{context}\n\n" if context else ""
    return f"{opening}### Instruction:\n{instruction}\n\n{middle}### Response:\n"
