"""How the weights of pi0.5 are divided over the processes that train it.

A unit's weights are gathered when its module is called, so everything that is trained is one module, called as such,
and every block in it is a unit. What is computed in float32 (projections, adaptive norms, heads) is gathered so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from gsrl_core.policy.flow import NoiseHead
from gsrl_core.policy.pi05 import Pi05
from gsrl_core.policy.storage import Extent
from gsrl_core.policy.value import ValueHead
from gsrl_core.sharding import shard, shard_root


class Evaluator(nn.Module):
    """A policy's evaluation of stored samples as the forward pass of one module."""

    def __init__(
        self,
        run: Callable[[Mapping[str, Tensor], Extent], tuple[Tensor, ...]],
        network: Pi05,
        value_head: ValueHead,
        noise_head: NoiseHead | None,
    ) -> None:
        super().__init__()
        self.network, self.value_head, self.noise_head = network, value_head, noise_head
        self._run = run

    def forward(self, chain: Mapping[str, Tensor], extent: Extent) -> tuple[Tensor, ...]:
        """Log-probability and entropy, each at its level, and value [B]."""
        return self._run(chain, extent)


def shard_evaluator(evaluator: Evaluator, network: Pi05, mesh: DeviceMesh) -> FSDPModule:
    """Divide all weights of ``evaluator``, whose network is ``network``; frozen ones keep their dtype."""
    vision, language = network.paligemma.vision_tower.vision_model, network.paligemma.language_model
    frozen = [*vision.encoder.layers, vision, network.paligemma.multi_modal_projector.linear]
    for module in (*frozen, language.embed_tokens, *language.layers, language.norm):
        shard(module, mesh)
    # Its last layer may be asked for keys and values alone.
    register_fsdp_forward_method(language.layers[-1], "keys_values")
    for layer in network.expert.layers:
        shard([layer.input_layernorm, layer.post_attention_layernorm], mesh)
        shard(layer, mesh, network.compute_dtype)
    return shard_root(evaluator, mesh)
