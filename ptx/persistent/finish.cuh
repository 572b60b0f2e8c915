// What becomes of the sums of a product: bias, norm, rotation and cache, gate, residual, choice of the
// next token. Two warps do nothing else: what a row needs besides its sum they have ready before it, and
// the others go on to the next step meanwhile.
#pragma once
#include "../epilogues.cuh"
#include "../formats/all.cuh"
#include "stream.cuh"

namespace persistent {

// This thread's number among those that finish.
__device__ __forceinline__ uint32_t finisher() { return thread_index() - FINISHING * 32; }

__device__ __forceinline__ uint32_t unit_columns(uint32_t format) {
    switch (format) {
        case 0: return gemv::F32::UNIT_COLUMNS;
        case 1: return gemv::F16::UNIT_COLUMNS;
        case 30: return gemv::BF16::UNIT_COLUMNS;
        default: return gemv::IntegerStage::UNIT_COLUMNS;
    }
}

__device__ __forceinline__ float value_any(uint32_t format, const uint8_t* unit, int row, int column, uint32_t n) {
    switch (format) {
#define CASE(ID, F) \
    case ID: return gemv::F::value(unit, row, column, n);
        EVERY_FORMAT(CASE)
#undef CASE
    }
    return 0.f;
}

// Posts v, element r of a vector of `rows`, times `gain`, and the sum of squares of its tile; all lanes of a warp,
// those without an element (`there` false) too. Tiles begin at lanes 0 and 16.
__device__ __forceinline__ void publish(uint32_t* mail, uint32_t rows, uint32_t r, float v, float gain, bool there, Tag tag) {
    if (there) post(mail, r, v * gain, tag);
    float square = there ? v * v : 0.f;
#pragma unroll
    for (int o = 8; o > 0; o >>= 1) square += __shfl_xor_sync(~0u, square, o);
    if (there && r % ROWS == 0) post(mail + squares_of(rows), r / ROWS, square, tag);
}

// The row of the k-th sum of this block's tiles.
__device__ __forceinline__ uint32_t row_of(uint32_t k) { return item_of(k / ROWS) * ROWS + k % ROWS; }

// y[i] = scale · table[token, i], rows of y shared out as the projections' are: a thread that finishes a row
// adds it to what it wrote itself.
__device__ __forceinline__ void embed(const Instruction& step) {
    const uint32_t columns = static_cast<uint32_t>(step.columns), token = board().token;
    const uint32_t items = (columns + ROWS - 1) / ROWS;
    const uint32_t end = count_of(items) * ROWS;
    const Tag tag = tag_of(step.y_tag, board().epoch);
    const uint32_t format = static_cast<uint32_t>(step.format[0]);
    const uint32_t unit_length = unit_columns(format);
    for (uint32_t k = finisher(); k - finisher() % 32 < end; k += FINISHERS) {
        const uint32_t i = row_of(k);
        const bool there = k < end && i < columns;
        float v = 0.f, gain = 1.f;
        if (there) {
            const uint32_t unit = i / unit_length;
            const uint8_t* p = step.weight[0] + token / ROWS * step.tile_bytes[0] + unit * step.unit_bytes[0];
            const uint32_t n = unit + 1 == units_of(step) ? static_cast<uint32_t>(step.tail) : unit_length;
            v = __fmul_rn(value_any(format, p, token % ROWS, i % unit_length, n), as_float(step.magnitude));
            if (step.gain != nullptr) gain = __ldg(step.gain + i);
            step.y[i] = v;
        }
        publish(step.y_mail, columns, i, v, gain, there, tag);
    }
}

// What is ready before the sums are: all that stands between the last sum and a post is time that every
// block of the device waits.
struct Step {
    const Instruction& step;
    uint32_t begin, end;  // tiles
    uint32_t at_once, parts;
    Tag tag;
    uint32_t half;   // of the sums, where the first batch is
    uint32_t index;  // of the step
    bool notes;

    __device__ __forceinline__ Step(uint32_t i, uint32_t r)
        : step(board().rows[r]), begin(board().tasks[r].begin), end(board().tasks[r].end), tag(tag_of(step.y_tag, board().epoch)), half(board().work[r][0].half), index(i) {
        const Shape shape(step.units);
        at_once = shape.at_once, parts = shape.parts;
        notes = board().launch.trace != nullptr && finisher() == 0;
    }

    // The sums of tiles base .. are there, in this half.
    __device__ __forceinline__ void wait(uint32_t base, uint32_t now) const {
        sync_sums(now);
        if (notes && base == begin) note(index, FIRST, cycles());
    }
    __device__ __forceinline__ const float* sums(uint32_t which) const { return Memory().half(which); }
    __device__ __forceinline__ uint32_t count(uint32_t base) const { return min(at_once, end - base); }

    // 1 / rms of the input, from its sums of squares; all lanes of the warp, each warp for itself.
    __device__ __forceinline__ float norm() const {
        const uint32_t columns = static_cast<uint32_t>(step.columns), tiles = (columns + ROWS - 1) / ROWS;
        const uint32_t* const mail = step.x + squares_of(columns);
        const Tag x_tag = tag_of(step.x_tag, board().epoch);
        // One word first, so that those who wait leave the L2 to those who work.
        await(mail + tiles - 1, x_tag);
        constexpr uint32_t EACH = 8;  // words that a lane asks for at once: a look costs a round trip
        float sum = 0.f;
        for (uint32_t t = finisher() % 32; t < tiles; t += 32 * EACH) {
            uint32_t w[EACH], wrong;
            do {
                wrong = 0;
#pragma unroll
                for (uint32_t k = 0; k < EACH; k++) w[k] = t + 32 * k < tiles ? peek(mail + t + 32 * k) : x_tag.value;
#pragma unroll
                for (uint32_t k = 0; k < EACH; k++) wrong |= w[k] ^ x_tag.value;
            } while ((wrong & x_tag.mask) != 0);
#pragma unroll
            for (uint32_t k = 0; k < EACH; k++) sum += opened(w[k], x_tag);
        }
        return rsqrtf(fmaf(warp_sum(sum), __frcp_rn(static_cast<float>(columns)), as_float(step.eps)));
    }
};

__device__ __forceinline__ float zero(float) { return 0.f; }
__device__ __forceinline__ float2 zero(float2) { return make_float2(0.f, 0.f); }
__device__ __forceinline__ float add(float a, float b) { return a + b; }
__device__ __forceinline__ float2 add(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }

// A row's `parts` partial sums (or those of two rows) from `p` on, added as a tree.
template <class T>
__device__ __forceinline__ T total(const float* p, uint32_t parts) {
    auto part = [&](uint32_t q) { return q < parts ? *reinterpret_cast<const T*>(p + q * ROWS) : zero(T()); };
    T s[4];
#pragma unroll
    for (int q = 0; q < 4; q++) s[q] = add(add(part(q), part(q + 4)), add(part(q + 8), part(q + 12)));
    return add(add(s[0], s[1]), add(s[2], s[3]));
}

// y = sums + bias + residual.
__device__ __forceinline__ void finish_project(const Step& s) {
    const Instruction& step = s.step;
    const uint32_t rows = static_cast<uint32_t>(step.rows[0]), parts = s.parts;
    const Tag tag = s.tag;
    const float* const residual = step.residual;
    const float* const bias = step.bias[0];
    const float* const gain = step.gain;
    uint32_t* const mail = step.y_mail;
    float* const y = step.y;
    uint32_t half = s.half;
    for (uint32_t base = s.begin; base < s.end; base += s.at_once) {
        const uint32_t count = s.count(base) * ROWS;
        uint32_t i = finisher(), r = row_of(base * ROWS + i);
        float a, b, g;
        bool there;
        auto carried = [&] {
            there = i < count && r < rows;
            a = there && residual != nullptr ? __ldcg(residual + r) : 0.f;
            b = there && bias != nullptr ? __ldg(bias + r) : 0.f;
            g = there && gain != nullptr ? __ldg(gain + r) : 1.f;
        };
        carried();
        const float* p = s.sums(half) + i / ROWS * parts * ROWS + i % ROWS;
        s.wait(base, half);
        while (i - finisher() % 32 < count) {
            const float v = (there ? total<float>(p, parts) : 0.f) + b + a;
            publish(mail, rows, r, v, g, there, tag);
            if (there) y[r] = v;
            i += FINISHERS, r += FINISHERS * gridDim.x, p += FINISHERS * parts;
            carried();
        }
        half ^= 1;
    }
}

// The logits; keeps the best of this thread's.
__device__ __forceinline__ void finish_head(const Step& s) {
    const Instruction& step = s.step;
    const uint32_t rows = static_cast<uint32_t>(step.rows[0]), parts = s.parts;
    const float* const bias = step.bias[0];
    float* const y = step.y;
    const float scale = s.norm();
    Candidate best = no_candidate();
    uint32_t half = s.half;
    for (uint32_t base = s.begin; base < s.end; base += s.at_once) {
        const float* p = s.sums(half) + finisher() / ROWS * parts * ROWS + finisher() % ROWS;
        s.wait(base, half);
        for (uint32_t i = finisher(); i < s.count(base) * ROWS; i += FINISHERS, p += FINISHERS * parts) {
            const uint32_t r = row_of(base * ROWS + i);
            if (r >= rows) break;
            const float v = total<float>(p, parts) * scale + (bias != nullptr ? __ldg(bias + r) : 0.f);
            best = consider(best, v, r);
            y[r] = v;
        }
        half ^= 1;
    }
    board().best[finisher()] = best;
}

// y = silu(gate) · up.
__device__ __forceinline__ void finish_gate_up(const Step& s) {
    const Instruction& step = s.step;
    const uint32_t rows = static_cast<uint32_t>(step.rows[0]), parts = s.parts;
    const Tag tag = s.tag;
    const float* const bias[2] = {step.bias[0], step.bias[1]};
    uint32_t* const mail = step.y_mail;
    float* const y = step.y;
    const float scale = s.norm();
    uint32_t half = s.half;
    for (uint32_t base = s.begin; base < s.end; base += s.at_once) {
        const uint32_t count = s.count(base) / 2 * ROWS;
        const float* p = s.sums(half) + finisher() / ROWS * 2 * parts * ROWS + finisher() % ROWS;
        s.wait(base, half);
        for (uint32_t i = finisher(); i < count; i += FINISHERS, p += 2 * FINISHERS * parts) {
            const uint32_t r = row_of(base / 2 * ROWS + i);
            if (r >= rows) break;
            float g = total<float>(p, parts) * scale, u = total<float>(p + parts * ROWS, parts) * scale;
            if (bias[0] != nullptr) g += __ldg(bias[0] + r);
            if (bias[1] != nullptr) u += __ldg(bias[1] + r);
            const float v = __fdividef(g, 1.f + expf(-g)) * u;
            post(mail, r, v, tag);
            y[r] = v;
        }
        half ^= 1;
    }
}

// Queries, keys and values: bias, rotation, cache. A thread has two rows, which are turned together.
struct Pair {
    uint32_t matrix, base, e0, e1;  // the head's first row; elements
    bool inside, rotates;
    float cos, sin;
    float bias[2];

    __device__ __forceinline__ Pair(const Instruction& step, uint32_t at) {
        uint32_t tile = at / ROWS;
        matrix = matrix_of(step, tile);
        const uint32_t r = tile * ROWS + at % ROWS;
        inside = r < static_cast<uint32_t>(step.rows[matrix != 0]);
        // A head's size is a power of two.
        const uint32_t e = r & (static_cast<uint32_t>(step.head_dim) - 1), half = static_cast<uint32_t>(step.half_rotary);
        base = r - e;
        const uint32_t pair = e / 2;
        e0 = e, e1 = e + 1;
        rotates = inside && matrix != 2 && e < 2 * half;
        if (step.halves != 0 && rotates) e0 = pair, e1 = pair + half;
        cos = 1.f, sin = 0.f, bias[0] = bias[1] = 0.f;
        const float* b = step.bias[matrix];
        if (inside && b != nullptr) bias[0] = __ldg(b + base + e0), bias[1] = __ldg(b + base + e1);
        if (!rotates) return;
        // One f32 rounding for the angle, as the reference has it.
        sin_cos(static_cast<float>(board().position) * __ldg(step.freqs + pair), sin, cos);
        cos *= as_float(step.magnitude), sin *= as_float(step.magnitude);
    }
};

__device__ __forceinline__ void finish_qkv(const Step& s) {
    const Instruction& step = s.step;
    const Tag tag = s.tag;
    const uint32_t parts = s.parts;
    const float scale = s.norm();
    uint32_t half = s.half;
    for (uint32_t base = s.begin; base < s.end; base += s.at_once) {
        bool waited = false;
        const uint32_t count = s.count(base) * (ROWS / 2);
        for (uint32_t i = finisher(); i < count || !waited; i += FINISHERS) {
            const Pair w(step, min(base * ROWS + 2 * i, s.end * ROWS - 2));  // of the block's rows
            const float* p = s.sums(half) + i / (ROWS / 2) * parts * ROWS + 2 * i % ROWS;
            // Where it goes: as words, and as f32 or, in the cache, as f16.
            uint32_t* const mail = w.matrix == 0 ? step.y_mail : w.matrix == 1 ? step.k_mail : step.v_mail;
            float* const y = step.y + w.base;
            const uint64_t row = static_cast<uint64_t>(w.base) * static_cast<uint32_t>(step.capacity) +
                                 board().position * static_cast<uint32_t>(step.head_dim);
            __half* const cache = static_cast<__half*>(w.matrix == 2 ? step.values : step.keys) + row;
            if (!waited) {
                s.wait(base, half);
                waited = true;
            }
            if (i >= count || !w.inside) continue;
            const float2 ab = total<float2>(p, parts);
            float a = fmaf(ab.x, scale, w.bias[0]), b = fmaf(ab.y, scale, w.bias[1]);
            if (w.rotates) {
                const float x = a;
                a = x * w.cos - b * w.sin;
                b = x * w.sin + b * w.cos;
            }
            const __half ha = __float2half_rn(a), hb = __float2half_rn(b);
            if (w.matrix != 0) a = __half2float(ha), b = __half2float(hb);
            post(mail, w.base + w.e0, a, tag);
            post(mail, w.base + w.e1, b, tag);
            if (w.matrix == 0) y[w.e0] = a, y[w.e1] = b;
            else cache[w.e0] = ha, cache[w.e1] = hb;
        }
        half ^= 1;
    }
}

// The steps of this launch, `count` of them.
__device__ __forceinline__ void finish_all(uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        const uint32_t r = wait_row(i);
        const uint32_t kind = static_cast<uint32_t>(board().rows[r].kind);
        if (kind == EMBED) {
            embed(board().rows[r]);
        } else if (kind != ATTENTION && board().tasks[r].begin < board().tasks[r].end) {
            const Step step(i, r);
            if (kind == PROJECT) finish_project(step);
            else if (kind == QKV) finish_qkv(step);
            else if (kind == GATE_UP) finish_gate_up(step);
            else finish_head(step);
            if (step.notes) note_end(i);
        }
        // Which row it was is found again: there is no register to keep it in.
        uint32_t done = i;
        asm volatile("" : "+r"(done));
        release_row(done);
    }
}

}  // namespace persistent
