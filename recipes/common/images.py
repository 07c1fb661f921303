"""Images as rows: reading them from this machine, and what a model is shown of them."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.rows import Source, check_columns, split_off
from common.tasks import ImageTask
from datasets import Dataset, Features, Image, Value, load_dataset
from PIL import Image as PILImage
from PIL import ImageOps
from sklearn.datasets import load_digits
from transformers import BaseImageProcessor

from hf_s3t.errors import ConfigError


# The part of the training images that `pretrain_vit.py` takes, and that fine-tuning must then leave out.
PRETRAINING = "pretraining"
_ARRAYS = ("images", "x", "data"), ("labels", "label", "y")


@dataclass(frozen=True)
class ImageSource(Source):
    """
    Where images come from: as [`~common.rows.Source`], and npz files and folders with a folder for each class.

    Args:
        image_column (`str`): What the column of images is called where the files do not say.
        label_column (`str`): The same for labels.
    """

    image_column: str = "image"
    label_column: str = "label"
    endings: tuple[str, ...] = (".npz", ".parquet")
    remedy: str = "Give a file that does, or a folder with a folder of images for each class."

    def _read(self, split: str) -> Dataset:
        path = Path(self.name)
        if path.suffix == ".npz":
            return self._from_npz(path)
        if path.is_dir() and not list(path.glob("**/*.parquet")):
            found = load_dataset("imagefolder", data_dir=self.name)
            if split not in found:
                raise ConfigError(
                    f"{self.name} has no split {split!r}, but {', '.join(found)}. Name its folders train and test, or "
                    "give `--train_split` and `--eval_split`."
                )
            return found[split]
        return super()._read(split)

    def _from_npz(self, path: Path) -> Dataset:
        if not zipfile.is_zipfile(path):
            raise ConfigError(f"{path} is no npz file, or a part of one. Expected what `numpy.savez` writes.")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        images, labels = (next((arrays[n] for n in names if n in arrays), None) for names in _ARRAYS)
        if images is None or labels is None:
            raise ConfigError(
                f"{path} holds {', '.join(arrays) or 'nothing'}. Expected `images` and `labels`, or the bytes of "
                "image files one after the other as `data`, where each ends as `end`, and `label`."
            )
        if "end" in arrays and images.ndim == 1:
            ends = arrays["end"].tolist()
            encoded = [images[a:b].tobytes() for a, b in zip([0, *ends], ends, strict=False)]
            values = [{"bytes": data, "path": None} for data in encoded]
        else:
            values = [PILImage.fromarray(image) for image in images]
        if len(values) != len(labels):
            raise ConfigError(f"{path} holds {len(values)} images and {len(labels)} labels. Expected as many of each.")
        return as_dataset(values, labels.tolist(), self.image_column, self.label_column)


def as_dataset(images: list, labels: list[int], image_column: str = "image", label_column: str = "label") -> Dataset:
    """Images and their labels as rows."""
    features = Features({image_column: Image(), label_column: Value("int64")})
    return Dataset.from_dict({image_column: images, label_column: labels}, features=features)


def check_images(dataset: Dataset, task: ImageTask, name: str, remedy: str) -> None:
    """
    Refuse rows without the task's columns, or whose images are none.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: With the columns there are.
    """
    check_columns(dataset, task.columns, task.name, name, remedy)
    if not isinstance(dataset.features[task.image_column], Image):
        images = [column for column, feature in dataset.features.items() if isinstance(feature, Image)]
        raise ConfigError(
            f"The column {task.image_column} of {name} holds no images; those that do: {', '.join(images) or 'none'}. "
            f"{remedy}"
        )


def digits() -> tuple[Dataset, Dataset]:
    """The handwritten digits that come with scikit-learn, 8 by 8 pixels: 1,437 to train on and 360 to evaluate on."""
    found = load_digits()
    pixels = (found.images * (255 / 16)).round().astype(np.uint8)
    rows = as_dataset([PILImage.fromarray(image) for image in pixels], found.target.tolist())
    # They come as one set: the part to evaluate on is chosen by the hash of their numbers.
    return split_off(rows.add_column("id", list(range(len(rows)))), range(len(rows)), 0.2, "test")


class Shown:
    """
    What a model is shown of a batch of rows: pixels, and labels.

    Augmentation happens here, when a batch is made, and draws from PyTorch's random state, which every stage seeds:
    what is stored stays the same, and what a stage saw is a function of its rows and its seed.

    Args:
        processor (`BaseImageProcessor`): Resizes and normalises, by numbers that came with the base.
        task ([`~common.tasks.ImageTask`]): Names the columns.
        padding (`int`, *optional*): Pixels around an image before it is cropped at random and perhaps flipped; none
            for rows to evaluate on.
        flip (`bool`): Whether half of the images are flipped.
    """

    def __init__(self, processor: BaseImageProcessor, task: ImageTask, padding: int | None = None, flip: bool = True):
        self.processor = processor
        self.task = task
        self.padding = padding
        self.flip = flip

    def __call__(self, batch: dict[str, list]) -> dict[str, Any]:
        """The batch as the model takes it."""
        images = [image.convert("RGB") for image in batch[self.task.image_column]]
        if self.padding is not None:
            images = [self._augmented(image) for image in images]
        pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": batch["labels"]}

    def _augmented(self, image: PILImage.Image) -> PILImage.Image:
        left, top = torch.randint(2 * self.padding + 1, (2,)).tolist()
        mirrored = bool(torch.randint(2, (1,))) and self.flip
        width, height = image.size
        image = ImageOps.expand(image, self.padding).crop((left, top, left + width, top + height))
        return ImageOps.mirror(image) if mirrored else image
