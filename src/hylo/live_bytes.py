"""How many bytes a computation holds at any moment, found without computing: its operations run on fake tensors.

torch's fake tensors have shapes and types but no memory. Everything that a model does to real ones happens to them too
(autocast's copies, what autograd keeps, checkpointing, gradients), so counting their storages as they come and go gives
a real run's memory, but for scratch inside of single operations, for a model of any size in a second or two.
"""

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from hylo.modeling import HyloForCausalLM

CHUNK = 64  # of the recurrences: tokens that come in whole chunks are padded nowhere
PRIMES = (17, 19, 23, 29, 31, 37, 41, 43, 47)


class Moment(NamedTuple):
    """Bytes at one time: gradients that have arrived at their weights, other tensors whose size does not depend on how
    many tokens a batch has (copies of weights, gradients on their way), and those that grow with the tokens."""

    gradients: float
    fixed: float
    tokens: float

    def beside(self, other: "Moment") -> "Moment":
        return Moment(*(a + b for a, b in zip(self, other, strict=True)))

    def scaled(self, factor: float) -> "Moment":
        """For `factor` times as many tokens."""
        return self._replace(tokens=self.tokens * factor)


class Trace(NamedTuple):
    """A pass over `tokens` tokens: the largest moments of its forward and backward part, and what is kept between."""

    tokens: int
    forward: list[Moment]
    kept: Moment
    backward: list[Moment]


class LiveBytes(TorchDispatchMode):
    """While it is on, counts the storages that operations make. A tensor grows with the tokens if `prime`, a factor of
    the number of tokens and of nothing else (see `traced_tokens`), divides its number of elements."""

    def __init__(self, model: nn.Module, prime: int) -> None:
        super().__init__()
        self.prime, self.now, self.front = prime, Moment(0, 0, 0), list[Moment]()
        self.known: dict[int, Moment] = {}  # by storage; those of the model are none of ours
        self.grown = False
        for tensor in (*model.parameters(), *model.buffers()):
            self.known[_key(tensor)] = Moment(0, 0, 0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._arrived)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return made

    def peaks(self) -> list[Moment]:
        """The moments since the last call at which something was largest, none of them below another in everything."""
        self._remember()
        front, self.front = self.front, []
        return front

    def _count(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self.known:
            return
        size, grows = storage.nbytes(), tensor.numel() % self.prime == 0
        self.known[key] = Moment(0, 0, size) if grows else Moment(0, size, 0)
        self.now, self.grown = self.now.beside(self.known[key]), True
        weakref.finalize(storage, self._freed, key)

    def _arrived(self, parameter: Tensor) -> None:
        """A weight's gradient is one from now on."""
        assert parameter.grad is not None
        key = _key(parameter.grad)
        if (was := self.known.get(key)) is not None and was.fixed:
            self.known[key] = Moment(was.fixed, 0, 0)
            self.now = self.now._replace(gradients=self.now.gradients + was.fixed, fixed=self.now.fixed - was.fixed)

    def _freed(self, key: int) -> None:
        self._remember()
        self.now = Moment(*(a - b for a, b in zip(self.now, self.known.pop(key), strict=True)))

    def _remember(self) -> None:
        if self.grown:
            now, self.grown = self.now, False
            if not any(all(a >= b for a, b in zip(moment, now, strict=True)) for moment in self.front):
                self.front = [m for m in self.front if any(a > b for a, b in zip(m, now, strict=True))] + [now]


def traced_tokens(model: nn.Module) -> tuple[int, int]:
    """How many tokens to run a model on in order to see what grows with them, and the prime to tell it by."""
    sizes = {parameter.numel() for parameter in model.parameters()}
    prime = next(prime for prime in PRIMES if all(size % prime for size in sizes))
    return CHUNK * prime, prime


def trace_decoder(model: PreTrainedModel, bf16: bool, keeps_states: bool = False) -> Trace:
    """A pass of the decoder, and backwards if something of it trains; a teacher's keeps states as stage 1 does."""
    tokens, prime = traced_tokens(model)
    trains = any(parameter.requires_grad for parameter in model.parameters())
    states: list[Tensor] = []
    if keeps_states:
        for layer in model.model.layers:
            layer.register_forward_pre_hook(lambda module, args: states.append(args[0]))
            layer.self_attn.register_forward_hook(lambda module, args, output: states.append(output[0]))
    live = LiveBytes(model, prime)
    with live:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), torch.set_grad_enabled(trains):
            ids = torch.zeros(1, tokens, dtype=torch.long)
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        forward, kept = live.peaks(), live.now
        if trains:
            hidden.backward(torch.ones_like(hidden))
        return Trace(tokens, forward, kept, live.peaks())


def trace_layer(model: HyloForCausalLM, index: int, bf16: bool) -> Trace:
    """One layer with stage 1's loss."""
    tokens, prime = traced_tokens(model)
    layer, width = model.model.layers[index], model.config.hidden_size
    fed, taught, mixed = (torch.zeros(1, tokens, width) for _ in range(3))
    outputs: list[Tensor] = []
    hook = layer.get_submodule("mixer").register_forward_hook(lambda module, args, output: outputs.append(output))
    inputs = model.model.layer_inputs(fed)
    live = LiveBytes(layer, prime)
    with live:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            pairs = (layer(fed, **inputs), taught), (outputs.pop(), mixed)
            loss = sum(torch.linalg.vector_norm(ours.float() - theirs, dim=-1).mean() for ours, theirs in pairs)
        del pairs
        forward, kept = live.peaks(), live.now
        loss.backward()
        hook.remove()
        return Trace(tokens, forward, kept, live.peaks())


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors made inside have no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def largest(moments: Iterable[Moment], factor: float) -> Moment:
    """The moment with the most bytes for `factor` times the tokens that were traced, scaled to them."""
    return max((moment.scaled(factor) for moment in moments), key=sum)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
