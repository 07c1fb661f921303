"""
Stages of Llama2-7B's architecture in 8 bit at the paper's settings, against the procedure its authors published.

Random weights of the real shapes cost what trained ones cost. Measured are the first stage (the topmost eight layers)
and the last (the lowest eight, whose gradients pass through all layers above): tokens per second and peak memory, for
`S3TTrainer` with and without gradient checkpointing, and for the published procedure, which needs it. Without a GPU
only `--quick` runs, on a small model.
"""

import itertools
import random
from pathlib import Path

import torch
from datasets import Dataset
from harness import Report, Task, clock, interleave, options
from peft import LoraConfig
from systems import SEVEN_PROJECTIONS, by_hand_model, temporary_folder
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_s3t import S3TConfig, S3TTrainer


NUM_SLICES = 4
BATCH = 16
# Tokens of an Alpaca example with its prompt, roughly: a median of 100, few above 300.
MEDIAN_TOKENS, SPREAD, MOST_TOKENS = 100, 0.5, 512
GIB = 2**30


class PadToken:
    """What the collator needs of a tokenizer: rows are numbers already."""

    pad_token_id, padding_side, mask_token = 0, "right", None

    def pad(self, rows, return_tensors=None, **_):
        """Rows of one length, with zeros on the right and an attention mask."""
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            mask[number, : len(row["input_ids"])] = 1
        return {"input_ids": ids, "attention_mask": mask}


class StageMeter(TrainerCallback):
    """Seconds and peak memory of each run of `Trainer.train`, set-up left out."""

    def __init__(self):
        self.seconds: list[float] = []
        self.peaks: list[int] = []

    def on_train_begin(self, args, state, control, **_):
        """Start the clock."""
        _synchronize()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._started = clock.now()

    def on_train_end(self, args, state, control, **_):
        """Note what the run took."""
        _synchronize()
        self.seconds.append(clock.now() - self._started)
        self.peaks.append(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def llama7b(quick: bool) -> LlamaConfig:
    """Llama2-7B's configuration, or one small enough for a CPU."""
    if quick:
        return LlamaConfig(
            vocab_size=500, hidden_size=64, intermediate_size=176, num_hidden_layers=8, num_attention_heads=4
        )
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
    )


def make_rows(rows: int, vocabulary: int) -> Dataset:
    """Random tokens, as many a row as an Alpaca example has."""
    draw = random.Random(0)
    lengths = [min(MOST_TOKENS, max(20, int(draw.lognormvariate(0, SPREAD) * MEDIAN_TOKENS))) for _ in range(rows)]
    ids = [[draw.randrange(1, vocabulary) for _ in range(length)] for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "id": list(range(rows))})


def load(base: Path) -> torch.nn.Module:
    """The base in 8 bit."""
    return AutoModelForCausalLM.from_pretrained(
        base,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
        dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        device_map={"": 0} if torch.cuda.is_available() else None,
    )


def lora() -> LoraConfig:
    """The paper's adapters."""
    return LoraConfig(r=32, lora_alpha=64, use_rslora=True, lora_dropout=0.05, target_modules=list(SEVEN_PROJECTIONS))


def arguments(folder: Path, steps: int, gradient_checkpointing: bool) -> TrainingArguments:
    """The paper's recipe, for so many steps a stage."""
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=2e-5,
        optim="paged_adamw_32bit" if cuda else "adamw_torch",
        warmup_steps=0.03,  # below 1: a share of the steps
        weight_decay=0.001,
        max_grad_norm=0.3,
        train_sampling_strategy="group_by_length",
        bf16=cuda,
        use_cpu=not cuda,
        gradient_checkpointing=gradient_checkpointing,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main() -> None:
    chosen = options(__doc__)
    if not (chosen.quick or torch.cuda.is_available()):
        print("llama7b: skipped, there is no GPU. --quick runs it on a small model.")
        return
    if chosen.cpu_time and torch.cuda.is_available():
        raise SystemExit("--cpu-time says nothing of a GPU's work. Leave it out.")
    steps, rounds = (2, 1) if chosen.quick else (12, 3)
    config = llama7b(chosen.quick)
    rows = make_rows(BATCH * steps * NUM_SLICES, config.vocab_size)
    report = Report(
        "llama7b",
        chosen,
        {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
            "batch": BATCH,
            "steps": steps,
            "median_tokens": MEDIAN_TOKENS,
            "load_in_8bit": True,
        },
    )
    collator = DataCollatorForLanguageModeling(PadToken(), mlm=False)
    with temporary_folder() as folder:
        base, systems = Path(folder) / "base", itertools.count()
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
        tokens_of = _tokens_per_stage(rows, steps)

        def ours(gradient_checkpointing: bool, meter: StageMeter) -> None:
            trainer = S3TTrainer(
                model=load(base),
                args=arguments(Path(folder) / f"ours-{next(systems)}", steps, gradient_checkpointing),
                train_dataset=rows,
                data_collator=collator,
                callbacks=[meter],
                peft_config=lora(),
                s3t_config=S3TConfig(num_slices=NUM_SLICES, budget=1, id_column="id"),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()

        def by_hand(meter: StageMeter) -> None:
            for stage in range(NUM_SLICES):
                trainer = Trainer(
                    model=by_hand_model(load(base), lora(), stage, NUM_SLICES),
                    args=arguments(Path(folder) / "by-hand", steps, True),
                    train_dataset=rows.remove_columns("id").select(range(len(rows) * (stage + 1) // NUM_SLICES)),
                    data_collator=collator,
                    callbacks=[meter],
                )
                trainer.remove_callback(PrinterCallback)
                trainer.train()

        for name, gradient_checkpointing in (("with gradient checkpointing", True), ("without", False)):
            mine, theirs = StageMeter(), StageMeter()
            interleave(
                Task(lambda g=gradient_checkpointing, m=mine: ours(g, m)),
                Task(lambda m=theirs: by_hand(m)),
                rounds=rounds,
            )
            for stage in (0, NUM_SLICES - 1):
                _report_stage(report, f"stage {stage}, {name}", stage, mine, theirs, tokens_of[stage])
    report.finish()


def _tokens_per_stage(rows: Dataset, steps: int) -> list[float]:
    """Tokens that a stage trains on, padding left out: the mean length is that of all rows."""
    mean = sum(map(len, rows["input_ids"])) / len(rows)
    return [mean * BATCH * steps] * NUM_SLICES


def _report_stage(report: Report, name: str, stage: int, mine: StageMeter, theirs: StageMeter, tokens: float) -> None:
    # The first round warms up.
    seconds, their_seconds = (sorted(m.seconds[stage + NUM_SLICES :: NUM_SLICES]) for m in (mine, theirs))
    middle, their_middle = seconds[len(seconds) // 2], their_seconds[len(their_seconds) // 2]
    report.add(
        f"{name}: time",
        middle / their_middle,
        "of theirs",
        numbers={
            "ours_seconds": middle,
            "theirs_seconds": their_middle,
            "ours_tokens_per_second": tokens / middle,
            "theirs_tokens_per_second": tokens / their_middle,
        },
    )
    report.add(f"{name}: tokens per second", tokens / middle, "", numbers={"theirs": tokens / their_middle})
    if mine.peaks[stage]:
        report.add(
            f"{name}: peak memory",
            max(mine.peaks[stage::NUM_SLICES]) / GIB,
            "GiB",
            numbers={"theirs": max(theirs.peaks[stage::NUM_SLICES]) / GIB},
        )


if __name__ == "__main__":
    main()
