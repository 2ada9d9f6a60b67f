"""The critic: a float32 MLP on the masked mean of the prefix."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


def masked_mean(hidden: Tensor, valid: Tensor) -> Tensor:
    """Mean over valid tokens: [B, N, W] with bool [B, N] -> float32 [B, W].

    pi_RL's code averages over padded slots too, which makes the critic depend on how much was padded.
    """
    weight = valid.to(torch.float32)
    return (hidden.float() * weight[..., None]).sum(dim=1) / weight.sum(dim=1, keepdim=True)


class ValueHead(nn.Module):
    """Linear-ReLU stack to one number (pi_RL: kaiming-normal hidden layers, last layer N(0, 0.02), zero biases)."""

    def __init__(self, width: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        sizes = (width, *hidden)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.mlp[-1].weight, std=0.02)

    def forward(self, pooled: Tensor) -> Tensor:
        """Float32 [B, W] -> [B]."""
        return self.mlp(pooled).squeeze(-1)
