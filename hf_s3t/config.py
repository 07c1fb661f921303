"""`S3TConfig`: how the data is cut up, which sequences are trained, and how the ensemble answers."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from .checks import (
    check_gate,
    check_prior,
    require_bool,
    require_chain,
    require_horizon,
    require_name,
    require_positive,
    require_share,
)
from .checks import (
    require_choice as require_choice,
)
from .checks import (
    require_int as require_int,
)
from .errors import ConfigError, FormatVersionError, counted


FORMAT_VERSION = 1
SEQUENCE_SELECTIONS = ("cyclic", "cyclic-paper", "bms", "conditional", "random", "sorted-cyclic", "optimal")
# "optimal" sums over all pairs of sets of slices.
OPTIMAL_MOST_SLICES = 8
# One stage for each set of slices doubles with every slice; the search for a family looks at all of them.
LATTICE_MOST_SLICES = 8
FAMILY_MOST_SLICES = 10
LATTICE = "lattice"
PARTITIONS = ("balanced", "hashed", "column")
AGGREGATIONS = ("mean_logits", "mean_probabilities", "majority_vote")
SELECTIONS = ("longest", "metric", "all")
KEEP_IDS = ("plain", "digest")
GROWTHS = ("top-down", "bottom-up")
STAGE_DATA = ("cumulative", "slice")
# Of serving, not of stages: those of a system may be changed.
OF_SERVING = ("gate", "gate_top_k", "gate_temperature")
# Far beyond what anybody trains; a config from elsewhere must not fill the memory before it is refused.
_LARGEST_PLAN = 2_000_000
_NEEDS_PRIOR = ("bms", "conditional", "sorted-cyclic")
_SWITCHES = ("colocate_duplicates", "base_is_public")
_COLUMNS = ("id_column", "group_column", "shard_column", "slice_column")


@dataclass
class S3TConfig:
    """
    The settings of an S3T system (Sequence-aware Sharded Sliced Training, ICLR 2025).

    Everything is checked on construction; nothing here depends on a model or a dataset.

    Args:
        num_shards (`int`, defaults to 1):
            Number of disjoint shards `m`; one ensemble member per shard answers. Where shards were added to a
            system, these are the first ones.
        num_slices (`int`, defaults to 4):
            Number of slices `L` of each shard, which is also the number of stages of a full stack.
        budget (`int`, *optional*):
            Number of sequences `B` trained per shard. Left out beside a named rule it is `num_slices`, where the
            deletion rate saturates. Left out beside all that says what is planned (`budget`, `work_budget`,
            `sequence_selection`, `keep_idle`), the plan is the one an expert would take for a new system: with up to
            5 slices the `"lattice"`, which costs no more than the published plan of `num_slices` rotations and serves
            every pattern of deletions at the depth of what is left; with up to 10 the best family for the work of
            these rotations; with more, the rotations without idle stages. With `select="metric"` or `"all"` it is the
            published plan.
        work_budget (`float`, *optional*):
            In the place of `budget`: at most so much training, in multiples of one full LoRA fine-tuning of the same
            data and epochs. The family of stages with the greatest expected depth is searched once, when the system
            is made, by `deletion_prior` and `score_horizon`, with up to 10 slices; one chain to full depth is always
            in it.
        keep_idle (`bool`, *optional*):
            Whether stages are planned that can never serve, as the published plans have them: a stage is idle if an
            earlier planned one saw the same set of slices. Leaving them out never changes the depth that serves; at
            equal depth another stage may answer. Defaults to `False` with `select="longest"`, and to `True` with
            `"metric"` and `"all"`, where none is idle. Without idle stages what is planned is sets: a missing set is
            grown on any valid stage that holds all of it but one slice.
        layers_per_slice (`int` or `list[int]`, *optional*):
            Transformer layers that each stage adapts. Defaults to (number of layers) // `num_slices`; the
            lowest layers left over never carry an adapter. A list gives every stage its own number, first stage first.
        sequence_selection (`str` or list of sequences, *optional*):
            How the sequences are chosen: `"cyclic"` (rotations spaced `L / B` apart; the rule where `budget` is given
            alone), `"cyclic-paper"` (Algorithm 1 as published), `"bms"` (Algorithm 2), `"conditional"`, `"random"`,
            `"sorted-cyclic"`, `"optimal"` (a search for the greatest exact depth, up to 8 slices), `"lattice"` (one
            stage for each set of slices, up to 8 slices; no budget), or the sequences themselves: lists of distinct
            slices, not necessarily of all, for every shard, or one list of them per shard.
        deletion_prior (`list[float]` or `list[list[float]]`, *optional*):
            Probability that a deletion request hits each slice of a shard, summing to one; one list for all shards or
            one per shard.
        score_horizon (`int`, defaults to 100):
            The number of deletions `t` in the score of a sequence; `"optimal"` averages the depth over as many.
        id_column (`str`, *optional*):
            Column with a unique integer or string per example. Without it ids are row numbers, which shift when rows
            leave the dataset: an audit on a dataset without the deleted rows needs an id column.
        group_column (`str`, *optional*):
            Column naming the group (a person, say) of each example; a group lies in one slice and can be unlearned as
            one.
        partition (`str`, defaults to `"balanced"`):
            `"balanced"` (random by ids, seed and the folder's secret, sizes within one of each other), `"hashed"` (an
            example's place is a hash of seed and its own id or group alone, which anybody can compute) or `"column"`.
        shard_column (`str`, *optional*):
            Column with the shard number of each example, for `partition="column"`.
        slice_column (`str`, *optional*):
            Column with the slice number of each example, for `partition="column"`.
        colocate_duplicates (`bool`, defaults to `False`):
            Put examples of equal content into one slice (and groups that share one), so that deleting all copies costs
            no more than deleting one.
        keep_ids (`str`, defaults to `"plain"`):
            How the system's folder keeps ids and groups: as they are, or as keyed digests (`"digest"`): where they are
            personal themselves, or dense, as row numbers are, so that a missing one names who was deleted. Calls take
            the ids as they are either way; what is trained is the same bit for bit.
        aggregation (`str`, *optional*):
            `"mean_logits"`, `"mean_probabilities"` or `"majority_vote"`. Defaults to the mean of token probabilities
            for causal language models and to the mean of logits otherwise. Where one member is left, its logits answer
            as they are: with mean probabilities the scale of logits changes then, their distribution does not.
        select (`str`, defaults to `"longest"`):
            Which surviving stack of a shard serves: the `"longest"`, the one with the best recorded evaluation loss
            (`"metric"`), or the longest of every sequence together (`"all"`).
        gate (`str`, *optional*):
            What gives each row of a call weights over the shards: `"terms"`, by the words that its prompt shares with
            the prompts of the rows that are still in (for bases that read text). The folder then holds keyed digests
            of these words (`gate.safetensors`). `None` is the mean of all members. This setting and the two that
            follow are of serving: no stage depends on them, and they can be others at each load.
        gate_top_k (`int`, *optional*):
            How many members answer a row at most, where as many stand out by their weights; all, by their weights, if
            not given.
        gate_temperature (`float`, defaults to 3.0):
            By what a gate's scores are divided before the softmax that makes weights of them. With less, few members
            answer more of the rows, which is best for facts; more is safer for questions that concern no shard.
        base_is_public (`bool`, defaults to `False`):
            States that a base quantised by calibration (GPTQ, AWQ) was calibrated on data nobody can ask to delete.
        growth (`str`, defaults to `"top-down"`):
            Where the first stage adapts layers, and where the others go from there: `"top-down"`, the paper's method,
            or `"bottom-up"`, its ablation (section C.2), where the layers left over are the topmost.
        stage_data (`str`, defaults to `"cumulative"`):
            What a stage is trained on: all slices of its prefix (`"cumulative"`, the paper's method), or the last one
            only (`"slice"`, its ablation of one slice per layer group, section C.2), which is `replay=0.0`.
        replay (`float`, defaults to 1.0):
            The share of the earlier slices' examples in each epoch of a stage, beside all of its new slice: another
            share in each epoch, drawn from the stage's seed and the epoch, of equally many (to the nearest number,
            at least one). 1.0 is the paper's method. A stage counts as trained on all slices of its prefix, unless
            the share is 0.0, which is `stage_data="slice"`.
        seed (`int`, defaults to 42):
            The one seed of the system: sequences and every stage's randomness are hashed from it. So are the places of
            a balanced partition, with the folder's secret: systems that are to be compared need one secret
            (`HF_S3T_KEY`), or the same seed places examples otherwise in each.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If a value is out of range, unknown, or contradicts another.

    Example:

    ```python
    >>> from hf_s3t import S3TConfig

    >>> config = S3TConfig(num_shards=5, num_slices=4, budget=2)
    >>> config.keeps_idle
    False
    >>> S3TConfig.from_dict(config.to_dict()) == config
    True
    ```
    """

    num_shards: int = field(
        default=1, metadata={"help": "Number of disjoint shards m, one ensemble member each; later ones may be added."}
    )
    num_slices: int = field(default=4, metadata={"help": "Number of slices L per shard: the stages of a full stack."})
    budget: int | None = field(
        default=None, metadata={"help": "Sequences B trained per shard; num_slices beside a named rule."}
    )
    work_budget: float | None = field(
        default=None, metadata={"help": "Training at most, in full fine-tunings: the best family of stages for it."}
    )
    keep_idle: bool | None = field(
        default=None, metadata={"help": "Plan stages that can never serve, as published; by select if not given."}
    )
    layers_per_slice: int | list[int] | None = field(
        default=None, metadata={"help": "Layers each stage adapts, top first; defaults to layers // num_slices."}
    )
    sequence_selection: str | list[Any] | None = field(
        default=None,
        metadata={
            "help": "cyclic, cyclic-paper, bms, conditional, random, sorted-cyclic, optimal, lattice, or sequences."
        },
    )
    deletion_prior: list[Any] | None = field(
        default=None, metadata={"help": "Deletion probability of each slice: one list, or one list per shard."}
    )
    score_horizon: int = field(default=100, metadata={"help": "Number of deletions t in the score of a sequence."})
    id_column: str | None = field(
        default=None, metadata={"help": "Column with a unique id per example; row numbers if not given."}
    )
    group_column: str | None = field(
        default=None, metadata={"help": "Column with the group (a person, say) that lies in one slice together."}
    )
    partition: str = field(default="balanced", metadata={"help": "balanced, hashed or column."})
    shard_column: str | None = field(default=None, metadata={"help": "Shard number column for partition=column."})
    slice_column: str | None = field(default=None, metadata={"help": "Slice number column for partition=column."})
    colocate_duplicates: bool = field(
        default=False, metadata={"help": "Put examples of equal content into one slice: deleting all costs as one."}
    )
    keep_ids: str = field(
        default="plain",
        metadata={"help": "plain, or digest where ids are personal or row numbers: the folder holds keyed digests."},
    )
    aggregation: str | None = field(
        default=None, metadata={"help": "mean_logits, mean_probabilities or majority_vote; by task if not given."}
    )
    select: str = field(default="longest", metadata={"help": "Stack served per shard: longest, metric or all."})
    gate: str | None = field(
        default=None, metadata={"help": "terms: weigh members by the words of each prompt; the mean if not given."}
    )
    gate_top_k: int | None = field(
        default=None, metadata={"help": "Members that answer a row at most, where a gate names so many."}
    )
    gate_temperature: float = field(
        default=3.0, metadata={"help": "What a gate's scores are divided by before they become weights."}
    )
    base_is_public: bool = field(
        default=False, metadata={"help": "The data a GPTQ or AWQ base was calibrated on can never be deleted."}
    )
    growth: str = field(
        default="top-down", metadata={"help": "top-down, or bottom-up: which layers the first stage adapts."}
    )
    stage_data: str = field(
        default="cumulative", metadata={"help": "cumulative, or slice: a stage trains on its last slice only."}
    )
    replay: float = field(
        default=1.0, metadata={"help": "Share of the earlier slices' examples in each epoch of a stage, 0 to 1."}
    )
    seed: int = field(
        default=42, metadata={"help": "The one seed of the system; what is to be compared needs one HF_S3T_KEY, too."}
    )

    def __post_init__(self) -> None:
        require_int("num_shards", self.num_shards, 1)
        require_int("num_slices", self.num_slices, 1)
        require_horizon("score_horizon", self.score_horizon)
        require_int("seed", self.seed, None)
        require_choice("partition", self.partition, PARTITIONS)
        require_choice("select", self.select, SELECTIONS)
        require_choice("keep_ids", self.keep_ids, KEEP_IDS)
        require_choice("growth", self.growth, GROWTHS)
        require_choice("stage_data", self.stage_data, STAGE_DATA)
        self._check_replay()
        if self.aggregation is not None:
            require_choice("aggregation", self.aggregation, AGGREGATIONS)
        self.gate_temperature = check_gate(self.gate, self.gate_top_k, self.gate_temperature, self.num_shards)
        for name in _SWITCHES:
            require_bool(name, getattr(self, name))
        if self.keep_idle is not None:
            require_bool("keep_idle", self.keep_idle)
        for name in _COLUMNS:
            require_name(name, getattr(self, name))
        self._check_layers_per_slice()
        self._check_prior()
        self._check_size(1)
        self._check_what_is_planned()
        self._check_size(self._sequences_at_most())
        self._check_columns()
        self._check_duplicates()

    def _check_replay(self) -> None:
        require_share("replay", self.replay)
        self.replay = float(self.replay)
        if self.stage_data == "slice" and 0 < self.replay < 1:
            raise ConfigError(
                f'stage_data="slice", which is replay=0.0, with replay={self.replay}. Leave `stage_data` out to train '
                "on a share of the earlier slices' examples, or `replay` to train on none of them."
            )
        if self.stage_data == "slice" or self.replay == 0:
            # Two names of one thing, so that configs of either compare equal.
            self.stage_data, self.replay = "slice", 0.0

    def _check_layers_per_slice(self) -> None:
        if isinstance(self.layers_per_slice, (list, tuple)):
            self.layers_per_slice = list(self.layers_per_slice)
            if len(self.layers_per_slice) != self.num_slices:
                raise ConfigError(
                    f"`layers_per_slice` has {counted(len(self.layers_per_slice), 'value')}, but "
                    f"num_slices={self.num_slices}. Give one number of layers per slice, top first, or a single "
                    "number for all."
                )
            for count in self.layers_per_slice:
                require_int("layers_per_slice", count, 1)
        elif self.layers_per_slice is not None:
            require_int("layers_per_slice", self.layers_per_slice, 1)

    def _check_prior(self) -> None:
        if self.deletion_prior is None:
            return
        given = self.deletion_prior.tolist() if hasattr(self.deletion_prior, "tolist") else self.deletion_prior
        kinds = {isinstance(p, (list, tuple)) for p in given} if isinstance(given, (list, tuple)) else set()
        if not isinstance(given, (list, tuple)) or len(kinds) > 1:
            raise ConfigError(
                f"`deletion_prior` must be a list of one probability per slice, or one such list per shard, got "
                f"{self.deletion_prior!r}."
            )
        per_shard = kinds == {True}
        priors = given if per_shard else [given]
        if per_shard and len(priors) != self.num_shards:
            raise ConfigError(
                f"`deletion_prior` has {counted(len(priors), 'list')}, but num_shards={self.num_shards}. Give one "
                "list for all shards or one list per shard."
            )
        for prior in priors:
            check_prior(prior, self.num_slices)
        self.deletion_prior = [list(map(float, p)) for p in priors] if per_shard else list(map(float, priors[0]))

    def _check_what_is_planned(self) -> None:
        if self.work_budget is not None:
            self._check_work_budget()
        elif isinstance(self.sequence_selection, str):
            self._check_rule(self.sequence_selection)
        elif self.sequence_selection is not None:
            self._check_listed_sequences()
        elif self.budget is not None:
            self._check_rule("cyclic")

    def _check_work_budget(self) -> None:
        given = {"budget": self.budget, "sequence_selection": self.sequence_selection}
        others = [f"{name}={value!r}" for name, value in given.items() if value is not None]
        if others:
            raise ConfigError(
                f"work_budget={self.work_budget!r} beside {' and '.join(others)}, expected one of them: what is "
                "trained for so much work is searched. Leave out the other, or `work_budget`."
            )
        self.work_budget = require_positive("work_budget", self.work_budget)
        if self.num_slices > FAMILY_MOST_SLICES:
            raise ConfigError(
                f"work_budget={self.work_budget} with num_slices={self.num_slices}, but the search is over at most "
                f"{FAMILY_MOST_SLICES} slices. Lower `num_slices`, or give `budget`."
            )
        require_chain("work_budget", self.work_budget, self.num_slices, self.replay)

    def _check_listed_sequences(self) -> None:
        self.sequence_selection = self._checked_lists(self.sequence_selection)
        lists = self.sequence_selection if self._sequences_per_shard() else [self.sequence_selection]
        counts = sorted({len(sequences) for sequences in lists})
        if self.budget is not None and counts != [self.budget]:
            raise ConfigError(
                f"budget={self.budget}, but the number of sequences that `sequence_selection` lists for a shard is "
                f"{' or '.join(map(str, counts))}. Leave `budget` out when the sequences are listed."
            )

    def _check_rule(self, rule: str) -> None:
        require_choice("sequence_selection", rule, (*SEQUENCE_SELECTIONS, LATTICE))
        if rule == LATTICE:
            self._check_lattice()
            return
        if self.budget is not None:
            require_int("budget", self.budget, 1)
        budget = self.num_slices if self.budget is None else self.budget
        if self.num_slices < 20 and budget > math.factorial(self.num_slices):
            raise ConfigError(
                f"budget={budget} is more than the {math.factorial(self.num_slices)} permutations of "
                f"num_slices={self.num_slices} slices. Lower the budget."
            )
        if rule in _NEEDS_PRIOR and self.deletion_prior is None:
            raise ConfigError(
                f'sequence_selection="{rule}" needs `deletion_prior`, the probability of each '
                'slice to be hit. Give it, or use "cyclic", which assumes nothing.'
            )
        if rule == "optimal" and self.num_slices > OPTIMAL_MOST_SLICES:
            raise ConfigError(
                f'sequence_selection="optimal" searches over at most {OPTIMAL_MOST_SLICES} slices, got num_slices='
                f'{self.num_slices}. Use "cyclic", or "bms" with a prior.'
            )
        if rule in ("bms", "sorted-cyclic") and budget > self.num_slices:
            raise ConfigError(
                f'sequence_selection="{rule}" selects at most num_slices={self.num_slices} '
                f'sequences, got budget={budget}. Lower the budget or use "conditional".'
            )

    def _check_lattice(self) -> None:
        if self.budget is not None:
            raise ConfigError(
                f'budget={self.budget} with sequence_selection="{LATTICE}", which has one stage for each set of '
                "slices. Leave `budget` out, or give `work_budget` for as many of them as it pays."
            )
        if self.num_slices > LATTICE_MOST_SLICES:
            raise ConfigError(
                f'sequence_selection="{LATTICE}" trains one stage for each set of at most {LATTICE_MOST_SLICES} '
                f"slices, got num_slices={self.num_slices}: {2**self.num_slices - 1} stages a shard. Lower "
                f"`num_slices`, or give `{'work_budget' if self.num_slices <= FAMILY_MOST_SLICES else 'budget'}`."
            )

    def _sequences_at_most(self) -> int:
        """How many sequences of a shard the stages can be at most."""
        if isinstance(self.sequence_selection, list):
            lists = self.sequence_selection if self._sequences_per_shard() else [self.sequence_selection]
            return max(map(len, lists))
        # A family is a tree whose leaves are sequences; one for each set of slices has half as many.
        return self.budget or self.num_slices

    def _check_size(self, budget: int) -> None:
        # A stage's address has as many numbers as its prefix has slices.
        if self.num_shards * budget * self.num_slices**2 > _LARGEST_PLAN:
            raise ConfigError(
                f"num_shards={self.num_shards} times budget={budget} times the square of num_slices="
                f"{self.num_slices} is more than {_LARGEST_PLAN}: so many stages cannot be kept. Lower one of them."
            )

    def _sequences_per_shard(self) -> bool:
        return isinstance(self.sequence_selection, list) and isinstance(self.sequence_selection[0][0], list)

    def _checked_lists(self, given: Any) -> list[Any]:
        expected = (
            f"`sequence_selection` must be one of {', '.join((*SEQUENCE_SELECTIONS, LATTICE))} or a list of sequences "
            f"of slices, got {given!r}."
        )
        try:
            rows = [list(row) for row in given]
            nested = bool(rows) and bool(rows[0]) and isinstance(rows[0][0], (list, tuple))
            shards = [[list(seq) for seq in shard] for shard in rows] if nested else [rows]
        except TypeError as error:
            raise ConfigError(expected) from error
        if nested and len(shards) != self.num_shards:
            raise ConfigError(
                f"`sequence_selection` lists sequences for {counted(len(shards), 'shard')}, but num_shards="
                f"{self.num_shards}. Give one list of sequences for all shards, or one list of them per shard."
            )
        for sequences in shards:
            if not sequences:
                raise ConfigError("`sequence_selection` is empty. List at least one sequence of slices.")
            for sequence in sequences:
                self._check_sequence(sequence)
            if len({tuple(sequence) for sequence in sequences}) != len(sequences):
                raise ConfigError("`sequence_selection` lists a sequence twice. Sequences must be distinct.")
        return shards if nested else shards[0]

    def _check_sequence(self, sequence: list[Any]) -> None:
        # A truth, or a float, may equal a number.
        are_slices = all(type(slice_) is int and 0 <= slice_ < self.num_slices for slice_ in sequence)
        if not sequence or not are_slices:
            raise ConfigError(
                f"`sequence_selection` holds {sequence}, expected slices out of 0..{self.num_slices - 1} "
                f"(num_slices={self.num_slices}). Name at least one, as a whole number."
            )
        if len(set(sequence)) < len(sequence):
            raise ConfigError(
                f"`sequence_selection` holds {sequence}, which repeats a slice. A stage adds one that those before it "
                "did not see: name each once; not every slice has to be named."
            )

    def _check_columns(self) -> None:
        given = [column is not None for column in (self.shard_column, self.slice_column)]
        if given != [self.partition == "column"] * 2:
            raise ConfigError(
                f'partition="{self.partition}" with shard_column={self.shard_column!r} and '
                f'slice_column={self.slice_column!r}. Both columns belong to partition="column", and to it alone.'
            )

    def _check_duplicates(self) -> None:
        if self.colocate_duplicates and self.partition != "balanced":
            raise ConfigError(
                f'colocate_duplicates=True with partition="{self.partition}", in which an example\'s place depends on '
                'nothing but itself. Use partition="balanced".'
            )

    def prior_of(self, shard: int) -> list[float] | None:
        """The deletion prior over the slices of one shard, or `None` if no prior was given."""
        if self.deletion_prior is None or not isinstance(self.deletion_prior[0], list):
            return self.deletion_prior
        of_shard: list[float] = self.deletion_prior[shard]
        return of_shard

    def with_added_shards(self, added: int) -> "S3TConfig":
        """
        The settings of a system to which whole shards were added: each is planned, and hit, as one of the first.

        Args:
            added (`int`): How many came to the `num_shards` that there were.

        Raises:
            [`~hf_s3t.errors.ConfigError`]: If so many stages cannot be kept.
        """
        if not added:
            return self
        first = self.num_shards
        later = [(first + number) % first for number in range(added)]
        more: dict[str, Any] = {}
        if self.deletion_prior is not None and isinstance(self.deletion_prior[0], list):
            more["deletion_prior"] = [*self.deletion_prior, *(self.deletion_prior[shard] for shard in later)]
        if isinstance(self.sequence_selection, list) and self._sequences_per_shard():
            lists = self.sequence_selection
            more["sequence_selection"] = [*lists, *(lists[shard] for shard in later)]
        return replace(self, num_shards=first + added, **more)

    def slices_trained_on(self, prefix: tuple[int, ...]) -> tuple[int, ...]:
        """The slices of a prefix whose examples its stage is trained on; what it stands on saw the others."""
        # Of a share of the earlier ones, too: which examples are in it depends on all that could be.
        return prefix if self.stage_data == "cumulative" else prefix[-1:]

    @property
    def keeps_idle(self) -> bool:
        """Whether stages are planned, and grown again, as the published plans have them, and not by their sets."""
        return self.select != "longest" if self.keep_idle is None else self.keep_idle

    def num_replayed(self, num_earlier: int) -> int:
        """How many of so many examples of earlier slices an epoch takes: to the nearest, and one where any are."""
        return min(num_earlier, max(1, round(self.replay * num_earlier))) if self.replay else 0

    def examples_per_epoch(self, sizes: Sequence[int]) -> int:
        """How many examples an epoch of a stage takes that is trained on slices of these sizes, the new one last."""
        return sizes[-1] + self.num_replayed(sum(sizes[:-1]))

    def explicit_sequences_of(self, shard: int) -> list[list[int]] | None:
        """The sequences the user listed for one shard, or `None` if a rule chooses them."""
        if not isinstance(self.sequence_selection, list):
            return None
        return self.sequence_selection[shard] if self._sequences_per_shard() else self.sequence_selection

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON types, with the format version."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "S3TConfig":
        """
        The config that `to_dict` described.

        Raises:
            [`~hf_s3t.errors.FormatVersionError`]: If the values were written by an unknown format version.
            [`~hf_s3t.errors.ConfigError`]: If a key is unknown or a value invalid.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"An S3TConfig is read from a JSON object, got {type(values).__name__}.")
        values = dict(values)
        version = values.pop("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise FormatVersionError(
                f"This config has format version {version!r}; this hf_s3t reads version {FORMAT_VERSION}. Install the "
                "version of hf_s3t that wrote it."
            )
        known = {f.name for f in fields(cls)}
        unknown = sorted(map(str, set(values) - known))
        if unknown:
            raise ConfigError(f"Unknown S3TConfig keys: {', '.join(unknown)}. Known: {', '.join(sorted(known))}.")
        return cls(**values)

    def to_json(self) -> str:
        """The settings as a JSON string."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "S3TConfig":
        """The config of a JSON string written by `to_json`."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"An S3TConfig is read from JSON, and this is none: {error}.") from error
        return cls.from_dict(values)
