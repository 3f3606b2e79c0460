"""The weights mean the same in an unmodified Megatron GPT: 'rope' positions and its own attention, one document."""

from __future__ import annotations

import dataclasses

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.dot_product_attention import DotProductAttention

from megatron_ext.models import build_gpt
from megatron_ext.models.megatron_config import megatron_config
from megatron_ext.models.specs import block_spec
from tests.gpt_cases import make_rollout, pack_rollout, randomize, run, small_config
from tests.layouts import error


def test_equals_stock_megatron_on_one_document(rng, world):
    """fp64 to 1e-10: logits of Megatron's GPTModel against our log-probabilities, for a document without prefix."""
    config = small_config(share_embeddings_and_output_weights=False)
    model = build_gpt(config, world)
    randomize(model, rng)
    model.double()
    spec = block_spec(config.num_layers, config.qk_layernorm)
    for layer in spec.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = DotProductAttention
    stock = GPTModel(
        dataclasses.replace(megatron_config(config.on("cpu"), "cpu"), mrope_section=None),
        spec,
        config.padded_vocab_size,
        config.encoder_seq_length,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=config.position_embedding.base,
    ).double()
    stock.load_state_dict(model.state_dict(), strict=False)
    assert not [n for n, p in stock.named_parameters() if not torch.equal(p, model.get_parameter(n))]

    batch = pack_rollout(make_rollout(rng, [(0, [33])], 61), pad=1)
    tokens = batch.tokens.unsqueeze(0)
    future = torch.ones(33, 33, dtype=torch.bool).triu(1)[None, None]
    logits = stock(tokens, batch.groups.position_ids.unsqueeze(0), future)[0, :-1, :61]
    expected = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    found, _ = run(model, batch)
    assert found.shape == (32,)
    assert error(found.detach(), expected.detach()) <= 1e-10
