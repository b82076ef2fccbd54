"""Parameter lists of real models, for routes that need no weights."""

from __future__ import annotations

from fractions import Fraction

from rlhf_dist.reshard.groups import Cut


def llama(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int, tied: bool = False
) -> dict[str, Cut]:
    """A Llama's parameters and the dim that tensor parallelism cuts."""
    head = hidden // heads
    found = {"model.embed_tokens.weight": Cut((vocabulary, hidden), 0)}
    for i in range(layers):
        stage, at = Fraction(i, layers), f"model.layers.{i}."
        found |= {
            at + "self_attn.q_proj.weight": Cut((hidden, hidden), 0, stage),
            at + "self_attn.k_proj.weight": Cut((kv_heads * head, hidden), 0, stage),
            at + "self_attn.v_proj.weight": Cut((kv_heads * head, hidden), 0, stage),
            at + "self_attn.o_proj.weight": Cut((hidden, hidden), 1, stage),
            at + "mlp.gate_proj.weight": Cut((intermediate, hidden), 0, stage),
            at + "mlp.up_proj.weight": Cut((intermediate, hidden), 0, stage),
            at + "mlp.down_proj.weight": Cut((hidden, intermediate), 1, stage),
            at + "input_layernorm.weight": Cut((hidden,), None, stage),
            at + "post_attention_layernorm.weight": Cut((hidden,), None, stage),
        }
    last = Fraction(layers - 1, layers)
    found["model.norm.weight"] = Cut((hidden,), None, last)
    if not tied:
        found["lm_head.weight"] = Cut((vocabulary, hidden), 0, last)
    return found


LLAMA_70B = (80, 8192, 28672, 64, 8, 128256)
