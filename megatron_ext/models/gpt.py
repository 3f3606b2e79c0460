"""A Megatron GPT that reads prefix-grouped streams and answers with log-probabilities.

Shape legend: t rows of the stream, b = 1, h hidden size, v vocabulary, tp tensor-parallel size, u predicted
tokens of the stream, r of its responses (see `megatron_ext.grouping`).
"""

from __future__ import annotations

import contextlib
import logging

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.attention.context import ContextShard, gather_predictions
from megatron_ext.attention.rotation import RotaryTables, RotatedStream
from megatron_ext.devices import device_type
from megatron_ext.errors import UserError
from megatron_ext.flops import ModelShape
from megatron_ext.grouping import PrefixGroups, StreamMedia
from megatron_ext.losses.logprobs import vocab_parallel_logprobs
from megatron_ext.models.config import GPTModelConfig, stream_multiple
from megatron_ext.models.media import MediaProjector
from megatron_ext.models.megatron_config import megatron_config
from megatron_ext.models.specs import assert_all_attention_grouped, block_spec
from megatron_ext.rotary import PositionIdRotaryEmbedding
from megatron_ext.runtime.activation_offload import offloaded_inputs
from megatron_ext.runtime.cpu import cuda_means
from megatron_ext.runtime.pieces import ModelPieces
from megatron_ext.runtime.weight_gather import await_weight

__all__ = ["PrefixGroupedGPT", "build_gpt"]

logger = logging.getLogger(__name__)


class PrefixGroupedGPT(GPTModel):
    """GPTModel with three differences: position ids drive the rotary embedding, every attention layer is the
    prefix-grouped one and does the rotating, and only the rows that are asked for reach the vocabulary projection."""

    def __init__(self, config: GPTModelConfig, transformer: TransformerConfig, device: torch.device, piece: int = 0):
        split, stage = config.pipeline_split, parallel_state.get_pipeline_model_parallel_rank()
        pre_process = stage == piece == 0
        post_process = (stage, piece) == (split.stages - 1, split.pieces - 1)
        super().__init__(
            config=transformer,
            transformer_layer_spec=block_spec(
                len(split.stage(stage)[piece]),
                config.qk_layernorm,
                config.transformer_impl,
                config.attn_logit_softcapping,
                config.attention_kernel,
                config.attention_plan,
            ),
            vocab_size=config.padded_vocab_size,
            max_sequence_length=config.encoder_seq_length,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
            position_embedding_type="mrope",
            scatter_embedding_sequence_parallel=config.vision is None,  # else media go in before the rows are split
            vp_stage=piece if split.pieces > 1 else None,
        )
        self.model_config = config
        position = config.position_embedding
        self.rotary_pos_emb = PositionIdRotaryEmbedding(
            config.kv_channels,
            position.base,
            position.percent,
            device,
            position.scheme,
            position.interleaved,
            position.scaling,
            position.sections,
        )
        if config.vision is not None and pre_process:
            self.media_projector = MediaProjector(
                config.vision.feature_size, config.hidden_size, config.init_method_std
            )
            self.media_projector.to(config.dtype)
        self.pairs_per_token = ModelShape.of(config).pairs_per_token  # to balance context-parallel ranks
        assert_all_attention_grouped(self)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        packed_seq_params: PackedSeqParams,
        labels: Tensor | None = None,
        rows: Tensor | None = None,
        temperature: float = 1.0,
        media: StreamMedia | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run this pipeline stage on one stream.

        Args:
            input_ids: int64 [t].
            position_ids: int64 [t], or [axes, t] by the model's position scheme.
            packed_seq_params: a `PrefixGroups`, or a prefill or decode step.
            labels: int64 [u], tokens predicted from the record's `predict_index` rows.
            rows: int64 rows whose logits are wanted, instead of labels.
            temperature: divides the logits behind log-probabilities.
            media: images and videos of the stream; only the first stage looks at them.

        Returns:
            hidden states [t (/ tp), 1, h] on every stage but the last; there (log-probabilities [r], entropies [r]),
            or logits [rows, v] over the real vocabulary where `rows` is given.
        """
        record = packed_seq_params
        if position_ids.dim() == 1:
            position_ids = position_ids.unsqueeze(0)
        if self.config.context_parallel_size > 1 and isinstance(record, PrefixGroups):
            record = ContextShard.of(
                record, self.pg_collection.cp, stream_multiple(self.model_config), self.pairs_per_token
            )
            input_ids, position_ids = input_ids[record.rows], position_ids[:, record.rows]
        decoder_input, angles, *_ = self._preprocess(
            input_ids=input_ids.unsqueeze(0),
            position_ids=position_ids.unsqueeze(1),  # [axes, b, t]
            decoder_input=self._embed(input_ids, media, record),
            packed_seq_params=record,
        )
        tables = RotaryTables.of(angles, self.config.params_dtype, self.rotary_pos_emb.interleaved)
        with self._layer_inputs():
            hidden = self.decoder(
                hidden_states=decoder_input,
                attention_mask=None,
                packed_seq_params=RotatedStream(record, tables),
            )
        if not self.post_process:
            return hidden
        if rows is not None:
            return self._logits(hidden, rows)
        return self._logprobs(hidden, record, labels, temperature)

    def _layer_inputs(self) -> contextlib.AbstractContextManager:
        """Where layers' inputs are kept for their backward pass."""
        if not (self.model_config.activation_offload and torch.is_grad_enabled()):
            return contextlib.nullcontext()
        return offloaded_inputs(len(self.decoder.layers), self.config.hidden_size, self.config.params_dtype)

    def _embed(self, input_ids: Tensor, media: StreamMedia | None, record: PackedSeqParams) -> Tensor | None:
        """Token embeddings with media in their places, [t (/ tp), 1, h]; None where Megatron's own embedding will do."""
        if not self.pre_process:
            return None
        if self.model_config.vision is None:
            if media is not None:
                raise UserError("the stream has media, but the model has no model.vision to see them with")
            return None
        hidden = self.embedding(input_ids=input_ids.unsqueeze(0), position_ids=None)  # [t, 1, h]
        if media is None and torch.is_grad_enabled():
            # Its gradient is 0, and not missing: ranks that sum gradients while backward runs wait for one of every weight.
            hidden = hidden + 0 * sum(await_weight(p).sum() for p in self.media_projector.parameters())
        if media is not None:
            rows, index, seen = media.rows, media.index, self.media_projector(media.features)  # [m], [m], [n, h]
            if isinstance(record, ContextShard):  # all ranks project all media: their gradients add up
                mine = record.local_rows[rows]
                kept = (mine >= 0).nonzero().squeeze(1)
                rows, index = mine[kept], index[kept]
            seen = seen.index_select(0, index.to(seen.device)).unsqueeze(1)  # [m, 1, h]
            hidden = hidden.index_put((rows.to(hidden.device),), seen)
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.pg_collection.tp)
        return hidden

    def _output_weight(self) -> Tensor:
        shared = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if shared else self.output_layer.weight
        return await_weight(weight)  # the output layer is not called

    def _logprobs(self, hidden: Tensor, record: PrefixGroups | ContextShard, labels: Tensor, temperature: float):
        """hidden [t (/ tp), 1, h] -> log-probabilities and entropies of `labels` [u], [r] each."""
        sharded = isinstance(record, ContextShard)
        if sharded:
            labels = labels[record.entries]
        if self.config.sequence_parallel:
            hidden = _gather_rows(hidden, record, self.pg_collection.tp)
        else:
            hidden = hidden.squeeze(1).index_select(0, record.predict_index)  # [u, h]
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.pg_collection.tp)
        logprobs, entropy = vocab_parallel_logprobs(
            hidden,
            self._output_weight(),
            labels,
            self.pg_collection.tp,
            temperature,
            self.model_config.logprob_chunk_size,
            self.model_config.vocab_size,
        )
        if sharded:
            logprobs, entropy = (gather_predictions(x, record) for x in (logprobs, entropy))
        expand = (record.groups if sharded else record).expand_index
        return (logprobs, entropy) if expand is None else (logprobs[expand], entropy[expand])  # [u] -> [r]

    def _logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """hidden [t (/ tp), 1, h] -> logits [rows, v] in fp32, gathered over the vocabulary. For sampling: no backward."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.pg_collection.tp)
        shard = hidden.squeeze(1).index_select(0, rows) @ self._output_weight().t()  # [rows, v / tp]
        logits = gather_from_tensor_model_parallel_region(shard, group=self.pg_collection.tp)
        return logits[:, : self.model_config.vocab_size].float()


def _gather_rows(hidden: Tensor, record: PrefixGroups | ContextShard, tp_group) -> Tensor:
    """Collect the predicting rows of a sequence-parallel stream: [t / tp, 1, h] -> [u, h].

    Only the rows that are asked for travel, each once, padded to the largest count among the ranks. The backward
    reduce-scatters, which also sums the vocabulary shards' shares of the gradient.
    """
    key = ("rows", tp_group.size(), tp_group.rank())
    if key not in record.derived:
        record.derived[key] = _row_tables(record, *key[1:], hidden.device)
    local, restore = record.derived[key]
    mine = hidden.index_select(0, local)  # [k, 1, h]
    gathered = gather_from_sequence_parallel_region(mine, tensor_parallel_output_grad=True, group=tp_group)
    return gathered.squeeze(1).index_select(0, restore)  # [tp * k, h] -> [u, h]


def _row_tables(record: PrefixGroups | ContextShard, tp: int, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(local rows to send [k], place of each predicting row among the gathered ones [u]), from lengths only."""
    unique, inverse = record.predict_rows.unique(return_inverse=True)
    shard = record.num_tokens // tp
    owner = unique // shard
    counts = torch.bincount(owner, minlength=tp)
    k = max(int(counts.max()) if len(unique) else 0, 1)
    first = counts.cumsum(0) - counts
    place = owner * k + torch.arange(len(unique)) - first[owner]
    local = torch.zeros(k, dtype=torch.int64)  # rows beyond a rank's count repeat row 0 and are never read
    local[: int(counts[rank])] = unique[owner == rank] - rank * shard
    return local.to(device), place[inverse].to(device)


def build_gpt(config: GPTModelConfig, device: torch.device) -> PrefixGroupedGPT | ModelPieces:
    """Build this rank's pipeline stage on its device, in training mode; in pieces where the configuration says so. On "meta"
    it is what a GPU would hold, and takes no memory."""
    if config.vocab_size is None:
        raise UserError("model.vocab_size is not set: take it from the tokenizer")
    kind = device_type(device)
    config = config.on(kind)
    transformer = megatron_config(config, kind)  # one for all pieces: the schedule and the engine write to it
    # Megatron makes its weights on "cuda", whatever torch's default device is.
    with cuda_means(device) if device.type == "meta" else contextlib.nullcontext():
        pieces = [PrefixGroupedGPT(config, transformer, device, piece) for piece in range(config.pipeline_split.pieces)]
    model = (ModelPieces(pieces) if len(pieces) > 1 else pieces[0]).to(device)
    count = sum(p.numel() for p in model.parameters())
    logger.info("built a GPT with %d parameters on this rank, precision %s", count, model.model_config.precision)
    if config.padded_vocab_size > config.vocab_size:
        logger.info("its vocabulary of %d rows is padded to %d", config.vocab_size, config.padded_vocab_size)
    return model
