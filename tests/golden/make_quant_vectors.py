"""Golden vectors of block decoding, from the GGUF reference (Python package gguf 0.19.0).

    pip install gguf==0.19.0 numpy
    python tests/golden/make_quant_vectors.py

writes beside itself
  quant_vectors.bin    per type: u32 type id, u32 blocks, the blocks, their f32 values; little-endian.
                       The scales of the first blocks are zeros, infinities, NaNs and subnormals;
                       MXFP4 has every exponent once.
  quant_digests.json   per type: SHA-256 over the SHA-256 of each chunk of CHUNK blocks, of the f32
                       values of BLOCKS blocks whose bytes are `stream` below.
Every NaN is written as 0x7fc00000.
"""

import hashlib
import json
import pathlib
import struct
import sys

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

HERE = pathlib.Path(__file__).parent
BLOCKS, CHUNK = 1_000_000, 20_000
SPECIAL = [0x0000, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0x7C01, 0x0001, 0x83FF, 0x7BFF, 0x3C00]
# The same of bfloat16, which are the upper halves of those of f32.
WIDE = [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0x0001, 0x807F, 0x7F7F, 0x3F80]

# Type, where its fields of two bytes stand in a block, blocks in quant_vectors.bin.
TYPES = [
    ("F32", [2], 64),
    ("F16", [0], 64),
    ("BF16", [0], 64),
    ("Q4_0", [0], 64),
    ("Q4_1", [0, 2], 64),
    ("Q5_0", [0], 64),
    ("Q5_1", [0, 2], 64),
    ("Q8_0", [0], 64),
    ("Q2_K", [80, 82], 24),
    ("Q3_K", [108], 24),
    ("Q4_K", [0, 2], 24),
    ("Q5_K", [0, 2], 24),
    ("Q6_K", [208], 24),
    ("IQ4_NL", [0], 64),
    ("IQ4_XS", [0], 24),
    ("MXFP4", [], 256),
]


def stream(seed, first, count):
    """Bytes first..first+count (multiples of 4) of the stream: word i is fmix32(i * phi + seed)."""
    x = np.arange(first // 4, (first + count) // 4, dtype=np.uint32)
    x = x * np.uint32(0x9E3779B9) + np.uint32(seed)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    return x.astype("<u4").view(np.uint8)


def values(blocks, kind):
    with np.errstate(all="ignore"):
        bits = np.ascontiguousarray(dequantize(blocks, kind)).view(np.uint32)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(nan, np.uint32(0x7FC00000), bits).astype("<u4").tobytes()


def main():
    vectors, digests = b"", {"blocks": BLOCKS, "chunk": CHUNK, "types": {}}
    for name, halves, count in TYPES:
        kind = GGMLQuantizationType[name]
        _, size = GGML_QUANT_SIZES[kind]
        blocks = stream(0xFFFF ^ kind, 0, count * size).copy().reshape(count, size)
        for i in range(2 * len(SPECIAL)):
            for which, at in enumerate(halves):
                # Second round: another special in the second field.
                specials = WIDE if name in ("F32", "BF16") else SPECIAL
                special = specials[(i + which * (3 * (i // len(SPECIAL)) + 1)) % len(SPECIAL)]
                blocks[i, at : at + 2] = np.frombuffer(struct.pack("<H", special), np.uint8)
            if name == "F32" and i >= len(SPECIAL):
                # Exactly zero, infinite, the smallest; the first round has other low bits.
                blocks[i, :2] = [1, 0] if special & 0x7FFF == 1 else [0, 0]
        if name == "MXFP4":
            blocks[:, 0] = np.arange(count)
        vectors += struct.pack("<II", kind, count) + blocks.tobytes() + values(blocks, kind)

        outer = hashlib.sha256()
        for first in range(0, BLOCKS, CHUNK):
            data = stream(kind, first * size, CHUNK * size).reshape(CHUNK, size)
            outer.update(hashlib.sha256(values(data, kind)).digest())
        digests["types"][name] = outer.hexdigest()
        print(name, outer.hexdigest(), file=sys.stderr)
    (HERE / "quant_vectors.bin").write_bytes(vectors)
    (HERE / "quant_digests.json").write_text(json.dumps(digests, indent=2) + "\n")


if __name__ == "__main__":
    main()
