"""A base that is given by its name, loaded as TRL loads one."""

from typing import Any

from transformers import BitsAndBytesConfig, PreTrainedModel, TrainingArguments

from ..errors import ConfigError, IsolationError
from ..model.quantisation import rowwise


def load_base(
    name: str, args: TrainingArguments, quantization_config: BitsAndBytesConfig | None = None, **settings: Any
) -> PreTrainedModel:
    """
    Load a base by its name, with the settings in `args.model_init_kwargs`, which are taken out.

    Args:
        name (`str`): A folder, or an id on the Hub.
        args ([`~transformers.TrainingArguments`]): Those of a trainer of TRL's.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*): How it shall be quantised.
        **settings: What loading is told besides; `architecture` is the class, if not the config's.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If it cannot be loaded.
    """
    # Only whoever gives a trainer of TRL's comes here.
    from trl.trainer.utils import create_model_from_path

    given: Any = getattr(args, "model_init_kwargs", None)
    kwargs = {**(given if isinstance(given, dict) else {}), **settings}
    vars(args)["model_init_kwargs"] = None
    quantization_config = quantization_config or kwargs.get("quantization_config")
    if quantization_config is not None:
        kwargs["quantization_config"] = rowwise(quantization_config)
    if args.distributed_state.distributed_type == "MULTI_GPU":
        kwargs["device_map"] = None
    kwargs.setdefault("trust_remote_code", getattr(args, "trust_remote_code", False))
    try:
        loaded: PreTrainedModel = create_model_from_path(name, **kwargs)
    except (OSError, TypeError, ValueError) as error:
        # No such place, no model there, settings that its class does not know.
        reason = " ".join(str(error).split()).rstrip(".")
        with_settings = f" with `model_init_kwargs={given!r}`" if given else ""
        raise ConfigError(
            f"`model={name!r}` cannot be loaded{with_settings}: {reason}. Give the folder of a model, or its id on "
            "the Hub; of a private one after `hf auth login`."
        ) from error
    return loaded


def num_tokens(model: PreTrainedModel) -> int | None:
    """How many tokens a base has embeddings of, if it has any."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        # Of what is no base more is said elsewhere.
        return None


def refuse_resized(model: PreTrainedModel, tokens: int | None, args: TrainingArguments) -> None:
    """
    Refuse a base to which a chat template has added tokens.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: With the way out.
    """
    if num_tokens(model) != tokens:
        raise IsolationError(
            f"`chat_template_path={getattr(args, 'chat_template_path', None)!r}` added tokens and resized the "
            "embeddings of the base, which all stages share. Save the resized model and train on that folder, or use "
            "a template without new tokens."
        )
