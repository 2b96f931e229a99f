// The AdamW step on the CPU in one pass over memory, with moments in FP8 or BF16.
//
// The eager form makes some forty passes over a window, each a torch operation of its own. Here a block of
// 128 elements is decoded, stepped and encoded while it is in registers and the first-level cache, so a step
// costs what its arithmetic costs: two divisions and a square root an element weigh most.
//
// The bits are those of update.py, moments.py, counter_rng.py and formats.py. Hence every operation is written
// as it is defined there, -ffp-contract=off keeps products apart from sums, and nothing depends on how the
// work is split over threads. There are no intrinsics: loops of 128 without branches, which compilers turn
// into the widest vectors the machine has. Choices are ternaries on computed values for that reason.
//
// Decoding takes no table: a gather is slower than a shift and a blend. Nor is a subnormal FP32 number ever
// multiplied on purpose (the GPU's way of decoding), for this costs an x86 processor some 150 cycles.
//
// All functions return nothing and cannot fail; the caller has checked lengths, types and contiguity.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kBlock = 128;
constexpr int64_t kBlocksPerThread = 256;  // a thread is not worth starting for less
constexpr int32_t kMagnitude = 0x7FFFFFFF, kInfinity = 0x7F800000, kFractionMask = (1 << 27) - 1;
constexpr int kColumns = 8;

struct Factors {
    float kept, mean_gain, square_kept, square_gain, root_factor, eps, step_size;
};

// Noise of element i: words (first, second) before position `carry`, the next two from there on.
struct Noise {
    uint32_t first, second, next_first, next_second;
    int64_t carry;
};

// One step's sums and extremes, as statistics.py lays them out.
struct Counts {
    int64_t columns[kColumns] = {0, 0, 0, 0, 0, 255, -1, 0};

    void add(const int64_t* other) {
        for (int i = 0; i < 5; ++i) columns[i] += other[i];
        columns[5] = std::min(columns[5], other[5]);
        columns[6] = std::max(columns[6], other[6]);
        columns[7] = std::max(columns[7], other[7]);
    }
};

inline float as_float(int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline int32_t as_bits(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float from_bf16(uint16_t half) { return as_float(static_cast<int32_t>(static_cast<uint32_t>(half) << 16)); }

// Nearest, ties to even; NaN stays NaN.
inline uint16_t to_bf16(float value) {
    const uint32_t bits = static_cast<uint32_t>(as_bits(value));
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>((bits & kMagnitude) > static_cast<uint32_t>(kInfinity) ? 0x7FC0 : rounded);
}

inline uint32_t random_word(uint32_t position, uint32_t first, uint32_t second) {
    uint32_t bits = position + first;
    bits = (bits ^ (bits >> 16)) * 0x7FEB352Du + second;
    bits = (bits ^ (bits >> 15)) * 0x846CA68Bu;
    return bits ^ (bits >> 16);
}

// An eight-bit format as formats.py has it: three mantissa bits, no infinity, the code after `largest` NaN.
template <int kBias, int32_t kLargest>
struct Format {
    static constexpr int32_t kRebias = (127 - kBias) << 23, kNormal = (128 - kBias) << 23;

    // Magnitude codes to values.
    static inline float decode(int32_t code) {
        constexpr float quantum = 1.0f / (1 << (kBias + 2));
        const float small = static_cast<float>(code) * quantum;
        const float value = as_float(code < 8 ? as_bits(small) : (code << 20) + kRebias);
        return as_float(code > kLargest ? 0x7FC00000 : as_bits(value));
    }

    // Codes of magnitude bits, rounded up where the noise says so.
    static inline int32_t encode(int32_t magnitude, uint32_t noise) {
        constexpr float unit = static_cast<float>(1ll << (27 + kBias + 2));
        const int32_t threshold = static_cast<int32_t>(noise) & kFractionMask;
        const float small = as_float(std::min(magnitude, kNormal));
        const int32_t fixed = (static_cast<int32_t>(small * unit) + threshold) >> 27;
        const int32_t normal = (magnitude - kRebias + (threshold >> 7)) >> 20;
        const int32_t code = std::min(std::max(normal, fixed), kLargest);
        return magnitude >= kInfinity ? kLargest + 1 : code;
    }
};

using Root = Format<15, 0xFE>;   // UE5M3
using Ratio = Format<7, 0x7E>;   // E4M3, of 2^4 m / sqrt(v)

// update.update on one element; `mean` and `square` become the new moments. Returns m / d.
inline float update(float& value, float grad, float& mean, float& square, float& root, const Factors& f) {
    mean = mean + (grad - mean) * f.mean_gain;
    square = square * f.square_kept + (grad * f.square_gain) * grad;
    root = std::sqrt(square);
    const float quotient = mean / (root * f.root_factor + f.eps);
    value = value * f.kept - quotient * f.step_size;
    return quotient;
}

// What a block's step needs to keep for counting.
struct Seen {
    float quotient[kBlock], before[kBlock], exact[kBlock], stored[kBlock];
};

void count_block(const Seen& seen, const uint8_t* means, const uint8_t* roots, int scale, int64_t size, Counts& to) {
    int32_t zeros = 0, lost = 0, saturated = 0, stalled = 0, nans = 0, most = 0;
    for (int64_t i = 0; i < size; ++i) {
        const int32_t code = roots[i], is_zero = code == 0, is_nan = code == 0xFF;
        const int32_t is_kept = seen.stored[i] == seen.before[i], is_new = seen.exact[i] != seen.before[i];
        zeros += is_zero;
        lost += is_zero & (seen.exact[i] > 0);
        saturated += (means[i] & 0x7F) == 0x7E;
        stalled += is_kept & is_new & (is_nan ^ 1);
        nans += is_nan;
        most = std::max(most, as_bits(seen.quotient[i]) & kMagnitude);
    }
    const bool is_used = zeros < size;
    const int64_t found[kColumns] = {zeros, lost, saturated, stalled, nans, is_used ? scale : 255,
                                     is_used ? scale : -1, most};
    to.add(found);
}

// Noise that rounds up a little more often; see `lifted` in moments.py.
inline uint32_t lifted(uint32_t noise) {
    const uint32_t threshold = noise & kFractionMask, leading = threshold >> 15;
    return threshold + ((leading * (4095 - leading) * 3) >> 4);
}

// One whole block. `words` holds the noise of its elements.
template <bool kCounted>
void step_fp8_block(float* __restrict value, const float* __restrict grad, uint8_t* __restrict means,
                    uint8_t* __restrict roots, uint8_t* __restrict scale, const uint32_t* __restrict words,
                    const Factors& f, int32_t smallest_scale, Seen* __restrict seen) {
    // Codes pass through 32 bits of their own, so that the loops below work on one width and stay in registers.
    alignas(64) float mean[kBlock], root[kBlock];
    alignas(64) int32_t root_codes[kBlock], ratio_codes[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) root_codes[i] = roots[i];
    for (int64_t i = 0; i < kBlock; ++i) ratio_codes[i] = means[i];
    const float old_power = as_float(static_cast<int32_t>(*scale) << 23);
    int32_t largest = 0;
    for (int64_t i = 0; i < kBlock; ++i) {
        const float old_root = Root::decode(root_codes[i]) * old_power;
        const int32_t ratio = ratio_codes[i];
        const float magnitude = Ratio::decode(ratio & 0x7F) * old_root * 0.0625f;
        const float before = old_root * old_root;
        float new_mean = as_float(as_bits(magnitude) ^ ((ratio & 0x80) << 24));
        float square = before, new_root;
        const float quotient = update(value[i], grad[i], new_mean, square, new_root, f);
        mean[i] = new_mean;
        root[i] = new_root;
        largest = std::max(largest, as_bits(new_root) & kMagnitude);
        if (kCounted) {
            seen->quotient[i] = quotient;
            seen->before[i] = before;
            seen->exact[i] = square;
        }
    }
    const int32_t exponent = (std::min(largest, kInfinity) + 0x1FFFFF) >> 23;
    const int32_t biased = std::max(exponent - 16, smallest_scale);
    const float inverse = as_float((254 - biased) << 23), power = as_float((biased - 4) << 23);
    for (int64_t i = 0; i < kBlock; ++i) {
        const uint32_t noise = words[i];
        const int32_t code = Root::encode(as_bits(root[i] * inverse) & kMagnitude, lifted(noise));
        const float unit = Root::decode(code) * power;
        const int32_t ratio = as_bits(mean[i] / unit);  // anything where the root is zero
        const int32_t ratio_code = Ratio::encode(ratio & kMagnitude, noise * 741103597u) | ((ratio >> 24) & 0x80);
        root_codes[i] = code;
        ratio_codes[i] = code == 0 ? 0 : ratio_code;
        if (kCounted) seen->stored[i] = (unit * 16.0f) * (unit * 16.0f);
    }
    for (int64_t i = 0; i < kBlock; ++i) roots[i] = static_cast<uint8_t>(root_codes[i]);
    for (int64_t i = 0; i < kBlock; ++i) means[i] = static_cast<uint8_t>(ratio_codes[i]);
    *scale = static_cast<uint8_t>(biased);
}

struct Fp8Step {
    float* value;
    const void* grad;
    bool is_half;
    uint8_t *means, *roots, *scales;
    uint16_t* working;
    int64_t count;
    Factors factors;
    Noise noise;
    int32_t smallest_scale;
    bool is_counted;

    void words_of(int64_t start, uint32_t* words) const {
        if (start + kBlock <= noise.carry || start >= noise.carry) {
            const bool is_after = start >= noise.carry;
            const uint32_t first = is_after ? noise.next_first : noise.first;
            const uint32_t second = is_after ? noise.next_second : noise.second;
            const uint32_t base = static_cast<uint32_t>(start);
            for (uint32_t i = 0; i < kBlock; ++i) words[i] = random_word(base + i, first, second);
            return;
        }
        for (int64_t i = 0; i < kBlock; ++i) {
            const bool is_after = start + i >= noise.carry;
            words[i] = random_word(static_cast<uint32_t>(start + i), is_after ? noise.next_first : noise.first,
                                   is_after ? noise.next_second : noise.second);
        }
    }

    void run(int64_t first_block, int64_t last_block, Counts& counts) const {
        alignas(64) float values[kBlock], grads[kBlock];
        alignas(64) uint32_t words[kBlock];
        Seen seen;
        for (int64_t block = first_block; block < last_block; ++block) {
            const int64_t start = block * kBlock, size = std::min(kBlock, count - start);
            float* at = value + start;
            if (size < kBlock) {
                std::memset(values, 0, sizeof values);
                std::memcpy(values, at, size * sizeof(float));
                at = values;
            }
            const float* step_grad = static_cast<const float*>(grad) + start;
            if (is_half || size < kBlock) {
                std::memset(grads, 0, sizeof grads);
                const uint16_t* half = static_cast<const uint16_t*>(grad) + start;
                if (!is_half)
                    std::memcpy(grads, step_grad, size * sizeof(float));
                else if (size == kBlock)
                    for (int64_t i = 0; i < kBlock; ++i) grads[i] = from_bf16(half[i]);
                else
                    for (int64_t i = 0; i < size; ++i) grads[i] = from_bf16(half[i]);
                step_grad = grads;
            }
            words_of(start, words);
            uint8_t *mean = means + start, *root = roots + start, *scale = scales + block;
            if (is_counted) {
                step_fp8_block<true>(at, step_grad, mean, root, scale, words, factors, smallest_scale, &seen);
                count_block(seen, mean, root, *scale, size, counts);
            } else {
                step_fp8_block<false>(at, step_grad, mean, root, scale, words, factors, smallest_scale, nullptr);
            }
            if (size < kBlock) std::memcpy(value + start, values, size * sizeof(float));
            if (working)
                for (int64_t i = 0; i < size; ++i) working[start + i] = to_bf16(at[i]);
        }
    }
};

struct Bf16Step {
    float* value;
    const void* grad;
    bool is_half;
    uint16_t *means, *squares, *working;
    int64_t count;
    Factors factors;

    void run(int64_t first_block, int64_t last_block, Counts&) const {
        const int64_t start = first_block * kBlock, stop = std::min(count, last_block * kBlock);
        is_half ? loop<true>(start, stop) : loop<false>(start, stop);
    }

    template <bool kHalf>
    void loop(int64_t start, int64_t stop) const {
        float* __restrict w = value;
        uint16_t *__restrict m = means, *__restrict v = squares;
        for (int64_t i = start; i < stop; ++i) {
            const float g = kHalf ? from_bf16(static_cast<const uint16_t*>(grad)[i]) : static_cast<const float*>(grad)[i];
            float mean = from_bf16(m[i]), square = from_bf16(v[i]), root, moved = w[i];
            update(moved, g, mean, square, root, factors);
            w[i] = moved;
            m[i] = to_bf16(mean);
            v[i] = to_bf16(square);
        }
        if (working)
            for (int64_t i = start; i < stop; ++i) working[i] = to_bf16(w[i]);
    }
};

template <typename Step>
void run_on_threads(const Step& step, int threads, int64_t* counters) {
    const int64_t blocks = (step.count + kBlock - 1) / kBlock;
    const int64_t wanted = std::max<int64_t>(1, std::min<int64_t>(threads, blocks / kBlocksPerThread));
    std::vector<Counts> counts(wanted);
    std::vector<std::thread> others;
    for (int64_t i = 1; i < wanted; ++i)
        others.emplace_back([&, i] { step.run(blocks * i / wanted, blocks * (i + 1) / wanted, counts[i]); });
    step.run(0, blocks / wanted, counts[0]);
    for (auto& other : others) other.join();
    if (!counters) return;
    Counts total;
    total.add(counters);
    for (const auto& part : counts) total.add(part.columns);
    std::copy(total.columns, total.columns + kColumns, counters);
}

}  // namespace

extern "C" {

// `working` and `counters` (int64 [8]) may be null. `is_half`: the gradient is BF16, else FP32.
// `smallest_scale` is a biased exponent.
void moe_step_fp8(float* value, const void* grad, int is_half, uint8_t* means, uint8_t* roots, uint8_t* scales,
                  uint16_t* working, int64_t* counters, int64_t count, const float* factors,
                  const uint32_t* noise, int64_t carry, int smallest_scale, int threads) {
    Factors f;
    std::memcpy(&f, factors, sizeof f);
    const Noise n{noise[0], noise[1], noise[2], noise[3], carry};
    const Fp8Step step{value, grad, is_half != 0, means, roots, scales, working, count, f, n, smallest_scale, counters != nullptr};
    run_on_threads(step, threads, counters);
}

void moe_step_bf16(float* value, const void* grad, int is_half, uint16_t* means, uint16_t* squares,
                   uint16_t* working, int64_t count, const float* factors, int threads) {
    Factors f;
    std::memcpy(&f, factors, sizeof f);
    run_on_threads(Bf16Step{value, grad, is_half != 0, means, squares, working, count, f}, threads, nullptr);
}
}
