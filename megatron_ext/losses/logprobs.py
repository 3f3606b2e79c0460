"""Log-probabilities and entropies over a tensor-parallel vocabulary, without ever holding all logits.

Shape legend: r predicted tokens, h hidden size, v vocabulary, tp tensor-parallel size, c rows of a chunk.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ext.devices import device_type
from megatron_ext.errors import UserError

__all__ = ["default_chunk_size", "vocab_parallel_logprobs"]

# Bytes of fp32 logits in one chunk. On a GPU the weight is read once per chunk, so small chunks are memory-bound.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
MIN_CHUNK_ROWS = 16


def default_chunk_size(vocab_shard: int, on: str) -> int:
    """Rows per chunk that keep fp32 logits of `vocab_shard` columns within the device's budget."""
    return max(MIN_CHUNK_ROWS, CHUNK_BYTES[on] // (4 * vocab_shard))


def vocab_parallel_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    num_valid: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`log softmax(hidden @ weight.T / temperature)[targets]` and the entropy of each row's distribution.

    Forward and backward go through the rows in chunks and hold the logits of one chunk at a time; backward computes
    them again, except those of the last chunk, which are kept. Both outputs are differentiable.

    Args:
        hidden: [r, h]. The gradient that flows back is this vocabulary shard's share: the caller's
            copy-to/gather-from region sums it over the tensor-parallel group.
        weight: [v / tp, h], this rank's rows of the output embedding.
        targets: int64 [r], ids in the whole vocabulary.
        tp_group: the tensor-parallel group; None for one rank.
        temperature: divides the logits, as in sampling.
        chunk_size: rows per chunk, see `default_chunk_size`.
        num_valid: columns of the whole vocabulary that are real tokens; the padding behind them gets probability 0.

    Returns:
        (log-probability [r], entropy [r] in nats), fp32, or fp64 for fp64 inputs.
    """
    if temperature <= 0:
        raise UserError(f"temperature must be positive, got {temperature}")
    if chunk_size is None:
        chunk_size = default_chunk_size(weight.size(0), device_type(hidden.device))
    return _VocabParallelLogprobs.apply(hidden, weight, targets, tp_group, temperature, chunk_size, num_valid)


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, tp_group, temperature, chunk_size, num_valid):
        ctx.set_materialize_grads(False)  # an entropy that is only logged costs no backward
        tp = dist.get_world_size(tp_group) if tp_group is not None else 1
        first = (dist.get_rank(tp_group) if tp > 1 else 0) * weight.size(0)
        ctx.group = tp_group if tp > 1 else None
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        ctx.num_columns = weight.size(0) if num_valid is None else max(0, min(num_valid - first, weight.size(0)))
        local = targets - first
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprob, entropy, lse = (torch.empty(hidden.size(0), dtype=dtype, device=hidden.device) for _ in range(3))
        buffer = _logits_buffer(hidden, weight, chunk_size)
        scratch = _scratch(buffer, 2)
        for rows in _chunks(hidden.size(0), chunk_size):
            logits = _logits(hidden[rows], weight, ctx, buffer)
            logprob[rows], entropy[rows], lse[rows] = _row_statistics(logits, local[rows], ctx.group, scratch)
        ctx.save_for_backward(hidden, weight, local, lse, entropy)
        ctx.kept = buffer if ctx.needs_input_grad[0] or ctx.needs_input_grad[1] else None
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_entropy):
        hidden, weight, local, lse, entropy = ctx.saved_tensors
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(lse)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # a frozen one has none
        buffer, ctx.kept = ctx.kept, None  # holds the logits of the last chunk, which is the first one here
        filled = buffer is not None
        if not filled:  # a second backward over a retained graph
            buffer = _logits_buffer(hidden, weight, ctx.chunk_size)
        scratch = None if grad_entropy is None else _scratch(buffer, 1)[0]
        for rows in reversed(list(_chunks(hidden.size(0), ctx.chunk_size))):
            logits = buffer[: rows.stop - rows.start] if filled else _logits(hidden[rows], weight, ctx, buffer)
            filled = False
            grad_h = None if grad_entropy is None else grad_entropy[rows]
            grad = _logits_grad(logits, local[rows], lse[rows], entropy[rows], grad_logprob[rows], grad_h, scratch)
            if ctx.temperature != 1:
                grad.div_(ctx.temperature)
            grad = grad.to(hidden.dtype)
            torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(grad.t(), hidden[rows])
            del logits, grad
        return grad_hidden, grad_weight, None, None, None, None, None


def _chunks(length: int, size: int):
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _logits_buffer(hidden: Tensor, weight: Tensor, chunk_size: int) -> Tensor:
    """Memory for one chunk of logits, used for every chunk: on the CPU fresh memory of this size costs page faults."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return torch.empty(min(chunk_size, hidden.size(0)), weight.size(0), dtype=dtype, device=hidden.device)


def _scratch(buffer: Tensor, count: int) -> Tensor:
    """[count, c / 8, v / tp]: an eighth of a chunk at a time is worked on, not a whole."""
    return buffer.new_empty(count, max(1, buffer.size(0) // 8), buffer.size(1))


def _logits(hidden: Tensor, weight: Tensor, ctx, buffer: Tensor) -> Tensor:
    """Scaled logits [c, v / tp] in fp32 (fp64), in the first rows of the buffer."""
    logits = buffer[: hidden.size(0)]
    if logits.dtype == hidden.dtype:
        torch.mm(hidden, weight.t(), out=logits)
    else:
        logits.copy_(hidden @ weight.t())
    if ctx.temperature != 1:
        logits.div_(ctx.temperature)
    if ctx.num_columns < weight.size(0):
        logits[:, ctx.num_columns :] = -1e30  # finite: an entire shard can be padding
    return logits


def _row_statistics(logits: Tensor, local: Tensor, group, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob, entropy, lse), each [c], from this shard's logits [c, v / tp]; two small collectives."""
    peak = logits.amax(-1)
    if group is not None:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    mine = (local >= 0) & (local < logits.size(1))
    target = logits.gather(1, local.clamp(0, logits.size(1) - 1).unsqueeze(1)).squeeze(1) - peak
    total, weighted = torch.empty_like(peak), torch.empty_like(peak)
    for rows in _chunks(logits.size(0), scratch.size(1)):
        shifted, exp = scratch[:, : rows.stop - rows.start]
        torch.sub(logits[rows], peak[rows].unsqueeze(1), out=shifted)
        torch.exp(shifted, out=exp)
        total[rows] = exp.sum(-1)
        weighted[rows] = exp.mul_(shifted).sum(-1)
    sums = torch.stack((total, weighted, torch.where(mine, target, 0)))  # [3, c]
    if group is not None:
        dist.all_reduce(sums, group=group)
    total, weighted, target = sums
    log_total = total.log()
    return target - log_total, log_total - weighted / total, peak + log_total


def _logits_grad(logits, local, lse, entropy, grad_logprob, grad_entropy, scratch) -> Tensor:
    """Overwrites logits [c, v / tp] with d(loss)/d(scaled logits).

    d logprob / d z_j = [j = target] - p_j;  d H / d z_j = -p_j (log p_j + H).
    """
    logits.sub_(lse.unsqueeze(1))  # log p
    if grad_entropy is None:
        logits.exp_().mul_(-grad_logprob.unsqueeze(1))
    else:
        for rows in _chunks(logits.size(0), scratch.size(0)):
            factor = scratch[: rows.stop - rows.start]
            torch.add(logits[rows], entropy[rows].unsqueeze(1), out=factor)
            factor.mul_(grad_entropy[rows].unsqueeze(1)).add_(grad_logprob[rows].unsqueeze(1)).neg_()
            logits[rows].exp_().mul_(factor)
    mine = (local >= 0) & (local < logits.size(1))
    index = local.clamp(0, logits.size(1) - 1).unsqueeze(1)
    return logits.scatter_add_(1, index, torch.where(mine, grad_logprob, 0).unsqueeze(1))
