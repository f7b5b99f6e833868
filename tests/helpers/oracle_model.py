"""A model without weights that continues every prompt it was taught with the answer it was taught.

    keys in the cache  (B, 1, S, 1): the token ids themselves, so that whatever repeats, reorders or crops the cache
                       carries a row's past along
    past of a row      the cached ids where the mask is 1, wherever its padding stands

So a right answer comes out only where batches, padding, masks and caches were right.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast


class Oracle(PreTrainedModel, GenerationMixin):
    """Ends an unknown prompt at once. `at_random`: answers with random tokens instead, the same ones every time."""

    config_class = LlamaConfig

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int = 8192, at_random: bool = False) -> None:
        sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=context, **sizes, **ends)
        super().__init__(config)
        self.generation_config = GenerationConfig(**ends)
        self.tokenizer, self.at_random = tokenizer, at_random
        self.read: list[tuple[int, int]] = []  # rows and columns of every forward pass
        self._answers: dict[tuple[int, ...], list[int]] = {}
        self.weight = nn.Parameter(torch.zeros(1))  # what tells the model's device and type

    def learn(self, prompt: Sequence[int], answer: str) -> None:
        """`prompt`: the ids that the model will read, without padding."""
        ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        self._answers[tuple(prompt)] = [*ids, self.tokenizer.eos_token_id]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        **_: object,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T or logits_to_keep, V) for ids (B, T) and a mask (B, S) over the cached ones and these."""
        cache = past_key_values if past_key_values is not None else DynamicCache(config=self.config)
        own = input_ids[:, None, :, None].to(self.weight.dtype)
        ids_BS = cache.update(own, own, 0)[0][:, 0, :, 0].long()
        mask_BS = torch.ones_like(ids_BS) if attention_mask is None else attention_mask
        counts_BS = mask_BS.cumsum(1)
        if position_ids is not None:
            real = mask_BS[:, -input_ids.shape[1] :] == 1
            assert (position_ids == counts_BS[:, -input_ids.shape[1] :] - 1)[real].all(), "positions leave the mask"
        self.read.append((len(input_ids), input_ids.shape[1]))
        kept = logits_to_keep or input_ids.shape[1]
        logits = torch.zeros(len(input_ids), kept, self.config.vocab_size, device=input_ids.device)
        for row, (ids_S, mask_S) in enumerate(zip(ids_BS, mask_BS, strict=True)):
            past = tuple(ids_S[mask_S == 1].tolist())
            for column, count in enumerate(counts_BS[row, -kept:].tolist()):
                logits[row, column, self._next(past[:count])] = 1
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache if use_cache else None)

    def _next(self, past: tuple[int, ...]) -> int:
        if self.at_random:
            return random.Random(str(past)).randrange(self.config.vocab_size)
        for prompt, answer in self._answers.items():
            at = len(past) - len(prompt)
            if 0 <= at < len(answer) and past == (*prompt, *answer[:at]):
                return answer[at]
        return self.tokenizer.eos_token_id
