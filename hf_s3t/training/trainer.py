"""`S3TTrainer`: Transformers' `Trainer`, run once per stage of an S3T system."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from peft import PeftConfig
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import align_special_tokens
from transformers.utils import logging

from .. import launch
from ..config import OF_SERVING, S3TConfig
from ..errors import ConfigError, counted
from ..folder.secret import write_key
from ..folder.system import SystemFolder
from ..model.fresh_copies import fresh_copy
from ..model.head import seed_head
from ..model.quantisation import keep_4_bit_weights, log_casts_once
from ..model.randomness import own_randomness
from ..model.stack import StageStack
from ..plan.stages import LEAST_STEPS, StageKey
from ..records.digests import KeptNames
from .audit import VerificationReport, keep_report, verify_stages
from .blueprint import Blueprint, Layout, NewSystem, TrainerInputs, check_same, draw_up
from .early_checks import check_choice, check_inputs, check_loss, check_rows, collates_as_stored
from .fed_rows import FedRows
from .first_process import in_first_process
from .gate_rows import check_has_prompts, gate_of, tokenizer_of
from .host import HostedBase, KeptByHost, arguments_type, given_besides, given_to, host_of, passed_on
from .hosted import HostedRuns
from .inputs import check_answers, check_kinds, check_parts, check_tokenizer
from .named_base import load_base, num_tokens, refuse_resized
from .optimizers import refuse_bound_optimizer
from .own_fields import with_own_fields
from .plan_run import old_objects_passed_over
from .progress import PlanProgress
from .reference import BaseAsReference
from .refusals import check_callbacks, check_hosted, check_lengths, evaluation_chooses
from .rows import StageRows, check_numbered, numbered
from .stage_sizes import check_batches, fewest_steps
from .tracking import PlanHandler


logger = logging.get_logger(__name__)

# As many slices are named that no sequence does.
_SHOWN_SLICES = 5
# What is given as the model: one, or the name of one.
_Base = TypeVar("_Base")


class S3TTrainerMixin(HostedRuns):
    """
    What makes a trainer train an S3T system: a run of `Trainer.train` per stage, on that stage's examples, with only
    that stage's adapter trainable. Put it before a trainer class, and that is all:

    `class MyTrainer(S3TTrainerMixin, SomeTrainer)` takes what `SomeTrainer` takes, in its order, then `peft_config`,
    if that does not take one, and `s3t_config`. It works over every class derived from [`~transformers.Trainer`] that
    takes `model`, `args` and `train_dataset` by these names. Rows carry their number through the preparation of the
    class, so that each stage gets its own; what the class makes of the base, and counts from step to step, every stage
    finds as the first did; a reference model is the base with adapters off; and what the class takes besides is
    recorded with each stage. What is asked of the class: what it makes of a row, and the loss of a batch, depend on
    that row and that batch alone (and on the recipe).

    Raises:
        [`~hf_s3t.errors.S3TError`]: Its children, before any training; see `hf_s3t.errors`.

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    from hf_s3t import S3TConfig, S3TTrainerMixin


    class S3TORPOTrainer(S3TTrainerMixin, ORPOTrainer):
        pass


    trainer = S3TORPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=ORPOConfig(output_dir="qwen-orpo-s3t"),
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        s3t_config=S3TConfig(num_shards=2, num_slices=4),
    )
    trainer.train()
    ```
    """

    # How stages lie on layers and data: the baselines have others.
    _layout = Layout()
    # Whether rows are numbered before the class prepares them.
    _numbers_rows = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if any(issubclass(kind, Trainer) for kind in cls.__mro__):
            # Behind its trainer class the mixin would never be asked, and all rows be trained on at once.
            host_of(cls)

    @own_randomness()
    def __init__(self, *args: Any, **kwargs: Any):
        self._host = host_of(type(self))
        given = given_to(self._host, args, kwargs)
        self._check_kinds_given(given)
        arguments = given["args"] = self._arguments_of(given)
        shared_base(
            given["model"],
            given.get("model_init"),
            given.get("optimizers", (None, None)),
            given.get("data_collator"),
            given.get("compute_loss_func"),
        )
        refuse_bound_optimizer(given.get("optimizer_cls_and_kwargs"), given.get("callbacks"))
        if isinstance(given["model"], str):
            if getattr(arguments, "model_init_kwargs", None):
                # Loading takes these out, and who gave them may give them again, to another trainer on the folder.
                arguments = given["args"] = copy.copy(arguments)
            given["model"] = self._load_base(given["model"], arguments, given.pop("quantization_config", None))
        elif given.get("quantization_config") is not None:
            raise ConfigError(
                f"`quantization_config` is given with a loaded {type(given['model']).__name__}, expected with the "
                "name of one: it says how to load. Give `model` as a text, or load it so and leave it out here."
            )
        model, rows = given["model"], given["train_dataset"]
        tokens = num_tokens(model)
        self._look_at_given(given)
        inputs = TrainerInputs(
            model, arguments, rows, given.get("eval_dataset"), given.get("callbacks"),
            *(given[name] for name in ("peft_config", "s3t_config")),
        )  # fmt: skip
        blueprint = draw_up(inputs, self._layout)
        self._check_rows_given(given, blueprint)
        check_choice(arguments, given.get("eval_dataset"), given.get("compute_metrics"), self._host)
        self._hosted_base = HostedBase(model)
        self._stack = stack_of(model, blueprint, self._model_type.stack_type)
        self._besides = given_besides(given)
        if "ref_model" in given:
            given["ref_model"] = BaseAsReference(self._stack)
        default_ddp_arguments(arguments)
        given["train_dataset"] = numbered(rows) if self._numbers_rows else rows
        if self._loads_names and given.get("eval_dataset") is not None:
            # By which a training example in it is found.
            given["eval_dataset"] = with_own_fields(given["eval_dataset"])
        try:
            super().__init__(**passed_on(self._host, given))
        finally:
            self._hosted_base.put_aside()
        self._kept_by_host = KeptByHost(self, self._host)
        refuse_resized(model, tokens, arguments)
        self._look_at_host(given)
        self._set_up(blueprint)

    def _check_kinds_given(self, given: Mapping[str, Any]) -> None:
        """Refuse what is of another kind than the class takes."""
        check_kinds(
            given["model"], given["args"], given["train_dataset"], given.get("eval_dataset"), self._loads_names,
            self._arguments_type(),
        )  # fmt: skip
        functions = (
            "data_collator", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics",
            "formatting_func",
        )  # fmt: skip
        check_parts(given.get("processing_class"), **{name: given.get(name) for name in functions})

    @property
    def _loads_names(self) -> bool:
        """Whether the class loads a base, and its tokenizer, by a name, as those of TRL do."""
        return hasattr(arguments_type(self._host), "model_init_kwargs")

    def _arguments_type(self) -> type[TrainingArguments]:
        """What the class takes as `args`."""
        return arguments_type(self._host)

    def _arguments_of(self, given: Mapping[str, Any]) -> TrainingArguments:
        """The recipe of a stage; the class's own where none was given."""
        if given["args"] is not None:
            arguments: TrainingArguments = given["args"]
            return arguments
        name = _name_of(given["model"])
        return arguments_type(self._host)(output_dir=f"{name.split('/')[-1]}-S3T")

    def _load_base(self, name: str, args: TrainingArguments, quantization_config: Any) -> PreTrainedModel:
        return load_base(name, args, quantization_config)

    def _look_at_given(self, given: dict[str, Any]) -> None:
        """Refuse what of this class's own arguments would break stages, and set what it would set itself."""
        check_hosted(self._host.__name__, given)
        peft_config = given["peft_config"]
        if getattr(given["args"], "disable_dropout", False) and getattr(peft_config, "lora_dropout", 0):
            # As where the class adapts a base itself.
            given["peft_config"] = copy.deepcopy(peft_config)
            given["peft_config"].lora_dropout = 0.0

    def _check_rows_given(self, given: Mapping[str, Any], blueprint: Blueprint) -> None:
        """Refuse rows of which a stage could make nothing, as far as what is stored tells."""
        if self._loads_names:
            check_tokenizer(given["model"], given["processing_class"])
            if given["train_dataset"] is None:
                raise ConfigError(
                    f"`train_dataset` is missing, and {self._host.__name__} is not set up without. Give the rows of "
                    "the first training; to answer, unlearn or push without them, load the folder by "
                    f"`S3TModel.from_pretrained({given['args'].output_dir!r})`."
                )
        if collates_as_stored(given.get("data_collator")):
            check_rows(given["train_dataset"], given["model"], blueprint.head, given["args"])

    def _look_at_host(self, given: Mapping[str, Any]) -> None:
        """Refuse a class that has made of rows, or loaded beside the base, what stages must not have."""
        given_rows = given["train_dataset"]
        if given_rows is not None and self._numbers_rows:
            check_numbered(self.train_dataset, given_rows, self._host.__name__)
        self._is_prepared_by_host = self.train_dataset is not given_rows
        check_lengths(self)
        check_callbacks(self._host.__name__, self.callback_handler.callbacks)
        reference = getattr(self, "ref_model", None)
        if reference is not None and not isinstance(self.accelerator.unwrap_model(reference), BaseAsReference):
            raise ConfigError(
                f"{self._host.__name__} loaded a reference of its own, a {type(reference).__name__}, expected none, "
                "or the base with adapters off. Have it take one as `ref_model`, and keep it so."
            )

    def _set_up(self, blueprint: Blueprint) -> None:
        """Open the system's folder, or make it, and get ready to train."""
        self._begin_without_live_model()
        self._fed_rows = FedRows(self.model, self.data_collator)
        self._align_tokens()
        self._look_at_evaluation(blueprint)
        # Before anything is written: truncation and filtering may have emptied a slice.
        prepared = self._prepared_rows(blueprint)
        new, folders = blueprint.new, [blueprint.folder]
        if new is not None:
            in_first_process(lambda: folders.append(self._make_folder(blueprint, new, prepared)))
        self.accelerator.wait_for_everyone()
        self.folder = self._as_it_is_now(folders[-1])
        # Another trainer may have made it first, with a secret of its own.
        is_ours = new is not None and new.key.check == self.folder.key.check
        if blueprint.rows is not None and not is_ours:
            folder = self.folder
            prepared = StageRows(self.train_dataset, blueprint.rows, folder.names, folder.record["row_digests"])
        self._stage_rows, self._training_rows = prepared, blueprint.rows
        self.s3t_config = blueprint.config
        self._layers = blueprint.layers
        self._prepared = self.train_dataset
        self._begin_undescribed()
        self._begin_without_stage()
        self._begin_curve()
        if self._stage_rows is not None:
            self._say_what_is_suboptimal(self._stage_rows)
        self._progress = PlanProgress()
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(self._progress)
        self.callback_handler = PlanHandler(self.callback_handler, self._stack.turns)

    def _look_at_evaluation(self, blueprint: Blueprint) -> None:
        """Where an evaluation chooses: its set holds no training example, and its functions can be copied."""
        rows = blueprint.rows
        self._compared_with = rows.compared_with if rows is not None and self.train_dataset is rows.dataset else None
        if rows is not None and evaluation_chooses(self.args, blueprint.config):
            self._compare_evaluation_set()
            for part in (self.compute_metrics, self.preprocess_logits_for_metrics):
                self._copy(part)

    def _prepared_rows(self, blueprint: Blueprint) -> StageRows | None:
        """The rows of the stages of a system that is to be made, which are enough of each and fit the model."""
        rows, new = blueprint.rows, blueprint.new
        if rows is None or new is None:
            return None
        prepared = StageRows(self.train_dataset, rows, KeptNames(new.key, blueprint.config.keep_ids))
        prepared.check_slices(new.table)
        if blueprint.config.gate is not None:
            check_has_prompts(prepared, self.processing_class)
        if self.train_dataset is not rows.dataset and collates_as_stored(self.data_collator):
            check_rows(self.train_dataset, self.model, blueprint.head, self.args)
        stages = new.plan.stages(new.table.empty)
        check_batches(stages, prepared, new.table, self.args, self.accelerator.num_processes)
        return prepared

    def _make_folder(self, blueprint: Blueprint, new: NewSystem, prepared: StageRows | None) -> SystemFolder | None:
        """Make the system; `None` if another trainer made the same one while this one was being set up."""
        output_dir = self._output_dir
        with SystemFolder.making(output_dir):
            if SystemFolder.exists(output_dir):
                check_same(blueprint, self.model, output_dir)
                return None
            write_key(output_dir, new.key)
            gate, tokenizer = None, tokenizer_of(self.processing_class)
            if blueprint.config.gate is not None and prepared is not None and tokenizer is not None:
                gate = gate_of(prepared, new.table, new.key, tokenizer)
            record = blueprint.record(self.model, new.key)
            folder = SystemFolder.create(output_dir, record, new.table, new.key, gate)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)
        return folder

    def _as_it_is_now(self, folder: SystemFolder | None) -> SystemFolder:
        """The system's folder, of which no table is read twice; what was deleted or trained meanwhile is taken in."""
        if folder is None:
            return SystemFolder(self._output_dir)
        folder.refresh_ledger()
        folder.refresh_stages()
        return folder

    def _align_tokens(self) -> None:
        """
        Have the base name the tokenizer's special tokens, as `Trainer.train` would: they decide where a text ends and
        which token a classifier looks at, and are recorded for whoever loads the system.
        """
        if isinstance(self.processing_class, (PreTrainedTokenizerBase, ProcessorMixin)):
            align_special_tokens(self.model, self.processing_class)

    def _say_what_is_suboptimal(self, rows: StageRows) -> None:
        dropped = rows.dropped(self.folder.table)
        if dropped:
            logger.warning_once(
                f"Truncation or filtering left nothing of {dropped} of {counted(len(self.folder.table), 'example')} "
                "to train on. Their ids stay in the table. Raise `max_length` to train on them."
            )
        self._say_what_the_gate_lacks()
        unplanned = self.folder.plan.unnamed_slices(self.s3t_config.num_slices)
        passed_over = sum(self.folder.table.size(*place) for place in unplanned)
        if passed_over:
            shown = ", ".join(f"{slice_} of shard {shard}" for shard, slice_ in unplanned[:_SHOWN_SLICES])
            more = ", ..." if len(unplanned) > _SHOWN_SLICES else ""
            logger.warning_once(
                f"{passed_over} of {len(self.folder.table)} examples are never trained on: they lie in slices that no "
                f"planned sequence names (slice {shown}{more}). To train on them, name every slice in "
                "`sequence_selection`, with another `output_dir`; or plan fewer slices."
            )
        if launch.asked_for() > 1 and self.accelerator.num_processes == 1:
            logger.warning_once(
                f"{launch.asked_for()} processes were asked for and the launcher started one, as it does on a CPU "
                "without MPI. Call `hf_s3t.launch.start_cpu_processes()` first thing in your script."
            )
        if self.args.device.type == "cuda" and not self.args.full_determinism:
            logger.warning_once(
                "Without `full_determinism=True` some CUDA kernels add in another order from run to run, and an audit "
                "may find other bits. The guarantee of `unlearn` does not depend on it."
            )
        steps = fewest_steps(self._missing(), rows, self.folder.table, self.args, self.accelerator.num_processes)
        if steps is not None and steps < LEAST_STEPS:
            logger.warning_once(
                f"The shortest stage gets {steps} optimizer steps; with fewer than about {LEAST_STEPS} a stage seldom "
                "converges. Raise `num_train_epochs`, lower `per_device_train_batch_size` or "
                "`gradient_accumulation_steps`, or have fewer shards or slices."
            )

    # The gate

    def build_gate(self) -> None:
        """
        Make the gate of the rows that are in, in the folder of a system that has none or another one.

        A system that is made with `S3TConfig(gate="terms")` has one. This is for one that was made without, and for
        other prompts or another tokenizer. Nothing is trained. The settings that `s3t_config` has of a gate are
        recorded with it. Models that serve the folder as its settings say take it up at their next call.

        Raises:
            [`~hf_s3t.errors.ConfigError`]: If the trainer has no dataset, or no prompts can be read from it.
            [`~hf_s3t.errors.FolderError`]: If the folder cannot be written to.

        Example:

        ```python
        trainer = S3TTrainer(
            model, args, train_dataset=dataset, processing_class=tokenizer, s3t_config=S3TConfig(gate="terms", ...)
        )
        trainer.build_gate()
        ```
        """
        rows = self._stage_rows
        if rows is None:
            raise ConfigError(
                "`build_gate` got no rows, expected those of the system: the trainer has no `train_dataset`. Make it "
                "with the dataset of the first training."
            )
        check_has_prompts(rows, self.processing_class)
        config = replace(self.s3t_config, gate=self.s3t_config.gate or "terms")
        self._write_gate({name: getattr(config, name) for name in OF_SERVING})
        self.s3t_config = config
        self.folder.refresh_settings()

    # The audit

    @old_objects_passed_over()
    def verify(self, stages: str | Sequence[StageKey | str] | None = None) -> VerificationReport:
        """
        Train surviving stages again, from their first stage up, on the data left, and compare bit for bit (E3).

        Do it in a fresh process: in the one that trained the stages, state that a stage left there (in a global, a
        closure, a library) acts on the audit too, and is not found. The report says which stages that is so for, and a
        warning says so once.

        Where this process has a key to sign with ([`hf_s3t.signing`]), the result is recorded in the folder's audits,
        of which receipts and reports tell; equal tensors in the process that trained the stages are not.

        Args:
            stages (`"sample"` or a list of stages, *optional*):
                `None` for every valid stage, `"sample"` for one drawn at random, or keys such as `"shard-0/2-0"`.

        Returns:
            [`~hf_s3t.training.audit.VerificationReport`]:
                Which stages were trained again, and every tensor that differs.
        """
        report = verify_stages(self, stages)
        if self.is_world_process_zero():
            keep_report(self.folder, report)
        return report


class S3TTrainer(S3TTrainerMixin, Trainer):
    """
    [`~transformers.Trainer`] for S3T systems: sequence and image classification, and any other task with one stack of
    transformer layers.

    Takes what `Trainer` takes, in its order, and two arguments more. `args.output_dir` is the system's folder;
    `num_train_epochs` and `max_steps` count per stage; `args.seed` is overridden by `s3t_config.seed`.

    To a callback every stage is a training, with its `on_train_begin`, its `state` and its steps. Trackers (those that
    `report_to` knows, and classes derived from them) see one run over all stages. In `on_log` steps go on from stage
    to stage, for every callback, and begin where the stages that are there end; logs carry `shard`, `sequence`
    (its number in the plan) and `depth`. After `train()`, `state.log_history` has the entries of all stages that it
    trained, in order, without those that saw what was deleted since.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model. It is never changed, and its head is initialised
            from the seed.
        args ([`~transformers.TrainingArguments`], *optional*): The recipe of a stage.
        data_collator, train_dataset, eval_dataset, processing_class: As in `Trainer`.
        compute_loss_func, compute_metrics, callbacks: As in `Trainer`.
        optimizer_cls_and_kwargs (`tuple[type, dict]`, *optional*):
            As in `Trainer`; every stage gives a copy of the arguments, and its own parameters, to the class. Arguments
            that hold parameters, a model or an optimizer are refused. Of an optimizer with two weights, as
            schedule-free ones have, a stage is the weights of its `eval()`.
        preprocess_logits_for_metrics: As in `Trainer`.
        model_init, optimizers: Refused: every stage starts a fresh optimizer on the one base model.
        peft_config ([`~peft.LoraConfig`], *optional*): The adapters; may be left out for a folder that has them.
            Without `target_modules` PEFT chooses them, where it has a default for the architecture.
        s3t_config ([`S3TConfig`], *optional*): The system; may be left out for a folder that has one.

    Raises:
        [`~hf_s3t.errors.S3TError`]: Its children, before any training; see `hf_s3t.errors`.

    Example:

    ```python
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification, TrainingArguments
    from hf_s3t import S3TConfig, S3TTrainer

    trainer = S3TTrainer(
        model=AutoModelForSequenceClassification.from_pretrained("roberta-large", num_labels=2),
        args=TrainingArguments(output_dir="roberta-sst2-s3t", learning_rate=1e-5, num_train_epochs=10),
        train_dataset=tokenized_dataset,
        peft_config=LoraConfig(r=16, lora_alpha=32, use_rslora=True, target_modules=["query", "value"]),
        s3t_config=S3TConfig(num_shards=5, num_slices=7, layers_per_slice=3, id_column="id"),
    )
    trainer.train()
    trainer.s3t_model.unlearn([17, 4211])
    ```
    """

    # `Trainer` makes no other rows of them.
    _numbers_rows = False

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., Any] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        peft_config: PeftConfig | None = None,
        s3t_config: S3TConfig | None = None,
    ):
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            peft_config=peft_config,
            s3t_config=s3t_config,
        )

    def _arguments_of(self, given: Mapping[str, Any]) -> TrainingArguments:
        return given["args"] if given["args"] is not None else TrainingArguments(output_dir="s3t_system")

    def _look_at_given(self, given: dict[str, Any]) -> None:
        """What `Trainer` itself takes is looked at already."""

    def _check_rows_given(self, given: Mapping[str, Any], blueprint: Blueprint) -> None:
        """Refuse rows of which the model would get nothing, or could make no loss, as far as what is stored tells."""
        model, args, rows = given["model"], given["args"], given["train_dataset"]
        compute_loss_func, data_collator = given["compute_loss_func"], given["data_collator"]
        reads_its_own_way = self._reads_rows_its_own_way()
        if not reads_its_own_way:
            check_inputs(rows, model, args)
            check_loss(type(self), model, args, rows, compute_loss_func, data_collator)
        makes_answers = data_collator is not None or compute_loss_func is not None
        check_answers(rows, makes_answers or reads_its_own_way)
        if compute_loss_func is None and not reads_its_own_way and collates_as_stored(data_collator):
            check_rows(rows, model, blueprint.head, args)

    def _check_rows_that_come(self, dataset: Any) -> None:
        makes_answers = self.compute_loss_func is not None or not collates_as_stored(self.data_collator)
        check_answers(dataset, makes_answers or self._reads_rows_its_own_way())
        super()._check_rows_that_come(dataset)

    def _reads_rows_its_own_way(self) -> bool:
        """Whether a class made of this one decides what is done with rows."""
        names = (
            "compute_loss", "training_step", "get_train_dataloader", "_get_dataloader", "_prepare_inputs",
            "_set_signature_columns_if_needed", "_remove_unused_columns", "_get_collator_with_removed_columns",
        )  # fmt: skip
        return any(getattr(type(self), name) is not getattr(S3TTrainer, name) for name in names)


def _name_of(model: Any) -> str:
    name: str = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
    return name or "model"


def stack_of(model: PreTrainedModel, blueprint: Blueprint, stack_type: type[StageStack]) -> StageStack:
    """The stack of a blueprint, on its base model with a head from the seed."""
    # What may be refused comes first, while the base is as it was given.
    keep_4_bit_weights(model)
    stack = stack_type(model, blueprint.peft_config, blueprint.layers, blueprint.head)
    seed_head(model, blueprint.head, blueprint.config.seed)
    checkpoint_without_reentry(model)
    log_casts_once(model)
    return stack


def checkpoint_without_reentry(model: PreTrainedModel) -> None:
    """
    Have a base that checkpoints activations do so in the way that needs no gradients at its input.

    `peft.prepare_model_for_kbit_training` turns checkpointing on without saying which way, and PyTorch's default is
    the other.
    """
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        model.gradient_checkpointing_enable({"use_reentrant": False})


def shared_base(
    model: _Base | None,
    model_init: Callable[..., Any] | None,
    optimizers: tuple[Any, Any],
    data_collator: Callable[..., Any] | None,
    compute_loss_func: Callable[..., Any] | None,
) -> _Base:
    """The model that all stages share. Arguments that would carry state from one stage into the next are refused."""
    for part in (data_collator, compute_loss_func):
        fresh_copy(part, (model,))
    if model is None or model_init is not None:
        raise ConfigError(
            "A trainer of stages needs `model`, the base that all stages share; `model_init` would make another one "
            "for every stage. Give the model."
        )
    if any(part is not None for part in optimizers):
        raise ConfigError(
            "`optimizers` would carry an optimizer's state from stage to stage. Give `optimizer_cls_and_kwargs`, from "
            "which every stage makes its own."
        )
    return model


def default_ddp_arguments(args: TrainingArguments) -> None:
    """Every trainable parameter of a stage takes part in every step, so DDP has none to look for."""
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False
