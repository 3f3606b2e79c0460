"""Chunked log-probabilities and entropies against PyTorch's log_softmax in fp64, and the memory they are made for."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from megatron_ext.losses import vocab_parallel_logprobs
from megatron_ext.losses.logprobs import CHUNK_BYTES, MIN_CHUNK_ROWS, default_chunk_size
from tests.layouts import error, randn

ROWS, HIDDEN, VOCAB = 37, 12, 53
BOUND = 1e-10  # fp64, see tests/unit/attention/comparison.py


def draw(rng, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = randn(rng, rows, HIDDEN), randn(rng, VOCAB, HIDDEN)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(VOCAB, (rows,), generator=rng)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, num_valid: int | None = None):
    logp = (hidden @ weight[:num_valid].t() / temperature).log_softmax(-1)
    return logp.gather(1, targets.unsqueeze(1)).squeeze(1), -(logp.exp() * logp).sum(-1)


def values_and_grads(function, hidden, weight, grad_logprob: Tensor | None, grad_entropy: Tensor | None):
    outputs = function()
    pairs = [(o, g) for o, g in zip(outputs, (grad_logprob, grad_entropy), strict=True) if g is not None]
    grads = torch.autograd.grad([o for o, _ in pairs], (hidden, weight), [g for _, g in pairs])
    return [*outputs, *grads]


def assert_equal_to_plain(
    rng, hidden, weight, targets, use=("logprob", "entropy"), num_valid=None, bound=BOUND, **options
):
    rows = hidden.size(0)
    grads = [randn(rng, rows) if name in use else None for name in ("logprob", "entropy")]
    found = values_and_grads(
        lambda: vocab_parallel_logprobs(hidden, weight, targets, num_valid=num_valid, **options), hidden, weight, *grads
    )
    temperature = options.get("temperature", 1.0)
    expected = values_and_grads(lambda: plain(hidden, weight, targets, temperature, num_valid), hidden, weight, *grads)
    for name, a, b in zip(("logprob", "entropy", "d hidden", "d weight"), found, expected, strict=True):
        assert a.dtype == torch.float64 and a.shape == b.shape
        assert error(a, b) <= bound, f"{name} differs by {error(a, b)}"
    return found


@pytest.mark.parametrize("use", [("logprob",), ("entropy",), ("logprob", "entropy")])
@pytest.mark.parametrize("chunk", [1, 7, 36, ROWS, 1000, None])
def test_equals_log_softmax(chunk, use, rng):
    """Chunks that do and do not divide the rows; gradients through either output and through both."""
    assert_equal_to_plain(rng, *draw(rng), use=use, chunk_size=chunk)


@pytest.mark.parametrize("temperature", [0.3, 2.5])
def test_temperature_divides_the_logits(temperature, rng):
    hidden, weight, targets = draw(rng)
    found = assert_equal_to_plain(rng, hidden, weight, targets, temperature=temperature, chunk_size=8)
    assert error(found[0], plain(hidden, weight, targets)[0]) > 1e-2


@pytest.mark.parametrize("num_valid", [VOCAB, VOCAB - 1, 20])
def test_padding_columns_have_probability_zero(num_valid, rng):
    """Values as if they were not there, and a gradient of exactly zero for their rows of the weight."""
    hidden, weight, targets = draw(rng)
    found = assert_equal_to_plain(rng, hidden, weight, targets % num_valid, num_valid=num_valid, chunk_size=10)
    assert torch.count_nonzero(found[3][num_valid:]) == 0
    assert torch.count_nonzero(found[3][:num_valid]) > 0


def test_first_and_last_token_of_the_vocabulary(rng):
    hidden, weight, _ = draw(rng)
    targets = torch.tensor([0, VOCAB - 1]).repeat(ROWS)[:ROWS]
    assert_equal_to_plain(rng, hidden, weight, targets, chunk_size=5)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows, rng):
    """A stream may predict nothing at all."""
    assert_equal_to_plain(rng, *draw(rng, rows), chunk_size=4)


def test_large_logits_stay_finite(rng):
    """Logits of +-1000 overflow a naive softmax; the entropy of a certain choice is 0, not NaN.

    The bound grows as rounding does: `hidden` enters the gradient of the weight twice.
    """
    factor = 300
    hidden, weight, targets = draw(rng)
    scaled = (hidden.detach() * factor).requires_grad_()
    found = assert_equal_to_plain(rng, scaled, weight, targets, bound=BOUND * factor**2, chunk_size=6)
    assert all(bool(x.isfinite().all()) for x in found)


def test_a_second_backward_is_the_same(rng):
    """The first overwrites the logits it kept; the second has to compute them again."""
    hidden, weight, targets = draw(rng)
    logprob, entropy = vocab_parallel_logprobs(hidden, weight, targets, chunk_size=8)
    loss = (logprob * randn(rng, ROWS)).sum() + entropy.square().sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_in_low_precision_is_that_of_plain_pytorch(dtype, rng):
    """Twice the L2 error of log_softmax(logits.float()) for values, three times for gradients."""
    hidden, weight, targets = draw(rng, rows=301)
    grads = randn(rng, 301), randn(rng, 301)
    truth = values_and_grads(
        lambda: plain(hidden.to(dtype).double(), weight.to(dtype).double(), targets), hidden, weight, *grads
    )
    low = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
    low_grads = [g.float() for g in grads]

    def plain_low():
        logp = (low[0] @ low[1].t()).float().log_softmax(-1)
        return logp.gather(1, targets.unsqueeze(1)).squeeze(1), -(logp.exp() * logp).sum(-1)

    reference = values_and_grads(plain_low, *low, *low_grads)
    found = values_and_grads(lambda: vocab_parallel_logprobs(*low, targets, chunk_size=300), *low, *low_grads)
    for name, a, b, c in zip(("logprob", "entropy", "d hidden", "d weight"), found, reference, truth, strict=True):
        assert a.dtype == (torch.float32 if name in ("logprob", "entropy") else dtype)
        ours, theirs = ((x.double() - c).norm().item() for x in (a, b))
        assert ours <= (3 if name.startswith("d ") else 2) * theirs, f"{name}: {ours:.3g} against {theirs:.3g}"


class AllocatedMemory(TorchDispatchMode):
    """Counts the bytes of storages made while it is active: the largest one, and the most alive at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.live, self.peak, self.largest = set(), 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_flatten(out)[0]:
            if isinstance(x, Tensor):
                self._see(x.untyped_storage())
        return out

    def see_inputs(self, *tensors: Tensor) -> None:
        """Memory that was there before does not count."""
        self.alive.update(x.untyped_storage()._cdata for x in tensors)

    def _see(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return
        self.alive.add(key)
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size: int) -> None:
        self.alive.discard(key)
        self.live -= size


def test_the_meter_sees_what_plain_log_softmax_allocates(rng):
    """Guards the next test: the plain form holds at least two [rows, vocabulary] tensors at once."""
    hidden, weight, targets = draw(rng, rows=256)
    with AllocatedMemory() as memory:
        memory.see_inputs(hidden, weight, targets)
        sum(plain(hidden, weight, targets)).sum().backward()
    assert memory.largest == 256 * VOCAB * 8
    assert memory.peak >= 2 * 256 * VOCAB * 8


@pytest.mark.parametrize("entropy", [False, True])
def test_never_more_than_one_chunk_of_logits(entropy, rng):
    """No tensor larger than a chunk of fp32 logits, and less than two chunks alive at any moment, backward included."""
    rows, vocab, chunk, width = 256, 4096, 16, 4
    hidden = torch.randn(rows, width, generator=rng).requires_grad_()
    weight = torch.randn(vocab, width, generator=rng).requires_grad_()
    targets = torch.randint(vocab, (rows,), generator=rng)
    chunk_bytes, gradients = chunk * vocab * 4, (rows + vocab) * width * 4
    with AllocatedMemory() as memory:
        memory.see_inputs(hidden, weight, targets)
        logprob, h = vocab_parallel_logprobs(hidden, weight, targets, chunk_size=chunk)
        (logprob.sum() + h.sum() if entropy else logprob.sum()).backward()
        del logprob, h
    assert memory.largest == chunk_bytes
    assert chunk_bytes < memory.peak < 2 * chunk_bytes + gradients
    assert weight.grad is not None and weight.grad.isfinite().all()


def test_default_chunk_keeps_the_budget():
    for device, budget in CHUNK_BYTES.items():
        rows = default_chunk_size(151_936, device)
        assert rows >= MIN_CHUNK_ROWS and rows * 151_936 * 4 <= budget
    assert default_chunk_size(10**9, "cpu") == MIN_CHUNK_ROWS


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_refuses_a_temperature_that_is_not_positive(temperature, rng):
    with pytest.raises(ValueError, match=f"temperature must be positive, got {temperature}"):
        vocab_parallel_logprobs(*draw(rng), temperature=temperature)
