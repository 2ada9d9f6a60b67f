"""Write the SentencePiece model of pi05_tiny: one piece a word of the task's language, one piece a state bin.

    python scripts/make_tiny_tokenizer.py

A vocabulary of 256 000 PaliGemma pieces would be 130 MB of embedding for a network of 10 MB. Words that are not listed
are spelled in characters, so no ASCII instruction has an unknown piece.
"""

from __future__ import annotations

import string
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2 as schema

OUT = Path(__file__).parent.parent / "gsrl_core" / "bundled" / "pi05_tiny" / "tokenizer.model"
SPACE = "\u2581"
WORDS = """
pick up the cube and put it on plate place block onto a to in of take grab lift grasp move set down then this that
red green blue white small object box dish tray saucer disc circle center centre middle top over from table robot arm
please carefully gently now your task is should be with using gripper hand transfer carry bring drop lay rest stack
position inside dice toy item round surface work bench next let so lies sits there here which by for at into
State Action Task
"""


def main() -> None:
    """Write the model file and say where."""
    model = schema.ModelProto()
    model.trainer_spec.model_type = schema.TrainerSpec.UNIGRAM
    # Ids of the special pieces as in Gemma.
    for name, value in (("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3)):
        setattr(model.trainer_spec, f"{name}_id", value)
        setattr(model.trainer_spec, f"{name}_piece", f"<{name}>")
    kinds = schema.ModelProto.SentencePiece
    for text, kind in (
        ("<pad>", kinds.CONTROL),
        ("<eos>", kinds.CONTROL),
        ("<bos>", kinds.CONTROL),
        ("<unk>", kinds.UNKNOWN),
    ):
        model.pieces.add(piece=text, score=0.0, type=kind)
    # Unigram segmentation maximises the sum of scores: whole words first, letters only where no word fits.
    numbers = [f"{SPACE}{value}" for value in range(-1, 256)]
    words = ["Task", "Action", *(SPACE + word for word in WORDS.split())]
    for text in dict.fromkeys([*numbers, *words]):
        model.pieces.add(piece=text, score=-1.0)
    for text in [SPACE, "\n", *string.ascii_letters, *string.digits, *string.punctuation]:
        model.pieces.add(piece=text, score=-10.0)
    model.trainer_spec.vocab_size = len(model.pieces)
    spec = model.normalizer_spec
    spec.name, spec.add_dummy_prefix, spec.remove_extra_whitespaces = "identity", False, False
    spec.escape_whitespaces = True
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_bytes(model.SerializeToString(deterministic=True))
    print(f"{len(model.pieces)} pieces -> {OUT}")


if __name__ == "__main__":
    main()
