"""Instructions (and states) to token ids: PaliGemma's prompt formats on a SentencePiece model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

from gsrl_core.errors import CheckpointError


class PromptTokenizer:
    """The prompts of openpi's PaligemmaTokenizer.

    Without state: begin token, text, newline. With state: ``Task: {text}, State: {bins};``, newline, ``Action: ``
    after the begin token. Text is stripped, and its underscores and newlines become spaces.
    """

    def __init__(self, model: Path, max_token_len: int, discrete_state: bool) -> None:
        """Read a SentencePiece file.

        Raises:
            CheckpointError: missing, or not a SentencePiece model, or without a begin token.
        """
        self.path = model
        self.max_token_len = max_token_len
        self.discrete_state = discrete_state
        if not model.is_file():
            raise CheckpointError(f"no tokenizer at {model}; put the SentencePiece file tokenizer.model there")
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.load_from_serialized_proto(model.read_bytes())
        except (RuntimeError, OSError) as error:
            raise CheckpointError(
                f"{model} is not a SentencePiece model ({error}); fetch tokenizer.model again"
            ) from error
        if self._pieces.bos_id() < 0:
            raise CheckpointError(f"{model} has no begin-of-sentence piece; it is not a PaliGemma-style tokenizer")
        self._encode = lru_cache(maxsize=4096)(self._encode_uncached)

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self._pieces.get_piece_size()

    def unknown(self, text: str) -> bool:
        """Whether some part of ``text`` has no piece."""
        return self._pieces.unk_id() in self._pieces.encode(_cleaned(text))

    def prompt_length(self, text: str, state_width: int) -> int:
        """Most tokens that ``text`` can take with any state of ``state_width`` entries."""
        return len(self._encode(text, (255,) * state_width if self.discrete_state else None))

    def encode(self, instructions: Sequence[str], bins: Tensor | None) -> tuple[Tensor, Tensor]:
        """Token ids int64 [B, max_token_len], zero-padded, and their mask bool [B, max_token_len].

        Args:
            instructions: B sentences.
            bins: int64 [B, D] from :func:`~gsrl_core.policy.transforms.discretize_state`; ignored by a tokenizer
                without discrete state.

        Raises:
            CheckpointError: a prompt does not fit.
        """
        states: list[tuple[int, ...] | None] = [None] * len(instructions)
        if self.discrete_state:
            if bins is None:
                raise CheckpointError("this checkpoint's prompt carries the state; give the discretised state")
            states = [tuple(row) for row in bins.tolist()]
        tokens = torch.zeros(len(instructions), self.max_token_len, dtype=torch.int64)
        mask = torch.zeros(len(instructions), self.max_token_len, dtype=torch.bool)
        for row, (text, state) in enumerate(zip(instructions, states, strict=True)):
            ids = self._encode(text, state)
            tokens[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = True
        return tokens, mask

    def _encode_uncached(self, text: str, state: tuple[int, ...] | None) -> tuple[int, ...]:
        pieces, bos = self._pieces, self._pieces.bos_id()
        if state is None:
            ids = [bos, *pieces.encode(_cleaned(text)), *pieces.encode("\n")]
        else:
            numbers = " ".join(map(str, state))
            ids = [bos, *pieces.encode(f"Task: {_cleaned(text)}, State: {numbers};\nAction: ")]
        if len(ids) > self.max_token_len:
            raise CheckpointError(
                f"the prompt for {text!r} takes {len(ids)} tokens, this checkpoint allows {self.max_token_len}; "
                "shorten the instruction"
            )
        return tuple(ids)


def _cleaned(text: str) -> str:
    return text.strip().replace("_", " ").replace("\n", " ")
