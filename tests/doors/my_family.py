"""A model family of one's own, Phi-3, in one file outside the package.

A recipe names it: `student: {model: ..., family: tests.doors.my_family:PHI3}`, with `allow_user_code: true`.
What Phi-3 has that Llama has not: one tensor for queries, keys and values, one for gate and up, a rotation of
a part of each head, and another epsilon.
"""

from __future__ import annotations

from megatron_lopd.families import (
    ENDS,
    SUPPORTED_OPTIONS,
    Architecture,
    ConfigJson,
    Family,
    Split,
    layer_rule,
    read_decoder,
)


def read(config: ConfigJson) -> Architecture:
    """What config.json leaves out has the defaults of transformers' Phi3Config."""
    return read_decoder(
        config,
        positions=4096,
        norm_eps=1e-5,
        grouped=False,
        partial_rotary=True,
        # One value each that this project can run; the file is refused, by key, for another.
        supported=SUPPORTED_OPTIONS | {"sliding_window": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    )


PHI3 = Family(
    name="phi3",  # model_type in config.json
    caption="Phi-3 with short context: fused query-key-value and gate-up tensors, partly rotary",
    read=read,
    # Megatron-Core's name below decoder.layers.N, Hugging Face's below model.layers.N, how ranks share it.
    rules=(
        *ENDS,
        layer_rule(
            "self_attention.linear_qkv.layer_norm_weight", ["input_layernorm.weight"], Split.REPLICATED
        ),
        layer_rule("self_attention.linear_qkv.weight", ["self_attn.qkv_proj.weight"], Split.QKV),
        layer_rule("self_attention.linear_proj.weight", ["self_attn.o_proj.weight"], Split.COLUMNS),
        layer_rule("mlp.linear_fc1.layer_norm_weight", ["post_attention_layernorm.weight"], Split.REPLICATED),
        layer_rule("mlp.linear_fc1.weight", ["mlp.gate_up_proj.weight"], Split.GATE_UP),
        layer_rule("mlp.linear_fc2.weight", ["mlp.down_proj.weight"], Split.COLUMNS),
    ),
)
