"""
Fine-tune a vision transformer on images as a system that can forget, and measure it at every depth.

    python recipes/image_classification.py --task_name cifar10                 # as in the paper: configs/cifar10.yaml
    python recipes/image_classification.py --task_name cifar10 --method full   # plain LoRA
    python recipes/image_classification.py --model_name_or_path M --dataset_name folder/ --label_set cat dog

`--dataset_name` is an id on the Hub, a folder with a folder of images for each class, a parquet file or an npz file.
A small vision transformer to try it with is made by `pretrain_vit.py`.
"""

from common import command_line
from common.image_task import main

from hf_s3t.launch import start_cpu_processes


if __name__ == "__main__":
    start_cpu_processes()
    command_line.run(main)
