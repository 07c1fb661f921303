"""From a request to its answer."""

from anyio import to_thread

from .schemas import Usage
from .service import Service


async def answer(service: Service, prompt: str, max_tokens: int) -> tuple[str, Usage]:
    """The text that follows a prompt, and what it cost."""

    def generate() -> tuple[str, Usage]:
        inputs = service.processor(prompt, return_tensors="pt")
        ids = service.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_tokens,
            do_sample=False,
        )
        length = inputs["input_ids"].shape[1]
        made = ids[0, length:].tolist()
        usage = Usage(prompt_tokens=length, completion_tokens=len(made), total_tokens=length + len(made))
        return str(service.processor.decode(made, skip_special_tokens=True)), usage

    return await to_thread.run_sync(generate)
