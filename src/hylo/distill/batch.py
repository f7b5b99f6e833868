"""What a batch of packed rows gives to a model and to a loss: its inputs, and the next token of every token.

A batch holds input_ids (B,T) int64 and, where its rows pack several documents, position_ids (B,T) int64, which count
from 0 in every document. Our model and transformers' Llama and Qwen keep such documents apart by themselves.
"""

from typing import Any

import torch
from torch import Tensor

NO_TARGET = -100


def model_inputs(batch: dict[str, Any]) -> dict[str, Tensor]:
    """What a causal model or its decoder takes by keyword; position_ids (B,T) only if some row has a second document.

    Call the model with use_cache=False: transformers' do not tell documents apart where there is a cache. Without
    position_ids, their attention needs no mask of T by T.
    """
    inputs = {"input_ids": batch["input_ids"]}
    positions_BT = batch.get("position_ids")
    if positions_BT is not None and bool((positions_BT.diff(dim=1) != 1).any()):
        inputs["position_ids"] = positions_BT
    return inputs


def next_tokens(batch: dict[str, Any]) -> Tensor:
    """Each position's next token, (B,T) int64; NO_TARGET where a row or a document ends."""
    ids_BT, positions_BT = batch["input_ids"], batch.get("position_ids")
    targets_BT = torch.full_like(ids_BT, NO_TARGET)
    targets_BT[:, :-1] = ids_BT[:, 1:]
    if positions_BT is not None:
        targets_BT[:, :-1].masked_fill_(positions_BT.diff(dim=1) != 1, NO_TARGET)
    return targets_BT
