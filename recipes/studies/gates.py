"""Who knows: what an ensemble keeps of what one of its shards has learnt, by what weighs its members."""

import argparse
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.instruction_rows import as_examples
from common.instruction_task import quiet, read
from common.instruction_tuning import make_method
from common.options import CONFIGS, Options
from common.results import settings_of
from datasets import Dataset
from demo.invented_people import fact_rows, general_rows, held_out_rows, make_people, strangers
from demo.people_demo import DEMO, demo_base
from demo.small_llama import base_model
from studies.asking import Answers, answers, answers_by
from studies.gates_of_classifiers import classifiers
from studies.membership import by_subject, membership, orphans
from studies.rewording import REWORDINGS, reworded
from studies.workbench import kept

from hf_s3t import S3TModel
from hf_s3t.analysis.options import stage_cost
from hf_s3t.analysis.planning import sequence_cost
from hf_s3t.analysis.rates import deletion_rate
from hf_s3t.analysis.streams import Policy, families_under
from hf_s3t.baselines import Method, use_public_secret
from hf_s3t.model.gates import chosen
from hf_s3t.sequences.families import stages_of


Row = Mapping[str, str]
# What the terms gate is chosen of, on subjects and general rows that are not reported.
TEMPERATURES, MOST_MEMBERS = (0.3, 1.0, 3.0, 5.0, 8.0), (None, 1, 2)
# Every third subject chooses; of the others, one in eight is deleted.
_CHOOSES, _DELETED = 3, 8
# Of one member the answers are its own, whatever weighs it.
AS_TRAINED = "as trained"
KINDS = (AS_TRAINED, *REWORDINGS)
# Attention of more rows at once leaves the caches.
_BATCH = 8
# Characters of an instruction and its answer, at most.
_LONGEST = 300
# Layouts that are compared: numbers of shards and of slices, and the epochs of one slice that all of them cost.
LAYOUTS = (*product((1, 5, 20), (1, 2, 4, 8)), (50, 1), (50, 2))
# A base with a layer for each of eight slices, and a person or general row for each slice of each shard.
_LAYOUT = {"num_layers": 8, "num_people": 40, "num_general": 160, "epochs": 24}
# What trains two layers well diverges where it trains all eight: each layout has the best of these.
_LAYOUT_RATES = {1: (1e-3,), 2: (1e-3, 3e-3), 4: (1e-3, 3e-3), 8: (1e-3, 3e-3)}
# What trains a shard well need not train all rows at once: one LoRA has the best of these, by the first seed.
_WHOLE_RATES = {"people": (1e-3, 3e-3), "authors": (1e-3, 2e-3)}
# The gate that is recommended: of twenty members each setting that is tried costs as much as training them.
_LAYOUT_GATE = {"gate": "terms", "gate_temperature": 1.0, "gate_top_k": 1}


# What is taught and asked


@dataclass(frozen=True)
class Subjects:
    """
    Facts about subjects, of which each has its place in one shard; and what concerns nobody.

    Args:
        known (mapping): Name of a subject -> its rows: instruction, input, output.
        strangers (mapping): The same of subjects that nothing is taught about.
        general (sequence of rows): What is taught besides.
        held_out (sequence of rows): What general quality is measured with.
        choosing_general (sequence of rows): As many more of the same, by which the gate's settings are chosen.
        measure (`str`): Which of the fields of [`Answers`] says what is known.
        title (`str`): What tables and pictures call them.
    """

    known: Mapping[str, Sequence[Row]]
    strangers: Mapping[str, Sequence[Row]]
    general: Sequence[Row]
    held_out: Sequence[Row]
    choosing_general: Sequence[Row]
    measure: str
    title: str

    def rows(self) -> Dataset:
        """What is taught, as `instruction`, `input` and `output`, with its ids and subjects."""
        facts = [
            {**row, "id": f"{name}-{number}", "subject": name}
            for name, rows in self.known.items()
            for number, row in enumerate(rows)
        ]
        # A general row is a subject of its own.
        others = [
            {**row, "id": f"general-{number}", "subject": f"nobody-{number}"}
            for number, row in enumerate(self.general)
        ]
        return Dataset.from_list(facts + others)

    @property
    def deleted(self) -> list[str]:
        """Those that are deleted; they neither choose nor are they reported."""
        return [name for number, name in enumerate(self.known) if number % _DELETED == 0]

    @property
    def choosing(self) -> list[str]:
        """Those by which the gate's settings are chosen."""
        return [n for number, n in enumerate(self.known) if number % _CHOOSES == 1 and n not in self.deleted]

    @property
    def reported(self) -> list[str]:
        """The others."""
        return [name for name in self.known if name not in self.deleted and name not in self.choosing]


def people(num_people: int, num_general: int, eval_size: int) -> Subjects:
    """The demo's invented people."""
    return Subjects(
        known={person.name: fact_rows(person) for person in make_people(num_people, 0, private=True)},
        strangers={person.name: fact_rows(person) for person in strangers(num_people, max(20, num_people))},
        general=general_rows(num_general, 0),
        held_out=held_out_rows(num_general, eval_size),
        choosing_general=held_out_rows(num_general + eval_size, eval_size),
        measure="right",
        title="invented people",
    )


def authors(data: Path, count: int, num_general: int, eval_size: int) -> Subjects:
    """TOFU's authors, as many strangers, and Alpaca's instructions."""
    found: dict[str, list[Row]] = {}
    for row in _lines(data / "tofu" / "full.jsonl"):
        asked = {"instruction": row["question"], "input": "", "output": row["answer"]}
        found.setdefault(f"author-{row['author']}", []).append(asked)
    names = list(found)
    instructions = (
        {name: row.get(name) or "" for name in ("instruction", "input", "output")}
        for row in _lines(data / "alpaca" / "alpaca_union.jsonl")
    )
    # Of those that are cut off by their length, the answer may be gone.
    short = (row for row in instructions if sum(map(len, row.values())) <= _LONGEST)
    others = list(islice(short, num_general + 2 * eval_size))
    return Subjects(
        known={name: found[name] for name in names[:count]},
        strangers={name: found[name] for name in names[count : 2 * count]},
        general=others[:num_general],
        held_out=others[num_general : num_general + eval_size],
        choosing_general=others[num_general + eval_size :],
        measure="tokens",
        title="TOFU's authors",
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


class Taught:
    """
    A system of a method, taught about subjects, and whoever asks it.

    Args:
        subjects ([`Subjects`]): What it is taught.
        options ([`~common.options.Options`]): The recipe's.
        base (`str`): The folder of its base model.
    """

    def __init__(self, subjects: Subjects, options: Options, base: str):
        self.subjects, self.options, self.base = subjects, options, base
        self.folder = Path(options.training.output_dir)

    @cached_property
    def method(self) -> Method:
        """The method, trained."""
        use_public_secret(self.folder)
        script = self.options.script
        train, held_out = (
            as_examples(rows, script.prompt_template, False)
            for rows in (self.subjects.rows(), Dataset.from_list(list(self.subjects.held_out)))
        )
        method = make_method(self.options, self.base, train, held_out)
        method.train()
        if self.options.script.method == "s3t" and not method.trainer.folder.has_gate:
            method.trainer.build_gate()
        return method

    def served(self, folder: Path | None = None, **gate: Any) -> S3TModel:
        """The system as it is served, or a copy of it, by some gate."""
        return S3TModel.from_pretrained(
            folder or self.method.output_dir, base_model=self.base, **{"gate": None, **gate}
        )

    @contextmanager
    def forgotten(self, names: Sequence[str]) -> Iterator[Path]:
        """A copy of the system's folder that has forgotten subjects, for as long as it is asked."""
        copy = self.folder.with_name(f"{self.folder.name}-forgot")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder, copy)
        try:
            self.served(copy).unlearn(groups=list(names))
            yield copy
        finally:
            shutil.rmtree(copy)

    def batches(self, rows: Sequence[Row], kind: str = AS_TRAINED) -> list[dict[str, torch.Tensor]]:
        """Rows as the trainer prepares them, their questions changed by a rule."""
        asked = [
            row if kind == AS_TRAINED else {**row, "instruction": reworded(row["instruction"], kind)} for row in rows
        ]
        script, trainer = self.options.script, self.method.trainer
        examples = as_examples(Dataset.from_list(asked), script.prompt_template, False)
        prepared = trainer._prepare_dataset(examples, trainer.processing_class, trainer.args, False, None, "questions")
        features = list(prepared)
        parts = [features[start : start + _BATCH] for start in range(0, len(features), _BATCH)]
        return [dict(trainer.data_collator(part)) for part in parts]

    def shares(self, names: Iterable[str]) -> torch.Tensor:
        """All weight on the shard that each row of the subjects is in: `(rows, num_shards)`."""
        table, shards = self.method.trainer.s3t_model, self.method.trainer.folder.config.num_shards
        ids = [f"{name}-{number}" for name in names for number in range(len(self.subjects.known[name]))]
        where = table.locate(ids)
        return torch.nn.functional.one_hot(torch.tensor([where[i][0] for i in ids]), shards).double()


def rows_of(subjects: Mapping[str, Sequence[Row]], names: Iterable[str] | None = None) -> list[Row]:
    """The rows of some subjects, or of all, one subject after the other."""
    return [row for name in (subjects if names is None else names) for row in subjects[name]]


# Measuring a system


def chosen_gate(taught: Taught) -> dict[str, Any]:
    """
    The settings of the terms gate under which the subjects that choose are known best, asked in other words, among
    those that answer general rows no worse than the mean does, beyond the error.

    Returns:
        `dict`: `gate`, as `S3TModel.from_pretrained` takes it, and `tried`: per setting what was known, and how much
        higher than the mean's the loss on general rows was, with its standard error.
    """
    subjects, shards = taught.subjects, taught.options.s3t.num_shards
    asked = [batch for kind in KINDS for batch in taught.batches(rows_of(subjects.known, subjects.choosing), kind)]
    general = taught.batches(subjects.choosing_general)
    settings = [
        {"gate": "terms", "gate_temperature": temperature, "gate_top_k": most}
        for temperature, most in product(TEMPERATURES, MOST_MEMBERS)
        if most is None or most <= shards
    ]
    models = [taught.served(**gate) for gate in settings]

    def found(batches: list[dict[str, torch.Tensor]]) -> dict[Any, Answers]:
        ways: dict[Any, torch.Tensor] = {
            number: _chosen_weights(taught, model, gate, batches)
            for number, (model, gate) in enumerate(zip(models, settings, strict=True))
        }
        return answers_by(taught.served(), batches, {**ways, "mean": torch.full_like(ways[0], 1 / shards)})

    of_subjects, of_others = found(asked), found(general)
    tried = []
    for number, gate in enumerate(settings):
        excess, error = _difference(of_others[number].loss, of_others["mean"].loss)
        # Of what knows as much the surer one.
        order = (excess <= error, _known(of_subjects[number], subjects), -float(of_subjects[number].loss.mean()))
        said = {"known": round(order[1], 4), "loss_above_mean": round(excess, 4), "error": round(error, 4)}
        tried.append((order, gate, said))
    best = max(tried, key=lambda one: one[0])
    return {"gate": best[1], "tried": [{**gate, **said} for _, gate, said in tried]}


def _difference(losses: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """By how much losses are above others of the same rows, and the standard error of that."""
    differences = losses - others
    return float(differences.mean()), float(differences.std(ddof=1) / len(differences) ** 0.5)


def _known(found: Answers, subjects: Subjects) -> float:
    return float(getattr(found, subjects.measure).mean())


def measured(taught: Taught) -> dict[str, Any]:
    """What a system knows by every gate, how it does otherwise, and what is left of whom it forgets."""
    choice = chosen_gate(taught) if taught.options.s3t.num_shards > 1 else {"gate": {"gate": "terms"}, "tried": []}
    models = {"mean": taught.served(), "terms": taught.served(**choice["gate"])}
    return {
        "chosen": choice,
        "known": _known_by_kind(taught, models, choice["gate"]),
        "held_out": _held_out(taught, models),
        **_after_deletion(taught, choice["gate"]),
        **_membership(taught, choice["gate"]),
    }


def measured_layout(taught: Taught) -> dict[str, Any]:
    """What a layout knows, asked as it was taught, by the mean and the gate that is recommended, and how it does."""
    subjects = taught.subjects
    models = {"mean": taught.served(), "terms": taught.served(**_LAYOUT_GATE)}
    choosing = taught.batches(rows_of(subjects.known, subjects.choosing))
    found = answers_by(models["mean"], choosing, {"oracle": taught.shares(subjects.choosing)})
    return {
        "known_of_choosing": round(_known(found["oracle"], subjects), 4),
        "known": _known_by_kind(taught, models, _LAYOUT_GATE, (AS_TRAINED,)),
        "held_out": _held_out(taught, models),
    }


def measured_whole(taught: Taught) -> dict[str, Any]:
    """What one LoRA knows that is fine-tuned on all the rows, and forgets nobody."""
    subjects, model = taught.subjects, taught.method.model
    chooses = answers(model, taught.batches(rows_of(subjects.known, subjects.choosing)))
    asked = {"full": rows_of(subjects.known, subjects.reported), "strangers": rows_of(subjects.strangers)}
    return {
        "known_of_choosing": round(_known(chooses, subjects), 4),
        "known": {
            who: {kind: round(_known(answers(model, taught.batches(rows, kind)), subjects), 4) for kind in KINDS}
            for who, rows in asked.items()
        },
        "held_out": {"full": round(float(answers(model, taught.batches(subjects.held_out)).loss.mean()), 4)},
    }


def _known_by_kind(
    taught: Taught, models: Mapping[str, S3TModel], gate: Mapping[str, Any], kinds: Sequence[str] = KINDS
) -> dict[str, dict[str, float]]:
    """Gate -> kind of question -> the share that is known of the subjects that are reported, and of strangers."""
    subjects = taught.subjects
    rows, right = rows_of(subjects.known, subjects.reported), taught.shares(subjects.reported)
    found: dict[str, dict[str, float]] = {name: {} for name in (*models, "oracle", "strangers")}
    equal = torch.full_like(right, 1 / right.shape[1])
    for kind in kinds:
        batches = taught.batches(rows, kind)
        weights = {"mean": equal, "terms": _chosen_weights(taught, models["terms"], gate, batches), "oracle": right}
        for name, one in answers_by(models["mean"], batches, weights).items():
            found[name][kind] = round(_known(one, subjects), 4)
        never = taught.batches(rows_of(subjects.strangers), kind)
        found["strangers"][kind] = round(_known(answers(models["terms"], never), subjects), 4)
    return found


def _held_out(taught: Taught, models: Mapping[str, S3TModel]) -> dict[str, float]:
    """The loss by gate on rows that are held out, and the standard error of the difference."""
    losses = {name: answers(model, taught.batches(taught.subjects.held_out)).loss for name, model in models.items()}
    _, error = _difference(losses["terms"], losses["mean"])
    return {**{name: round(float(loss.mean()), 4) for name, loss in losses.items()}, "error": round(error, 4)}


def _after_deletion(taught: Taught, gate: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of subjects that are deleted in one request, and of those that stay; and where questions go."""
    subjects = taught.subjects
    with taught.forgotten(subjects.deleted) as copy:
        after = {"mean": taught.served(copy), "terms": taught.served(copy, **gate)}
        if after["mean"].is_exhausted:
            return {"after": None}
        asked = {
            "deleted": [subjects.known[name] for name in subjects.deleted],
            "strangers": list(subjects.strangers.values()),
            "others": [subjects.known[name] for name in subjects.reported],
        }
        batches = {who: taught.batches([row for rows in found for row in rows]) for who, found in asked.items()}
        known = {
            name: {who: round(_known(answers(model, batches[who]), subjects), 4) for who in asked}
            for name, model in after.items()
        }
        weights = [
            by_subject(gate_weights(after["terms"], batches[who]).numpy(), asked[who])
            for who in ("deleted", "strangers")
        ]
        return {"after": {"known": known, "orphans": orphans(*weights)}}


def _membership(taught: Taught, gate: Mapping[str, Any]) -> dict[str, Any]:
    """
    Whether subjects that were deleted can be told from strangers, each of them deleted from a copy by itself and asked
    about beside strangers of its own: by how much less surprised a system is than the base, and by what the gate gives
    the shard that the subject was in.
    """
    subjects, base, gates = taught.subjects, _base(taught), {"mean": {}, "terms": gate}
    before = {name: taught.served(**one) for name, one in gates.items()}
    names = list(subjects.strangers)
    each = len(names) // len(subjects.known)
    scores: dict[tuple[str, str], tuple[list[np.ndarray], list[np.ndarray]]] = {}

    def take(when: str, how: str, values: np.ndarray, asked: Sequence[Sequence[Row]]) -> None:
        members, others = scores.setdefault((when, how), ([], []))
        member, *beside = by_subject(values, asked)
        members.append(member)
        others.extend(beside)

    for number, (name, rows) in enumerate(subjects.known.items()):
        asked = [rows, *(subjects.strangers[other] for other in names[number * each : (number + 1) * each])]
        batches, shard = (
            taught.batches([row for found in asked for row in found]),
            int(taught.shares([name])[0].argmax()),
        )
        usual = answers(base, batches).loss
        with taught.forgotten([name]) as copy:
            after = {how: taught.served(copy, **one) for how, one in gates.items()}
            for when, models in (("before", before), ("after", after)):
                for how, model in models.items():
                    # What a text is like in general drops out.
                    take(when, how, usual - answers(model, batches).loss, asked)
                take(when, "weight", gate_weights(models["terms"], batches).numpy()[:, shard], asked)
    told: dict[str, dict[str, Any]] = {"before": {}, "after": {}}
    for (when, how), (members, others) in scores.items():
        told[when][how] = membership(members, others)
    return {"membership": told}


def _base(taught: Taught) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(taught.base).eval()


def gate_weights(model: S3TModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """What the gate gives the shards for questions, `(rows, num_shards)`."""
    found = []
    for batch in batches:
        # Of a row, what stands before its answer.
        is_prompt = (batch["labels"] == -100) & batch["attention_mask"].bool()
        found.append(model.gate_weights(batch["input_ids"], is_prompt.long()))
    return torch.cat(found).double()


def _chosen_weights(
    taught: Taught, model: S3TModel, gate: Mapping[str, Any], batches: Iterable[Mapping[str, torch.Tensor]]
) -> torch.Tensor:
    """What weighs the members of a system that is whole, less those that the gate leaves out."""
    s3t = taught.options.s3t
    whole = [frozenset(range(s3t.num_slices))] * s3t.num_shards
    return chosen(gate_weights(model, batches), whole, gate.get("gate_top_k"))


# The study


def gates(options: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    """People and authors by numbers of shards, layouts at equal work: by the mean, by terms, by who knows."""
    quiet()
    found = {name: PARTS[name](options, others) for name in options.only}
    # Of one part they differ in what each system says of itself.
    settings = {name: systems[0]["settings"] for name, systems in found.items() if systems}
    for systems in found.values():
        for system in systems:
            del system["settings"]
    return {**found, "settings": settings, "seeds": options.seeds}


def _people(options: argparse.Namespace, others: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    for shards, seed in product(options.shards, options.seeds):
        given = ["--num_shards", str(shards), "--num_slices", "2", "--budget", "1", "--seed", str(seed)]
        found.append(_of_people(options, f"people-{shards}-seed{seed}", [*given, *others]))
    return found


def _of_people(
    options: argparse.Namespace,
    label: str,
    argv: Sequence[str],
    num_layers: int | None = None,
    measure: Callable[[Taught], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    system = ["--output_dir", str(options.work_dir / "systems" / label), "--group_column", "subject"]
    given = read([*argv, *system], demo_defaults=DEMO)
    script = given.script
    settings = demo_base(script)
    base, _ = base_model(replace(settings, num_layers=num_layers or settings.num_layers), script.cache_dir)
    subjects = people(script.num_people, script.num_general, script.eval_size)
    return _kept(options, label, Taught(subjects, given, base), measure)


def _authors(options: argparse.Namespace, others: Sequence[str]) -> list[dict[str, Any]]:
    # Two shards are not worth the hours: the question is what many strangers do to one that knows.
    return [
        _of_authors(options, f"authors-{shards}-seed{seed}", {"num_shards": shards, "seed": seed}, others)
        for shards, seed in product([n for n in options.shards if n > 2], options.seeds)
    ]


def _of_authors(
    options: argparse.Namespace, label: str, own: Mapping[str, Any], others: Sequence[str]
) -> dict[str, Any]:
    base, subjects = options.data / "stories260K", authors(options.data, options.authors, 10 * options.authors, 200)
    given = {
        "config": CONFIGS / "stories260k_tofu.yaml",
        "model_name_or_path": base,
        "dataset_name": options.data / "tofu" / "full.jsonl",
        "output_dir": options.work_dir / "systems" / label,
        "id_column": "id",
        "group_column": "subject",
        "num_slices": 2,
        "layers_per_slice": 2,
        "budget": 1,
        "keep_idle": "false",
        **own,
    }
    argv = _as_arguments(given)
    return _kept(options, label, Taught(subjects, read([*argv, *others]), str(base)))


def _as_arguments(given: Mapping[str, Any]) -> list[str]:
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def _whole(options: argparse.Namespace, others: Sequence[str]) -> list[dict[str, Any]]:
    """One LoRA on all the rows about people, and about authors."""

    def train(who: str, seed: int, rate: float) -> dict[str, Any]:
        label = f"{who}-full-seed{seed}-{rate:g}"
        own = {"method": "full", "num_shards": 1, "seed": seed, "learning_rate": rate}
        if who == "authors":
            return _of_authors(options, label, own, others)
        return _of_people(options, label, [*_as_arguments(own), *others])

    found = []
    for who, rates in _WHOLE_RATES.items():
        for seed in options.seeds:
            tried = {rate: train(who, seed, rate) for rate in rates}
            best = max(tried, key=lambda rate: tried[rate]["known_of_choosing"])
            rates = (best,)
            found.append({**tried[best], "learning_rate": best})
    return found


def _layouts(options: argparse.Namespace, others: Sequence[str]) -> list[dict[str, Any]]:
    """Shards by slices, for the work of as many epochs."""
    found, layers = [], _LAYOUT["num_layers"]
    for (shards, slices), seed in product(LAYOUTS, options.seeds):
        cost = sequence_cost(slices, layers // slices, layers)
        epochs = max(1, round(_LAYOUT["epochs"] / cost))
        given = {
            "num_people": _LAYOUT["num_people"],
            "num_general": _LAYOUT["num_general"],
            "num_shards": shards,
            "num_slices": slices,
            "budget": 1,
            "num_train_epochs": epochs,
            "seed": seed,
        }
        argv = _as_arguments(given)
        label = f"layout-{shards}-{slices}-seed{seed}"
        tried = {
            rate: _of_people(
                options,
                f"{label}-{rate:g}",
                [*argv, "--learning_rate", str(rate), *others],
                layers,
                measured_layout,
            )
            for rate in _LAYOUT_RATES[slices]
        }
        best = max(tried, key=lambda rate: tried[rate]["known_of_choosing"])
        one = {**tried[best], "learning_rate": best}
        works = [stage_cost(depth, slices, layers // slices, layers, 1.0) for depth in range(1, slices + 1)]
        stream = families_under(
            stages_of([range(slices)]), slices, Policy.all_at_once(slices), num_shards=shards, works=works
        )
        # Work is counted in trainings of the layout with one slice, whose epochs are the most.
        per_epoch = epochs / _LAYOUT["epochs"]
        found.append(
            {
                **one,
                "num_slices": slices,
                "epochs": epochs,
                "work": round(cost * per_epoch, 4),
                "requests_until_a_shard_is_dead": round(deletion_rate(shards, slices, 1, until="first_shard"), 2),
                "requests_until_all_are_dead": round(deletion_rate(shards, slices, 1), 2),
                "work_of_a_request": round(stream.work / stream.requests * per_epoch, 5),
            }
        )
    return found


def _kept(
    options: argparse.Namespace,
    label: str,
    taught: Taught,
    measure: Callable[[Taught], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """What was measured of a system, from the work folder if it was before."""
    path = options.work_dir / "measurements" / f"{label}.json"
    if measure is None:
        measure = measured_whole if taught.options.script.method == "full" else measured
    settings = settings_of(taught.options)
    found = kept(path, {"recipe": settings, "subjects": len(taught.subjects.known)}, lambda: measure(taught))
    known = found["known"]
    print(label, *(f"{gate} {shares[AS_TRAINED]:.1%}" for gate, shares in known.items()), flush=True)
    return {
        "title": taught.subjects.title,
        "measure": taught.subjects.measure,
        "num_shards": taught.options.s3t.num_shards,
        "seed": taught.options.s3t.seed,
        "settings": settings,
        **found,
    }


# Part of the study -> what computes it.
PARTS: Mapping[str, Callable[[argparse.Namespace, Sequence[str]], list[dict[str, Any]]]] = {
    "people": _people,
    "authors": _authors,
    "layouts": _layouts,
    "whole": _whole,
    "classifiers": classifiers,
}
