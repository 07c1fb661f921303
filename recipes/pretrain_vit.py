"""
Make a small vision transformer where none can be fetched: pretrained on a part of the images, for fine-tuning on the
others.

    python recipes/pretrain_vit.py --task_name digits --output_dir small-vit
    python recipes/image_classification.py --task_name digits --leave_out_share 0.5 --model_name_or_path small-vit

The images that it is pretrained on can never be unlearned. They are chosen by a hash of their row numbers, and
`--leave_out_share` with the same share keeps them out of fine-tuning.
"""

from common import command_line
from common.vit_pretraining import main


if __name__ == "__main__":
    command_line.run(main)
