#!/usr/bin/env python3
"""Writes tests/golden/transformers/: small random models as folders of safetensors, and the logits
that the modelling code of `transformers` computes from them in float32.

A folder holds config.json, the weights as `save_pretrained` writes them, tokens.json (the text) and
logits.bin (float32, little-endian, [positions, vocab]). Weights are rounded to the stored type
before the logits are computed, so that both sides read the same numbers.

Run: python3 make_transformers_models.py [NAME …]   (needs torch, transformers; made with 5.23.0)
"""
import json
import pathlib
import shutil
import sys

import torch
import transformers as t

OUT = pathlib.Path(__file__).parent / "transformers"
POSITIONS = 96
COMMON = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=128, rms_norm_eps=1e-5, bos_token_id=1,
    eos_token_id=2, pad_token_id=0, attn_implementation="eager",
)
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=4.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=32)
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=4.0)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)


def longrope(pairs):
    return dict(rope_type="longrope", rope_theta=10000.0,
                short_factor=[1.0 + 0.1 * i for i in range(pairs)],
                long_factor=[1.0 + 0.9 * i for i in range(pairs)])


# name: configuration, stored type, most bytes of a shard
MODELS = {
    # Scaled embedding angles beyond the original 32 positions; two shards.
    "llama": (lambda: t.LlamaConfig(**COMMON, rope_parameters=LLAMA3), torch.float32, "40KB"),
    "llama-linear": (lambda: t.LlamaConfig(**COMMON, rope_parameters=LINEAR), torch.bfloat16, "1GB"),
    "llama-yarn": (lambda: t.LlamaConfig(**COMMON, rope_parameters=YARN), torch.bfloat16, "1GB"),
    # Heads that are wider than hidden_size / heads, biases in every projection, tied embeddings.
    "llama-biases": (
        lambda: t.LlamaConfig(**COMMON, head_dim=24, attention_bias=True, mlp_bias=True,
                              tie_word_embeddings=True), torch.float16, "1GB"),
    "qwen2": (lambda: t.Qwen2Config(**COMMON), torch.bfloat16, "1GB"),
    "mistral": (lambda: t.MistralConfig(**COMMON, head_dim=8, sliding_window=None),
                torch.float16, "1GB"),
    "mistral-window": (lambda: t.MistralConfig(**COMMON, head_dim=16, sliding_window=16),
                       torch.bfloat16, "1GB"),
    "qwen3": (lambda: t.Qwen3Config(**COMMON, head_dim=32), torch.bfloat16, "1GB"),
    "gemma2": (lambda: t.Gemma2Config(**COMMON, head_dim=16, query_pre_attn_scalar=16,
                                      sliding_window=16), torch.bfloat16, "1GB"),
    "gemma3": (lambda: t.Gemma3TextConfig(**{**COMMON, "num_hidden_layers": 7}, head_dim=16,
                                          query_pre_attn_scalar=16, sliding_window=16),
               torch.bfloat16, "1GB"),
    "phi3": (lambda: t.Phi3Config(**COMMON, rope_parameters=longrope(8),
                                  original_max_position_embeddings=32), torch.bfloat16, "1GB"),
    "mixtral": (lambda: t.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
                torch.bfloat16, "1GB"),
    "qwen3moe": (lambda: t.Qwen3MoeConfig(**COMMON, head_dim=16, num_experts=4, num_experts_per_tok=2,
                                          moe_intermediate_size=32, norm_topk_prob=True),
                 torch.bfloat16, "1GB"),
}


def randomise(model, dtype):
    generator = torch.Generator().manual_seed(20261122)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() >= 2:
                value = noise * (1.0 if "embed" in name else 1.5 / p.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                value = 0.3 * noise
            else:
                value = p + 0.2 * noise
            p.copy_(value.to(dtype).float())


def main():
    torch.set_num_threads(1)
    for name in sys.argv[1:] or MODELS:
        config, dtype, shard = MODELS[name]
        shutil.rmtree(OUT / name, ignore_errors=True)
        config = config()
        model = t.AutoModelForCausalLM.from_config(config).float().eval()
        randomise(model, dtype)
        tokens = [(7 * i * i + 3 * i + 1) % config.vocab_size for i in range(POSITIONS)]
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0].float()
        folder = OUT / name
        # The same weights, in the type that they were rounded to.
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
        (folder / "generation_config.json").unlink(missing_ok=True)
        (folder / "tokens.json").write_text(json.dumps(tokens) + "\n")
        (folder / "logits.bin").write_bytes(logits.numpy().astype("<f4").tobytes())
        print(name, sorted(p.name for p in folder.iterdir()), float(logits.std()))


if __name__ == "__main__":
    main()
