"""What GPUs alone compute in, asked for where there is none: headers open, files are known, ranks refuse."""

from __future__ import annotations

import pytest

from runtime.commands.engines import _same_files, open_front
from runtime.config import ModelConfig
from runtime.errors import InvalidArgument
from runtime.model.header import header_device, open_model

FOR_GPUS = ({"kv_dtype": "fp8"}, {"dtype": "fp16"})


@pytest.mark.parametrize("settings", FOR_GPUS)
def test_a_header_opens_where_the_ranks_will_be(tiny, settings) -> None:
    model = ModelConfig(str(tiny), **settings)
    assert header_device(model, "auto") == "cuda"
    assert header_device(model, "cpu") == "cpu"
    assert header_device(ModelConfig(model.path), "auto") == "cpu"
    opened = open_front(model, chat=False).opened
    assert (opened.dtype, opened.device) == ("fp16", "cuda")
    with pytest.raises(InvalidArgument, match="is not possible on a CPU; use auto"):
        open_model(model, "cpu")


@pytest.mark.parametrize("settings", FOR_GPUS)
def test_files_are_told_apart_whatever_they_are_computed_in(tiny, settings) -> None:
    """Which every build of a server's ranks does, the first one too."""
    build = _same_files(ModelConfig(str(tiny), **settings), lambda say: "built")
    assert [build(print), build(print)] == ["built", "built"]
