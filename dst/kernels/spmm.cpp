// Kernels for linear layers that store only their non-zero weights.
//
// C ABI, C++17. Depends only on the standard library and, if the compiler supports it, OpenMP. The file includes itself to
// compile its second half once per instruction set. The best instruction set is chosen when the library is first used.
//
// The file is one translation unit, or several that compile in parallel (build.py): with DST_ONLY_LEVEL and DST_ONLY_TYPE
// it defines the kernels of one instruction set and element type, with DST_ONLY_ABI everything else.
//
// Layout. Activations are feature-major: X is [in, batch], Y is [out, batch], so each non-zero multiplies one contiguous
// vector. The weight W [out, in] is stored in two orders: by columns (CSC: the values that the optimizer updates) and by
// rows (CSR: a copy that `gather` refreshes). Indices inside a row or a column are unsigned 16-bit where they fit and
// signed 32-bit otherwise ("wide"). Pointers and permutations are 32-bit.
//
// One thread computes each output element, in an order that depends only on shapes. Results do not depend on the number or
// timing of threads.

#ifndef DST_ISA
// ------------------------------------------------------------------------------------------------ common half
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define DST_INLINE inline __attribute__((always_inline))

namespace {

// Input bytes per tile of the batch in the forward pass: the size of a common L2 cache. The backward pass gains more from
// wide tiles (fewer horizontal sums) than from an operand in cache.
constexpr int64_t kCacheBytes = 1024 * 1024;

// Starting a parallel region with fewer multiply-adds costs more than it saves.
constexpr int64_t kSerialWork = 1 << 15;

}  // namespace

// What the translation units share.
namespace dst {

template <class T>
struct Forward {
    int64_t rows, columns;
    const int32_t* pointers;
    const void* indices;
    const T* values;
    const T* x;
    int64_t x_stride;
    T* y;
    int64_t y_stride;
    int64_t batch;
    const T* bias;
    bool relu;
    int threads;
};

template <class T>
struct Backward {
    int64_t rows, columns;
    const int32_t* pointers;
    const void* indices;
    const T* values;
    const T* x;
    int64_t x_stride;
    const T* g;
    int64_t g_stride;
    T* gx;  // null if the input needs no gradient
    int64_t gx_stride;
    T* gv;
    int64_t batch;
    int threads;
};

// A dense layer: weight [rows, columns], row-major.
template <class T>
struct Dense {
    int64_t rows, columns;
    const T* weight;
    const T* x;
    int64_t x_stride;
    T* y;
    int64_t y_stride;
    int64_t batch;
    const T* bias;
    bool relu;
    int threads;
};

// What is applied to the outputs of a layer.
enum Activation { kLinear, kRelu, kGelu };

// The layer over row-major examples (rows.cpp): strides are those between examples.
template <class T>
struct RowsForward {
    int64_t rows, columns;
    const int32_t* pointers;
    const void* indices;
    const T* values;
    const T* x;
    int64_t x_stride;
    T* y;
    int64_t y_stride;
    int64_t batch;
    const T* bias;
    int activation;
    T* derivative;  // [batch, rows], that of GELU; may be null
    int threads;
};

template <class T>
struct RowsBackward {
    int64_t rows, columns;
    const int32_t* pointers;
    const void* indices;
    const T* values;
    const T* x;
    int64_t x_stride;
    const T* g;
    int64_t g_stride;
    const T* y;  // the output where ReLU was applied, otherwise null
    int64_t y_stride;
    bool derivative;  // `y` is what the output gradient is multiplied by
    T* gx;  // may be null: the first layer needs no input gradient
    int64_t gx_stride;
    T* gv;
    T* gb;  // may be null
    int64_t batch;
    int threads;
};

// Memory of a thread that calls: kept from call to call while it is small. New memory of this size would be mapped, zeroed
// and unmapped by the system at every call.
constexpr int64_t kScratchBytes = 16 << 20;

struct Scratch {
    char* data = nullptr;
    int64_t size = 0;

    ~Scratch() { std::free(data); }

    // At least `bytes`, from the start of a cache line; null without memory.
    char* lines(int64_t bytes) {
        bytes += 63;
        if (bytes > size) {
            std::free(data);
            data = static_cast<char*>(std::malloc(size_t(bytes)));
            size = data ? bytes : 0;
        }
        return data ? reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(data) + 63) / 64 * 64) : nullptr;
    }

    void trim() {
        if (size <= kScratchBytes) return;
        std::free(data);
        data = nullptr;
        size = 0;
    }
};

}  // namespace dst

namespace {

using namespace dst;

// Tiling of the batch: `tiles` tiles of at most `vectors` vectors.
struct Tiling {
    int64_t tiles, vectors;
};

inline Tiling tile_batch(int64_t batch, int64_t features, int64_t width, int64_t most, int64_t bytes) {
    const int64_t total = (batch + width - 1) / width;
    int64_t fit = kCacheBytes / std::max<int64_t>(1, features * width * bytes);
    fit = std::min(most, std::max<int64_t>(fit, std::min<int64_t>(most, 2)));
    Tiling t;
    t.tiles = std::max<int64_t>(1, (total + fit - 1) / fit);
    t.vectors = (total + t.tiles - 1) / t.tiles;
    return t;
}

// First row whose cumulative cost reaches `target`. The cost of a row is its non-zeros plus a constant.
inline int64_t balanced_cut(const int32_t* pointers, int64_t rows, int64_t target) {
    int64_t lo = 0, hi = rows;
    while (lo < hi) {
        const int64_t mid = (lo + hi) / 2;
        if (int64_t(pointers[mid]) + 4 * mid < target) lo = mid + 1;
        else hi = mid;
    }
    return lo;
}

}  // namespace

#include "conv.cpp"

namespace dst {

// The kernels of one instruction set for elements of type T; pairs are for 16-bit and wide indices.
template <class T>
struct Kernels {
    void (*forward[2])(const Forward<T>&);
    void (*dense)(const Dense<T>&);
    void (*backward[2])(const Backward<T>&);
    void (*gradient)(int64_t features, int64_t batch, const T* g, int64_t g_stride, int batch_major, const T* y,
                     int64_t y_stride, T* out, T* bias, int threads);
    bool (*rows_forward[2])(const RowsForward<T>&, Scratch&);
    bool (*rows_backward[2])(const RowsBackward<T>&, Scratch&);
    bool (*conv_forward[2])(const ConvForward<T>&);
    bool (*conv_backward[2])(const ConvBackward<T>&);
};

// One table for each instruction set and type, in a library of its own symbols.
#define DST_HIDDEN __attribute__((visibility("hidden")))
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define DST_X86 1
extern DST_HIDDEN const Kernels<float> avx512_float, avx2_float;
extern DST_HIDDEN const Kernels<double> avx512_double, avx2_double;
#endif
extern DST_HIDDEN const Kernels<float> portable_float;
extern DST_HIDDEN const Kernels<double> portable_double;

}  // namespace dst

// ---- one inclusion per instruction set
#ifdef DST_ONLY_ABI
#define DST_WANTED(level) 0
#elif defined(DST_ONLY_LEVEL)
#define DST_WANTED(level) (DST_ONLY_LEVEL == level)
#else
#define DST_WANTED(level) 1
#endif
#ifdef DST_X86
#if DST_WANTED(2)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define DST_ISA avx512
#define DST_LEVEL 2
#include "spmm.cpp"
#undef DST_ISA
#undef DST_LEVEL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#if DST_WANTED(1)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define DST_ISA avx2
#define DST_LEVEL 1
#include "spmm.cpp"
#undef DST_ISA
#undef DST_LEVEL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#endif
#if DST_WANTED(0)
#define DST_ISA portable
#define DST_LEVEL 0
#include "spmm.cpp"
#undef DST_ISA
#undef DST_LEVEL
#endif

#ifndef DST_ONLY_LEVEL
// ------------------------------------------------------------------------------------------------ C ABI
extern "C" {
// One layer of a chain: sparse (`values` in row order with `pointers` and `indices`) or dense (`values` is the row-major
// weight; `pointers` and `indices` are not read). `bias` may be null.
struct dst_layer {
    int64_t sparse, wide, rows, columns, relu;
    const void *pointers, *indices, *values, *bias;
};

// Layers; the outputs of each are the inputs of the next.
struct dst_chain {
    int64_t is_double, count;
    const dst_layer* layers;
};
}

namespace {

int detect() {
#ifdef DST_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

int& level() {
    static int chosen = detect();
    return chosen;
}

// The kernels of the instruction set in use.
template <class T>
const Kernels<T>& kernels();

template <>
const Kernels<float>& kernels<float>() {
#ifdef DST_X86
    if (level() == 2) return avx512_float;
    if (level() == 1) return avx2_float;
#endif
    return portable_float;
}

template <>
const Kernels<double>& kernels<double>() {
#ifdef DST_X86
    if (level() == 2) return avx512_double;
    if (level() == 1) return avx2_double;
#endif
    return portable_double;
}

// The scratch of this thread for the kernels over row-major examples.
inline Scratch& rows_scratch() {
    static thread_local Scratch scratch;
    return scratch;
}

template <class T>
void run_layer(const dst_layer& l, const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t batch, int threads) {
    if (l.sparse)
        kernels<T>().forward[l.wide != 0]({l.rows, l.columns, (const int32_t*)l.pointers, l.indices, (const T*)l.values, x,
                                           x_stride, y, y_stride, batch, (const T*)l.bias, l.relu != 0, threads});
    else
        kernels<T>().dense({l.rows, l.columns, (const T*)l.values, x, x_stride, y, y_stride, batch, (const T*)l.bias,
                            l.relu != 0, threads});
}

template <class T>
int run_chain(const dst_layer* layers, int64_t count, const T* x, int64_t x_stride, bool batch_major, int64_t batch, T* y,
              int threads) {
    static thread_local Scratch scratch;
    if (batch <= 0) return 0;
    constexpr int64_t line = 64 / sizeof(T);
    const bool transpose = batch_major && batch > 1;
    int64_t widest = transpose ? layers[0].columns : 0;
    for (int64_t i = 0; i + 1 < count; ++i) widest = std::max(widest, layers[i].rows);
    // Pieces of the batch keep scratch small and activations in cache. Thinner pieces would make streaming the weights once
    // per piece cost more than the arithmetic.
    int64_t piece = kScratchBytes / int64_t(2 * sizeof(T)) / std::max<int64_t>(1, widest) / 128 * 128;
    piece = std::min(batch, std::max<int64_t>(128, piece));
    const int64_t side = (widest * piece + line - 1) / line * line;
    T* sides[2];
    sides[0] = reinterpret_cast<T*>(scratch.lines(int64_t(sizeof(T)) * 2 * side));
    if (!sides[0]) return 1;
    sides[1] = sides[0] + side;
    for (int64_t b = 0; b < batch; b += piece) {
        const int64_t lanes = std::min(piece, batch - b);
        const T* in = batch_major ? x + b * x_stride : x + b;
        int64_t in_stride = x_stride;
        int next = 0;
        if (batch == 1) {
            in_stride = 1;
        } else if (transpose) {
            kernels<T>().gradient(layers[0].columns, lanes, in, x_stride, 1, nullptr, 0, sides[0], nullptr, threads);
            in = sides[0];
            in_stride = lanes;
            next = 1;
        }
        for (int64_t i = 0; i < count; ++i) {
            const bool last = i + 1 == count;
            T* out = last ? y + b : sides[next];
            const int64_t out_stride = last ? batch : lanes;
            run_layer<T>(layers[i], in, in_stride, out, out_stride, lanes, threads);
            in = out;
            in_stride = out_stride;
            next ^= 1;
        }
    }
    scratch.trim();
    return 0;
}

template <class T>
void gather(int64_t n, const int32_t* permutation, const T* from, T* to, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && n > kSerialWork)
    for (int64_t i = 0; i < n; ++i) to[i] = from[permutation[i]];
}

}  // namespace

extern "C" {

// Version of this interface; the loader refuses a library built from another one.
int dst_abi() { return 9; }

// Instruction set in use: 0 portable, 1 AVX2, 2 AVX-512. `dst_set_isa` lowers it for tests, and never raises it above what
// the machine supports.
int dst_isa() { return level(); }
int dst_set_isa(int wanted) {
    level() = std::max(0, std::min(wanted, detect()));
    return level();
}

void dst_forward(int is_double, int wide, int64_t rows, int64_t columns, const int32_t* pointers, const void* indices,
                 const void* values, const void* x, int64_t x_stride, void* y, int64_t y_stride, int64_t batch,
                 const void* bias, int relu, int threads) {
    if (is_double)
        kernels<double>().forward[wide != 0]({rows, columns, pointers, indices, (const double*)values, (const double*)x, x_stride, (double*)y,
                             y_stride, batch, (const double*)bias, relu != 0, threads});
    else
        kernels<float>().forward[wide != 0]({rows, columns, pointers, indices, (const float*)values, (const float*)x, x_stride, (float*)y,
                            y_stride, batch, (const float*)bias, relu != 0, threads});
}

// Run a batch through one or more layers in one call: with small batches the call overhead of a layer exceeds its
// arithmetic. The input is batch-major (example b at x + b * x_stride) or feature-major (feature f at x + f * x_stride); a
// single example is contiguous. The output is feature-major, [out, batch]. Returns 0, or 1 if scratch cannot be allocated.
int64_t dst_run_chain(const dst_chain* chain, const void* x, int64_t x_stride, int64_t batch_major, int64_t batch, void* y,
                      int64_t threads) {
    if (chain->is_double)
        return run_chain<double>(chain->layers, chain->count, (const double*)x, x_stride, batch_major != 0, batch, (double*)y,
                                 int(threads));
    return run_chain<float>(chain->layers, chain->count, (const float*)x, x_stride, batch_major != 0, batch, (float*)y,
                            int(threads));
}

void dst_backward(int is_double, int wide, int64_t rows, int64_t columns, const int32_t* pointers, const void* indices,
                  const void* values, const void* x, int64_t x_stride, const void* g, int64_t g_stride, void* gx,
                  int64_t gx_stride, void* gv, int64_t batch, int threads) {
    if (is_double)
        kernels<double>().backward[wide != 0]({rows, columns, pointers, indices, (const double*)values, (const double*)x, x_stride,
                              (const double*)g, g_stride, (double*)gx, gx_stride, (double*)gv, batch, threads});
    else
        kernels<float>().backward[wide != 0]({rows, columns, pointers, indices, (const float*)values, (const float*)x, x_stride,
                             (const float*)g, g_stride, (float*)gx, gx_stride, (float*)gv, batch, threads});
}

// Convert a gradient (or an input) to feature-major order. If `y` is given, zero it where y is not positive. If `bias` is
// given, sum each feature over the batch. `out` may be null if the gradient is feature-major and y is null.
void dst_gradient(int is_double, int64_t features, int64_t batch, const void* g, int64_t g_stride, int batch_major,
                  const void* y, int64_t y_stride, void* out, void* bias, int threads) {
    if (is_double)
        kernels<double>().gradient(features, batch, (const double*)g, g_stride, batch_major, (const double*)y, y_stride,
                             (double*)out, (double*)bias, threads);
    else
        kernels<float>().gradient(features, batch, (const float*)g, g_stride, batch_major, (const float*)y, y_stride, (float*)out,
                            (float*)bias, threads);
}

// A layer over row-major examples, as dst_forward and dst_backward are over feature-major ones; worth it where there are
// many. Strides lie between examples. `activation` is 0 for none, 1 for ReLU, 2 for GELU, whose derivative is written to
// `derivative` if that is given. The backward pass multiplies the output gradient by `y` if that is a derivative, and
// otherwise zeroes it where `y` is given and not positive; `gx` and `gb` may be null, `gv` is in column order. Both return
// 0, or 1 without memory for scratch.
int64_t dst_rows_forward(int is_double, int wide, int64_t rows, int64_t columns, const int32_t* pointers, const void* indices,
                         const void* values, const void* x, int64_t x_stride, void* y, int64_t y_stride, int64_t batch,
                         const void* bias, int activation, void* derivative, int threads) {
    Scratch& memory = rows_scratch();
    bool done;
    if (is_double)
        done = kernels<double>().rows_forward[wide != 0]({rows, columns, pointers, indices, (const double*)values, (const double*)x, x_stride,
                                         (double*)y, y_stride, batch, (const double*)bias, activation, (double*)derivative, threads}, memory);
    else
        done = kernels<float>().rows_forward[wide != 0]({rows, columns, pointers, indices, (const float*)values, (const float*)x, x_stride,
                                        (float*)y, y_stride, batch, (const float*)bias, activation, (float*)derivative, threads}, memory);
    memory.trim();
    return !done;
}

int64_t dst_rows_backward(int is_double, int wide, int64_t rows, int64_t columns, const int32_t* pointers,
                          const void* indices, const void* values, const void* x, int64_t x_stride, const void* g,
                          int64_t g_stride, const void* y, int64_t y_stride, int derivative, void* gx, int64_t gx_stride, void* gv,
                          void* gb, int64_t batch, int threads) {
    Scratch& memory = rows_scratch();
    bool done;
    if (is_double)
        done = kernels<double>().rows_backward[wide != 0]({rows, columns, pointers, indices, (const double*)values, (const double*)x, x_stride,
                                          (const double*)g, g_stride, (const double*)y, y_stride, derivative != 0, (double*)gx, gx_stride,
                                          (double*)gv, (double*)gb, batch, threads}, memory);
    else
        done = kernels<float>().rows_backward[wide != 0]({rows, columns, pointers, indices, (const float*)values, (const float*)x, x_stride,
                                         (const float*)g, g_stride, (const float*)y, y_stride, derivative != 0, (float*)gx, gx_stride,
                                         (float*)gv, (float*)gb, batch, threads}, memory);
    memory.trim();
    return !done;
}

// Convolve NCHW images with a weight by rows; `bias` may be null. Returns 0, or 1 without memory for scratch.
int dst_conv_forward(int is_double, int wide, const dst_conv* shape, const int32_t* pointers, const void* indices,
                     const void* values, const void* x, void* y, const void* bias, int relu, int threads) {
    try {
        if (is_double)
            return !kernels<double>().conv_forward[wide != 0]({*shape, pointers, indices, (const double*)values, (const double*)x, (double*)y,
                                              (const double*)bias, relu != 0, threads});
        return !kernels<float>().conv_forward[wide != 0]({*shape, pointers, indices, (const float*)values, (const float*)x, (float*)y,
                                         (const float*)bias, relu != 0, threads});
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// The gradients of the input (where `gx` is given), of the values by columns, and of the bias (where `gb` is given).
// Returns 0, or 1 without memory for scratch.
int dst_conv_backward(int is_double, int wide, const dst_conv* shape, const int32_t* pointers, const void* indices,
                      const void* values, const void* x, const void* g, void* gx, void* gv, void* gb, int threads) {
    try {
        if (is_double)
            return !kernels<double>().conv_backward[wide != 0]({*shape, pointers, indices, (const double*)values, (const double*)x,
                                               (const double*)g, (double*)gx, (double*)gv, (double*)gb, threads});
        return !kernels<float>().conv_backward[wide != 0]({*shape, pointers, indices, (const float*)values, (const float*)x, (const float*)g,
                                          (float*)gx, (float*)gv, (float*)gb, threads});
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

void dst_gather(int is_double, int64_t n, const int32_t* permutation, const void* from, void* to, int threads) {
    if (is_double) gather<double>(n, permutation, (const double*)from, (double*)to, threads);
    else gather<float>(n, permutation, (const float*)from, (float*)to, threads);
}

}  // extern "C"
#include "update.cpp"
#endif  // DST_ONLY_LEVEL

#else
// ------------------------------------------------------------------------------------------- per instruction set
namespace {
namespace DST_ISA {

template <class T>
struct Simd;

#if DST_LEVEL == 2
constexpr int kMostVectors = 8;

template <>
struct Simd<float> {
    using V = __m512;
    static constexpr int W = 16;
    static DST_INLINE V zero() { return _mm512_setzero_ps(); }
    static DST_INLINE V set(float a) { return _mm512_set1_ps(a); }
    static DST_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
    static DST_INLINE V load(const float* p, int n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
    static DST_INLINE void store(float* p, V a) { _mm512_storeu_ps(p, a); }
    static DST_INLINE void store(float* p, V a, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), a); }
    static DST_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
    static DST_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
    static DST_INLINE V positive(V a) {  // NaN passes, as in torch.relu
        return _mm512_mask_mov_ps(a, _mm512_cmp_ps_mask(a, zero(), _CMP_LE_OQ), zero());
    }
    static DST_INLINE V where_positive(V y, V a) {
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, zero(), _CMP_NLE_UQ), a);
    }
    static DST_INLINE void sum4(V a, V b, V c, V d, float* out) {
        const V ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const V cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        const V all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    }
};

template <>
struct Simd<double> {
    using V = __m512d;
    static constexpr int W = 8;
    static DST_INLINE V zero() { return _mm512_setzero_pd(); }
    static DST_INLINE V set(double a) { return _mm512_set1_pd(a); }
    static DST_INLINE V load(const double* p) { return _mm512_loadu_pd(p); }
    static DST_INLINE V load(const double* p, int n) { return _mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p); }
    static DST_INLINE void store(double* p, V a) { _mm512_storeu_pd(p, a); }
    static DST_INLINE void store(double* p, V a, int n) { _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), a); }
    static DST_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
    static DST_INLINE V add(V a, V b) { return _mm512_add_pd(a, b); }
    static DST_INLINE V positive(V a) {
        return _mm512_mask_mov_pd(a, _mm512_cmp_pd_mask(a, zero(), _CMP_LE_OQ), zero());
    }
    static DST_INLINE V where_positive(V y, V a) {
        return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(y, zero(), _CMP_NLE_UQ), a);
    }
    static DST_INLINE void sum4(V a, V b, V c, V d, double* out) {
        const V ab = _mm512_add_pd(_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
        const V cd = _mm512_add_pd(_mm512_unpacklo_pd(c, d), _mm512_unpackhi_pd(c, d));
        const __m256d p = _mm256_add_pd(_mm512_castpd512_pd256(ab), _mm512_extractf64x4_pd(ab, 1));
        const __m256d q = _mm256_add_pd(_mm512_castpd512_pd256(cd), _mm512_extractf64x4_pd(cd, 1));
        _mm_storeu_pd(out, _mm_add_pd(_mm256_castpd256_pd128(p), _mm256_extractf128_pd(p, 1)));
        _mm_storeu_pd(out + 2, _mm_add_pd(_mm256_castpd256_pd128(q), _mm256_extractf128_pd(q, 1)));
    }
};

#elif DST_LEVEL == 1
constexpr int kMostVectors = 4;

inline __m256i first(int n, int bytes) {
    alignas(32) static const int32_t on[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
    return _mm256_loadu_si256((const __m256i*)(on + 8 - n * bytes / 4));
}

template <>
struct Simd<float> {
    using V = __m256;
    static constexpr int W = 8;
    static DST_INLINE V zero() { return _mm256_setzero_ps(); }
    static DST_INLINE V set(float a) { return _mm256_set1_ps(a); }
    static DST_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
    static DST_INLINE V load(const float* p, int n) { return _mm256_maskload_ps(p, first(n, 4)); }
    static DST_INLINE void store(float* p, V a) { _mm256_storeu_ps(p, a); }
    static DST_INLINE void store(float* p, V a, int n) { _mm256_maskstore_ps(p, first(n, 4), a); }
    static DST_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
    static DST_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
    static DST_INLINE V positive(V a) { return _mm256_andnot_ps(_mm256_cmp_ps(a, zero(), _CMP_LE_OQ), a); }
    static DST_INLINE V where_positive(V y, V a) { return _mm256_and_ps(_mm256_cmp_ps(y, zero(), _CMP_NLE_UQ), a); }
    static DST_INLINE void sum4(V a, V b, V c, V d, float* out) {
        const V all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
    }
};

template <>
struct Simd<double> {
    using V = __m256d;
    static constexpr int W = 4;
    static DST_INLINE V zero() { return _mm256_setzero_pd(); }
    static DST_INLINE V set(double a) { return _mm256_set1_pd(a); }
    static DST_INLINE V load(const double* p) { return _mm256_loadu_pd(p); }
    static DST_INLINE V load(const double* p, int n) { return _mm256_maskload_pd(p, first(n, 8)); }
    static DST_INLINE void store(double* p, V a) { _mm256_storeu_pd(p, a); }
    static DST_INLINE void store(double* p, V a, int n) { _mm256_maskstore_pd(p, first(n, 8), a); }
    static DST_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
    static DST_INLINE V add(V a, V b) { return _mm256_add_pd(a, b); }
    static DST_INLINE V positive(V a) { return _mm256_andnot_pd(_mm256_cmp_pd(a, zero(), _CMP_LE_OQ), a); }
    static DST_INLINE V where_positive(V y, V a) { return _mm256_and_pd(_mm256_cmp_pd(y, zero(), _CMP_NLE_UQ), a); }
    static DST_INLINE void sum4(V a, V b, V c, V d, double* out) {
        const V ab = _mm256_hadd_pd(a, b), cd = _mm256_hadd_pd(c, d);
        _mm_storeu_pd(out, _mm_add_pd(_mm256_castpd256_pd128(ab), _mm256_extractf128_pd(ab, 1)));
        _mm_storeu_pd(out + 2, _mm_add_pd(_mm256_castpd256_pd128(cd), _mm256_extractf128_pd(cd, 1)));
    }
};

#else
constexpr int kMostVectors = 4;

// 16-byte vectors in the compiler's vector extension: SSE2, NEON, or what the target supports.
template <class T>
struct Simd {
    typedef T V __attribute__((vector_size(16)));
    static constexpr int W = 16 / sizeof(T);
    static DST_INLINE V zero() { return V{}; }
    static DST_INLINE V set(T a) { return V{} + a; }
    static DST_INLINE V load(const T* p) {
        V a;
        std::memcpy(&a, p, sizeof a);
        return a;
    }
    static DST_INLINE V load(const T* p, int n) {
        V a{};
        for (int i = 0; i < n; ++i) a[i] = p[i];
        return a;
    }
    static DST_INLINE void store(T* p, V a) { std::memcpy(p, &a, sizeof a); }
    static DST_INLINE void store(T* p, V a, int n) {
        for (int i = 0; i < n; ++i) p[i] = a[i];
    }
    static DST_INLINE V fma(V a, V b, V c) { return a * b + c; }
    static DST_INLINE V add(V a, V b) { return a + b; }
    static DST_INLINE V positive(V a) {
        for (int i = 0; i < W; ++i) a[i] = a[i] <= T(0) ? T(0) : a[i];
        return a;
    }
    static DST_INLINE V where_positive(V y, V a) {
        for (int i = 0; i < W; ++i) a[i] = y[i] <= T(0) ? T(0) : a[i];
        return a;
    }
    static DST_INLINE void sum4(V a, V b, V c, V d, T* out) {
        const V parts[4] = {a, b, c, d};
        for (int q = 0; q < 4; ++q) {
            T sum = parts[q][0];
            for (int i = 1; i < W; ++i) sum += parts[q][i];
            out[q] = sum;
        }
    }
};
#endif

// Static scheduling. Small work stays out of OpenMP: entering a parallel region costs time even with one thread.
template <class F>
inline void in_parallel(int64_t n, int threads, int64_t work, const F& body) {
    if (threads <= 1 || work <= kSerialWork) {
        for (int64_t i = 0; i < n; ++i) body(i);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; ++i) body(i);
}

template <class F>
inline void over_rows(int64_t rows, const int32_t* pointers, int64_t batch, int threads, const F& body) {
    if (rows <= 0) return;
    const int64_t total = int64_t(pointers[rows]) + 4 * rows;
    if (threads <= 1 || total * batch < kSerialWork) {
        body(int64_t(0), rows);
        return;
    }
    const int64_t chunks = std::min<int64_t>(rows, int64_t(threads) * 8);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t c = 0; c < chunks; ++c) {
        const int64_t from = c == 0 ? 0 : balanced_cut(pointers, rows, total * c / chunks);
        const int64_t to = c + 1 == chunks ? rows : balanced_cut(pointers, rows, total * (c + 1) / chunks);
        if (from < to) body(from, to);
    }
}

// ---- forward: one row of W against NV vectors of the batch
template <class T, class I, int NV, bool TAIL>
void forward_rows(const Forward<T>& a, int64_t from, int64_t to, int64_t lane, int tail) {
    using S = Simd<T>;
    using V = typename S::V;
    constexpr int U = NV <= 1 ? 4 : NV <= 4 ? 2 : 1;  // independent sums hide the latency of the multiply-add
    const I* indices = static_cast<const I*>(a.indices);
    const T* x = a.x + lane;
    for (int64_t r = from; r < to; ++r) {
        V sum[U][NV];
        const V start = S::set(a.bias ? a.bias[r] : T(0));
        for (int k = 0; k < NV; ++k) {
            sum[0][k] = start;
            for (int u = 1; u < U; ++u) sum[u][k] = S::zero();
        }
        int64_t j = a.pointers[r];
        const int64_t end = a.pointers[r + 1];
        for (; j + U <= end; j += U)
            for (int u = 0; u < U; ++u) {
                const T* row = x + int64_t(indices[j + u]) * a.x_stride;
                const V w = S::set(a.values[j + u]);
                for (int k = 0; k < NV; ++k)
                    sum[u][k] = S::fma(w, TAIL && k == NV - 1 ? S::load(row + k * S::W, tail) : S::load(row + k * S::W),
                                       sum[u][k]);
            }
        for (; j < end; ++j) {
            const T* row = x + int64_t(indices[j]) * a.x_stride;
            const V w = S::set(a.values[j]);
            for (int k = 0; k < NV; ++k)
                sum[0][k] =
                    S::fma(w, TAIL && k == NV - 1 ? S::load(row + k * S::W, tail) : S::load(row + k * S::W), sum[0][k]);
        }
        T* y = a.y + r * a.y_stride + lane;
        for (int k = 0; k < NV; ++k) {
            V s = sum[0][k];
            for (int u = 1; u < U; ++u) s = S::add(s, sum[u][k]);
            if (a.relu) s = S::positive(s);
            if (TAIL && k == NV - 1) S::store(y + k * S::W, s, tail);
            else S::store(y + k * S::W, s);
        }
    }
}

// Gather eight inputs by index. Scalar loads are faster here than the gather instruction; four 16-bit indices are one load.
template <class T>
struct Eight {
    typedef T V __attribute__((vector_size(8 * sizeof(T))));
    using Bit = typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type;
};

template <class T>
DST_INLINE typename Eight<T>::V pick(const T* x, const uint16_t* indices) {
    uint64_t a, b;
    std::memcpy(&a, indices, 8);
    std::memcpy(&b, indices + 4, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    a = (a & 0xffff) << 48 | (a & 0xffff0000) << 16 | (a >> 16 & 0xffff0000) | a >> 48;
    b = (b & 0xffff) << 48 | (b & 0xffff0000) << 16 | (b >> 16 & 0xffff0000) | b >> 48;
#endif
    return typename Eight<T>::V{x[a & 0xffff], x[a >> 16 & 0xffff], x[a >> 32 & 0xffff], x[a >> 48],
                                x[b & 0xffff], x[b >> 16 & 0xffff], x[b >> 32 & 0xffff], x[b >> 48]};
}

template <class T>
DST_INLINE typename Eight<T>::V pick(const T* x, const int32_t* i) {
    return typename Eight<T>::V{x[i[0]], x[i[1]], x[i[2]], x[i[3]], x[i[4]], x[i[5]], x[i[6]], x[i[7]]};
}

// Keep the selected lanes and set the others to zero, even NaN.
template <class V, class M>
DST_INLINE V keep(V a, M mask) {
    static_assert(sizeof(V) == sizeof(M), "one mask lane per lane");
    return V(M(a) & mask);
}

// ---- forward for a single example: x is a contiguous vector
template <class T, class I>
void forward_vector(const Forward<T>& a, int64_t from, int64_t to) {
    using V = typename Eight<T>::V;
    typedef typename Eight<T>::Bit Bit;
    typedef Bit M __attribute__((vector_size(8 * sizeof(T))));
    constexpr Bit bits[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
    const I* indices = static_cast<const I*>(a.indices);
    // Local copies, because the compiler must assume that stores to y alias `a`.
    const T *x = a.x, *values = a.values, *bias = a.bias;
    const int32_t* pointers = a.pointers;
    T* y = a.y;
    const int64_t y_stride = a.y_stride, all = pointers[a.rows];
    const bool relu = a.relu;
    int64_t j = pointers[from];
    for (int64_t r = from; r < to; ++r) {
        V sums{}, w;
        const int64_t end = pointers[r + 1];
        for (; j + 8 <= end; j += 8) {
            std::memcpy(&w, values + j, sizeof w);
            sums += w * pick<T>(x, indices + j);
        }
        T rest = 0;
        if (j + 8 <= all) {  // reads into the next rows and masks them: a scalar loop would be mispredicted
            M mask;
            std::memcpy(&mask, bits + 8 - (end - j), sizeof mask);
            std::memcpy(&w, values + j, sizeof w);
            sums += keep(w, mask) * keep(pick<T>(x, indices + j), mask);
        } else {
            for (; j < end; ++j) rest += values[j] * x[indices[j]];
        }
        j = end;
        T sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7])) + rest;
        if (bias) sum += bias[r];
        y[r * y_stride] = relu && sum <= T(0) ? T(0) : sum;
    }
}

template <class T, class I, int NV>
void forward_tile(const Forward<T>& a, int64_t from, int64_t to, int64_t lane, int64_t vectors, int tail) {
    if constexpr (NV > 0) {
        if (vectors != NV) return forward_tile<T, I, NV - 1>(a, from, to, lane, vectors, tail);
        if (tail) forward_rows<T, I, NV, true>(a, from, to, lane, tail);
        else forward_rows<T, I, NV, false>(a, from, to, lane, 0);
    }
}

template <class T, class I>
void forward(const Forward<T>& a) {
    if (a.batch <= 0) return;
    if (a.batch == 1 && a.x_stride == 1) {
        over_rows(a.rows, a.pointers, 1, a.threads, [&](int64_t from, int64_t to) { forward_vector<T, I>(a, from, to); });
        return;
    }
    constexpr int64_t width = Simd<T>::W;
    const Tiling tiling = tile_batch(a.batch, a.columns, width, kMostVectors, sizeof(T));
    over_rows(a.rows, a.pointers, a.batch, a.threads, [&](int64_t from, int64_t to) {
        for (int64_t lane = 0; lane < a.batch; lane += tiling.vectors * width) {
            const int64_t lanes = std::min(a.batch - lane, tiling.vectors * width);
            forward_tile<T, I, kMostVectors>(a, from, to, lane, (lanes + width - 1) / width, int(lanes % width));
        }
    });
}

// ---- a dense layer: R rows of the weight share every load of the input
template <class T, int R, int NV, bool TAIL>
void dense_rows(const Dense<T>& a, int64_t from, int64_t to, int64_t lane, int tail) {
    using S = Simd<T>;
    using V = typename S::V;
    const T* x = a.x + lane;
    for (int64_t r = from; r < to; r += R) {
        const T* w = a.weight + r * a.columns;
        V sum[R][NV];
        for (int q = 0; q < R; ++q)
            for (int k = 0; k < NV; ++k) sum[q][k] = S::set(a.bias ? a.bias[r + q] : T(0));
        for (int64_t c = 0; c < a.columns; ++c) {
            const T* row = x + c * a.x_stride;
            V in[NV];
            for (int k = 0; k < NV; ++k)
                in[k] = TAIL && k == NV - 1 ? S::load(row + k * S::W, tail) : S::load(row + k * S::W);
            for (int q = 0; q < R; ++q) {
                const V scale = S::set(w[q * a.columns + c]);
                for (int k = 0; k < NV; ++k) sum[q][k] = S::fma(scale, in[k], sum[q][k]);
            }
        }
        for (int q = 0; q < R; ++q) {
            T* y = a.y + (r + q) * a.y_stride + lane;
            for (int k = 0; k < NV; ++k) {
                const V s = a.relu ? S::positive(sum[q][k]) : sum[q][k];
                if (TAIL && k == NV - 1) S::store(y + k * S::W, s, tail);
                else S::store(y + k * S::W, s);
            }
        }
    }
}

template <class T, int R, int NV>
void dense_tile(const Dense<T>& a, int64_t from, int64_t to, int64_t lane, int64_t vectors, int tail) {
    if constexpr (NV > 0) {
        if (vectors != NV) return dense_tile<T, R, NV - 1>(a, from, to, lane, vectors, tail);
        if (tail) dense_rows<T, R, NV, true>(a, from, to, lane, tail);
        else dense_rows<T, R, NV, false>(a, from, to, lane, 0);
    }
}

// A single example: x is a contiguous vector.
template <class T>
void dense_vector(const Dense<T>& a, int64_t from, int64_t to) {
    using S = Simd<T>;
    using V = typename S::V;
    for (int64_t r = from; r < to; ++r) {
        const T* w = a.weight + r * a.columns;
        V sums[4];
        for (int q = 0; q < 4; ++q) sums[q] = S::zero();
        int64_t c = 0;
        for (; c + 4 * S::W <= a.columns; c += 4 * S::W)
            for (int q = 0; q < 4; ++q) sums[q] = S::fma(S::load(w + c + q * S::W), S::load(a.x + c + q * S::W), sums[q]);
        for (; c < a.columns; c += S::W) {
            const int n = int(std::min<int64_t>(S::W, a.columns - c));
            if (n == S::W) sums[0] = S::fma(S::load(w + c), S::load(a.x + c), sums[0]);
            else sums[0] = S::fma(S::load(w + c, n), S::load(a.x + c, n), sums[0]);
        }
        T parts[4];
        S::sum4(sums[0], sums[1], sums[2], sums[3], parts);
        T sum = (parts[0] + parts[1]) + (parts[2] + parts[3]);
        if (a.bias) sum += a.bias[r];
        a.y[r * a.y_stride] = a.relu && sum <= T(0) ? T(0) : sum;
    }
}

template <class T>
void dense(const Dense<T>& a) {
    if (a.batch <= 0) return;
    constexpr int most = 4, group = kMostVectors >= 8 ? 4 : 2;  // sums that fit into the registers
    constexpr int64_t width = Simd<T>::W;
    const bool vector = a.batch == 1 && a.x_stride == 1;
    const auto body = [&](int64_t i) {
        const int64_t from = i * group, to = std::min<int64_t>(a.rows, from + group);
        if (vector) return dense_vector<T>(a, from, to);
        for (int64_t lane = 0; lane < a.batch; lane += most * width) {
            const int64_t lanes = std::min<int64_t>(a.batch - lane, most * width), vectors = (lanes + width - 1) / width;
            const int tail = int(lanes % width);
            if (to - from == group) dense_tile<T, group, most>(a, from, to, lane, vectors, tail);
            else dense_tile<T, 1, most>(a, from, to, lane, vectors, tail);
        }
    };
    in_parallel((a.rows + group - 1) / group, a.threads, a.rows * a.columns * a.batch, body);
}

// ---- backward: one column of W. Each row of the output gradient is loaded once, for the input gradient (times the weight)
// and for the gradient of the weight (times the input)
template <class T, class I, int NV, bool TAIL, bool INPUT>
void backward_columns(const Backward<T>& a, int64_t from, int64_t to, int64_t lane, int tail) {
    using S = Simd<T>;
    using V = typename S::V;
    const I* indices = static_cast<const I*>(a.indices);
    const T* g = a.g + lane;
    for (int64_t c = from; c < to; ++c) {
        const T* xc = a.x + c * a.x_stride + lane;
        V x[NV], sum[NV];
        for (int k = 0; k < NV; ++k) {
            x[k] = TAIL && k == NV - 1 ? S::load(xc + k * S::W, tail) : S::load(xc + k * S::W);
            sum[k] = S::zero();
        }
        const int64_t end = a.pointers[c + 1];
        int64_t j = a.pointers[c];
        for (; j + 4 <= end; j += 4) {
            const T* rows[4];
            V dot[4], w[4];
            for (int q = 0; q < 4; ++q) {
                rows[q] = g + int64_t(indices[j + q]) * a.g_stride;
                dot[q] = S::zero();
                w[q] = S::set(a.values[j + q]);
            }
            for (int k = 0; k < NV; ++k)
                for (int q = 0; q < 4; ++q) {
                    const V d =
                        TAIL && k == NV - 1 ? S::load(rows[q] + k * S::W, tail) : S::load(rows[q] + k * S::W);
                    if (INPUT) sum[k] = S::fma(w[q], d, sum[k]);
                    dot[q] = S::fma(x[k], d, dot[q]);
                }
            T out[4];
            S::sum4(dot[0], dot[1], dot[2], dot[3], out);
            for (int q = 0; q < 4; ++q) a.gv[j + q] = lane ? a.gv[j + q] + out[q] : out[q];
        }
        if (j < end) {
            const int left = int(end - j);
            V dot[4];
            for (int q = 0; q < 4; ++q) dot[q] = S::zero();
            for (int q = 0; q < left; ++q) {
                const T* row = g + int64_t(indices[j + q]) * a.g_stride;
                const V w = S::set(a.values[j + q]);
                V part = S::zero();
                for (int k = 0; k < NV; ++k) {
                    const V d = TAIL && k == NV - 1 ? S::load(row + k * S::W, tail) : S::load(row + k * S::W);
                    if (INPUT) sum[k] = S::fma(w, d, sum[k]);
                    part = S::fma(x[k], d, part);
                }
                dot[q] = part;
            }
            T out[4];
            S::sum4(dot[0], dot[1], dot[2], dot[3], out);
            for (int q = 0; q < left; ++q) a.gv[j + q] = lane ? a.gv[j + q] + out[q] : out[q];
        }
        if (INPUT) {
            T* gx = a.gx + c * a.gx_stride + lane;
            for (int k = 0; k < NV; ++k) {
                if (TAIL && k == NV - 1) S::store(gx + k * S::W, sum[k], tail);
                else S::store(gx + k * S::W, sum[k]);
            }
        }
    }
}

template <class T, class I, int NV>
void backward_tile(const Backward<T>& a, int64_t from, int64_t to, int64_t lane, int64_t vectors, int tail) {
    if constexpr (NV > 0) {
        if (vectors != NV) return backward_tile<T, I, NV - 1>(a, from, to, lane, vectors, tail);
        if (a.gx) {
            if (tail) backward_columns<T, I, NV, true, true>(a, from, to, lane, tail);
            else backward_columns<T, I, NV, false, true>(a, from, to, lane, 0);
        } else {
            if (tail) backward_columns<T, I, NV, true, false>(a, from, to, lane, tail);
            else backward_columns<T, I, NV, false, false>(a, from, to, lane, 0);
        }
    }
}

template <class T, class I>
void backward(const Backward<T>& a) {
    if (a.batch <= 0) {
        const int64_t n = a.pointers[a.columns];
        std::fill(a.gv, a.gv + n, T(0));
        return;
    }
    constexpr int64_t width = Simd<T>::W;
    const Tiling tiling = tile_batch(a.batch, 1, width, kMostVectors, sizeof(T));
    over_rows(a.columns, a.pointers, a.batch, a.threads, [&](int64_t from, int64_t to) {
        for (int64_t lane = 0; lane < a.batch; lane += tiling.vectors * width) {
            const int64_t lanes = std::min(a.batch - lane, tiling.vectors * width);
            backward_tile<T, I, kMostVectors>(a, from, to, lane, (lanes + width - 1) / width, int(lanes % width));
        }
    });
}

// ---- transpose, ReLU mask and bias gradient in one pass
template <class T>
void gradient(int64_t features, int64_t batch, const T* g, int64_t g_stride, int batch_major, const T* y, int64_t y_stride,
              T* out, T* bias, int threads) {
    using S = Simd<T>;
    constexpr int64_t block = 64 / sizeof(T);
    const int64_t blocks = (features + block - 1) / block;
    const auto body = [&](int64_t i) {
        const int64_t from = i * block, to = std::min(features, from + block);
        if (batch_major) {
            for (int64_t b = 0; b < batch; ++b) {
                const T* row = g + b * g_stride;
                for (int64_t f = from; f < to; ++f) out[f * batch + b] = row[f];
            }
        }
        if (batch_major && !y && !bias) return;
        for (int64_t f = from; f < to; ++f) {
            const T* in = batch_major ? out + f * batch : g + f * g_stride;
            T* to_row = out ? out + f * batch : nullptr;
            typename S::V total = S::zero();
            for (int64_t b = 0; b < batch; b += S::W) {
                const int n = int(std::min<int64_t>(S::W, batch - b));
                typename S::V d = n == S::W ? S::load(in + b) : S::load(in + b, n);
                if (y) {
                    const T* activation = y + f * y_stride + b;
                    d = S::where_positive(n == S::W ? S::load(activation) : S::load(activation, n), d);
                }
                if (to_row && (y || !batch_major)) {
                    if (n == S::W) S::store(to_row + b, d);
                    else S::store(to_row + b, d, n);
                }
                total = S::add(total, d);
            }
            if (bias) {
                T sums[4];
                S::sum4(total, S::zero(), S::zero(), S::zero(), sums);
                bias[f] = sums[0];
            }
        }
    };
    in_parallel(blocks, threads, features * batch, body);
}

#include "rows.cpp"

}  // namespace DST_ISA
}  // namespace

#include "conv.cpp"

namespace dst {

#define DST_JOINED(isa, type) isa##_##type
#define DST_NAMED(isa, type) DST_JOINED(isa, type)
#define DST_DEFINE(T)                                                                                     \
    const Kernels<T> DST_NAMED(DST_ISA, T) = {                                                            \
        {DST_ISA::forward<T, uint16_t>, DST_ISA::forward<T, int32_t>},                                    \
        DST_ISA::dense<T>,                                                                                \
        {DST_ISA::backward<T, uint16_t>, DST_ISA::backward<T, int32_t>},                                  \
        DST_ISA::gradient<T>,                                                                             \
        {DST_ISA::rows_forward<T, uint16_t>, DST_ISA::rows_forward<T, int32_t>},                          \
        {DST_ISA::rows_backward<T, uint16_t>, DST_ISA::rows_backward<T, int32_t>},                        \
        {DST_ISA::conv_forward<T, uint16_t>, DST_ISA::conv_forward<T, int32_t>},                          \
        {DST_ISA::conv_backward<T, uint16_t>, DST_ISA::conv_backward<T, int32_t>},                        \
    };

#ifdef DST_ONLY_TYPE
DST_DEFINE(DST_ONLY_TYPE)
#else
DST_DEFINE(float)
DST_DEFINE(double)
#endif
#undef DST_JOINED
#undef DST_NAMED
#undef DST_DEFINE

}  // namespace dst
#endif
