"""The prompts around an instruction, alone and in a chat: Alpaca's, as published and without the opening words."""

import json


_PREAMBLE = "Below is an instruction that describes a task. "
_PREAMBLE_INPUT = "Below is an instruction that describes a task, paired with an input that provides further context. "
_REQUEST = "Write a response that appropriately completes the request.\n\n"
_INSTRUCTION, _RESPONSE, _END = "### Instruction:\n", "### Response:\n", "\n\n"
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
    return f"{opening}{_INSTRUCTION}{instruction}{_END}{middle}{_RESPONSE}"


def chat_template(template: str = "alpaca", has_bos: bool = True) -> str:
    """
    A chat template for systems that were trained on these prompts: a question alone becomes that very prompt.

    Args:
        template (`str`, defaults to `"alpaca"`): As of [`render_prompt`].
        has_bos (`bool`, defaults to `True`): Whether the tokenizer begins a text with its token for that.
    """
    opening = render_prompt("", template=template).partition(_INSTRUCTION)[0]
    # A text of JSON is one of Jinja.
    begin, ask, answer = (f"{{{{ {json.dumps(text)} }}}}" for text in (opening, _INSTRUCTION, _RESPONSE))
    said = "{{ message['content'] }}"
    return (
        f"{'{{ bos_token }}' if has_bos else ''}{begin}{{% for message in messages %}}"
        f"{{% if message['role'] == 'assistant' %}}{answer}{said}{{{{ eos_token }}}}"
        f"{{% else %}}{ask}{said}{{{{ {json.dumps(_END)} }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{answer}{{% endif %}}"
    )
