"""Chat templates: a question in a chat becomes the prompt that a system was trained on."""

import json

from common.prompts import render_prompt


_QUESTION, _ANSWER, _END = "### Instruction:\n", "### Response:\n", "\n\n"


def chat_template(template: str = "alpaca", has_bos: bool = True) -> str:
    """
    A chat template for systems that were trained on Alpaca's prompts.

    Args:
        template (`str`, defaults to `"alpaca"`): As of [`~common.prompts.render_prompt`].
        has_bos (`bool`, defaults to `True`): Whether the tokenizer begins a text with its token for that.
    """
    opening = render_prompt("", template=template).partition(_QUESTION)[0]
    # A text of JSON is one of Jinja.
    begin, ask, answer = (f"{{{{ {json.dumps(text)} }}}}" for text in (opening, _QUESTION, _ANSWER))
    said = "{{ message['content'] }}"
    return (
        f"{'{{ bos_token }}' if has_bos else ''}{begin}{{% for message in messages %}}"
        f"{{% if message['role'] == 'assistant' %}}{answer}{said}{{{{ eos_token }}}}"
        f"{{% else %}}{ask}{said}{{{{ {json.dumps(_END)} }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{answer}{{% endif %}}"
    )
