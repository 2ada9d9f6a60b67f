import pytest
import sentencepiece
import torch
from policy_examples import TOKENIZER

from gsrl_core.errors import CheckpointError
from gsrl_core.policy.tokenizer import PromptTokenizer

TEXT = "pick up the cube and put it on the plate"


@pytest.fixture
def tokenizer():
    return PromptTokenizer(TOKENIZER, 48, discrete_state=True)


def pieces(ids):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
    return [processor.id_to_piece(i) for i in ids]


def test_prompt_with_state_spells_the_published_sentence(tokenizer):
    bins = torch.tensor([[-1, 0, 9, 10, 99, 100, 128, 254, 255]])
    tokens, mask = tokenizer.encode([TEXT], bins)
    assert tokens.shape == mask.shape == (1, 48)
    spelled = pieces(tokens[0, mask[0]].tolist())
    assert spelled[0] == "<bos>"
    assert "".join(spelled[1:]).replace("▁", " ") == f"Task: {TEXT}, State: -1 0 9 10 99 100 128 254 255;\nAction: "
    assert not tokens[0, ~mask[0]].any()
    # Right padding only.
    assert mask[0].tolist() == sorted(mask[0].tolist(), reverse=True)


def test_prompt_without_state(tokenizer):
    plain = PromptTokenizer(TOKENIZER, 48, discrete_state=False)
    tokens, mask = plain.encode([f"  {TEXT.replace(' ', '_')}\n"], None)
    spelled = pieces(tokens[0, mask[0]].tolist())
    assert "".join(spelled[1:]).replace("▁", " ") == f"{TEXT}\n"


@pytest.mark.parametrize("value", range(-1, 256))
def test_every_bin_is_one_piece(tokenizer, value):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
    assert len(processor.encode(f" {value}")) == 1


def test_vocabulary_is_small_and_ascii_has_no_unknown(tokenizer):
    assert tokenizer.vocab_size <= 512
    assert not tokenizer.unknown("Grab THE zebra-striped box; stack it (gently!) @ 12.5% & quickly?")
    assert tokenizer.unknown("füße")


def test_length_does_not_depend_on_the_state(tokenizer):
    lengths = {int(tokenizer.encode([TEXT], torch.full((1, 9), value))[1].sum()) for value in (-1, 5, 77, 255)}
    assert lengths == {tokenizer.prompt_length(TEXT, 9)}


def test_long_prompt_is_refused(tokenizer):
    with pytest.raises(CheckpointError, match=r"takes \d+ tokens, this checkpoint allows 48"):
        tokenizer.encode([TEXT * 3], torch.zeros(1, 9, dtype=torch.int64))


def test_state_is_required(tokenizer):
    with pytest.raises(CheckpointError, match="give the discretised state"):
        tokenizer.encode([TEXT], None)


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
def test_broken_files(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        PromptTokenizer(path, 48, discrete_state=True)
