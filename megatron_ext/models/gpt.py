"""A Megatron GPT that reads prefix-grouped streams and answers with log-probabilities.

Shape legend: t rows of the stream, b = 1, h hidden size, v vocabulary, tp tensor-parallel size, u predicted
tokens of the stream, r of its responses (see `megatron_ext.grouping`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

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

from megatron_ext.adapters.spec import adapted_spec, lora_shapes
from megatron_ext.adapters.state import start_adapters, train_adapters
from megatron_ext.attention.context import ContextShard, gather_predictions
from megatron_ext.attention.rotation import RotaryTables, RotatedStream
from megatron_ext.devices import device_type
from megatron_ext.errors import UserError
from megatron_ext.flops import ModelShape
from megatron_ext.grouping import PrefixGroups, StreamEntry, StreamMedia
from megatron_ext.losses.logprobs import vocab_parallel_logprobs
from megatron_ext.models.config import GPTModelConfig, stream_multiple
from megatron_ext.models.deepstack import Shown
from megatron_ext.models.freezing import freeze
from megatron_ext.models.megatron_config import megatron_config
from megatron_ext.models.specs import assert_all_attention_grouped, block_spec
from megatron_ext.rotary import PositionIdRotaryEmbedding
from megatron_ext.runtime.activation_offload import offloaded_inputs
from megatron_ext.runtime.cpu import cuda_means
from megatron_ext.runtime.distributed import STAGE_SEEDS
from megatron_ext.runtime.pieces import ModelPieces
from megatron_ext.runtime.weight_gather import await_weight
from megatron_ext.vision import VisionTower
from megatron_ext.vision.connectors import build_connector

__all__ = ["PrefixGroupedGPT", "build_gpt"]

logger = logging.getLogger(__name__)


class PrefixGroupedGPT(GPTModel):
    """GPTModel with three differences: position ids drive the rotary embedding, every attention layer is the
    prefix-grouped one and does the rotating, and only the rows that are asked for reach the vocabulary projection."""

    def __init__(self, config: GPTModelConfig, transformer: TransformerConfig, device: torch.device, piece: int = 0):
        split, stage = config.pipeline_split, parallel_state.get_pipeline_model_parallel_rank()
        pre_process = stage == piece == 0
        post_process = (stage, piece) == (split.stages - 1, split.pieces - 1)
        adapted = config.peft is not None
        spec = block_spec(
            len(split.stage(stage)[piece]),
            config.qk_layernorm,
            "local" if adapted else config.transformer_impl,
            config.attn_logit_softcapping,
            config.attention_kernel,
            config.attention_plan,
            config.residual_multiplier,
            config if config.multi_latent_attention else None,
            across_heads=(config.num_attention_heads, config.num_query_groups)
            if config.qk_layernorm_across_heads
            else None,
            experts=config,
            layers=split.stage(stage)[piece],
            fed=config.vision.deepstack if config.vision is not None and pre_process else 0,
        )
        if adapted:
            spec = adapted_spec(spec, lora_shapes(config.peft, config.linears, config.num_query_groups))
        super().__init__(
            config=transformer,
            transformer_layer_spec=spec,
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
            config.rotated_channels,
            position.base,
            position.percent,
            device,
            position.scheme,
            position.interleaved,
            position.scaling,
            position.sections,
        )
        if config.vision is not None and pre_process:
            self._build_eyes(device)
        freeze(self, config)
        self.pairs_per_token = ModelShape.of(config).pairs_per_token  # to balance context-parallel ranks
        assert_all_attention_grouped(self)

    def _build_eyes(self, device: torch.device) -> None:
        config = self.model_config
        self.media_projector = build_connector(config.vision, config.hidden_size, config.init_method_std)
        self.media_projector.to(config.dtype)
        self.vision_tower: VisionTower | None = None
        if config.vision.has_tower:
            group = parallel_state.get_tensor_and_context_parallel_group()
            recompute = config.activations_checkpoint_granularity == "full"
            self.vision_tower = VisionTower(config.vision, group, device, recompute)
            self.vision_tower.to_precision(config.dtype)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        packed_seq_params: PackedSeqParams,
        labels: Tensor | None = None,
        rows: Tensor | None = None,
        temperature: float = 1.0,
        media: StreamMedia | None = None,
        entry: StreamEntry | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run this pipeline stage on one stream.

        Args:
            input_ids: int64 [t].
            position_ids: int64 [t], or int64 or float64 [axes, t] by the model's position scheme.
            packed_seq_params: a `PrefixGroups`, or a prefill or decode step.
            labels: int64 [u], tokens predicted from the record's `predict_index` rows.
            rows: int64 rows whose logits are wanted, instead of labels.
            temperature: divides the logits behind log-probabilities.
            media: images and videos of the stream; only the first stage looks at them.
            entry: the block at which the stream enters, without context parallelism. A stage below runs nothing.

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
        skipped = self._layers_below(entry)
        if skipped == len(self.decoder.layers):
            return self._nothing(len(input_ids))
        shown = self._show(media, record, skipped)
        given = self._embed(input_ids, shown) if skipped is None else self._entered(entry)
        decoder_input, angles, *_ = self._preprocess(
            input_ids=input_ids.unsqueeze(0),
            position_ids=position_ids.unsqueeze(1),  # [axes, b, t]
            decoder_input=given,
            packed_seq_params=record,
        )
        if self.pre_process and skipped is None and self.model_config.embedding_multiplier != 1:
            decoder_input = decoder_input * self.model_config.embedding_multiplier
        if self.model_config.peft is not None and torch.is_grad_enabled():
            self._make_differentiable(decoder_input)
        rotary = self.rotary_pos_emb
        tables = RotaryTables.of(angles, self.config.params_dtype, rotary.interleaved, rotary.attention_scaling)
        features, media_rows = self._behind_layers(shown, len(input_ids))
        with self._layer_inputs(), self._layers_from(skipped or 0):
            hidden = self.decoder(
                hidden_states=decoder_input,
                attention_mask=None,
                context=features,
                packed_seq_params=RotatedStream(record, tables, media_rows),
            )
        if not self.post_process:
            return hidden
        if rows is not None:
            return self._logits(hidden, rows)
        return self._logprobs(hidden, record, labels, temperature)

    def _layers_below(self, entry: StreamEntry | None) -> int | None:
        """How many of this stage's layers lie below the entry: all of them, if it is on a later stage; None: it is on an earlier
        one, or there is none."""
        if entry is None:
            return None
        below = entry.block - (self.decoder.layers[0].layer_number - 1)
        return None if below < 0 else min(below, len(self.decoder.layers))

    def _nothing(self, rows: int) -> Tensor:
        """What a stage below the entry sends, [t (/ tp), 1, h]; the stage of the entry does not look at it."""
        rows //= self.pg_collection.tp.size() if self.config.sequence_parallel else 1
        return torch.zeros(
            rows, 1, self.config.hidden_size, dtype=self.config.params_dtype, device=torch.cuda.current_device()
        )

    def _entered(self, entry: StreamEntry) -> Tensor:
        hidden = entry.hidden
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.pg_collection.tp)
        if not self.pre_process:
            self.decoder.set_input_tensor(hidden)
        return hidden

    @contextlib.contextmanager
    def _layers_from(self, first: int) -> Iterator[None]:
        """Without the layers before it."""
        every = self.decoder.layers
        self.decoder.layers = every[first:] if first else every
        try:
            yield
        finally:
            self.decoder.layers = every

    def _layer_inputs(self) -> contextlib.AbstractContextManager:
        """Where layers' inputs are kept for their backward pass."""
        if not (self.model_config.activation_offload and torch.is_grad_enabled()):
            return contextlib.nullcontext()
        return offloaded_inputs(len(self.decoder.layers), self.config.hidden_size, self.config.params_dtype)

    def _make_differentiable(self, decoder_input: Tensor | None) -> None:
        """A layer that is computed again has gradients where its input has: here of a frozen embedding, which has none."""
        if decoder_input is not None and self.model_config.activations_checkpoint_granularity == "full":
            decoder_input.requires_grad_()

    def _show(self, media: StreamMedia | None, record: PackedSeqParams, skipped: int | None) -> Shown | None:
        """What stands in this rank's rows of media; None: nothing that this stage has a use for.

        Args:
            skipped: layers below those that are run; None: tokens are embedded, too.
        """
        vision = self.model_config.vision
        if media is None or not self.pre_process:
            return None
        if vision is None:
            raise UserError("the stream has media, but the model has no model.vision to see them with")
        if skipped is not None and skipped >= vision.deepstack:
            return None
        rows, index, seen = media.rows, media.index, self._see(media)  # [m], [m], [n, (1 + d) h]
        if isinstance(record, ContextShard):  # all ranks project all media: their gradients add up
            mine = record.local_rows[rows]
            kept = (mine >= 0).nonzero().squeeze(1)
            rows, index = mine[kept], index[kept]
        return Shown(rows, seen.index_select(0, index.to(seen.device)))

    def _behind_layers(self, shown: Shown | None, rows: int) -> tuple[Tensor | None, Tensor | None]:
        """What deepstack adds behind the first layers, and where; None: nothing."""
        config = self.config
        if shown is None or not self.model_config.vision.deepstack:
            return None, None
        return shown.behind_layers(
            config.hidden_size, rows, self.pg_collection.tp if config.sequence_parallel else None
        )

    def _embed(self, input_ids: Tensor, shown: Shown | None) -> Tensor | None:
        """Token embeddings with media in their places, [t (/ tp), 1, h]; None where Megatron's own embedding will do."""
        if not self.pre_process or self.model_config.vision is None:
            return None
        nothing = None
        if shown is None and torch.is_grad_enabled():
            # Its gradient is 0, and not missing: ranks that sum gradients while backward runs wait for one of every weight, and
            # where nothing else trains a stream without media has no other. It comes before the embedding, as what is shown
            # does: ranks with media and without have gradients in one order.
            eyes = (self.media_projector, self.vision_tower or torch.nn.Identity())
            nothing = 0 * sum(await_weight(p).sum() for eye in eyes for p in eye.parameters() if p.requires_grad)
        hidden = self.embedding(input_ids=input_ids.unsqueeze(0), position_ids=None)  # [t, 1, h]
        if nothing is not None:
            hidden = hidden + nothing
        if shown is not None:
            hidden = shown.embedded(hidden)
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.pg_collection.tp)
        return hidden

    def _see(self, media: StreamMedia) -> Tensor:
        """[n, (1 + d) h]: every medium of the stream once, and with it what deepstack adds behind d layers."""
        content, tower = media.content, self.vision_tower
        if not isinstance(content, Tensor):
            if tower is None:
                raise UserError("the stream has pictures, but the model has no model.vision.tower: give it features")
            more = (content,) if self.model_config.vision.condenses else ()
            found = self.media_projector(tower(content), *more)
            if len(found) != (expected := 1 + int(media.index.max())):
                raise UserError(
                    f"the tower makes {len(found)} tokens of the stream's media, their places are {expected}"
                )
            return found
        if tower is not None and tower.trains and torch.is_grad_enabled():
            raise UserError("the stream has features, and the tower that would compute them trains: give it pictures")
        if self.model_config.vision.condenses:
            raise UserError(
                "the stream has features, and model.vision.connector=onevision must know of which images and videos they are: "
                "give it pictures"
            )
        return self.media_projector(content)

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
            temperature * self.model_config.logits_scaling,
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
        return logits[:, : self.model_config.vocab_size].float() / self.model_config.logits_scaling


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
    if config.qk_layernorm_across_heads:
        # Each rank has its own part of these norms' weights: Megatron would sum their gradients, as of whole ones.
        transformer.qk_layernorm = False
    model = (ModelPieces(pieces) if len(pieces) > 1 else pieces[0]).to(device)
    if config.peft is not None:
        for piece in pieces:
            _start_adapters(piece, config.peft.init)
        train_adapters(model)
    count = sum(p.numel() for p in model.parameters())
    logger.info("built a GPT with %d parameters on this rank, precision %s", count, model.model_config.precision)
    if config.padded_vocab_size > config.vocab_size:
        logger.info("its vocabulary of %d rows is padded to %d", config.vocab_size, config.padded_vocab_size)
    return model


def _start_adapters(piece: PrefixGroupedGPT, init: str) -> None:
    """Of the seed that stages have alike, whose own differ by their numbers."""
    seed = torch.initial_seed() - STAGE_SEEDS * parallel_state.get_pipeline_model_parallel_rank()
    for layer in piece.decoder.layers:
        start_adapters(layer, init, f"{seed} {layer.layer_number}")
