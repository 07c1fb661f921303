"""
The paper's baselines, and S3T itself, under one interface: train, serve, delete, train again, and what it cost.

Every method takes the same arguments and, under one secret, partitions the data alike, so that one driver can measure
them all.
"""

import contextlib
import os
import time
from abc import ABC
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import PredictionOutput, TrainOutput

from ..config import S3TConfig
from ..errors import ConfigError
from ..folder.files import make_folders
from ..folder.layout import ADAPTER_FILE, PROTOTYPES_FILE, STAGES
from ..folder.secret import write_key
from ..folder.status import serving_depths
from ..model.modeling import S3TModel
from ..model.randomness import preserved_randomness
from ..plan.stages import StageKey, stage_seed
from ..records.digests import PUBLIC_SECRET, DigestKey
from ..training.blueprint import Layout
from ..training.trainer import S3TTrainer
from .cost import Cost, UnitCost, add_cost, read_cost
from .prototypes import ProtoSISAModel, check_is_classifier
from .whole_adapter import AtOnce, SliceBySlice, WholeAdapterModel


@dataclass(frozen=True)
class Deletion:
    """
    What a deletion did.

    Args:
        seconds (`float`): How long it took, until nothing that answers has seen one of the examples.
        deleted (`int`): Number of examples deleted now; those that were deleted before are not counted.
        depths_before (`list[int]`): [`Method.depths`] before.
        depths_after (`list[int]`): [`Method.depths`] after.
    """

    seconds: float
    deleted: int
    depths_before: list[int]
    depths_after: list[int]


def use_public_secret(output_dir: str | os.PathLike[str]) -> None:
    """
    Give a system that is to be made in a folder the secret that everybody knows: it is written in this package.

    All such systems place the same ids alike by the seed alone, whatever the method, folder and machine: for comparing
    on public or invented data. Of other data everybody could test who was deleted; there, set `HF_S3T_KEY` to one
    secret for all that is compared. A folder in which something is stays as it is, and `HF_S3T_KEY` goes before it.

    Args:
        output_dir (`str` or `os.PathLike`): The folder, which need not be there.

    Example:

    ```python
    from hf_s3t.baselines import METHODS, use_public_secret

    for name in METHODS:
        use_public_secret(f"runs/{name}")
    ```
    """
    folder = Path(output_dir)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        return
    make_folders(folder)
    write_key(output_dir, DigestKey(PUBLIC_SECRET.encode()))


class Method(ABC):
    """
    One way to fine-tune a model on data that may have to be forgotten; all ways take the same arguments.

    The same ids land in the same shard and slice, whatever the method, under the same secret: a balanced partition
    follows from it, so set `HF_S3T_KEY` for all that is compared, or see [`use_public_secret`]. A classification head
    starts from the same seed. What training makes is in `args.output_dir`: a second object on the same folder goes on
    where the first one, or its process, ended. Deletions are exact for every method: what answers afterwards is to the
    bit what training without the examples would have made of the same units.

    A slice that deletions have emptied ends a sequence before it, for every method: nothing after it is trained again.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model, for this method alone; adapters are attached to it.
        args ([`~transformers.TrainingArguments`]):
            The recipe of a unit; an [`~trl.SFTConfig`] with `trainer_class=SFTTrainer`. `args.output_dir` is the
            method's folder.
        train_dataset ([`~datasets.Dataset`]):
            The training data with the id column that `s3t_config` names: tokenised for `Trainer`, as it comes for
            `SFTTrainer`. Deleted rows may still be in it.
        eval_dataset ([`~datasets.Dataset`], *optional*): What [`Method.evaluate`] takes by itself.
        data_collator, processing_class: As in `Trainer`.
        compute_metrics, preprocess_logits_for_metrics: As in `Trainer`.
        peft_config ([`~peft.LoraConfig`], *optional*): The adapters; the recorded ones if not given.
        s3t_config ([`S3TConfig`], *optional*):
            Shards, slices, partition, seed, aggregation: the same for every method. What is planned, and layer groups,
            count for S3T only: the others have one sequence. The recorded settings if not given.
        trainer_class (`type`, defaults to [`~transformers.Trainer`]): `Trainer` or `trl.SFTTrainer`.

    Raises:
        [`~hf_s3t.errors.S3TError`]: Its children, before any training; see `hf_s3t.errors`.

    Example:

    ```python
    from peft import LoraConfig
    from transformers import TrainingArguments
    from hf_s3t import S3TConfig
    from hf_s3t.baselines import METHODS

    for name, method_class in METHODS.items():
        method = method_class(
            load_base_model(),
            TrainingArguments(output_dir=f"runs/{name}", learning_rate=1e-3, num_train_epochs=5),
            train_dataset=train,
            eval_dataset=test,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=["query", "value"]),
            s3t_config=S3TConfig(num_shards=5, num_slices=4, id_column="id"),
        )
        method.train()
        print(name, method.evaluate(), method.cost.seconds)
        print(method.unlearn(["example-17"]).depths_after)
    ```
    """

    name: str
    _layout: Layout
    _model_type: type[S3TModel] = WholeAdapterModel

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        train_dataset: Any,
        eval_dataset: Any = None,
        data_collator: Callable[..., Any] | None = None,
        processing_class: Any = None,
        compute_metrics: Callable[..., Any] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        peft_config: PeftConfig | None = None,
        s3t_config: S3TConfig | None = None,
        trainer_class: type[Trainer] = Trainer,
    ):
        self._check(model, args, peft_config)
        # mypy takes classes for what they make, which cannot be hashed.
        trainer_type = _trainer_type(trainer_class, self._layout, self._model_type)  # type: ignore[arg-type]
        self.trainer = trainer_type(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            peft_config=peft_config,
            s3t_config=s3t_config,
        )
        # The last process may have ended between a deletion and what follows from it.
        self._settle()

    def _check(self, model: PreTrainedModel, args: TrainingArguments, peft_config: PeftConfig | None) -> None:
        """Refuse what the method cannot do, before anything is made."""
        if args.push_to_hub and self.name != "s3t":
            raise ConfigError(
                f"`push_to_hub=True`: who loads {self.name!r} from the Hub would take it for an S3T system. Turn it "
                "off."
            )

    @property
    def output_dir(self) -> Path:
        """The method's folder: everything that outlives the process is there."""
        return self.trainer.folder.path

    @property
    def model(self) -> S3TModel:
        """The model that serves: a Transformers model of its task, for whatever needs more than `predict`."""
        return self.trainer.s3t_model

    # Training

    def train(self) -> None:
        """Train what is missing; a run that was interrupted goes on at the last finished unit."""
        self.trainer.train()
        self._settle()

    def retrain(self) -> Cost:
        """
        Train again what deletions removed, on the data that is left: S3T and SISA from what was kept on, others anew.

        Returns:
            [`~hf_s3t.baselines.cost.Cost`]: What that cost.
        """
        before = self.cost
        self.train()
        return self.cost.since(before)

    @property
    def cost(self) -> Cost:
        """What training has cost so far, over all sessions; training again is counted again."""
        return read_cost(self.output_dir)

    # Answering

    def predict(self, dataset: Any, depth: int | None = None) -> PredictionOutput:
        """
        The answers to a dataset, aggregated over shards.

        Args:
            dataset ([`~datasets.Dataset`]): Rows as those of `train_dataset`; an id column is passed over.
            depth (`int`, *optional*): Answer with at most so many slices learnt per shard; see `max_depth`.

        Returns:
            [`~transformers.trainer_utils.PredictionOutput`]: `predictions` is an array of shape `(rows, classes)`, in
            the order of the rows: logits, or whatever `s3t_config.aggregation` makes of them.

        Raises:
            [`~hf_s3t.errors.ExhaustedError`]: If nothing is left to answer.
            [`~hf_s3t.errors.ConfigError`]: If the method has no such depth.
        """
        with self._limited_to(depth), self._in_order_of_rows():
            return self.trainer.predict(self._prepared(dataset))

    def evaluate(self, dataset: Any = None, depth: int | None = None) -> dict[str, float]:
        """
        The metrics on a dataset, by `compute_metrics`, and the loss.

        Args:
            dataset ([`~datasets.Dataset`], *optional*): As in `predict`; `eval_dataset` if not given.
            depth (`int`, *optional*): As in `predict`.

        Raises:
            [`~hf_s3t.errors.ExhaustedError`]: If nothing is left to answer.
            [`~hf_s3t.errors.ConfigError`]: If the method has no such depth, or there is no dataset.
        """
        if dataset is None and self.trainer.eval_dataset is None:
            raise ConfigError("`evaluate()` without a dataset needs the method's `eval_dataset`. Give one of them.")
        with self._limited_to(depth):
            return self.trainer.evaluate(None if dataset is None else self._prepared(dataset))

    @contextlib.contextmanager
    def _limited_to(self, depth: int | None) -> Iterator[None]:
        if depth is None:
            yield
            return
        if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= self.max_depth:
            raise ConfigError(f"depth={depth!r}, expected 1 to {self.max_depth} for {self.name!r}.")
        with self.model.limited_to(depth):
            yield

    @contextlib.contextmanager
    def _in_order_of_rows(self) -> Iterator[None]:
        """Trainer answers in the order of its batches, which with `group_by_length` is not that of the rows."""
        args = self.trainer.args
        strategy, args.train_sampling_strategy = args.train_sampling_strategy, "random"
        try:
            yield
        finally:
            args.train_sampling_strategy = strategy

    def _prepared(self, dataset: Any) -> Any:
        """A dataset as the trainer evaluates it: one of `SFTTrainer` is tokenised first."""
        prepare = getattr(self.trainer, "_prepare_dataset", None)
        if prepare is None or "input_ids" in (getattr(dataset, "column_names", None) or ("input_ids",)):
            return dataset
        return prepare(dataset, self.trainer.processing_class, self.trainer.args, False, None, "eval")

    @property
    def max_depth(self) -> int:
        """The depth of a shard that has learnt everything."""
        return self.trainer.folder.config.num_slices

    @property
    def depths(self) -> list[int]:
        """Per shard, how many slices the member that answers has learnt; 0 where none may answer."""
        folder = self.trainer.folder
        return serving_depths(folder, folder.valid_stages)

    @property
    def is_exhausted(self) -> bool:
        """Whether nothing is left to answer, or nothing has been trained."""
        return not any(self.depths)

    # Forgetting

    def unlearn(
        self, ids: Sequence[int | str] | None = None, *, groups: Sequence[int | str] | None = None
    ) -> Deletion:
        """
        Forget examples. Nothing is trained; see `retrain`.

        All ids are checked first, and the deletion is in the folder, synced, before anything else changes.

        Args:
            ids (sequence of `int` or `str`, *optional*): Ids of the examples. Those that were deleted before are no
                error.
            groups (sequence of `int` or `str`, *optional*): Groups whose examples are all meant.

        Returns:
            [`Deletion`]: How long it took, and what is left.

        Raises:
            [`~hf_s3t.errors.UnknownExampleError`]: If an id or group is unknown; nothing is deleted then.
            [`~hf_s3t.errors.ConfigError`]: If neither is given.
        """
        started = time.perf_counter()
        report = self.model.unlearn(ids, groups=groups)
        self._settle()
        return Deletion(time.perf_counter() - started, report.deleted, report.depths_before, report.depths_after)

    def _settle(self) -> None:
        """Bring what a method keeps besides its adapters in step with the examples that are in."""
        return

    def storage_bytes(self) -> int:
        """Size in bytes of what the method keeps to be able to serve and to delete: its adapter files."""
        return sum(path.stat().st_size for path in self.output_dir.glob(f"{STAGES}/shard-*/*/{ADAPTER_FILE}"))


class S3T(Method):
    """S3T: per shard several sequences of stages. Deletion drops the stages that saw the example."""

    name = "s3t"
    _layout = Layout()
    _model_type = S3TModel


class Full(Method):
    """
    One adapter on all layers per shard, trained on all that the shard holds: with one shard plain LoRA fine-tuning.

    Deletion takes the shards that saw the example out until they are trained anew.
    """

    name = "full"
    _layout = AtOnce()


class SISA(Method):
    """
    SISA: one sequence a shard; each slice continues training the adapter on all layers, with a checkpoint after each.

    Trained on the slices so far, as in SISA proper, or by `s3t_config.replay` on a share of the earlier ones in each
    epoch. Every slice starts a fresh optimizer. Deletion goes back to the checkpoint before the slice; `retrain` goes
    on from there.
    """

    name = "sisa"
    _layout = SliceBySlice("sisa")


class ProtoSISA(SISA):
    """
    [`SISA`] and a classifier by class prototypes (mean features of the base per class), whose logits are mixed.

    Deletion also takes the example out of the prototypes, which are computed again for what is left of its slice. They
    go on answering when every shard is dead. The weight of the prototypes is `model.prototype_weight`, 0.5 unless it
    is set: it can be changed at any time, and nothing is trained for it.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If the model is no classifier of exclusive classes, or there are several
            processes.
    """

    name = "protosisa"
    _layout = SliceBySlice("protosisa")
    _model_type = ProtoSISAModel

    def _check(self, model: PreTrainedModel, args: TrainingArguments, peft_config: PeftConfig | None) -> None:
        super()._check(model, args, peft_config)
        check_is_classifier(model, getattr(peft_config, "layers_pattern", None))
        if args.world_size > 1:
            raise ConfigError(f'"protosisa" runs in one process, and there are {args.world_size}. Start one.')

    def _settle(self) -> None:
        trainer, prototypes, rows = self.trainer, self.model.prototypes, self.trainer._stage_rows
        is_new = prototypes.is_empty and not any(self.depths) and not trainer.folder.ledger.num_deletions
        if is_new or rows is None:
            # Nothing has been trained.
            return
        table = trainer.folder.table
        prototypes.drop_stale(table)
        sums = {}
        for place in prototypes.missing(table):
            key = StageKey(place[0], place[1:])
            with preserved_randomness():
                # A dataset may augment at random: a slice is always seen in the same way.
                set_seed(stage_seed(trainer.folder.config.seed, key))
                batches = trainer.get_test_dataloader(rows.select(key, table)) if rows.positions(key, table) else ()
                sums[place] = prototypes.sum_up(batches, table.slice_digest(*place))
        if sums:
            prototypes.add(sums)

    @property
    def is_exhausted(self) -> bool:
        """Whether nothing is left to answer: neither a shard nor a prototype."""
        return super().is_exhausted and self.model.prototypes.is_empty

    def storage_bytes(self) -> int:
        """Size in bytes of the adapter files and the prototypes."""
        prototypes = self.output_dir / PROTOTYPES_FILE
        return super().storage_bytes() + (prototypes.stat().st_size if prototypes.exists() else 0)


class Sequential(Method):
    """
    Sequential training (Kumar et al., 2023): the adapter on all layers is trained on one slice after the other.

    As [`SISA`], with each slice seen only while it is the last. Deletion goes back to the checkpoint before the slice.
    """

    name = "sequential"
    _layout = SliceBySlice("sequential", "slice")


METHODS: dict[str, type[Method]] = {method.name: method for method in (S3T, Full, SISA, ProtoSISA, Sequential)}


if TYPE_CHECKING:
    # The class that `_Measured` is put before.
    _Host = S3TTrainer
else:
    _Host = object


class _Measured(_Host):
    """The part of a trainer that notes what every unit cost. It comes before the trainer's class."""

    def _train_stage(
        self, key: StageKey, resume: bool, ignore_keys_for_eval: list[str] | None = None
    ) -> TrainOutput | None:
        output: TrainOutput | None = super()._train_stage(key, resume, ignore_keys_for_eval)
        if output is not None and self.is_world_process_zero() and self._stage_rows is not None:
            rows = self._stage_rows.num_per_epoch(key, self.folder.table)
            seen = round((self.state.epoch or 0) * rows)
            add_cost(self.folder, UnitCost(str(key), output.metrics["train_runtime"], output.global_step, seen))
        return output


@cache
def _trainer_type(trainer_class: type[Trainer], layout: Layout, model_type: type[S3TModel]) -> type[S3TTrainer]:
    """The trainer of a method's units."""
    base: type = S3TTrainer
    if trainer_class is not Trainer:
        # Only here may TRL be imported: whoever gives its trainer has imported it.
        from ..training.sft_trainer import S3TSFTTrainer

        base = S3TSFTTrainer
        if trainer_class not in base.__mro__:
            raise ConfigError(
                f"`trainer_class` is {trainer_class.__name__}, expected transformers.Trainer or trl.SFTTrainer. Give "
                "one of them."
            )
    name = f"{layout.method.capitalize()}{base.__name__}"
    # By this room's name, as records have it.
    return type(name, (_Measured, base), {"_layout": layout, "_model_type": model_type, "__module__": __package__})
