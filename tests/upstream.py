"""Networks with the layouts and names of other libraries, for tests of the importers."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

M = TypeVar("M", bound=nn.Module)


def settled(module: M, seed: int = 0) -> M:
    """Makes every number random, so that none is neutral; float32 numbers become float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                fan = tensor[0].numel() if tensor.ndim > 1 else 16
                draw = torch.randn(tensor.shape, generator=generator) / fan**0.5
                tensor.copy_(draw + ("norm" in name and name.endswith("weight")))
    return module.double().eval()


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Block(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(before), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = norm(after), nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    q: nn.Conv2d
    k: nn.Conv2d
    v: nn.Conv2d
    proj_out: nn.Conv2d

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        for name in ("q", "k", "v", "proj_out"):
            self.add_module(name, nn.Conv2d(channels, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (each(h).flatten(2).transpose(1, 2) for each in (self.q, self.k, self.v))
        seen = F.softmax(q @ k.transpose(1, 2) / x.shape[1] ** 0.5, dim=2) @ v
        return x + self.proj_out(seen.transpose(1, 2).reshape(x.shape))


class Conv(nn.Module):
    def __init__(self, channels: int, *, down: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 2 if down else 1, 0 if down else 1)


class Level(nn.Module):
    """A level of LlamaGen, of either side."""

    downsample: Conv
    upsample: Conv

    def __init__(self, before: int, after: int, blocks: int, attends: bool) -> None:
        super().__init__()
        widths = [before, *[after] * blocks]
        self.res = nn.ModuleList(Block(*widths[i : i + 2]) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(after) for _ in range(blocks * attends))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        if hasattr(self, "downsample"):
            return self.downsample.conv(F.pad(x, (0, 1, 0, 1)))
        if hasattr(self, "upsample"):
            return self.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class Side(nn.Module):
    """The encoder or decoder of LlamaGen; the order of its middle and its levels says which."""

    def __init__(self, inputs: int, widths: list[int], outputs: int, blocks: int, down: bool):
        super().__init__()
        self.down = down
        self.conv_in = nn.Conv2d(inputs, widths[0], 3, padding=1)
        self.mid = nn.ModuleList()
        self.conv_blocks = nn.ModuleList()
        coarsest = widths[-1] if down else widths[0]
        self.mid.extend([Block(coarsest, coarsest), Attention(coarsest), Block(coarsest, coarsest)])
        for i in range(len(widths) - 1):
            last = i == len(widths) - 2
            level = Level(widths[i], widths[i + 1], blocks, attends=last if down else i == 0)
            if not last:
                conv = Conv(widths[i + 1], down=down)
                level.add_module("downsample" if down else "upsample", conv)
            self.conv_blocks.append(level)
        self.norm_out, self.conv_out = (
            norm(widths[-1]),
            nn.Conv2d(widths[-1], outputs, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        parts = [*self.conv_blocks, *self.mid] if self.down else [*self.mid, *self.conv_blocks]
        for part in parts:
            x = part(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class LlamaGen(nn.Module):
    """LlamaGen's network. widths: of its levels, the finest first; the encoder's have one block."""

    quantize: Any

    def __init__(self, widths: tuple[int, ...] = (32, 64), z: int = 6, k: int = 32, d: int = 4):
        super().__init__()
        self.encoder = Side(3, [widths[0], *widths], z, 1, down=True)
        self.decoder = Side(z, [widths[-1], *reversed(widths)], 3, 2, down=False)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z, d, 1), nn.Conv2d(d, z, 1)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(k, d)
        self.quantize.register_buffer("codebook_used", torch.zeros(65536))

    def latents(self, images: torch.Tensor, unit: bool) -> torch.Tensor:
        """Returns latents (N, S, D), on the unit sphere if codes are."""
        latents = self.quant_conv(self.encoder(2 * images - 1)).flatten(2).transpose(1, 2)
        return F.normalize(latents, dim=-1) if unit else latents

    def outputs(self, indices: torch.Tensor, unit: bool, side: int) -> torch.Tensor:
        codes = self.quantize.embedding.weight
        rows = (F.normalize(codes, dim=-1) if unit else codes)[indices]  # (N, S, D)
        grid = rows.transpose(1, 2).reshape(len(rows), -1, side, side)
        return self.decoder(self.post_quant_conv(grid))


class Residual(nn.Module):
    """Blocks of pytorch-vq-vae. Their first ReLU is in place, and so changes what is added."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self._block = nn.Sequential(
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, hidden, 3, padding=1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self._block(x)
        return x + inner


class Stack(nn.Module):
    def __init__(self, channels: int, hidden: int, count: int) -> None:
        super().__init__()
        self._layers = nn.ModuleList(Residual(channels, hidden) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self._layers:
            x = layer(x)
        return F.relu(x)


class PytorchVqVae(nn.Module):
    """The network of zalandoresearch/pytorch-vq-vae, with its averages."""

    _encoder: Any
    _decoder: Any
    _vq_vae: Any

    def __init__(self, hidden: int, block_hidden: int, blocks: int, k: int, d: int) -> None:
        super().__init__()
        self._encoder, self._decoder, self._vq_vae = nn.Module(), nn.Module(), nn.Module()
        self._encoder._conv_1 = nn.Conv2d(3, hidden // 2, 4, 2, 1)
        self._encoder._conv_2 = nn.Conv2d(hidden // 2, hidden, 4, 2, 1)
        self._encoder._conv_3 = nn.Conv2d(hidden, hidden, 3, 1, 1)
        self._encoder._residual_stack = Stack(hidden, block_hidden, blocks)
        self._pre_vq_conv = nn.Conv2d(hidden, d, 1)
        self._vq_vae._embedding = nn.Embedding(k, d)
        self._vq_vae._ema_w = nn.Parameter(torch.zeros(k, d))
        self._vq_vae.register_buffer("_ema_cluster_size", torch.zeros(k))
        self._decoder._conv_1 = nn.Conv2d(d, hidden, 3, 1, 1)
        self._decoder._residual_stack = Stack(hidden, block_hidden, blocks)
        self._decoder._conv_trans_1 = nn.ConvTranspose2d(hidden, hidden // 2, 4, 2, 1)
        self._decoder._conv_trans_2 = nn.ConvTranspose2d(hidden // 2, 3, 4, 2, 1)

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        e = self._encoder
        h = e._conv_3(F.relu(e._conv_2(F.relu(e._conv_1(images - 0.5)))))
        return self._pre_vq_conv(e._residual_stack(h)).flatten(2).transpose(1, 2)

    def outputs(self, indices: torch.Tensor, side: int) -> torch.Tensor:
        rows = self._vq_vae._embedding.weight[indices]
        d = self._decoder
        h = d._conv_1(rows.transpose(1, 2).reshape(len(rows), -1, side, side))
        return d._conv_trans_2(F.relu(d._conv_trans_1(d._residual_stack(h))))


class SonnetLike:
    """Sonnet's example: only its variables, in TensorFlow's layouts. It computes in float64."""

    def __init__(self, hidden: int, block_hidden: int, blocks: int, k: int, d: int) -> None:
        rng, shapes = np.random.default_rng(0), {}
        half = hidden // 2
        shapes["encoder/enc_1"], shapes["encoder/enc_2"] = (4, 4, 3, half), (4, 4, half, hidden)
        shapes["encoder/enc_3"], shapes["to_vq"] = (3, 3, hidden, hidden), (1, 1, hidden, d)
        for side in ("encoder", "decoder"):
            for i in range(blocks):
                shapes[f"{side}/res3x3_{i}"] = (3, 3, hidden, block_hidden)
                shapes[f"{side}/res1x1_{i}"] = (1, 1, block_hidden, hidden)
        shapes["decoder/dec_1"] = (3, 3, d, hidden)
        shapes["decoder/dec_2"], shapes["decoder/dec_3"] = (4, 4, half, hidden), (4, 4, 3, half)
        self.blocks, self.variables = blocks, {}
        for name, shape in shapes.items():
            transposed = name in ("decoder/dec_2", "decoder/dec_3")
            biases, fan = shape[2 if transposed else 3], shape[0] * shape[1] * shape[2]
            self.variables[f"{name}/w"] = rng.normal(size=shape) / fan**0.5
            self.variables[f"{name}/b"] = rng.normal(size=biases) / 4
        self.variables["vq/embeddings"] = rng.normal(size=(d, k)) / 2
        self.variables["ema_cluster_size/hidden"] = rng.uniform(0, 4, k)
        self.variables["ema_dw/hidden"] = rng.normal(size=(d, k))
        self.variables |= {"ema_dw/counter": np.array(3), "ema_dw/average": rng.normal(size=(d, k))}
        self.variables = {name: array.astype("float32") for name, array in self.variables.items()}

    def _conv(self, x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        kernel = torch.from_numpy(self.variables[f"{name}/w"]).double().permute(3, 2, 0, 1)
        bias = torch.from_numpy(self.variables[f"{name}/b"]).double()
        padding = (kernel.shape[2] - stride + 1) // 2 if stride > 1 else kernel.shape[2] // 2
        return F.conv2d(x, kernel, bias, stride, padding)

    def _up(self, x: torch.Tensor, name: str) -> torch.Tensor:
        kernel = torch.from_numpy(self.variables[f"{name}/w"]).double().permute(3, 2, 0, 1)
        return F.conv_transpose2d(
            x, kernel, torch.from_numpy(self.variables[f"{name}/b"]).double(), 2, 1
        )

    def _stack(self, h: torch.Tensor, side: str) -> torch.Tensor:
        for i in range(self.blocks):
            inner = self._conv(F.relu(h), f"{side}/res3x3_{i}")
            h = h + self._conv(F.relu(inner), f"{side}/res1x1_{i}")
        return F.relu(h)

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        h = F.relu(self._conv(images - 0.5, "encoder/enc_1", 2))
        h = F.relu(self._conv(h, "encoder/enc_2", 2))
        h = self._stack(F.relu(self._conv(h, "encoder/enc_3")), "encoder")
        return self._conv(h, "to_vq").flatten(2).transpose(1, 2)

    def outputs(self, indices: torch.Tensor, side: int) -> torch.Tensor:
        rows = torch.from_numpy(self.variables["vq/embeddings"].T).double()[indices]
        h = self._conv(rows.transpose(1, 2).reshape(len(rows), -1, side, side), "decoder/dec_1")
        return self._up(
            F.relu(self._up(self._stack(h, "decoder"), "decoder/dec_2")), "decoder/dec_3"
        )
