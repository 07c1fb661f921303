"""
Fine-tune an encoder on a text classification task as a system that can forget, and measure it at every depth.

    python recipes/text_classification.py --task_name rte                 # as in the paper: by configs/rte.yaml
    python recipes/text_classification.py --task_name rte --method full   # plain LoRA, to compare
    python recipes/text_classification.py --config recipes/configs/minilm_rte.yaml --model_name_or_path M
    python recipes/text_classification.py --model_name_or_path M --dataset_name train.csv --eval_file test.csv
        --text_columns question --label_column topic --label_set sports politics science

The tasks of GLUE and SuperGLUE bring their columns, label sets, metrics and data (`common/tasks.py`); the metrics are
the benchmarks' own. Results go into one JSON file, with every prediction on the rows evaluated on.
"""

from common import command_line
from common.text_task import main

from hf_s3t.launch import start_cpu_processes


if __name__ == "__main__":
    start_cpu_processes()
    command_line.run(main)
