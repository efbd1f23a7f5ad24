"""A compressed model on each instruction set that this CPU has: one machine sees what those without its units see."""

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import oats_vision as ov
from oats_vision.cli.commands import app
from oats_vision.data.pictures import Batches
from oats_vision.evaluation.top1 import evaluate_top1
from oats_vision.kernels import native
from oats_vision.nn.sparse_low_rank import merge


@pytest.fixture
def compressed(tiny_vit, pictures) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    for parameter in tiny_vit.parameters():
        if parameter.dim() > 1:  # so that the classes differ by more than rounding
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    ov.compress(tiny_vit, pictures, rate=0.5, iterations=5)
    return tiny_vit


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@pytest.mark.parametrize(
    ("weights", "precision"),
    [
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_logits_are_those_of_the_dense_model_under_autocast(instruction_set, precision, weights, compressed, pictures):
    compressed.to(weights)
    images = pictures[0].to(weights)
    with torch.inference_mode(), native.instruction_set(instruction_set):
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            logits = compressed(images).double()
        expected = merge(compressed.float())(images.float()).double()
    tolerance = 1e-4 if precision is None and weights == torch.float32 else 0.05
    assert (logits - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_top1_in_mixed_precision_is_that_of_the_model_itself(instruction_set, precision, compressed, pictures):
    with torch.inference_mode():
        labels = torch.cat([compressed(images).argmax(1) for images in pictures]).split(4)
    batches = Batches([(*batch, 0, ["one"] * 4) for batch in zip(pictures, labels, strict=True)], total=8)
    with native.instruction_set(instruction_set):
        score = evaluate_top1(compressed, batches, mixed_precision=precision)
    assert score.pictures == 8
    assert score.top1 == 100 if precision is None else score.top1 >= 75


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_the_command_line_evaluates_in_mixed_precision(instruction_set, tmp_path, model_directory):
    model, _ = ov.load_model(str(model_directory))
    ov.compress(model, [torch.randn(8, 3, 28, 28)], rate=0.5, iterations=2)
    ov.save(model, tmp_path / "compressed")
    command = ["eval", "top1", tmp_path / "compressed", "--data", "demo", "--samples", "32", "--no-dense", "--json"]
    with native.instruction_set(instruction_set):
        done = CliRunner().invoke(app, [*map(str, command), "--mixed-precision", "bfloat16"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert '"pictures": 32' in done.stdout
