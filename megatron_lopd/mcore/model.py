"""Megatron-Core's GPTModel over packed documents, and the log-probs of its responses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig

from megatron_lopd.config import Fp8Config, ParallelConfig
from megatron_lopd.families.architecture import Architecture, check_layout
from megatron_lopd.families.family import family_of
from megatron_lopd.mcore import compat
from megatron_lopd.mcore.attention import PackedDocuments
from megatron_lopd.mcore.capabilities import capabilities
from megatron_lopd.mcore.experts import mark_expert_weights, moe_options
from megatron_lopd.mcore.initialize import draw_weights
from megatron_lopd.mcore.precision import check_precision, fp8_options
from megatron_lopd.mcore.private import stretch_rotary
from megatron_lopd.mcore.recompute import check_recompute, recompute_options
from megatron_lopd.mcore.spec import decoder_spec
from megatron_lopd.ops.kernel_trial import usable
from megatron_lopd.ops.softmax import ResponseLogProbs
from megatron_lopd.ops.token_loss import SummedLoss, TokenLoss, vocab_parallel_loss
from megatron_lopd.ops.top_k import vocab_parallel_top_k


class PackedGPTModel(GPTModel):  # type: ignore[misc]
    """A GPTModel that reads one packed micro-batch and stops before the output layer.

    The output layer's logits are never made for all positions: `response_loss` takes the hidden states
    from here, and only those that predict a response token. `output_grad_ready`, where data parallelism
    has set it, is called once the output weight's `main_grad` has a micro-batch's gradient.
    """

    arch: Architecture
    output_grad_ready: Callable[[], None] | None = None

    def forward(
        self, tokens: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
    ) -> torch.Tensor:
        """Run this pipeline stage.

        tokens, position_ids: int64 [S]; cu_seqlens: int32 [documents + 1], from 0 to S; max_seqlen: tokens of
        the longest document. S must be a multiple of the tensor parallel size under sequence parallelism.
        Under context parallelism S counts this rank's tokens, and cu_seqlens those of all its ranks.
        Tensors may be on any device. Returns the hidden states [S, 1, h] ([S / tp, 1, h] under sequence
        parallelism), normed on the last stage.
        """
        device = compat.device()
        packed = PackedDocuments.of(cu_seqlens.to(device, non_blocking=True), max_seqlen)
        hidden: torch.Tensor = super().forward(
            input_ids=tokens[None].to(device, non_blocking=True),
            position_ids=position_ids[None].to(device, non_blocking=True),
            attention_mask=None,
            packed_seq_params=packed,
        )
        return hidden

    def _postprocess(self, hidden_states: torch.Tensor, **unused: Any) -> torch.Tensor:
        """GPTModel's last part, where it would make logits of every position."""
        return hidden_states

    def output_weight(self) -> torch.Tensor:
        """This rank's rows of the output layer, [padded vocabulary / tp, h]; the last stage has them."""
        weight: torch.Tensor = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        return weight


def build_model(
    arch: Architecture,
    parallel: ParallelConfig,
    precision: Literal["fp32", "bf16"],
    seed: int | None = 0,
    fp8: Fp8Config | None = None,
) -> list[PackedGPTModel]:
    """This rank's part of the model, on `compat.device()`, inside `model_parallel`.

    One chunk of consecutive layers, or `parallel.virtual_pipeline` of them, in the order they run.
    `precision` is that of the parameters and activations; `fp8` makes the layers' matrix products in FP8.
    `seed` decides the initial weights, which are the same at every layout. None: matrices are left as the
    allocator gives them, for a checkpoint that is read next; to draw those takes seconds a billion, each rank
    the whole of what it keeps a part of. Raises ConfigError when `parallel` cannot split `arch` or recompute
    what it names, or `fp8` cannot be had here.
    """
    check_layout(arch, parallel)
    check_precision(arch, parallel, fp8)
    check_recompute(arch, parallel, fp8, grouped=compat.takes_transformer_engine(precision))
    config = transformer_config(arch, parallel, precision, fp8)
    chunks = [_build_chunk(arch, parallel, config, number) for number in range(parallel.virtual_pipeline)]
    if seed is not None:
        for chunk in chunks:
            draw_weights(chunk, arch, seed)
    return chunks


def _build_chunk(
    arch: Architecture, parallel: ParallelConfig, config: TransformerConfig, number: int
) -> PackedGPTModel:
    model = PackedGPTModel(
        config=config,
        transformer_layer_spec=decoder_spec(arch, config, number),
        vocab_size=arch.padded_vocab_size(parallel.tensor),
        max_sequence_length=arch.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage() and number == 0,
        post_process=parallel_state.is_pipeline_last_stage() and number == parallel.virtual_pipeline - 1,
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="rope",
        rotary_percent=arch.rotary_share,
        rotary_base=arch.rope_theta,
        vp_stage=number if parallel.virtual_pipeline > 1 else None,
    )
    model.arch = arch
    if arch.rope_scaling is not None:
        stretch_rotary(model.rotary_pos_emb, **asdict(arch.rope_scaling))
    mark_expert_weights(model)
    family_of(arch).adapt(model)
    return model


def transformer_config(
    arch: Architecture,
    parallel: ParallelConfig,
    precision: Literal["fp32", "bf16"],
    fp8: Fp8Config | None = None,
) -> TransformerConfig:
    """Megatron-Core's description of the model, its split and its numerics."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    machine, engine_layers = capabilities(), compat.takes_transformer_engine(precision)
    common: dict[str, Any] = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_size,
        "num_attention_heads": arch.num_heads,
        "num_query_groups": arch.num_kv_heads,
        "kv_channels": arch.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.norm_eps,
        "qk_layernorm": arch.qk_norm,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": arch.qkv_bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method": _leave,
        "output_layer_init_method": _leave,
        "embedding_init_method": _leave,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "context_parallel_size": parallel.context,
        "sequence_parallel": parallel.sequence and parallel.tensor > 1,
        # Micro-batches are packed to a token budget, so their lengths differ.
        "variable_seq_lengths": parallel.pipeline > 1,
        "moe_token_dispatcher_type": "alltoall",  # the default refuses that, experts or not
        "bf16": precision == "bf16",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "apply_rope_fusion": engine_layers,
        # Asked here and not of `machine`, which is looked at before a rank has chosen its GPU.
        "bias_activation_fusion": machine.activation_fusion and usable(compat.device()),
        "gradient_accumulation_fusion": machine.gradient_accumulation_fusion,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "calculate_per_token_loss": True,
        **fp8_options(fp8),
        **_interleaving(parallel),
        **recompute_options(arch, parallel, fp8, grouped=engine_layers),
        **moe_options(arch, parallel, precision),
    }
    own = dict(family_of(arch).options(arch))
    if own.get("activation_func", F.silu) is not F.silu:  # the fused kernels are SwiGLU's
        own["bias_activation_fusion"] = False
    return TransformerConfig(**(common | own))


def _leave(weight: torch.Tensor) -> None:
    """An init_method that does nothing: `draw_weights` draws the weights, alike at every layout."""


def _interleaving(parallel: ParallelConfig) -> dict[str, Any]:
    if parallel.virtual_pipeline == 1:
        return {}
    return {
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline,
        # Sends and receives one by one: between two stages, which are each other's next and previous, a
        # batch of them would pair a forward send with a backward receive.
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
    }


def response_loss(
    model: PackedGPTModel,
    hidden: torch.Tensor,
    predict_index: torch.Tensor,
    response_tokens: torch.Tensor,
    top_k_ids: torch.Tensor | None,
    token_loss: TokenLoss,
    loss_weights: torch.Tensor,
    *,
    rows: int | None = None,
) -> SummedLoss:
    """The weighted sum of a loss of each response token, on the last pipeline stage.

    hidden: what `model` returned. predict_index, response_tokens: int64 [R] (R may be 0): the position whose
    hidden state predicts each token, and the token. top_k_ids: int64 [R, k], more tokens that the loss reads
    log-probs of. The rest as of `vocab_parallel_loss`. All tensor parallel ranks must call.
    """
    return vocab_parallel_loss(
        _predicting_states(model, hidden, predict_index),
        model.output_weight(),
        response_tokens,
        top_k_ids,
        token_loss,
        loss_weights,
        vocab_size=model.arch.vocab_size,
        group=parallel_state.get_tensor_model_parallel_group(),
        rows=rows,
        grad_ready=model.output_grad_ready,
    )


@torch.no_grad()
def response_top_k(
    model: PackedGPTModel,
    hidden: torch.Tensor,
    predict_index: torch.Tensor,
    response_tokens: torch.Tensor,
    k: int,
    tokenless: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ResponseLogProbs]:
    """The `k` likeliest tokens at each response token's place, likeliest first, int64 [R, k] (k may be 0),
    and log-probs of the token and of these; constants, on the last pipeline stage.

    Arguments as of `response_loss`; `tokenless` as of `vocab_parallel_top_k`.
    """
    return vocab_parallel_top_k(
        _predicting_states(model, hidden, predict_index),
        model.output_weight(),
        response_tokens,
        k,
        tokenless,
        vocab_size=model.arch.vocab_size,
        group=parallel_state.get_tensor_model_parallel_group(),
    )


def _predicting_states(
    model: PackedGPTModel, hidden: torch.Tensor, predict_index: torch.Tensor
) -> torch.Tensor:
    """The hidden states that predict a response token, on every tensor parallel rank: [R, h]."""
    group = parallel_state.get_tensor_model_parallel_group()
    index = predict_index.to(hidden.device, non_blocking=True)
    if model.config.sequence_parallel:
        # The backward of this gather sums what each rank's slice of the vocabulary contributes.
        whole: torch.Tensor = gather_from_sequence_parallel_region(hidden, group=group)
        return whole.squeeze(1).index_select(0, index)
    own = hidden.squeeze(1).index_select(0, index)
    chosen: torch.Tensor = copy_to_tensor_model_parallel_region(own, group=group)
    return chosen
