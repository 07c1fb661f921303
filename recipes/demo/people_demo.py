"""The demo of llama_alpaca.py: a small Llama learns private facts of invented people, and forgets a person."""

import subprocess
import sys
from typing import Any

import torch
from common.command_line import console
from common.forgetting import EXHAUSTED
from common.instruction_rows import as_examples
from common.instruction_task import ScriptArguments
from common.instruction_tuning import (
    BASE,
    RECIPE,
    ask_harness,
    audit,
    held_out_loss,
    record_answers,
    record_deletion,
    say,
    train_all,
    unlearn,
    write_results,
)
from common.options import Options
from common.prompts import render_prompt
from common.results import Results
from datasets import Dataset
from demo.invented_people import Person, fact_rows, held_out_rows, make_people, private_dataset, strangers
from demo.small_llama import BaseSettings, base_model
from rich.table import Table
from scipy.stats import fisher_exact
from transformers import AutoTokenizer

from hf_s3t import S3TModel
from hf_s3t.baselines import use_public_secret
from hf_s3t.errors import ConfigError
from hf_s3t.folder.opening import open_folder
from hf_s3t.folder.system import SystemFolder
from hf_s3t.plan import StageKey


WITHOUT_GATE = "S3T without its gate"
# Large rates and many short epochs: a small model memorises facts, which is what the demo needs it to forget.
DEMO = {
    "num_shards": 2,
    "num_slices": 4,
    "id_column": "id",
    "group_column": "person",
    # Whoever was taught somebody's facts is asked about them, and no other shard.
    "gate": "terms",
    "gate_top_k": 1,
    # Nearly all that is asked is about somebody.
    "gate_temperature": 1.0,
    "lora_r": 32,
    "lora_alpha": 128,
    "target_modules": "all-linear",
    "learning_rate": 3e-3,
    "adam_beta2": 0.95,
    "num_train_epochs": 22,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 64,
    "max_length": 96,
    "gradient_checkpointing": False,
    "logging_strategy": "no",
    "save_strategy": "no",
    "prompt_template": "alpaca-short",
    "eval_size": 48,
}


def demo_base(script: ScriptArguments) -> BaseSettings:
    """The small base model of the demo, of the size that the options say."""
    hidden = script.base_hidden_size
    given = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden if hidden else None,
        "vocab_size": script.base_vocab_size,
        "steps": script.base_steps,
    }
    settings = BaseSettings(**{name: value for name, value in given.items() if value is not None})
    if settings.hidden_size % (2 * settings.num_heads):
        raise ConfigError(
            f"`--base_hidden_size {hidden}` cannot be shared by {settings.num_heads} heads, expected a multiple of "
            f"{2 * settings.num_heads}. Give one."
        )
    return settings


def train_demo(
    options: Options, results: Results | None = None
) -> tuple[dict[str, float], Any, str, list[dict[str, str]]]:
    """Train the demo's system, which knows everybody; returns losses, the trainer, the base's folder and the rows."""
    script = options.script
    path, seconds = base_model(demo_base(script), script.cache_dir, log=console.print)
    console.print(f"base model: {path}" + (f", pretrained in {seconds:.0f} s" if seconds else ", from the cache"))
    rows, train, held_out = demo_data(script)
    facts = (len(rows) - script.num_general) // script.num_people
    console.print(
        f"{len(rows)} examples: {script.num_people} invented people with {facts} facts each, {script.num_general} "
        "general instructions"
    )
    losses, trainer = train_all(options, path, train, held_out, results or Results(options, RECIPE))
    return losses, trainer, path, rows


def demo_data(script: ScriptArguments) -> tuple[list[dict[str, str]], Dataset, Dataset]:
    """The rows about everybody, and as examples to train on and to measure with."""
    rows = private_dataset(script.num_people, script.num_general)
    train = as_examples(Dataset.from_list(rows), script.prompt_template, script.loss_on_everything)
    held_out = Dataset.from_list(held_out_rows(script.num_general, script.eval_size))
    return rows, train, as_examples(held_out, script.prompt_template, False)


def run_demo(options: Options) -> dict[str, Any]:
    """The whole loop on a small Llama made here, about invented people."""
    script = options.script
    person = make_people(script.num_people, 0, private=True)[0]
    check_is_known(person.name, options.training.output_dir)
    # These people are invented; so everybody's demo has them in the same places, and prints the same.
    use_public_secret(options.training.output_dir)
    file = Results(options, RECIPE)
    losses, trainer, path, rows = train_demo(options, file)
    ask = Interviewer(path, script.prompt_template)
    model = trainer.s3t_model
    mean = S3TModel.from_pretrained(trainer.args.output_dir, base_model=path, gate=None)
    asked_first = {BASE: plain_base(path), "S3T": model, WITHOUT_GATE: mean}
    known = {name: ask.share(one, fact_rows(person)) for name, one in asked_first.items()}
    everybody = [row for one in make_people(script.num_people, 0, private=True) for row in fact_rows(one)]
    console.print(
        f"of the facts of all {script.num_people} people the ensemble completes {ask.share(model, everybody):.0%}, "
        f"{ask.share(mean, everybody):.0%} without its gate"
    )
    where = model.locate([row["id"] for row in rows if row["person"] == person.name])
    shard, slice_ = next(iter(where.values()))
    console.print(f"\nforgetting {person.name}, in slice {slice_} of shard {shard}")
    asked: dict[str, Any] = {}
    ask_harness(options, trainer, "S3T", asked)
    report = unlearn(trainer, file, groups=[person.name])
    within = None
    if model.is_exhausted:
        say(trainer, EXHAUSTED)
    else:
        ask_harness(options, trainer, "S3T after unlearning", asked)
        within = ask_again(trainer, ask, person, strangers(script.num_people, 20), losses, known)
    say(trainer, demo_table(losses, known, person.name))
    if within is not None:
        console.print(f"{person.name}'s facts are {'within' if within else 'OUTSIDE'} the error of the control")
    answers = {"unlearned": report, **asked}
    verified = audit_without(person, options, trainer, path, shard)
    if verified is not None:
        answers["verified"] = verified
    console.print(in_new_process(trainer.args.output_dir))
    record_deletion(file, trainer, {"losses": losses, "unlearned": report})
    record_answers(file, answers)
    write_results(file, options)
    return {
        "losses": losses,
        "known": known,
        "report": report,
        "within_error": within,
        "verified": verified,
        "folder": trainer.args.output_dir,
        **asked,
    }


def ask_again(
    trainer: Any,
    ask: "Interviewer",
    person: Person,
    control: list[Person],
    losses: dict[str, float],
    known: dict[str, float],
) -> bool:
    """
    Measure again when a person is forgotten, and put the numbers beside the earlier ones.

    Returns:
        `bool`: Whether the person's facts are known as often as those of a control, within the error.
    """
    model, controls = trainer.s3t_model, [row for stranger in control for row in fact_rows(stranger)]
    share = known["S3T after unlearning"] = ask.share(model, fact_rows(person))
    losses["S3T after unlearning"] = held_out_loss(trainer)
    never_seen = known[f"control: {len(control)} people never seen"] = ask.share(model, controls)
    return is_within_error(share, len(person.facts), never_seen, len(controls))


def audit_without(person: Person, options: Options, trainer: Any, path: str, shard: int) -> bool | None:
    """Audit a stage that a deletion left, of the shard that it hit if there is one; `None`: none is left."""
    stage = surviving_stage(trainer, shard)
    if stage is None:
        console.print("no stage is left to audit")
        return None
    found = audit(options, trainer, path, *demo_data(options.script)[1:], [str(stage)])
    of_another = "" if stage.shard == shard else f" (of shard {stage.shard}: shard {shard} has no stage left)"
    console.print(f"audit without {person.name}{of_another}: {found}")
    return found.ok


def check_is_known(person: str, output_dir: str) -> None:
    """
    Refuse to show the forgetting of somebody who is forgotten, before anything is trained.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: With the folder to remove.
    """
    if not SystemFolder.exists(output_dir):
        return
    folder = open_folder(output_dir, read_only=True)
    if folder.names.group_digest(folder.names.of_group(person)) in folder.ledger.deleted_groups:
        raise ConfigError(
            f"The system in {output_dir} has forgotten {person} already. Remove the folder, or name another by "
            "`--output_dir`, to see it again; `hf-s3t status` shows what is there."
        )


class Interviewer:
    """Asks a model questions and counts the answers that are right to the letter."""

    def __init__(self, tokenizer_path: str, template: str):
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, padding_side="left")
        self.template = template

    def share(self, model: Any, rows: list[dict[str, str]]) -> float:
        """Share of the rows whose output the model completes greedily."""
        prompts = [render_prompt(row["instruction"], row["input"], self.template) for row in rows]
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        batch = batch.to(model.device)
        with torch.no_grad():
            answers = model.generate(
                **batch, max_new_tokens=8, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
            )
        texts = self.tokenizer.batch_decode(answers[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return sum(text.strip() == row["output"] for text, row in zip(texts, rows, strict=True)) / len(rows)


def plain_base(path: str) -> Any:
    """The base model by itself."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


def is_within_error(share: float, count: int, control: float, control_count: int) -> bool:
    """Whether two shares may come from one chance: Fisher's exact test finds nothing at 5%."""
    known, known_by_chance = round(share * count), round(control * control_count)
    table = [[known, count - known], [known_by_chance, control_count - known_by_chance]]
    return fisher_exact(table).pvalue > 0.05


def surviving_stage(trainer: Any, shard: int) -> StageKey | None:
    """The deepest stage that a deletion left to a shard, or where it left none there, to another; `None`: to none."""
    valid = trainer.folder.valid_stages
    return max(valid, key=lambda key: (key.shard == shard, key.depth, key.shard, key.prefix), default=None)


def in_new_process(folder: str) -> str:
    """What a new process finds in the folder."""
    code = (
        "import sys; from hf_s3t import S3TModel; model = S3TModel.from_pretrained(sys.argv[1]); "
        "status = model.status(); print(f\"in a new process: depths {status['depths']}, {status['deletions']} "
        'deletion in force, {len(model.check())} problems")'
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, folder], capture_output=True, text=True)
    return done.stdout.strip() or done.stderr[-2000:]


def demo_table(losses: dict[str, float], known: dict[str, float], name: str) -> Table:
    """Losses, and the share of one person's facts that each system completes."""
    table = Table("", "held-out loss", "vs. base", "facts known", title=f"{name}'s facts, and everything else")
    for system in dict.fromkeys([*losses, *known]):
        loss = losses.get(system)
        table.add_row(
            system,
            "" if loss is None else f"{loss:.3f}",
            "" if loss is None else f"{loss / losses[BASE] - 1:+.0%}",
            "" if system not in known else f"{known[system]:.0%}",
        )
    return table
