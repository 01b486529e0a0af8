"""Our model and transformers', from the same weights and seed, learn the same: step by step within float32's noise."""

import pytest
import torch
import transformers
from small_models import one_thread  # noqa: F401
from small_runs import CONFIG, PLAIN, class_folders, reader

from focalnet import FocalNetForImageClassification
from focalnet.training.batches import ClassificationBatch
from focalnet.training.sources import load_source
from focalnet.training.trainer import FocalNetTrainer
from focalnet.training.views import TrainingViews

STEPS = 50
SETTINGS = PLAIN.but(
    epochs=13, label_smoothing=0.1, mixup=0.8, cutmix=1.0, crop_scale=(0.5, 1), flip=0.5, layer_decay=0.9
)


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """The loss of each step, by library, and in float64 as what both are noise around."""
    root = tmp_path_factory.mktemp("runs")
    table = load_source(str(class_folders(root / "data")), reader(), labelled=True).train
    torch.manual_seed(0)
    fields = {**CONFIG, "image_size": 16, "num_labels": 2, "drop_path_rate": 0.2}
    model = transformers.FocalNetForImageClassification(transformers.FocalNetConfig(**fields))
    model.save_pretrained(root / "start")
    kinds = {
        "transformers": (transformers.FocalNetForImageClassification, torch.float32),
        "focalnet": (FocalNetForImageClassification, torch.float32),
        "float64": (transformers.FocalNetForImageClassification, torch.float64),
    }
    found = {}
    for name, (kind, dtype) in kinds.items():
        model = kind.from_pretrained(root / "start", dtype=dtype)
        found[name] = fifty_steps(model, table, root / name, dtype)
    return found


def fifty_steps(model, table, folder, dtype):
    batch = ClassificationBatch(SETTINGS)

    def collate(examples):
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch(examples).items()}

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        learning_rate=SETTINGS.learning_rate,
        max_steps=STEPS,
        logging_steps=1,
        seed=0,
        data_seed=0,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_drop_last=True,
    )
    views = TrainingViews(table, reader(), SETTINGS, [0, 1])
    trainer = FocalNetTrainer(
        model=model, args=arguments, data_collator=collate, train_dataset=views, settings=SETTINGS
    )
    trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], dtype=torch.float64)


def test_losses_agree_for_fifty_steps(losses):
    ours, theirs, exact = losses["focalnet"], losses["transformers"], losses["float64"]
    assert len(ours) == STEPS
    noise = (theirs - exact).abs().max()
    assert (ours - exact).abs().max() <= 2 * noise + 1e-6, "further from float64 than twice transformers' own noise"


def test_the_loss_fell(losses):
    ours = losses["focalnet"]
    assert ours[-10:].mean() < 0.9 * ours[:5].mean()
