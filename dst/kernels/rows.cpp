// Sparse layers over many row-major examples: X is [batch, in], Y is [batch, out]. Included by spmm.cpp once per
// instruction set, inside that set's namespace.
//
// The batch is cut into blocks of a few vectors of examples. The block of an operand is transposed in registers into
// scratch, [features, block], where a non-zero weight is again one scalar times one contiguous vector; results are
// transposed on their way out. Scratch stays in the caches, so memory sees every operand once, in its own order.

// Vectors of examples in a block: as many as the backward pass can hold twice in the registers of AVX2, and few enough for
// the block of a hidden layer of a transformer to stay near the first-level cache.
constexpr int kVectors = 4;

// Bytes of a block that one pass over the weight may touch: half of a common second-level cache.
#if DST_LEVEL == 2
constexpr int64_t kFarBytes = 512 * 1024;
#else
constexpr int64_t kFarBytes = 256 * 1024;
#endif
constexpr int64_t kPanelBytes = 16 * 1024;
constexpr int64_t kAhead = 3;  // lines fetched ahead of those being transposed

// ---- transposing in registers
// A vector is gathered from 16-byte pieces of several rows; what remains is to transpose the pieces in place.
template <class T>
struct Turn;

#if DST_LEVEL == 2
template <>
struct Turn<float> {
    using V = __m512;
    static DST_INLINE V pieces(const float* p, int64_t step) {
        V v = _mm512_castps128_ps512(_mm_loadu_ps(p));
        v = _mm512_insertf32x4(v, _mm_loadu_ps(p + step), 1);
        v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 2 * step), 2);
        return _mm512_insertf32x4(v, _mm_loadu_ps(p + 3 * step), 3);
    }
    static DST_INLINE void transpose(V* v) {
        const V a = _mm512_unpacklo_ps(v[0], v[1]), b = _mm512_unpackhi_ps(v[0], v[1]);
        const V c = _mm512_unpacklo_ps(v[2], v[3]), d = _mm512_unpackhi_ps(v[2], v[3]);
        v[0] = _mm512_shuffle_ps(a, c, 0x44);
        v[1] = _mm512_shuffle_ps(a, c, 0xEE);
        v[2] = _mm512_shuffle_ps(b, d, 0x44);
        v[3] = _mm512_shuffle_ps(b, d, 0xEE);
    }
};

template <>
struct Turn<double> {
    using V = __m512d;
    static DST_INLINE V pieces(const double* p, int64_t step) {
        V v = _mm512_castpd128_pd512(_mm_loadu_pd(p));
        v = _mm512_insertf64x2(v, _mm_loadu_pd(p + step), 1);
        v = _mm512_insertf64x2(v, _mm_loadu_pd(p + 2 * step), 2);
        return _mm512_insertf64x2(v, _mm_loadu_pd(p + 3 * step), 3);
    }
    static DST_INLINE void transpose(V* v) {
        const V a = _mm512_unpacklo_pd(v[0], v[1]);
        v[1] = _mm512_unpackhi_pd(v[0], v[1]);
        v[0] = a;
    }
};

#elif DST_LEVEL == 1
template <>
struct Turn<float> {
    using V = __m256;
    static DST_INLINE V pieces(const float* p, int64_t step) {
        return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + step), 1);
    }
    static DST_INLINE void transpose(V* v) {
        const V a = _mm256_unpacklo_ps(v[0], v[1]), b = _mm256_unpackhi_ps(v[0], v[1]);
        const V c = _mm256_unpacklo_ps(v[2], v[3]), d = _mm256_unpackhi_ps(v[2], v[3]);
        v[0] = _mm256_shuffle_ps(a, c, 0x44);
        v[1] = _mm256_shuffle_ps(a, c, 0xEE);
        v[2] = _mm256_shuffle_ps(b, d, 0x44);
        v[3] = _mm256_shuffle_ps(b, d, 0xEE);
    }
};

template <>
struct Turn<double> {
    using V = __m256d;
    static DST_INLINE V pieces(const double* p, int64_t step) {
        return _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(p)), _mm_loadu_pd(p + step), 1);
    }
    static DST_INLINE void transpose(V* v) {
        const V a = _mm256_unpacklo_pd(v[0], v[1]);
        v[1] = _mm256_unpackhi_pd(v[0], v[1]);
        v[0] = a;
    }
};

#else
template <class T>
struct Turn {
    using V = typename Simd<T>::V;
    static DST_INLINE V pieces(const T* p, int64_t) { return Simd<T>::load(p); }
    static DST_INLINE void transpose(V* v) {
        for (int i = 0; i < Simd<T>::W; ++i)
            for (int j = 0; j < i; ++j) {
                const T a = v[i][j];
                v[i][j] = v[j][i];
                v[j][i] = a;
            }
    }
};
#endif

// Elements of a cache line: features are moved in lines, so that every line of an operand is touched once.
template <class T>
constexpr int64_t kLine = 64 / sizeof(T);

// Features of the output whose results are gathered before they are transposed.
template <class T>
constexpr int64_t kGroup = 4 * kLine<T>;

template <class T>
struct Operand {
    const T* data;
    int64_t stride;
    const T* y;  // read unless FACTOR is kNone
    int64_t y_stride;
};

// What an output gradient is multiplied by while it is brought in: nothing, whether the output `y` is positive (ReLU), or
// a derivative that the forward pass has left in `y`.
enum Factor { kNone, kPositive, kGiven };

template <class T>
DST_INLINE T factored(Factor factor, T v, T y) {
    return factor == kNone ? v : factor == kGiven ? v * y : y <= T(0) ? T(0) : v;
}

// Bring `lanes` rows of an operand into scratch [features, NV vectors]; lanes beyond are zero. `sums` receives the sum of
// every feature if SUM. A panel of features is walked by one vector of rows at a time: rows that lie a multiple of 4096
// bytes apart share a set of the first-level cache, which has room for few more.
template <class T, int NV, Factor FACTOR, bool SUM>
void turn_in(const Operand<T>& a, int64_t lanes, int64_t features, T* out, T* sums) {
    using S = Simd<T>;
    using V = typename S::V;
    constexpr int64_t L = NV * S::W, line = kLine<T>, panel = std::max<int64_t>(1, kPanelBytes / (64 * L)) * line;
    constexpr int K = 16 / sizeof(T);
    const int64_t whole = lanes / S::W * S::W;
    for (int64_t begin = 0; begin < features; begin += panel) {
        const int64_t end = std::min(features, begin + panel), lines = (end - begin) / line;
        V total[panel / K];
        if (SUM)
            for (int64_t q = 0; q < lines * (line / K); ++q) total[q] = S::zero();
        for (int64_t l = 0; l < whole; l += S::W)
            for (int64_t f = begin; f + line <= end; f += line) {
                const T* in = a.data + l * a.stride + f;
                const T* y = FACTOR ? a.y + l * a.y_stride + f : nullptr;
                for (int i = 0; i < S::W; ++i) {
                    __builtin_prefetch(in + i * a.stride + kAhead * line);
                    if (FACTOR) __builtin_prefetch(y + i * a.y_stride + kAhead * line);
                }
                for (int q = 0; q < line / K; ++q) {
                    V v[K];
                    for (int i = 0; i < K; ++i) {
                        v[i] = Turn<T>::pieces(in + i * a.stride + q * K, K * a.stride);
                        if (FACTOR) {
                            const V w = Turn<T>::pieces(y + i * a.y_stride + q * K, K * a.y_stride);
                            v[i] = FACTOR == kGiven ? S::fma(w, v[i], S::zero()) : S::where_positive(w, v[i]);
                        }
                    }
                    if (SUM) {
                        V sum = v[0];
                        for (int i = 1; i < K; ++i) sum = S::add(sum, v[i]);
                        V& t = total[(f - begin) / K + q];
                        t = S::add(t, sum);
                    }
                    Turn<T>::transpose(v);
                    for (int i = 0; i < K; ++i) S::store(out + (f + q * K + i) * L + l, v[i]);
                }
            }
        if (SUM)
            for (int64_t q = 0; q < lines * (line / K); ++q) {
                T parts[S::W];
                S::store(parts, total[q]);
                for (int i = 0; i < S::W; ++i) sums[begin + q * K + i % K] += parts[i];
            }
        for (int64_t f = begin; f < end; ++f) {  // what does not fill a vector or a line
            int64_t l = f < begin + lines * line ? whole : 0;
            if (l == L) {
                f = begin + lines * line - 1;
                continue;
            }
            for (; l < lanes; ++l) {
                const T v = factored(FACTOR, a.data[l * a.stride + f], FACTOR ? a.y[l * a.y_stride + f] : T(0));
                if (SUM) sums[f] += v;
                out[f * L + l] = v;
            }
            for (; l < L; ++l) out[f * L + l] = 0;
        }
    }
}

template <class T, int NV, Factor FACTOR>
void turn_in(const Operand<T>& a, int64_t lanes, int64_t features, T* out, T* sums) {
    if (sums) turn_in<T, NV, FACTOR, true>(a, lanes, features, out, sums);
    else turn_in<T, NV, FACTOR, false>(a, lanes, features, out, nullptr);
}

// ---- GELU, x Φ(x), with its derivative Φ(x) + x φ(x)
inline void gelu(double* y, double* derivative, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const double x = y[i], cdf = 0.5 * std::erfc(-x * 0.70710678118654752440);
        if (derivative) derivative[i] = cdf + x * 0.39894228040143267794 * std::exp(-0.5 * x * x);
        y[i] = x * cdf;
    }
}

// In single precision the normal distribution comes from Abramowitz and Stegun, formula 7.1.26, whose error (1.5e-7) is that
// of single precision, and shares its exponential with the density. Plain loops: compilers make vectors of them.
inline void gelu(float* y, float* derivative, int64_t n) {
    constexpr int64_t piece = 64;
    float cdf[piece], density[piece];
    for (int64_t begin = 0; begin < n; begin += piece) {
        const int64_t size = std::min(piece, n - begin);
        float* at = y + begin;
        for (int64_t i = 0; i < size; ++i) {
            const float x = at[i], a = std::fabs(x) * 0.70710678f;
            float p = x * x * -0.72134752f;  // exp(-x²/2) = 2^p, in whole and fractional powers
            const bool normal = p > -125.0f;  // not NaN either, which no integer can hold
            p = normal ? p : -125.0f;
            const float whole = (p + 12582912.0f) - 12582912.0f, f = p - whole;
            float e = 1.5403530e-4f;
            e = e * f + 1.3333558e-3f;
            e = e * f + 9.6181291e-3f;
            e = e * f + 5.5504109e-2f;
            e = e * f + 2.4022651e-1f;
            e = e * f + 6.9314718e-1f;
            e = e * f + 1.0f;
            const int32_t bits = (int32_t(whole) + 127) << 23;
            float power;
            std::memcpy(&power, &bits, sizeof power);
            e = normal ? e * power : 0.0f;
            const float t = 1.0f / (1.0f + 0.3275911f * a);
            float q = 1.061405429f;
            q = q * t - 1.453152027f;
            q = q * t + 1.421413741f;
            q = q * t - 0.284496736f;
            q = q * t + 0.254829592f;
            q *= 0.5f * t * e;
            cdf[i] = x < 0.0f ? q : 1.0f - q;
            density[i] = 0.39894228f * e;
        }
        if (derivative)
            for (int64_t i = 0; i < size; ++i) derivative[begin + i] = cdf[i] + at[i] * density[i];
        for (int64_t i = 0; i < size; ++i) at[i] *= cdf[i];
    }
}

// Brings an operand of the next block into the second-level cache while this one is computed: some bytes after every row
// or column of the weight.
struct Ahead {
    const char *at = nullptr, *upto = nullptr;
    int64_t rate = 0;

    // Rows far apart, and more than the cache has room for, are left to be fetched when they are read.
    template <class T>
    Ahead(const T* data, int64_t stride, int64_t features, int64_t lanes, int64_t steps) {
        const int64_t bytes = stride * lanes * int64_t(sizeof(T));
        if (!data || lanes <= 0 || stride >= 2 * features || bytes >= kFarBytes) return;
        at = upto = reinterpret_cast<const char*>(data);
        rate = bytes / std::max<int64_t>(1, steps) + 1;
    }

    DST_INLINE void step() {
        for (upto += rate; at < upto; at += 64) __builtin_prefetch(at, 0, 2);
    }
};

// The same for the lines that the next group of results is written to: there are as many streams as examples, more than a
// machine foresees. Called after the i-th of a group.
template <class T>
DST_INLINE void ahead_of_results(const T* out, int64_t stride, int64_t lanes, int64_t i) {
    for (int64_t l = i * lanes / kGroup<T>; l < (i + 1) * lanes / kGroup<T>; ++l)
        for (int64_t f = 0; f < kGroup<T>; f += kLine<T>) __builtin_prefetch(out + l * stride + f, 0, 2);
}

// Bring a group of features, scratch [features, NV vectors], back to `lanes` rows: a few rows at a time, as above.
template <class T, int NV>
DST_INLINE void turn_out(const T* in, int64_t lanes, int64_t features, T* out, int64_t stride) {
    using S = Simd<T>;
    using V = typename S::V;
    constexpr int64_t L = NV * S::W, line = kLine<T>;
    constexpr int K = 16 / sizeof(T);
    const int64_t whole = lanes / S::W * S::W, full = features / line * line;
    for (int64_t l = 0; l < whole; l += S::W)
        for (int q = 0; q < S::W; q += K)
            for (int64_t f = 0; f < full; f += line)
                for (int64_t p = f; p < f + line; p += S::W) {
                    V v[K];
                    for (int i = 0; i < K; ++i) v[i] = Turn<T>::pieces(in + (p + i) * L + l + q, K * L);
                    Turn<T>::transpose(v);
                    for (int i = 0; i < K; ++i) S::store(out + (l + q + i) * stride + p, v[i]);
                }
    for (int64_t l = 0; l < lanes; ++l)
        for (int64_t f = l < whole ? full : 0; f < features; ++f) out[l * stride + f] = in[f * L + l];
}

// ---- a compressed matrix cut into `count` runs of its indices, so that a run of the operand stays in the cache
struct Cuts {
    int64_t count, run, lines;
    const int32_t* pointers;
    const int32_t* inner;  // [count - 1, lines]: where the runs after the first begin

    const int32_t* from(int64_t k) const { return k == 0 ? pointers : inner + (k - 1) * lines; }
    const int32_t* to(int64_t k) const { return k + 1 == count ? pointers + 1 : inner + k * lines; }
};

inline Cuts plan_cuts(int64_t features, int64_t bytes, int64_t lines, const int32_t* pointers) {
    Cuts cuts;
    cuts.count = std::max<int64_t>(1, (features * bytes + kFarBytes - 1) / kFarBytes);
    cuts.run = (features + cuts.count - 1) / cuts.count;
    cuts.lines = lines;
    cuts.pointers = pointers;
    cuts.inner = nullptr;
    return cuts;
}

template <class I>
void find_cuts(Cuts& cuts, const I* indices, int32_t* inner, int threads) {
    if (cuts.count == 1) return;
    cuts.inner = inner;
    in_parallel(cuts.lines, threads, cuts.lines * cuts.count * 64, [&](int64_t i) {
        const I *at = indices + cuts.pointers[i], *end = indices + cuts.pointers[i + 1];
        for (int64_t k = 1; k < cuts.count; ++k) {
            at = std::lower_bound(at, end, k * cuts.run, [](I index, int64_t bound) { return int64_t(index) < bound; });
            inner[(k - 1) * cuts.lines + i] = int32_t(at - indices);
        }
    });
}

// Workers take tasks in turn; worker w alone uses the w-th part of the scratch.
template <class F>
void share(int64_t tasks, int threads, int64_t work, const F& body) {
    if (threads <= 1 || work <= kSerialWork) {
        for (int64_t i = 0; i < tasks; ++i) body(0, i);
        return;
    }
    std::atomic<int64_t> next{0};
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int w = 0; w < threads; ++w)
        for (int64_t i = next++; i < tasks; i = next++) body(w, i);
}

inline int64_t round_line(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// ---- forward
template <class T, class I, int NV>
void rows_block(const RowsForward<T>& a, const Cuts& cuts, int64_t first, int64_t lanes, T* scratch) {
    using S = Simd<T>;
    using V = typename S::V;
    constexpr int64_t L = NV * S::W, step = kGroup<T>;
    constexpr int U = NV <= 2 ? 4 : NV <= 4 ? 2 : 1;  // independent sums hide the latency of the multiply-add
    T *x = scratch, *out = x + a.columns * L, *slope = out + step * L, *partial = slope + (a.derivative ? step * L : 0);
    turn_in<T, NV, kNone, false>({a.x + first * a.x_stride, a.x_stride, nullptr, 0}, lanes, a.columns, x, nullptr);
    const I* indices = static_cast<const I*>(a.indices);
    const T* values = a.values;
    const T* bias = a.bias;
    const int64_t rows = a.rows, next = std::min<int64_t>(L, a.batch - first - L);
    Ahead ahead(a.x + (first + L) * a.x_stride, a.x_stride, a.columns, next, rows * cuts.count);
    for (int64_t k = 0; k < cuts.count; ++k) {
        const int32_t *from = cuts.from(k), *to = cuts.to(k);
        const bool last = k + 1 == cuts.count, relu = last && a.activation == kRelu, bent = last && a.activation == kGelu;
        for (int64_t group = 0; group < rows; group += step) {
            const int64_t size = std::min(step, rows - group);
            const T* results = group + step < rows ? a.y + first * a.y_stride + group + step : a.y + (first + L) * a.y_stride;
            for (int64_t i = 0; i < size; ++i) {
                const int64_t r = group + i;
                V sum[U][NV];
                for (int v = 0; v < NV; ++v) {
                    sum[0][v] = k ? S::load(partial + r * L + v * S::W) : S::set(bias ? bias[r] : T(0));
                    for (int u = 1; u < U; ++u) sum[u][v] = S::zero();
                }
                ahead.step();
                if (last) ahead_of_results(results, a.y_stride, L, i);
                int64_t j = from[r];
                const int64_t end = to[r];
                for (; j + U <= end; j += U)
                    for (int u = 0; u < U; ++u) {
                        const T* row = x + int64_t(indices[j + u]) * L;
                        const V w = S::set(values[j + u]);
                        for (int v = 0; v < NV; ++v) sum[u][v] = S::fma(w, S::load(row + v * S::W), sum[u][v]);
                    }
                for (; j < end; ++j) {
                    const T* row = x + int64_t(indices[j]) * L;
                    const V w = S::set(values[j]);
                    for (int v = 0; v < NV; ++v) sum[0][v] = S::fma(w, S::load(row + v * S::W), sum[0][v]);
                }
                T* y = last ? out + i * L : partial + r * L;
                for (int v = 0; v < NV; ++v) {
                    V s = sum[0][v];
                    for (int u = 1; u < U; ++u) s = S::add(s, sum[u][v]);
                    if (relu) s = S::positive(s);
                    S::store(y + v * S::W, s);
                }
            }
            if (bent) gelu(out, a.derivative ? slope : nullptr, size * L);
            if (last) turn_out<T, NV>(out, lanes, size, a.y + first * a.y_stride + group, a.y_stride);
            if (bent && a.derivative) turn_out<T, NV>(slope, lanes, size, a.derivative + first * rows + group, rows);
        }
    }
}

template <class T, class I, int NV>
void rows_any_block(const RowsForward<T>& a, const Cuts& cuts, int64_t first, int64_t lanes, T* scratch) {
    if constexpr (NV > 1) {
        if (lanes <= NV / 2 * Simd<T>::W) return rows_any_block<T, I, NV / 2>(a, cuts, first, lanes, scratch);
    }
    rows_block<T, I, NV>(a, cuts, first, lanes, scratch);
}

template <class T, class I>
bool rows_forward(const RowsForward<T>& a, Scratch& memory) {
    if (a.batch <= 0 || a.rows <= 0) return true;
    constexpr int64_t L = kVectors * Simd<T>::W, size = sizeof(T);
    const int64_t blocks = (a.batch + L - 1) / L;
    const int threads = int(std::min<int64_t>(std::max(1, a.threads), blocks));
    Cuts cuts = plan_cuts(a.columns, L * size, a.rows, a.pointers);
    const int64_t each = (a.columns + (a.derivative ? 2 : 1) * kGroup<T> + (cuts.count > 1 ? a.rows : 0)) * L;
    const int64_t inner = round_line((cuts.count - 1) * a.rows * 4);
    char* data = memory.lines(each * size * threads + inner);
    if (!data) return false;
    find_cuts(cuts, static_cast<const I*>(a.indices), reinterpret_cast<int32_t*>(data), a.threads);
    T* scratch = reinterpret_cast<T*>(data + inner);
    const int64_t work = (int64_t(a.pointers[a.rows]) + a.rows + a.columns) * a.batch;
    const int64_t run = std::max<int64_t>(1, std::min<int64_t>(8, blocks / (threads * 4)));  // blocks in a row for a worker
    share((blocks + run - 1) / run, threads, work, [&](int worker, int64_t i) {
        for (int64_t b = i * run; b < std::min(blocks, (i + 1) * run); ++b)
            rows_any_block<T, I, kVectors>(a, cuts, b * L, std::min(L, a.batch - b * L), scratch + worker * each);
    });
    return true;
}

// ---- backward: one column of W, whose input and sum stay in registers; every vector of the output gradient is loaded once
// and feeds the input gradient and the weight's own
template <class T, int NV>
struct Column {
    using S = Simd<T>;
    using V = typename S::V;
    V x[NV], sum[NV];

    template <bool INPUT>
    DST_INLINE V step(const T* g, T weight) {
        const V w = S::set(weight);
        V dot = S::zero();
        for (int v = 0; v < NV; ++v) {
            const V d = S::load(g + v * S::W);
            if (INPUT) sum[v] = S::fma(w, d, sum[v]);
            dot = S::fma(x[v], d, dot);
        }
        return dot;
    }
};

template <class T>
DST_INLINE void accumulate4(const T* parts, T* out, bool fresh) {
    typedef T Four __attribute__((vector_size(4 * sizeof(T))));
    Four a, b;
    std::memcpy(&a, parts, sizeof a);
    if (!fresh) {
        std::memcpy(&b, out, sizeof b);
        a += b;
    }
    std::memcpy(out, &a, sizeof a);
}

template <class T, class I, int NV, bool INPUT>
void columns_block(const RowsBackward<T>& a, const Cuts& cuts, int64_t begin, int64_t end, int64_t first, int64_t lanes,
                   bool fresh, T* gv, T* gb, T* scratch) {
    using S = Simd<T>;
    using V = typename S::V;
    constexpr int64_t L = NV * S::W, step = kGroup<T>;
    T *g = scratch, *x = g + a.rows * L, *out = x + (end - begin) * L, *partial = out + step * L;
    const Operand<T> gradient = {a.g + first * a.g_stride, a.g_stride, a.y ? a.y + first * a.y_stride : nullptr, a.y_stride};
    if (a.y && a.derivative) turn_in<T, NV, kGiven>(gradient, lanes, a.rows, g, gb);
    else if (a.y) turn_in<T, NV, kPositive>(gradient, lanes, a.rows, g, gb);
    else turn_in<T, NV, kNone>(gradient, lanes, a.rows, g, gb);
    const Operand<T> input = {a.x + first * a.x_stride + begin, a.x_stride, nullptr, 0};
    turn_in<T, NV, kNone, false>(input, lanes, end - begin, x, nullptr);
    const I* indices = static_cast<const I*>(a.indices);
    const T* values = a.values;
    const int64_t next = std::min<int64_t>(L, a.batch - first - L);
    const int64_t steps = (end - begin) * cuts.count;
    Ahead ahead_g(a.g + (first + L) * a.g_stride, a.g_stride, a.rows, next, steps);
    Ahead ahead_y(a.y ? a.y + (first + L) * a.y_stride : nullptr, a.y_stride, a.rows, next, steps);
    Ahead ahead_x(a.x + (first + L) * a.x_stride + begin, a.x_stride, end - begin, next, steps);
    for (int64_t k = 0; k < cuts.count; ++k) {
        const int32_t *from = cuts.from(k), *to = cuts.to(k);
        const bool last = k + 1 == cuts.count;
        for (int64_t group = begin; group < end; group += step) {
            const int64_t size = std::min(step, end - group);
            const T* results = !INPUT              ? nullptr
                               : group + step < end ? a.gx + first * a.gx_stride + group + step
                                                    : a.gx + (first + L) * a.gx_stride + begin;
            for (int64_t i = 0; i < size; ++i) {
                const int64_t c = group + i;
                Column<T, NV> column;
                for (int v = 0; v < NV; ++v) {
                    column.x[v] = S::load(x + (c - begin) * L + v * S::W);
                    if (INPUT) column.sum[v] = k ? S::load(partial + (c - begin) * L + v * S::W) : S::zero();
                }
                ahead_g.step();
                ahead_y.step();
                ahead_x.step();
                if (INPUT && last) ahead_of_results(results, a.gx_stride, L, i);
                const int64_t stop = to[c];
                int64_t j = from[c];
                T parts[4];
                for (; j + 4 <= stop; j += 4) {
                    V dot[4];
                    for (int q = 0; q < 4; ++q)
                        dot[q] = column.template step<INPUT>(g + int64_t(indices[j + q]) * L, values[j + q]);
                    S::sum4(dot[0], dot[1], dot[2], dot[3], parts);
                    accumulate4(parts, gv + j, fresh);
                }
                if (j < stop) {
                    V dot[4];
                    for (int q = 0; q < 4; ++q)
                        dot[q] = j + q < stop ? column.template step<INPUT>(g + int64_t(indices[j + q]) * L, values[j + q])
                                              : S::zero();
                    S::sum4(dot[0], dot[1], dot[2], dot[3], parts);
                    for (int q = 0; j + q < stop; ++q) gv[j + q] = fresh ? parts[q] : gv[j + q] + parts[q];
                }
                if (INPUT) {
                    T* gx = last ? out + i * L : partial + (c - begin) * L;
                    for (int v = 0; v < NV; ++v) S::store(gx + v * S::W, column.sum[v]);
                }
            }
            if (INPUT && last) turn_out<T, NV>(out, lanes, size, a.gx + first * a.gx_stride + group, a.gx_stride);
        }
    }
}

template <class T, class I, int NV, bool INPUT>
void columns_any_block(const RowsBackward<T>& a, const Cuts& cuts, int64_t begin, int64_t end, int64_t first,
                       int64_t lanes, bool fresh, T* gv, T* gb, T* scratch) {
    if constexpr (NV > 1) {
        if (lanes <= NV / 2 * Simd<T>::W)
            return columns_any_block<T, I, NV / 2, INPUT>(a, cuts, begin, end, first, lanes, fresh, gv, gb, scratch);
    }
    columns_block<T, I, NV, INPUT>(a, cuts, begin, end, first, lanes, fresh, gv, gb, scratch);
}

// The weight's gradient is summed within slices of the batch, then over the slices in their order. How many there are
// depends on shapes alone; where they do not occupy the threads, several share the columns of a slice, which changes no
// sum but transposes the output gradient once for each.
constexpr int64_t kMostSlices = 32, kSliceBlocks = 4, kSliceBytes = kScratchBytes / 2;

template <class T, class I, bool INPUT>
bool rows_backward_in(const RowsBackward<T>& a, Scratch& memory) {
    constexpr int64_t L = kVectors * Simd<T>::W, size = sizeof(T);
    const int64_t nnz = a.pointers[a.columns], blocks = (a.batch + L - 1) / L;
    int64_t slices = 1;
    while (slices < kMostSlices && slices * kSliceBlocks < blocks && 2 * slices * nnz * size <= kSliceBytes) slices *= 2;
    int threads = std::max(1, a.threads);
    const int64_t work = (2 * nnz + a.rows + 2 * a.columns) * a.batch;
    if (work <= kSerialWork) threads = 1;
    int64_t shares = 1;
    if (slices % threads && slices < 4 * threads) shares = std::max<int64_t>(1, std::min(a.columns, 4 * threads / slices));
    threads = int(std::min<int64_t>(threads, slices * shares));
    Cuts cuts = plan_cuts(a.rows, L * size, a.columns, a.pointers);
    const int64_t each = (a.rows + a.columns + kGroup<T> + (INPUT && cuts.count > 1 ? a.columns : 0)) * L;
    const int64_t inner = round_line((cuts.count - 1) * a.columns * 4), one = round_line((nnz + a.rows) * size);
    char* data = memory.lines(inner + each * size * threads + one * (slices - 1));
    if (!data) return false;
    find_cuts(cuts, static_cast<const I*>(a.indices), reinterpret_cast<int32_t*>(data), threads);
    T* scratch = reinterpret_cast<T*>(data + inner);
    char* slice_data = data + inner + each * size * threads;
    const auto slice = [&](int64_t s) { return s ? reinterpret_cast<T*>(slice_data + (s - 1) * one) : a.gv; };
    const auto slice_bias = [&](int64_t s) { return s ? slice(s) + nnz : a.gb; };
    const int64_t total = nnz + 4 * a.columns;
    share(slices * shares, threads, work, [&](int worker, int64_t i) {
        const int64_t s = i / shares, q = i % shares;
        const int64_t begin = q == 0 ? 0 : balanced_cut(a.pointers, a.columns, total * q / shares);
        const int64_t end = q + 1 == shares ? a.columns : balanced_cut(a.pointers, a.columns, total * (q + 1) / shares);
        T* gb = a.gb && q == 0 ? slice_bias(s) : nullptr;
        if (gb) std::fill(gb, gb + a.rows, T(0));
        const int64_t from = blocks * s / slices, to = blocks * (s + 1) / slices;
        for (int64_t b = from; b < to; ++b)
            columns_any_block<T, I, kVectors, INPUT>(a, cuts, begin, end, b * L, std::min(L, a.batch - b * L), b == from, slice(s), gb,
                                               scratch + worker * each);
    });
    if (slices == 1) return true;
    constexpr int64_t piece = 1024;
    in_parallel((nnz + piece - 1) / piece, threads, nnz * slices, [&](int64_t i) {
        const int64_t to = std::min(nnz, (i + 1) * piece);
        for (int64_t s = 1; s < slices; ++s) {
            const T* from = slice(s);
            for (int64_t j = i * piece; j < to; ++j) a.gv[j] += from[j];
        }
    });
    if (a.gb)
        for (int64_t s = 1; s < slices; ++s)
            for (int64_t r = 0; r < a.rows; ++r) a.gb[r] += slice_bias(s)[r];
    return true;
}

template <class T, class I>
bool rows_backward(const RowsBackward<T>& a, Scratch& memory) {
    if (a.batch <= 0) {
        std::fill(a.gv, a.gv + a.pointers[a.columns], T(0));
        if (a.gb) std::fill(a.gb, a.gb + a.rows, T(0));
        return true;
    }
    return a.gx ? rows_backward_in<T, I, true>(a, memory) : rows_backward_in<T, I, false>(a, memory);
}
