"""A residual network with batch norm, and methods of robust training on it, as they are written in PyTorch.

The other side of `training.py`: the same network with the same weights, and one step of each method. It
is only imported where PyTorch is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports] - optional
from torch.nn import functional  # pyright: ignore[reportMissingImports]

import ntkadv as na

__all__ = ["METHODS", "Network", "run"]


def _norm(ours: Any) -> Any:
    layer = torch.nn.BatchNorm2d(ours.scale.size)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(np.asarray(ours.scale)))
        layer.bias.copy_(torch.tensor(np.asarray(ours.offset)))
    return layer


def _convolution(ours: Any) -> Any:
    size, _, channels_in, channels = ours.weights.shape
    layer: Any = torch.nn.Conv2d(channels_in, channels, size, stride=ours.stride, padding=ours.padding, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(np.array(ours.weights).transpose(3, 2, 0, 1)))
    return layer.to(memory_format=torch.channels_last)


class _Block(torch.nn.Module):
    """A residual block; `shift` moves what goes into the branch of its convolutions."""

    def __init__(self, ours: Any):
        super().__init__()
        self.norms = torch.nn.ModuleList(map(_norm, ours.norms))
        self.convolutions = torch.nn.ModuleList(map(_convolution, ours.convolutions))
        self.shortcut = None if ours.shortcut is None else _convolution(ours.shortcut)

    def forward(self, x: Any, shift: Any = None) -> Any:
        hidden = torch.relu(self.norms[0](x))
        skip = x if self.shortcut is None else self.shortcut(hidden)
        moved = hidden if shift is None else shift(hidden)
        return self.convolutions[1](torch.relu(self.norms[1](self.convolutions[0](moved)))) + skip


class Network(torch.nn.Module):
    """A `PreActResNet` of ours, translated with its weights."""

    def __init__(self, ours: na.vision.PreActResNet):
        super().__init__()
        self.mean, self.std = ours.mean, ours.std
        self.stem = _convolution(ours.stem)
        self.blocks = torch.nn.ModuleList(map(_Block, ours.blocks))
        self.norm = _norm(ours.norm)
        self.head = torch.nn.Linear(ours.head.weights.shape[0], ours.num_classes)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor(np.asarray(ours.head.weights).T.copy()))
            self.head.bias.copy_(torch.tensor(np.asarray(ours.head.bias)))

    def forward(self, x: Any, shifts: Any = None) -> Any:
        """Give logits; `shifts` are functions of the hidden states, one a block."""
        z = self.stem((x - self.mean) / self.std)
        for number, block in enumerate(self.blocks):
            z = block(z, None if shifts is None else shifts[number])
        return self.head(torch.relu(self.norm(z)).mean((2, 3)))


Update = Callable[[Any, Any, Any], Any]
"""Makes one update with images, labels and their places among the training images; gives the loss before it."""


def standard(net: Network, optimizer: Any, *, eps: float, steps: int, n: int) -> Update:
    """Train on clean images."""
    del eps, steps, n
    return lambda x, y, places: _descended(optimizer, functional.cross_entropy(net(x), y))


def fgsm(net: Network, optimizer: Any, *, eps: float, steps: int, n: int) -> Update:
    """Train on images attacked by one step from the clean image."""
    del steps, n
    return lambda x, y, places: _descended(optimizer, functional.cross_entropy(net(_ascent(net, x, y, x, eps, eps)), y))


def pgd(net: Network, optimizer: Any, *, eps: float, steps: int, n: int) -> Update:
    """Train on images attacked by several steps from the clean image."""
    del n

    def update(x: Any, y: Any, places: Any) -> Any:
        point = x
        for _ in range(steps):
            point = _ascent(net, point, y, x, eps / 4, eps)
        return _descended(optimizer, functional.cross_entropy(net(point), y))

    return update


def trades(net: Network, optimizer: Any, *, eps: float, steps: int, n: int) -> Update:
    """Train by TRADES with beta = 6; the attack meets the network in evaluation."""
    del n

    def update(x: Any, y: Any, places: Any) -> Any:
        net.eval()
        with torch.no_grad():
            clean = functional.softmax(net(x), 1)
        point = x + 1e-3 * torch.randn_like(x)
        for _ in range(steps):
            point = point.detach().requires_grad_()
            divergence = functional.kl_div(functional.log_softmax(net(point), 1), clean, reduction="sum")
            (gradient,) = torch.autograd.grad(divergence, point)
            point = _projected(point + eps / 4 * gradient.sign(), x, eps)
        net.train()
        outputs = net(x)
        attacked = functional.log_softmax(net(point.detach()), 1)
        divergence = functional.kl_div(attacked, functional.softmax(outputs, 1), reduction="batchmean")
        return _descended(optimizer, functional.cross_entropy(outputs, y) + 6 * divergence)

    return update


def apart(net: Network, optimizer: Any, *, eps: float, steps: int, n: int) -> Update:
    """Train by APART: stored starts, and step sizes of the image and of each block that learn."""
    del steps
    alpha, alpha_start = (torch.tensor(1e-4, requires_grad=True) for _ in range(2))
    alpha_hidden = torch.zeros(len(net.blocks), requires_grad=True)
    scalars: tuple[Any, ...] = (alpha, alpha_start, alpha_hidden)
    ascent = torch.optim.SGD(scalars, lr=5e-8, momentum=0.9, weight_decay=400)
    held: dict[str, Any] = {}

    def update(x: Any, y: Any, places: Any) -> Any:
        if not held:
            held["starts"] = (1e-3 * torch.randn((n, *x.shape[1:]))).to(memory_format=torch.channels_last)
        kept, zeros = held["starts"][places], []

        def watched(hidden: Any) -> Any:
            zeros.append(torch.zeros_like(hidden, requires_grad=True))
            return hidden + zeros[-1]

        begin = (alpha_start * kept).clamp(-eps, eps)
        point = (x + begin).clamp(0, 1).detach().requires_grad_()
        loss = functional.cross_entropy(net(point, [watched] * len(net.blocks)), y)
        image_sign, *signs = (slope.sign() for slope in torch.autograd.grad(loss, [point, *zeros]))

        nudge: Any = torch.zeros_like(x, requires_grad=True)
        moved = (x + (begin + alpha * image_sign).clamp(-eps, eps)).clamp(0, 1) + nudge
        shifts = [
            lambda hidden, length=length, sign=sign: hidden + length * sign
            for length, sign in zip(alpha_hidden, signs, strict=True)
        ]
        ascent.zero_grad()
        loss = _descended(optimizer, functional.cross_entropy(net(moved, shifts), y))
        with torch.no_grad():
            length = alpha / (alpha_start + 1e-7)
            held["starts"][places] = (kept + length * nudge.grad.sign()).clamp(-1, 1)
            for scalar in scalars:
                scalar.grad.neg_()
        ascent.step()
        return loss

    return update


def _descended(optimizer: Any, loss: Any) -> Any:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _ascent(net: Network, point: Any, y: Any, clean: Any, length: float, eps: float) -> Any:
    point = point.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(functional.cross_entropy(net(point), y), point)
    return _projected(point + length * gradient.sign(), clean, eps)


def _projected(point: Any, clean: Any, eps: float) -> Any:
    with torch.no_grad():
        return torch.min(torch.max(point, clean - eps), clean + eps).clamp(0, 1)


METHODS: dict[str, Callable[..., Update]] = {
    "standard": standard,
    "FGSM": fgsm,
    "PGD": pgd,
    "TRADES": trades,
    "APART": apart,
}


def run(
    name: str,
    ours: na.vision.PreActResNet,
    x: np.ndarray,
    labels: np.ndarray,
    batch_size: int,
    *,
    eps: float,
    steps: int,
    rate: float,
    momentum: float,
    threads: int,
) -> Callable[[int], list[float]]:
    """Give training by a method: so many updates on batches drawn at random, and the losses before them."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    # Channels first by name and last in memory, as PyTorch computes them fastest on a CPU.
    inputs = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).to(memory_format=torch.channels_last)
    classes = torch.from_numpy(labels.astype(np.int64))
    net = Network(ours)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=momentum)
    update = METHODS[name](net, optimizer, eps=eps, steps=steps, n=len(x))

    def make(updates: int) -> list[float]:
        losses = []
        for _ in range(updates):
            places = torch.randperm(len(classes))[:batch_size]
            losses.append(float(update(inputs[places], classes[places], places)))
        return losses

    return make
