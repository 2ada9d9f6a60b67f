"""Names of the published tensors: several spellings in, openpi's out."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from gsrl_core.errors import CheckpointError, listed

EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
TIED_EMBEDDING = "paligemma_with_expert.paligemma.lm_head.weight"
"""The same tensor under the name that openpi's files keep (safetensors stores tied tensors once).

lerobot does not tie the two: its language model embeds with ``embed_tokens`` (``get_input_embeddings``), which training
changes, and nothing computes with its ``lm_head``, which keeps its random start.
"""
UNUSED = "paligemma_with_expert.gemma_expert.lm_head.weight"
"""Published, but no computation needs it. It is carried along so that openpi can read what is written back."""
HEADS = ("value_head.", "noise_head.")

_PALIGEMMA = r"^paligemma_with_expert\.paligemma\."
_SPELLINGS = (
    (r"^model\.(?=paligemma_with_expert|action_|time_mlp|state_proj|value_head|noise_head)", ""),
    (r"^action_time_mlp_", "time_mlp_"),
    (_PALIGEMMA + r"language_model\.lm_head\.", "paligemma_with_expert.paligemma.lm_head."),
    (_PALIGEMMA + r"language_model\.model\.", "paligemma_with_expert.paligemma.model.language_model."),
    (
        _PALIGEMMA + r"(language_model|vision_tower|multi_modal_projector)\.",
        r"paligemma_with_expert.paligemma.model.\1.",
    ),
)
_RLINF_NOISE_HEAD = re.compile(r"^noise_head\.mlp_logvar\.moduleList\.(\d+)\.linear_1\.")
"""RLinf's ExploreNoiseNet: an activation follows every layer, in the same Sequential here."""
_SHOWN = 12


def canonical(name: str) -> str:
    """A tensor's name in this repository, from openpi's (old or new), lerobot's or this one's."""
    name = _respelled(name)
    return EMBEDDING if name == TIED_EMBEDDING else name


def published(name: str, family: str = "pi05") -> str:
    """The name that a file gets."""
    if family == "pi0":
        name = re.sub("^time_mlp_", "action_time_mlp_", name)
    return TIED_EMBEDDING if name == EMBEDDING else name


def published_tensors(network: Mapping[str, Tensor], carried: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """What a file gets: the network's tensors and the carried ones, in which lerobot's ``lm_head`` may be."""
    named = {published(name, family): tensor for name, tensor in network.items()}
    if TIED_EMBEDDING in carried:
        named[EMBEDDING] = named[TIED_EMBEDDING]
    return named | dict(carried)


def sort_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of a file as (network, heads, carried), under canonical names.

    Carried is what no computation needs: ``UNUSED``, and an ``lm_head`` that is not the embedding beside it.

    Raises:
        CheckpointError: a tensor is there under two names, and they differ.
    """
    network: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    carried: dict[str, Tensor] = {}
    for given, tensor in tensors.items():
        name = _respelled(given)
        part = carried if name in {UNUSED, TIED_EMBEDDING} else heads if name.startswith(HEADS) else network
        if name in part and not _same(part[name], tensor):
            raise CheckpointError(f"{name} is stored twice, under two spellings, and they differ; keep the right one")
        part[name] = tensor
    head = carried.get(TIED_EMBEDDING)
    if head is not None and _same(network.setdefault(EMBEDDING, head), head):
        del carried[TIED_EMBEDDING]
    return network, heads, carried


def check_names(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str) -> None:
    """Compare names and shapes.

    Raises:
        CheckpointError: naming missing, unexpected and misshapen tensors.
    """
    misshapen = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in sorted(set(given) & set(wanted))
        if given[name].shape != wanted[name].shape
    ]
    problems = [
        f"{len(names)} {kind}: {listed(names, _SHOWN)}"
        for kind, names in (
            ("missing", sorted(set(wanted) - set(given))),
            ("unexpected", sorted(set(given) - set(wanted))),
            ("misshapen", misshapen),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{source} does not fit the architecture. {'; '.join(problems)}. Check that config.json belongs to these "
            "weights and that the download is complete"
        )


def _respelled(name: str) -> str:
    for pattern, replacement in _SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return _RLINF_NOISE_HEAD.sub(lambda match: f"noise_head.mlp.{2 * int(match[1])}.", name)


def _same(first: Tensor, second: Tensor) -> bool:
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    return first.is_meta or torch.equal(first, second)
