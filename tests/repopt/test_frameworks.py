"""RepOptimizers in the loops of other frameworks: the path of our own loop, bit for bit, with the clip in the step."""

import logging

import pytest
import pytorch_lightning as lightning
import torch
from accelerate import Accelerator
from test_ecosystem import SGD, assert_same, batches, loss_of, net, of_form

SETTINGS = SGD | {"max_norm": 0.05}
EPOCH = batches(6)
EVERY = pytest.mark.parametrize(
    ("form", "rule"), [("compact", "sgd"), ("compact", "adamw"), ("held", "sgd"), ("held", "adamw")]
)


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


def expected(form, rule, parts=1, xs=EPOCH):
    """The network after a loop of our own, each step on the mean gradient of so many batches."""
    model = net()
    optimizer = of_form(form, rule, model, **SETTINGS)
    for start in range(0, len(xs), parts):
        optimizer.zero_grad()
        for x in xs[start : start + parts]:
            (loss_of(model, x) / parts).backward()
        optimizer.step()
    assert optimizer.norm > 0.05  # it clips
    return model


class Module(lightning.LightningModule):
    """The network as a user of Lightning writes it down."""

    def __init__(self, form, rule):
        super().__init__()
        self.model = net()
        # Here: where configure_optimizers is called, a checkpoint's weights are in the model already.
        self.optimizer = of_form(form, rule, self.model, **SETTINGS)

    def training_step(self, batch, _):
        return loss_of(self.model, batch)

    def configure_optimizers(self):
        return self.optimizer

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.stack(EPOCH), batch_size=None)


def fit(module, tmp_path, epochs=1, resume=None, **options):
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision="64-true",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )
    trainer.fit(module, ckpt_path=resume, weights_only=True)
    return trainer


@EVERY
@pytest.mark.parametrize("parts", [1, 2])
def test_lightning(form, rule, parts, tmp_path):
    module = Module(form, rule)
    fit(module, tmp_path, accumulate_grad_batches=parts)
    assert_same(module.model, expected(form, rule, parts))


@EVERY
def test_lightning_goes_on_from_its_checkpoint(form, rule, tmp_path):
    first, second = Module(form, rule), Module(form, rule)
    fit(first, tmp_path).save_checkpoint(tmp_path / "one.ckpt")
    fit(second, tmp_path, epochs=2, resume=tmp_path / "one.ckpt")
    assert_same(second.model, expected(form, rule, xs=EPOCH * 2))


@EVERY
@pytest.mark.parametrize("parts", [1, 2])
def test_accelerate(form, rule, parts):
    model = net()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
    prepared, optimizer = accelerator.prepare(model, of_form(form, rule, model, **SETTINGS))
    for x in EPOCH:
        with accelerator.accumulate(prepared):
            accelerator.backward(loss_of(prepared, x))
            optimizer.step()
            optimizer.zero_grad()
    assert_same(model, expected(form, rule, parts))


@EVERY
def test_accelerate_goes_on_from_its_checkpoint(form, rule, tmp_path):
    for number, xs in enumerate((EPOCH[:3], EPOCH[3:])):
        model = net()
        accelerator = Accelerator(cpu=True)
        prepared, optimizer = accelerator.prepare(model, of_form(form, rule, model, **SETTINGS))
        if number:
            accelerator.load_state(tmp_path / "state")
        for x in xs:
            optimizer.zero_grad()
            accelerator.backward(loss_of(prepared, x))
            optimizer.step()
        accelerator.save_state(tmp_path / "state")
    assert_same(model, expected(form, rule))
