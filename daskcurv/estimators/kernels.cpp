// The pointwise arithmetic of difference propagation on a CPU; kernels.py has the formulas.
//
// All arithmetic is that of float32, operation by operation, and rounded once on the way out, so
// that results have the bits of the uncompiled functions. Compile without contraction to fused
// multiply-adds and without fast-math.

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

struct bfloat16 {
    uint16_t bits;
};

float wide(float value) { return value; }

float wide(bfloat16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

void store(float value, float* out) { *out = value; }

void store(float value, bfloat16* out) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // ties to even
    out->bits = value != value ? uint16_t(0x7fc0) : uint16_t(nearest);
}

// Of both functions, the result is NaN if the value is.
float at_least(float value, float bound) { return value < bound ? bound : value; }
float at_most(float value, float bound) { return value > bound ? bound : value; }

// So many values at a time stay in the fastest cache from one loop to the next.
constexpr int BLOCK = 1024;

struct Place {
    int64_t row, column;  // of a block in (rows, n)
    int length;
    int64_t offset(int64_t n) const { return row * n + column; }
};

// Call `work` for every block of an array of shape (rows, n).
template <class Work>
void each_block(int64_t rows, int64_t n, int threads, Work work) {
    const int64_t in_row = (n + BLOCK - 1) / BLOCK, blocks = rows * in_row;
    const auto some = [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) {
            const int64_t column = block % in_row * BLOCK;
            work(Place{block / in_row, column, int(n - column < BLOCK ? n - column : BLOCK)});
        }
    };
    constexpr int64_t WORTH_A_THREAD = 64;
    const int64_t most = blocks / WORTH_A_THREAD;
    if (threads > most) threads = int(most);
    if (threads < 2) return some(0, blocks);
    std::vector<std::thread> running;
    for (int64_t k = 0; k < threads; ++k)
        running.emplace_back(some, k * blocks / threads, (k + 1) * blocks / threads);
    for (auto& thread : running) thread.join();
}

template <class T>
void sum(const T* const* parts, int count, int64_t offset, int length, float* total) {
    const T* first = parts[0] + offset;
    for (int i = 0; i < length; ++i) total[i] = wide(first[i]);
    for (int part = 1; part < count; ++part) {
        const T* next = parts[part] + offset;
        for (int i = 0; i < length; ++i) total[i] += wide(next[i]);
    }
}

template <class T>
void clean_rectify(const float* const* inputs, int count, float h, float* rectified, T* scaled,
                   int64_t n, int threads) {
    each_block(1, n, threads, [&](Place at) {
        float value[BLOCK];
        sum(inputs, count, at.column, at.length, value);
        for (int i = 0; i < at.length; ++i) {
            rectified[at.column + i] = at_least(value[i], 0);
            store(value[i] / h, scaled + at.column + i);
        }
    });
}

template <class T>
void clean_rectify_gradient(const float* const* gradients, int count, const T* scaled, float h,
                            float* before, T* kept, int64_t n, int threads) {
    each_block(1, n, threads, [&](Place at) {
        float gradient[BLOCK];
        sum(gradients, count, at.column, at.length, gradient);
        for (int i = 0; i < at.length; ++i) {
            before[at.column + i] = wide(scaled[at.column + i]) > 0 ? gradient[i] : 0;
            store(gradient[i] / h, kept + at.column + i);
        }
    });
}

template <class T>
void rectify(const T* const* deltas, int count, const T* scaled, T* out, int64_t rows, int64_t n,
             int threads) {
    each_block(rows, n, threads, [&](Place at) {
        float delta[BLOCK];
        sum(deltas, count, at.offset(n), at.length, delta);
        const T* s = scaled + at.column;
        T* result = out + at.offset(n);
        for (int i = 0; i < at.length; ++i) {
            const float bound = -wide(s[i]);
            store(at_least(delta[i], bound) - at_least(bound, 0), result + i);
        }
    });
}

template <class T>
void rectify_gradient(const T* const* gammas, int count, const T* rectified, const T* scaled,
                      const T* gradient, T* out, int64_t rows, int64_t n, int threads) {
    each_block(rows, n, threads, [&](Place at) {
        float gamma[BLOCK];
        sum(gammas, count, at.offset(n), at.length, gamma);
        const T *s = scaled + at.column, *g = gradient + at.column;
        const T* behind = rectified + at.offset(n);
        T* result = out + at.offset(n);
        for (int i = 0; i < at.length; ++i) {
            const float clean = wide(s[i]), jump = wide(g[i]);
            const bool is_open = wide(behind[i]) > at_most(-clean, 0), was_open = clean > 0;
            const float if_open = was_open ? gamma[i] : gamma[i] + jump;
            const float if_shut = was_open ? -jump : 0;
            store(is_open ? if_open : if_shut, result + i);
        }
    });
}

}  // namespace

#define KERNELS(T, NAME)                                                                          \
    void clean_rectify_##NAME(const float* const* inputs, int count, float h, float* rectified,   \
                              T* scaled, int64_t n, int threads) {                                \
        clean_rectify(inputs, count, h, rectified, scaled, n, threads);                           \
    }                                                                                             \
    void clean_rectify_gradient_##NAME(const float* const* gradients, int count, const T* scaled, \
                                       float h, float* before, T* kept, int64_t n, int threads) { \
        clean_rectify_gradient(gradients, count, scaled, h, before, kept, n, threads);            \
    }                                                                                             \
    void rectify_##NAME(const T* const* deltas, int count, const T* scaled, T* out, int64_t rows, \
                        int64_t n, int threads) {                                                 \
        rectify(deltas, count, scaled, out, rows, n, threads);                                    \
    }                                                                                             \
    void rectify_gradient_##NAME(const T* const* gammas, int count, const T* rectified,           \
                                 const T* scaled, const T* gradient, T* out, int64_t rows,        \
                                 int64_t n, int threads) {                                        \
        rectify_gradient(gammas, count, rectified, scaled, gradient, out, rows, n, threads);      \
    }

extern "C" {
KERNELS(float, float32)
KERNELS(bfloat16, bfloat16)
}
