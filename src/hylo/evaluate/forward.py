"""One forward pass of many rows, stopped at the final hidden states: logits are made only where they are needed."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

BATCH_TOKENS = 8192  # tokens in one forward pass
TILE_LOGITS = 2**22  # logits in memory at once (16 MiB in float32)


class Scorer:
    """A causal language model seen as final hidden states and an output head.

    `hidden` gives what the head reads (after the final norm), in the model's precision; `head` is float32.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.head = model.get_output_embeddings().weight.detach().float()  # (V, D)
        self.vocabulary = self.head.shape[0]
        self.device = self.head.device

    @torch.no_grad()
    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Final hidden states of rows without padding: (B, T) -> (B, T, D)."""
        return self.model.base_model(input_ids=ids.to(self.device), use_cache=False).last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, V) in float32."""
        return hidden.float() @ self.head.T


class Teacher(Scorer):
    """A scorer that computes the hidden states of a batch once, whatever number of students is held against them."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._known: dict[tuple[torch.Size, bytes], torch.Tensor] = {}

    def remembered(self, ids: torch.Tensor) -> torch.Tensor:
        """As `hidden`; kept in main memory."""
        key = (ids.shape, ids.numpy().tobytes())  # the same tokens cut into other rows are other contexts
        if key not in self._known:
            self._known[key] = self.hidden(ids).cpu()
        return self._known[key].to(self.device)


def batches(ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """Rows (R, T) in batches of at most BATCH_TOKENS tokens, or of one row where a row is longer."""
    yield from ids.split(max(1, BATCH_TOKENS // ids.shape[1]))
