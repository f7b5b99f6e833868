"""What is read, what is held out, and that the two never meet."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hylo.data.sources import (
    read_documents,
    standard_library,
    token_stream,
)
from hylo.errors import HyloError

END = 256


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the end of text."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"<end>": END}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", model_max_length=16)


def test_standard_library_is_split_by_document() -> None:
    train, held_out = standard_library(False), standard_library(True)
    assert len(train) > 300 and 0.02 < len(held_out) / len(train) < 0.1
    assert not {d for d in train if len(d) > 500} & set(held_out)
    assert standard_library(True) == held_out


def test_token_stream_closes_every_document(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    stream = token_stream(tokenizer, ["a" * 40, "bb"])
    assert stream.dtype == np.int32 and len(stream) == 44
    assert np.flatnonzero(stream == END).tolist() == [40, 43]
    assert not caplog.records  # a document longer than the model's context is nothing to warn of


def test_folder_is_read_in_the_order_of_paths(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.md", "sub/c.py", "image.png"):
        (tmp_path / name).write_text(name)
    assert read_documents(tmp_path) == ["a.md", "b.txt", "sub/c.py"]


def test_unusable_text(tmp_path: Path) -> None:
    with pytest.raises(HyloError, match="nowhere does not exist"):
        read_documents(tmp_path / "nowhere")
    with pytest.raises(HyloError, match="no text in"):
        read_documents(tmp_path)
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(HyloError, match="x.txt is not readable UTF-8"):
        read_documents(tmp_path)
