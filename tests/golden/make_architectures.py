"""Small random models of every architecture, and their logits by transformers' own modelling code.

    pip install torch transformers==5.23.0 gguf==0.19.0
    python tests/golden/make_architectures.py [NAME …]

writes into architectures/ beside itself, per model
  NAME.gguf        seeded random weights, matrices in f16, vectors in f32: what transformers computes
                   with, converted as llama.cpp's converter does
  NAME.json        a forced text of random ids and the logits of all ids after every position, in
                   float32 with eager attention, in the form that `decode-bench verify --golden` reads

Windows, original contexts and caps are small, so that the text goes far beyond each of them. The
weights are so large that attention is not uniform and the experts' choices differ.
"""

import json
import math
import pathlib
import sys

import gguf
import numpy as np
import torch
import transformers
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

HERE = pathlib.Path(__file__).parent / "architectures"
VOCAB, POSITIONS = 64, 48
SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    attn_implementation="eager",
)
# Heads of another size than hidden / heads.
WIDE = dict(SMALL, head_dim=32)
GEMMA = dict(SMALL, hidden_size=32, intermediate_size=64, head_dim=16, sliding_window=10)


def rope(kind="default", theta=10_000.0, **more):
    return dict(rope_type=kind, rope_theta=theta, **more)


def stretched(kind, **more):
    return rope(kind, factor=4.0, original_max_position_embeddings=16, **more)


def phi3():
    short = [1.0 + 0.1 * i for i in range(4)]
    long = [1.5 + 0.9 * i for i in range(4)]
    scaling = dict(short_factor=short, long_factor=long, original_max_position_embeddings=24)
    parameters = dict(rope("longrope", partial_rotary_factor=0.5), **scaling)
    more = dict(original_max_position_embeddings=24, sliding_window=12)
    return Phi3Config(**SMALL, rope_parameters=parameters, **more)


# Name of the files, architecture in GGUF, configuration, positions of the text.
MODELS = [
    ("llama-3", "llama", lambda: LlamaConfig(
        **SMALL,
        rope_parameters=stretched("llama3", low_freq_factor=1.0, high_freq_factor=4.0),
    ), POSITIONS),
    ("llama-yarn", "llama", lambda: LlamaConfig(
        **SMALL, rope_parameters=stretched("yarn"), attention_bias=True, mlp_bias=True,
    ), POSITIONS),
    ("mistral-nemo", "llama", lambda: MistralConfig(**WIDE, sliding_window=None), POSITIONS),
    ("qwen2", "qwen2", lambda: Qwen2Config(**SMALL, tie_word_embeddings=True), POSITIONS),
    ("qwen3", "qwen3", lambda: Qwen3Config(
        **WIDE, rope_parameters=rope(theta=1e6), tie_word_embeddings=True,
    ), POSITIONS),
    ("gemma2", "gemma2", lambda: Gemma2Config(
        **GEMMA,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=8.0,
    ), POSITIONS),
    # Six layers of the 5:1 pattern and one more.
    ("gemma3", "gemma3", lambda: Gemma3TextConfig(
        **dict(GEMMA, num_hidden_layers=7),
        query_pre_attn_scalar=16,
        rope_parameters=dict(
            full_attention=rope("linear", theta=1e6, factor=8.0),
            sliding_attention=rope(),
        ),
    ), POSITIONS),
    # The divisors are chosen by the length of the context: two texts of one model.
    ("phi3-short", "phi3", phi3, 24),
    ("phi3-long", "phi3", phi3, POSITIONS),
    ("mixtral", "llama", lambda: MixtralConfig(
        **dict(SMALL, intermediate_size=48),
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=None,
    ), POSITIONS),
    ("qwen3moe", "qwen3moe", lambda: Qwen3MoeConfig(
        **SMALL,
        head_dim=16,
        num_experts=6,
        num_experts_per_tok=3,
        # Experts begin within a tile of 16 rows.
        moe_intermediate_size=40,
        norm_topk_prob=True,
    ), POSITIONS),
]

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
# With a norm after each block, the names of the norms mean something else.
POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def randomise(model, gemma):
    """Weights that f16 holds exactly, of a size that makes every part of the model matter."""
    for name, p in model.named_parameters():
        random = torch.randn(p.shape)
        if name.endswith("norm.weight"):
            # Gemma multiplies with one more than the weight.
            p.data = 0.25 * random + (0.0 if gemma else 1.0)
        elif name.endswith("bias"):
            p.data = 0.3 * random
        elif "embed_tokens" in name:
            p.data = random if not gemma else 0.5 * random
        else:
            p.data = random * 1.3 / math.sqrt(p.shape[-1])
        p.data = p.data.half().float()


def adjacent(w, heads):
    """Rows of a head in the order that rotates neighbours, as the converter lays them for llama."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def tensors(model, arch, c):
    """Names in GGUF and values."""
    gemma = arch.startswith("gemma")
    names = dict(LAYER, **POST_NORMS) if gemma else LAYER
    for name, p in model.named_parameters():
        w = p.data.numpy()
        if not name.startswith("model.layers."):
            stem, kind = name.rsplit(".", 1)
            out = f"{OUTER[stem]}.{kind}"
        elif name.endswith("experts.gate_up_proj"):
            layer = name.split(".")[2]
            half = w.shape[1] // 2
            yield f"blk.{layer}.ffn_gate_exps.weight", w[:, :half]
            yield f"blk.{layer}.ffn_up_exps.weight", w[:, half:]
            continue
        elif name.endswith("experts.down_proj"):
            out = f"blk.{name.split('.')[2]}.ffn_down_exps.weight"
        else:
            _, _, layer, rest = name.split(".", 3)
            stem, kind = rest.rsplit(".", 1)
            out = f"blk.{layer}.{names[stem]}.{kind}"
        if arch == "llama" and ".attn_q." in out:
            w = adjacent(w, c.num_attention_heads)
        if arch == "llama" and ".attn_k." in out:
            w = adjacent(w, c.num_key_value_heads)
        if gemma and out.endswith("norm.weight"):
            w = w + 1.0
        yield out, w
    if c.model_type == "phi3":
        for which in ["short", "long"]:
            factors = c.rope_parameters[f"{which}_factor"]
            yield f"rope_factors_{which}.weight", np.array(factors, dtype=np.float32)
    if c.rope_parameters.get("rope_type") == "llama3":
        n = c.hidden_size // c.num_attention_heads
        plain = 1.0 / c.rope_parameters["rope_theta"] ** (np.arange(0, n, 2) / n)
        yield "rope_freqs.weight", plain / model.model.rotary_emb.inv_freq.numpy()


def write(path, name, arch, model, c):
    w = gguf.GGUFWriter(path, arch)
    w.add_name(f"{name}, random weights")
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_vocab_size(c.vocab_size)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    if head_dim != c.hidden_size // c.num_attention_heads or arch.startswith("gemma"):
        w.add_key_length(head_dim)
        w.add_value_length(head_dim)
    r = c.rope_parameters
    if arch == "gemma3":
        r = r["full_attention"]
    w.add_rope_freq_base(r["rope_theta"])
    w.add_rope_dimension_count(int(head_dim * r.get("partial_rotary_factor", 1.0)))
    if r["rope_type"] in ["linear", "yarn"]:
        kind = gguf.RopeScalingType.LINEAR if r["rope_type"] == "linear" else gguf.RopeScalingType.YARN
        w.add_rope_scaling_type(kind)
        w.add_rope_scaling_factor(r["factor"])
    if r["rope_type"] in ["yarn", "longrope"]:
        w.add_rope_scaling_orig_ctx_len(r["original_max_position_embeddings"])
    if r["rope_type"] == "longrope":
        w.add_rope_scaling_attn_factors(float(model.model.rotary_emb.attention_scaling))
    if getattr(c, "sliding_window", None):
        w.add_sliding_window(c.sliding_window)
    if arch == "gemma2":
        w.add_attn_logit_softcapping(c.attn_logit_softcapping)
        w.add_final_logit_softcapping(c.final_logit_softcapping)
    experts = getattr(c, "num_local_experts", None) or getattr(c, "num_experts", None)
    if experts:
        w.add_expert_count(experts)
        w.add_expert_used_count(c.num_experts_per_tok)
    if arch == "qwen3moe":
        w.add_expert_feed_forward_length(c.moe_intermediate_size)
    for out, value in tensors(model, arch, c):
        # The router is stored in f32 as vectors are.
        small = value.ndim == 1 or "gate_inp" in out
        w.add_tensor(out, np.ascontiguousarray(value, dtype=np.float32 if small else np.float16))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def forced(model, positions):
    ids = torch.randint(0, VOCAB, (1, positions))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].double()
    order = logits.argsort(dim=1, descending=True)
    sums = logits.logsumexp(dim=1)
    nll = [float(sums[p] - logits[p, ids[0, p + 1]]) for p in range(positions - 1)]
    margin = float((logits.sort(dim=1).values[:, -1] - logits.sort(dim=1).values[:, -2]).min())
    spread = float(logits.std())
    print(f"  logits {spread:.2f} about their mean; least margin of a first choice {margin:.4f}")
    rounded = [[round(float(logits[p, i]), 6) for i in order[p]] for p in range(positions)]
    return dict(
        ids=ids[0].tolist(),
        top_ids=order.tolist(),
        top_logits=rounded,
        logsumexp=[round(float(x), 6) for x in sums],
        mean_nll=sum(nll) / len(nll),
    )


def main():
    HERE.mkdir(exist_ok=True)
    for name, arch, config, positions in MODELS:
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        print(name)
        # The texts of phi3 are of one model.
        torch.manual_seed(sum(name.split("-")[0].encode()))
        c = config()
        model = transformers.AutoModelForCausalLM.from_config(c, dtype=torch.float32).eval()
        randomise(model, arch.startswith("gemma"))
        file = name if arch != "phi3" else "phi3"
        write(HERE / f"{file}.gguf", file, arch, model, c)
        golden = dict(
            model=f"{file}.gguf",
            reference=f"transformers {transformers.__version__}, {type(model).__name__}, float32, eager",
            greedy=[],
            forced=forced(model, positions),
        )
        (HERE / f"{name}.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
