"""What a request that generates asks of its rows, and the rows that answer it."""

from collections.abc import Sequence
from typing import Any

from .answers import Answer, submit
from .problems import Problem
from .rows import Adjustments, Part, Row, Sampling, Wanted
from .schemas import GenerationRequest, Usage
from .service import Service, Task


_COLDEST = 0.01


def check_task(service: Service) -> None:
    """
    Refuse what a classifier cannot do.

    Raises:
        [`~hf_s3t.server.problems.Problem`]: 404, with the path that it answers at.
    """
    if service.task is not Task.GENERATION:
        raise Problem(404, "This system classifies, and makes no text. Ask `/v1/classify`.", "wrong_task")


def rows_of(
    service: Service,
    request: GenerationRequest,
    prompts: Sequence[tuple[int, ...]],
    max_tokens: int | None,
    logprobs: int | None,
) -> Answer[Any]:
    """
    Have a request answered: `n` rows for each prompt, in their order.

    Args:
        service ([`~hf_s3t.server.service.Service`]): The service.
        request ([`~hf_s3t.server.schemas.GenerationRequest`]): What was asked.
        prompts (sequence of `tuple[int, ...]`): The tokens of each prompt.
        max_tokens (`int`, *optional*): How many tokens each row gets at most; as many as there is room for if not
            given.
        logprobs (`int`, *optional*): How many alternatives are told of each token.

    Raises:
        [`~hf_s3t.server.problems.Problem`]: If the request is refused.
    """
    sampling = _sampling(service, request)
    seed = None if sampling.is_greedy else request.seed
    adjustments = _adjustments(service, request)
    wanted = [
        Wanted(
            prompt,
            service.prompts.most_tokens(prompt, max_tokens),
            sampling,
            tuple(request.stop),
            logprobs,
            adjustments,
            request.stream,
            seed,
        )
        for prompt in prompts
        for _ in range(request.n)
    ]
    answer = service.answers.open()
    metrics, eos = service.metrics, service.eos
    rows = [
        Row(one, service.processor, eos, answer.put_for(index), lambda: metrics.first_token(answer.seconds))
        for index, one in enumerate(wanted)
    ]
    submit(service.batcher, service.answers, answer, rows, is_alone=seed is not None)
    return answer


def usage_of(service: Service, answer: Answer[Part], prompt_tokens: int, last: Sequence[Part]) -> Usage:
    """
    What an answer took, when it is complete; metrics and logs are told.

    Args:
        service ([`~hf_s3t.server.service.Service`]): The service.
        answer ([`~hf_s3t.server.answers.Answer`]): The answer.
        prompt_tokens (`int`): How many tokens its prompts have.
        last (sequence of [`~hf_s3t.server.rows.Part`]): The last part of each of its rows.
    """
    made = sum(part.num_tokens for part in last)
    service.metrics.tokens(prompt_tokens, made)
    answer.tokens = (prompt_tokens, made)
    return Usage.of(prompt_tokens, made)


def _sampling(service: Service, request: GenerationRequest) -> Sampling:
    """As asked; what is not said is the model's own setting, and else OpenAI's."""
    own = service.model.generation_config
    temperature = _first(request.temperature, own.temperature, 1.0)
    if temperature == 0:
        return Sampling(0.0)
    return Sampling(
        # Of less, scores are no numbers any more.
        max(temperature, _COLDEST),
        _first(request.top_p, own.top_p, 1.0),
        max(0, int(_first(request.top_k, own.top_k, 0))),
        _first(request.min_p, own.min_p, 0.0),
    )


def _adjustments(service: Service, request: GenerationRequest) -> Adjustments:
    try:
        bias = {int(token): value for token, value in request.logit_bias.items()}
    except ValueError:
        raise Problem(422, "`logit_bias` maps numbers of tokens to numbers.", "logit_bias", "logit_bias") from None
    if not all(0 <= token < service.prompts.vocabulary for token in bias):
        message = f"`logit_bias` names tokens from 0 to {service.prompts.vocabulary - 1}."
        raise Problem(422, message, "unknown_token", "logit_bias")
    own = service.model.generation_config.repetition_penalty
    repetition = _first(request.repetition_penalty, own, 1.0)
    return Adjustments(request.presence_penalty, request.frequency_penalty, repetition, bias)


def _first(*values: float | None) -> float:
    """The first that is given."""
    return next(float(value) for value in values if value is not None)
