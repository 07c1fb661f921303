"""The names of everything that may lie in a system's folder."""

CONFIG_FILE = "s3t_config.json"
TABLE_FILE = "examples.parquet"
# Rows that are being added: there until the table has them.
ADDITION_FILE = "addition.parquet"
GATE_FILE = "gate.safetensors"
LEDGER_FILE = "ledger.jsonl"
HEAD_FILE = "ledger.head"
SIGNATURES_FILE = "signatures.jsonl"
AUDITS_FILE = "audits.jsonl"
KEY_FILE = "ledger.key"
STAGES = "stages"
CHECKPOINTS = "checkpoints"
# Who trains which stage, and in which order they are grown.
CLAIMS = "claims"
ORDER_FILE = "order.json"
STAGE_FILE = "stage.json"
# Of what `Trainer` writes inside a stage, so begins each folder; the number of its step follows.
CHECKPOINT_PREFIX = "checkpoint-"
# Of a folder that more than one process may write to: of a system's stages, and of each trainer's checkpoints.
LOCK_FILE = ".lock"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
# Of a checkpoint: what an optimizer trains with, if that is not what serves.
TRAINING_WEIGHTS_FILE = "training_weights.safetensors"
PENDING_FILE = "pending.jsonl"
ERASURES_FILE = "erasures.jsonl"
# Beside the folder's lock, and held for longer: from looking a request to erase up until it is done.
ERASURES_LOCK_FILE = ".erasures.lock"
COST_FILE = "cost.json"
PROTOTYPES_FILE = "prototypes.safetensors"
CARD_FILE = "README.md"
DIAGRAM_FILE = "stacks.svg"
ATTRIBUTES_FILE = ".gitattributes"
IGNORE_FILE = ".gitignore"
CACHE = ".cache"
# The card, its picture, and what tokenizers, image processors and the Hub's client write beside a system.
COMPANIONS = frozenset(
    f"""
    {CARD_FILE} {DIAGRAM_FILE} LICENSE {ATTRIBUTES_FILE} {IGNORE_FILE} {CACHE}
    tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja
    chat_template.json additional_chat_templates vocab.json vocab.txt merges.txt tokenizer.model spiece.model
    sentencepiece.bpe.model sentencepiece.model bpe.codes source.spm target.spm
    preprocessor_config.json processor_config.json video_preprocessor_config.json image_processor_config.json
    """.split()
)
# What is being written, or removed, begins so; who finds it while holding the lock knows that its writer died.
TEMPORARY = ".tmp-"
GONE = ".gone-"
LEFTOVER_PREFIXES = (TEMPORARY, GONE)
LEFTOVERS = (
    f"{TEMPORARY}*",
    f"{CLAIMS}/{TEMPORARY}*",
    *(f"{STAGES}/shard-*/{prefix}*" for prefix in LEFTOVER_PREFIXES),
)
TRACKER_LOGS = ("runs", "wandb", "mlruns")
HISTORY = ".git"
PARTS = (
    CONFIG_FILE,
    TABLE_FILE,
    ADDITION_FILE,
    GATE_FILE,
    LEDGER_FILE,
    HEAD_FILE,
    SIGNATURES_FILE,
    AUDITS_FILE,
    PENDING_FILE,
    ERASURES_FILE,
    KEY_FILE,
    COST_FILE,
    PROTOTYPES_FILE,
    STAGES,
    CHECKPOINTS,
    CLAIMS,
)
STAGE_FILES = (ADAPTER_CONFIG_FILE, ADAPTER_FILE, STAGE_FILE)


def is_log(name: str) -> bool:
    """Whether a file or folder of this name holds what a tracker logged of a training."""
    return name in TRACKER_LOGS or ".tfevents." in name
