"""A user's own network: the example, and what the docs say about PyTorch's modules."""

import re
import runpy
import textwrap

import numpy as np
import pytest
import torch
from support import ROOT
from torch import nn

import vqref
from vqref.agreement import compare
from vqref.families import Stack
from vqref.network import run as run_rows

EXAMPLE, DOCS = ROOT / "examples" / "own_network.py", ROOT / "docs" / "your-network.md"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


def test_the_example_makes_a_bundle_of_its_module(run, tmp_path):
    done = run(EXAMPLE, tmp_path / "made")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.endswith("100.00% of the tokens are the module's\n")
    assert (tmp_path / "made" / "model.pt").exists()
    assert (tmp_path / "made" / "bundle" / "manifest.json").exists()


def test_a_tensor_in_the_wrong_place_shows_in_its_stage(example):
    module, spec = example["trained"](), example["rows_of"]()
    params = example["params_of"](module)
    images = np.random.default_rng(0).random((2, *spec.image_shape), np.float32)
    assert compare(spec, params, images, example["backend_of"](module)).passed
    names = ("encoder.query.weight", "encoder.value.weight")
    swapped = params | dict(zip(names, (params[name] for name in names[::-1]), strict=True))
    report = compare(spec, swapped, images, example["backend_of"](module))
    assert "encoder" in {check.stage for check in report.failures}
    assert "decoder" not in {check.stage for check in report.failures}


def test_a_tensor_that_no_row_has_is_named(example):
    module = example["trained"]()
    module.extra = nn.Parameter(torch.zeros(1), requires_grad=False)
    with pytest.raises(ValueError, match="no row has extra"):
        example["params_of"](module)


def test_the_codebook_gets_averages_unless_it_has_them():
    codebook = np.arange(6, dtype=np.float32).reshape(3, 2)
    found = vqref.averaged({"quantizer.codebook": codebook})
    assert (found["quantizer.ema_count"] == np.ones(3, np.float32)).all()
    assert found["quantizer.ema_means"] is codebook
    own = {"quantizer.codebook": codebook, "quantizer.ema_count": np.zeros(3, np.float32)}
    assert (vqref.averaged(own)["quantizer.ema_count"] == 0).all()


def test_the_code_in_the_docs_is_the_examples():
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(blocks) == 4
    lines = textwrap.dedent(EXAMPLE.read_text())
    assert all(block in lines for block in blocks)


def group_norm():
    module = nn.GroupNorm(2, 6, eps=1e-3)
    stack = Stack("x", (6, 4, 4))
    stack.row("scale", "affine", (6, 4, 4), scale=(1e-6 / 1e-3) ** 0.5)
    stack.row("it", "group_norm", (6, 4, 4), groups=2)
    return module, stack, module.weight


def output_padding():
    module = nn.ConvTranspose2d(6, 5, 3, stride=2, padding=1, output_padding=1)
    stack = Stack("x", (6, 4, 4))
    pads = ((1, 0), (1, 0))
    stack.row("it", "conv_transpose", (5, 8, 8), kernel=(3, 3), stride=2, pads=pads)
    return module, stack, module.weight


def pixel_shuffle():
    convolution = nn.Conv2d(6, 20, 1)
    with torch.no_grad():
        convolution.bias.copy_(convolution.bias[:5].repeat_interleave(4))
    stack = Stack("x", (6, 4, 4))
    stack.conv_transpose("it", 5, 2, stride=2, same=False)
    weight = convolution.weight.reshape(5, 2, 2, 6).permute(3, 0, 1, 2)
    module = nn.Sequential(convolution, nn.PixelShuffle(2))
    module.bias = convolution.bias[::4]
    return module, stack, weight


@pytest.mark.parametrize("made", [group_norm, output_padding, pixel_shuffle])
def test_modules_of_pytorch_are_the_rows_that_the_docs_say(made):
    torch.manual_seed(0)
    module, stack, weight = made()
    module, x = module.double(), torch.randn(3, 6, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        expected = module(x).numpy()
    tensors = {"x.it.weight": weight, "x.it.bias": module.bias}
    params = {name: tensor.detach().double().numpy() for name, tensor in tensors.items()}
    found = run_rows(stack.rows, params, x.numpy())
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-12
