"""The base model that a recipe is given: whether there is one, and why it cannot be read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoConfig

from hf_s3t.errors import ConfigError, S3TError


def check_model_is_given(name: str | None, example: str) -> None:
    """
    Refuse a run without a base model.

    Args:
        name (`str`, *optional*): What `--model_name_or_path` says.
        example (`str`): A model that would do.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If it says nothing.
    """
    if not name:
        raise ConfigError(
            f"`--model_name_or_path` is missing. Give the base model: a folder, or an id on the Hub such as {example}."
        )


def check_model_is_there(name: str) -> None:
    """
    Refuse a base model that cannot be read, before anything is trained.

    Args:
        name (`str`): A folder, or an id on the Hub.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: With the reason.
    """
    with reading_model(name):
        AutoConfig.from_pretrained(name)


@contextmanager
def reading_model(name: str) -> Iterator[None]:
    """
    Say in one line why a base model, or what comes with it, could not be read.

    Args:
        name (`str`): A folder, or an id on the Hub.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: With the reason.
    """
    try:
        yield
    except S3TError:
        raise
    except (OSError, ValueError) as error:
        said = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        if name[0] in "./~" and not Path(name).exists():
            # What libraries say is that it is no id on the Hub.
            said = "there is no such folder"
        raise ConfigError(
            f"`--model_name_or_path {name}` cannot be read: {said.rstrip('.')}. Give the folder of a model with all "
            "its files, or an id on the Hub that can be reached from here."
        ) from error
