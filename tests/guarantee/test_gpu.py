"""The guarantee on a GPU: training again gives the same bits (E3), and the ensemble answers as its members do."""

import pytest
import torch
from support import tiny
from support.insides import routing_of

from hf_s3t.model.route import Route, routed


pytestmark = pytest.mark.gpu


@pytest.fixture
def trainer(tmp_path):
    args = tiny.training_arguments(tmp_path, use_cpu=False, full_determinism=True, num_train_epochs=2)
    trainer = tiny.make_trainer(tmp_path, args=args, config=tiny.s3t_config(num_shards=2))
    trainer.train()
    return trainer


def test_every_surviving_stage_can_be_trained_again_bit_for_bit(trainer):
    trainer.s3t_model.unlearn([tiny.ids_of(1)[0]])
    report = trainer.verify()
    assert report.ok, str(report)


def test_the_batched_pass_equals_the_members_one_by_one(trainer):
    model = trainer.s3t_model
    assert model.device.type == "cuda"
    inputs = {"input_ids": tiny.batch_of(tiny.lm_rows(4))["input_ids"].to(model.device)}
    members = routing_of(model).route.members
    with torch.no_grad():
        together = model(**inputs).logits
        alone = []
        for member in members:
            with routed(Route((member,))):
                alone.append(model.base_model(**inputs).logits.float().softmax(-1))
    torch.testing.assert_close(together.exp(), torch.stack(alone).mean(0), atol=1e-5, rtol=1e-5)
