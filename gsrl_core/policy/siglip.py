"""The SigLIP vision tower (https://arxiv.org/abs/2303.15343): patches -> tokens, no pooling head."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from gsrl_core.policy.config import Pi05Config
from gsrl_core.policy.gemma import Projection, embedding


class WideLayerNorm(nn.LayerNorm):
    """Layer norm computed in float32, returned in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        normed = functional.layer_norm(
            input.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return normed.to(input.dtype)


class VisionEmbeddings(nn.Module):
    """Patch projection and learned positions, float32 as in the published checkpoints."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.vision_width, config.patch_size, stride=config.patch_size)
        self.position_embedding = embedding(config.image_tokens, config.vision_width)

    def forward(self, images: Tensor) -> Tensor:
        """Float [B, 3, S, S] in [-1, 1] -> float32 tokens [B, N, W], row-major."""
        patches = functional.conv2d(
            images.float(),
            self.patch_embedding.weight.float(),
            self.patch_embedding.bias.float(),
            stride=self.patch_embedding.stride,
        )
        return patches.flatten(2).transpose(1, 2) + self.position_embedding.weight.float()


class VisionAttention(nn.Module):
    """Full self-attention over the patches."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.num_heads = config.vision_heads
        width = config.vision_width
        self.q_proj = Projection(width, width)
        self.k_proj = Projection(width, width)
        self.v_proj = Projection(width, width)
        self.out_proj = Projection(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, W] -> [B, N, W]."""
        shape = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (proj(x).view(shape).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class VisionMlp(nn.Module):
    """fc2(gelu_tanh(fc1(x)))."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.fc1 = Projection(config.vision_width, config.vision_mlp)
        self.fc2 = Projection(config.vision_mlp, config.vision_width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, W] -> [B, N, W]."""
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class VisionLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.layer_norm1 = WideLayerNorm(config.vision_width, eps=1e-6)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = WideLayerNorm(config.vision_width, eps=1e-6)
        self.mlp = VisionMlp(config)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, W] -> [B, N, W]."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.vision_depth))


class VisionModel(nn.Module):
    """Images to patch tokens."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = WideLayerNorm(config.vision_width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] in [-1, 1] -> [B, N, W] in the dtype of ``images``."""
        x = self.embeddings(images).to(images.dtype)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class VisionTower(nn.Module):
    """Named as in the published key tree: ``vision_tower.vision_model``."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.vision_model = VisionModel(config)
