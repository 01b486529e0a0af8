"""Training: transformers' Trainer on focalnet's models, and gradient checkpointing block by block."""

import subprocess
import sys

import pytest
import torch
import transformers
from small_models import (
    CLASSES,
    EVERY_OPTION,
    SMALL,
    assert_equal,
    assert_same_gradients,
    build,
    images,
    one_thread,  # noqa: F401
    tensors,
)
from torch.multiprocessing.reductions import StorageWeakRef

import focalnet

# The newest transformers calls it activation checkpointing; this is its name in every version there is so far.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

# --- Trainer

STEPS = 12
DROPOUT = {"hidden_dropout_prob": 0.1, "drop_path_rate": 0.2}


class ColouredSquares(torch.utils.data.Dataset):
    """Three classes of noise, each with one colour channel brighter than the others."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(96) % 3
        self.images = 0.5 * torch.randn(96, 3, 16, 16, generator=generator)
        self.images[torch.arange(96), self.labels] += 1

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def train(folder, resume=None, seed=0, **arguments):
    """The losses of the steps that were made."""
    torch.manual_seed(seed)
    config = focalnet.FocalNetConfig(**SMALL | DROPOUT | {"num_labels": 3, "initializer_range": 0.2})
    trainer = transformers.Trainer(
        focalnet.FocalNetForImageClassification(config),
        transformers.TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=16,
            learning_rate=5e-3,
            logging_steps=1,
            save_steps=STEPS // 2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **arguments,
        ),
        train_dataset=ColouredSquares(),
    )
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=["plain", "gradient checkpointing", "gradient checkpointing, reentrant"],
)
def test_trainer_lowers_the_loss_and_resumes_on_the_same_curve(arguments, tmp_path):
    losses = train(tmp_path, **arguments)
    assert len(losses) == STEPS
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    # The checkpoint brings weights, optimizer, schedule and random state: the fresh model's own weights do not matter.
    resumed = train(tmp_path, resume=str(tmp_path / f"checkpoint-{STEPS // 2}"), seed=1, **arguments)
    assert resumed == losses


def test_trainer_makes_the_same_steps_with_gradient_checkpointing_as_without(tmp_path):
    plain = train(tmp_path / "plain")
    assert train(tmp_path / "checkpointed", gradient_checkpointing=True) == plain


# --- gradient checkpointing

REENTRANT = pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])


def loss_of(outputs):
    return sum((tensor * torch.linspace(-1, 1, tensor.numel()).view_as(tensor)).mean() for tensor in tensors(outputs))


def blocks(model):
    return [layer for stage in model.base_model.encoder.stages for layer in stage.layers]


@REENTRANT
@pytest.mark.parametrize("fields", [SMALL, EVERY_OPTION], ids=["defaults", "every option"])
@pytest.mark.parametrize("name", CLASSES)
def test_gradient_checkpointing_changes_no_gradient(name, fields, use_reentrant):
    plain, checkpointed = (build(focalnet, name, fields | DROPOUT).train() for _ in range(2))
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    outputs = []
    for model in (plain, checkpointed):
        torch.manual_seed(0)
        outputs.append(model(images(29, 50)))
        loss_of(outputs[-1]).backward()
    assert_equal(outputs[1], outputs[0])
    assert_same_gradients(checkpointed, plain)


@REENTRANT
def test_each_block_is_recomputed_just_before_its_backward(use_reentrant):
    model = build(focalnet, "FocalNetForImageClassification", SMALL).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    events = []
    for index, block in enumerate(blocks(model)):
        block.norm2.register_forward_hook(lambda *_, index=index: events.append(("forward", index)))
        block.norm1.weight.register_hook(lambda _, index=index: events.append(("backward", index)))
    loss = model(images(), labels=torch.tensor([0, 4])).loss
    assert events == [("forward", index) for index in range(4)]
    events.clear()
    loss.backward()
    # Blocks 1 and 2 are of one stage, which is not recomputed as a whole.
    assert events == [event for index in (3, 2, 1, 0) for event in (("forward", index), ("backward", index))]


@REENTRANT
def test_one_block_at_a_time_has_activations_in_memory(use_reentrant):
    model = build(focalnet, "FocalNetForImageClassification", SMALL).train()
    activations, alive_in_backward = {}, []

    def alive():
        return [index for index, activation in activations.items() if not activation.expired()]

    def remember(index, activation):
        activations[index] = StorageWeakRef(activation.untyped_storage())

    for index, block in enumerate(blocks(model)):
        block.mlp.fc1.register_forward_hook(lambda _, __, output, index=index: remember(index, output))
        block.mlp.fc2.weight.register_hook(lambda _: alive_in_backward.append(alive()))

    outputs = model(images(), labels=torch.tensor([0, 4]))
    assert alive() == [0, 1, 2, 3]
    del outputs
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    loss = model(images(), labels=torch.tensor([0, 4])).loss
    assert alive() == []
    loss.backward()
    assert alive_in_backward == [[3], [2], [1], [0]]


def test_with_a_frozen_stem_reentrant_checkpointing_trains_the_blocks_once_inputs_require_gradients():
    plain, checkpointed = (build(focalnet, "FocalNetForImageClassification", SMALL).train() for _ in range(2))
    checkpointed.gradient_checkpointing_enable({"use_reentrant": True})
    checkpointed.enable_input_require_grads()
    for model in (plain, checkpointed):
        model.focalnet.embeddings.requires_grad_(False)
        torch.manual_seed(0)
        model(images(), labels=torch.tensor([0, 4])).loss.backward()
    assert_same_gradients(checkpointed, plain)


def test_gradient_checkpointing_can_be_disabled_again():
    model = build(focalnet, "FocalNetForImageClassification", SMALL).train()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    calls = []
    for block in blocks(model):
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    model(images(), labels=torch.tensor([0, 4])).loss.backward()
    assert len(calls) == len(blocks(model))


# --- some parameters frozen


@pytest.mark.parametrize("trained", ["mlp.fc2.bias", "norm1", "mlp.fc1", "projection_in", "embeddings", "classifier"])
def test_with_the_rest_frozen_the_gradients_are_those_of_transformers(trained):
    ours, theirs = (build(library, "FocalNetForImageClassification", SMALL) for library in (focalnet, transformers))
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name)
        model(images(29, 50), labels=torch.tensor([0, 4])).loss.backward()
    assert_same_gradients(ours, theirs)


# --- processes and threads

WORKER = """
import os, sys, torch, focalnet
torch.set_num_threads(2)
torch.manual_seed(0)
model = focalnet.FocalNetModel(focalnet.FocalNetConfig(image_size=32, embed_dim=16, depths=[1, 1], focal_levels=[2, 2],
                                                       focal_windows=[3, 3])).eval()
q, ctx, gates = torch.randn(1, 40, 40, 16 + 16 + 3).split([16, 16, 3], -1)
weights, weight = [torch.randn(16, 1, k, k) for k in (3, 5)], torch.randn(16, 16)

def compute():
    operands = (q, q, ctx, gates, weights, weight, None, False, [True] * 6, None)
    gradients = torch.ops.focalnet.focal_modulation_bwd(*operands)
    mlp = model.encoder.stages[0].layers[0].mlp.train()
    with torch.no_grad():
        return [*gradients, mlp(q), model(torch.ones(1, 3, 32, 32)).last_hidden_state]

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 3
    def __getitem__(self, index):
        before = len(os.listdir("/proc/self/task"))
        same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(compute(), expected, strict=True))
        return same, torch.get_num_threads(), len(os.listdir("/proc/self/task")) - before

expected = compute()  # with both threads, whose pool a forked process does not inherit
workers = {"num_workers": 2, "multiprocessing_context": "fork", "timeout": 60}
print(*torch.utils.data.DataLoader(Data(), batch_size=None, **workers))
"""


def test_forked_workers_of_a_data_loader_run_the_kernels_on_one_thread_each():
    """Neither a deadlock on the parent's threads nor threads of their own beside the one that each worker has."""
    run = subprocess.run([sys.executable, "-c", WORKER], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == " ".join(["[True, 1, 0]"] * 3)
