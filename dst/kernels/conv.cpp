// Direct sparse convolution of NCHW images; included by spmm.cpp, once in its common half and once per instruction set.
//
// Layout. One vector holds the same element of as many images as it has lanes: a non-zero weight is then one scalar times
// aligned vectors at consecutive positions of a row, whatever the size of the image, and no lane is spent on padding. A
// band of rows is brought into this order in a scratch, with its padding in place, so a tap (channel, row, column of the
// kernel) is one offset into the scratch; outputs leave through a scratch too. Where the batch has fewer images than a
// vector has lanes, bands of one image take lanes too. With a stride the columns are stored by their remainder, which keeps
// the positions that a tap reads consecutive.
//
// Every element is summed in an order that depends on sizes and pattern alone; gradients of weights are summed in a number
// of parts that depends on sizes alone, and these in turn.

#ifndef DST_ISA
#ifndef DST_CONV_COMMON
#define DST_CONV_COMMON
// ------------------------------------------------------------------------------------------------ common half

extern "C" {
// Sizes of a convolution; the weight is [outputs, channels * kernel_height * kernel_width].
struct dst_conv {
    int64_t batch, channels, height, width, outputs, out_height, out_width;
    int64_t kernel_height, kernel_width, stride_height, stride_width, pad_height, pad_width, dilation_height, dilation_width;
};
}

namespace dst {

template <class T>
struct ConvForward {
    dst_conv s;
    const int32_t* pointers;  // by rows
    const void* indices;
    const T* values;
    const T* x;
    T* y;
    const T* bias;
    bool relu;
    int threads;
};

template <class T>
struct ConvBackward {
    dst_conv s;
    const int32_t* pointers;  // by columns
    const void* indices;
    const T* values;
    const T* x;
    const T* g;
    T* gx;  // may be null
    T* gv;
    T* gb;  // may be null
    int threads;
};

}  // namespace dst

namespace {

// Bytes that the scratch of one band may take: a share of the last-level cache. Taller bands repeat fewer rows and read and
// write images in longer streams; the rows at work are what has to fit the second-level cache.
constexpr int64_t kBandBytes = 4096 * 1024;

// Bytes of the scratch that the taps of one block reach from one strip of outputs: half a first-level cache.
constexpr int64_t kBlockBytes = 16 * 1024;

// Outputs of a strip: sums that fit into the registers.
constexpr int kMostPositions = 8;

// Elements of a scratch that 32-bit offsets reach.
constexpr int64_t kMostElements = std::numeric_limits<int32_t>::max();

// Parts in which the gradients of the weights are summed, and so the most threads that a backward pass can use.
constexpr int64_t kParts = 16;

inline Scratch& conv_scratch() {
    static thread_local Scratch scratch;
    return scratch;
}

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t whole_lines(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

// A scratch holds rows, a row its channels, a channel its columns, a column one vector: what the taps of a few consecutive
// outputs reach lies in few pages. Steps are an odd number of cache lines, so that the same place in successive rows and
// channels falls into different sets of the first-level cache.
struct Layout {
    int64_t channel, row, rows;  // elements between channels, elements between rows, number of rows
};

template <class T>
Layout lay_out(int64_t channels, int64_t rows, int64_t slots, int64_t lanes) {
    const int64_t line = 64 / sizeof(T), channel = ceil_div(slots * lanes, line) | 1;
    return {channel * line, (channels * channel | 1) * line, rows};
}

// How images are cut into bands of `height` rows: lane i holds band i / batch of image i % batch.
struct Bands {
    int64_t height, lanes, units;
};

// The cheapest cut whose bands have at most `fit` rows, a multiple of `step`. A unit costs its rows and a constant.
inline Bands cut_bands(int64_t batch, int64_t rows, int64_t step, int64_t fit, int64_t width, double row_cost,
                       double unit_cost, int64_t parallel) {
    Bands best{};
    double least = 0;
    for (int64_t height = step; height < rows + step; height += step) {
        if (height > fit && best.height) break;
        const int64_t lanes = batch * ceil_div(rows, height), units = ceil_div(lanes, width);
        const double cost = double(ceil_div(units, parallel)) * (row_cost * double(height) + unit_cost);
        if (best.height && cost > least) continue;
        best = {height, lanes, units};
        least = cost;
    }
    return best;
}

// Where the columns of a row go in the scratch: offsets in elements of columns [first, last).
struct Columns {
    int64_t first, last, slots;
    bool contiguous;
    std::vector<int32_t> offsets;  // by column
};

// Column i is padded column i + shift; padded columns are stored by their remainder modulo the stride. Columns beyond
// the `padded` ones are not stored.
inline Columns place_columns(int64_t width, int64_t shift, int64_t padded, int64_t stride, int64_t lanes) {
    Columns c;
    const int64_t each = ceil_div(padded, stride);
    c.slots = each * stride;
    c.contiguous = stride == 1;
    c.first = std::min(width, std::max<int64_t>(0, -shift));
    c.last = std::max(c.first, std::min(width, padded - shift));
    c.offsets.assign(size_t(width), 0);
    for (int64_t i = c.first; i < c.last; ++i)
        c.offsets[i] = int32_t(((i + shift) % stride * each + (i + shift) / stride) * lanes);
    return c;
}

// Taps of one output channel (backward: input channel) within one block.
struct Segment {
    int32_t channel, count;
};

// Taps in the order in which they are used: by list, by block of the channels they read (whose reach stays in the
// first-level cache), by segment. Within a block segments come by their number of taps, so that the processor predicts
// where a loop over a segment ends. The first block has a segment for every channel.
template <class T>
struct Taps {
    int64_t blocks;
    std::vector<int32_t> segment_starts, tap_starts;  // [lists * blocks + 1]
    std::vector<Segment> segments;
    std::unique_ptr<int32_t[]> offsets;  // into the scratch, in elements
    std::unique_ptr<int32_t[]> positions;  // in the values
    std::unique_ptr<T[]> values;
};

// Blocks of the channels read, each of which reaches `bytes` from a strip.
inline int64_t block_size(int64_t channels, int64_t bytes) {
    const int64_t blocks = std::max<int64_t>(1, (channels * bytes + kBlockBytes / 2) / kBlockBytes);
    return std::max<int64_t>(1, ceil_div(channels, blocks));
}

// `runs(f)` calls f(list, block, channel, first, last, base) for every run of taps at consecutive positions [first, last),
// twice in the same order; `offset(position, base)` is the offset of a tap. Every pass begins with this, also that of a single
// image, so taps are copied in runs and nothing is compared to sort them.
template <class T, class Runs, class Offset>
Taps<T> order_taps(int64_t lists, int64_t blocks, int64_t channels, int64_t n, const T* values, const Runs& runs,
                   const Offset& offset) {
    Taps<T> t;
    t.blocks = blocks;
    std::vector<int32_t> next(size_t(lists * blocks * channels), 0), places;
    runs([&](int64_t list, int64_t block, int64_t channel, int32_t first, int32_t last, int64_t) {
        next[(list * blocks + block) * channels + channel] += last - first;
    });
    t.offsets.reset(new int32_t[size_t(n)]);
    t.positions.reset(new int32_t[size_t(n)]);
    t.values.reset(new T[size_t(n)]);
    int32_t taps = 0;
    for (int64_t i = 0; i < lists * blocks; ++i) {
        const size_t start = t.segments.size();
        t.segment_starts.push_back(int32_t(start));
        t.tap_starts.push_back(taps);
        int32_t* counts = next.data() + i * channels;
        const bool all = i % blocks == 0;
        // A stable counting sort by the number of taps.
        places.assign(size_t(*std::max_element(counts, counts + channels)) + 2, 0);
        for (int64_t c = 0; c < channels; ++c)
            if (counts[c] || all) ++places[counts[c] + 1];
        for (size_t k = 1; k < places.size(); ++k) places[k] += places[k - 1];
        t.segments.resize(start + size_t(places.back()));
        for (int64_t c = 0; c < channels; ++c)
            if (counts[c] || all) t.segments[start + size_t(places[counts[c]]++)] = {int32_t(c), counts[c]};
        for (size_t k = start; k < t.segments.size(); ++k) {
            counts[t.segments[k].channel] = taps;
            taps += t.segments[k].count;
        }
    }
    t.segment_starts.push_back(int32_t(t.segments.size()));
    t.tap_starts.push_back(taps);
    runs([&](int64_t list, int64_t block, int64_t channel, int32_t first, int32_t last, int64_t base) {
        int32_t& at = next[(list * blocks + block) * channels + channel];
        int32_t *offsets = t.offsets.get() + at, *positions = t.positions.get() + at;
        T* to = t.values.get() + at;
        at += last - first;
        for (int32_t j = first; j < last; ++j) {
            *offsets++ = int32_t(offset(j, base));
            *positions++ = j;
            *to++ = values[j];
        }
    });
    return t;
}

// Cut positions [first, last), whose indices increase, where an index reaches a multiple of `size`, and call
// f(number of the multiple, first, last) for the parts.
template <class I, class F>
inline void over_blocks(const I* indices, int32_t first, int32_t last, int64_t size, int64_t blocks, const F& f) {
    for (int64_t b = 0; b < blocks && first < last; ++b) {
        const int64_t bound = (b + 1) * size;
        int32_t end = b + 1 < blocks ? first : last;
        while (end < last && int64_t(indices[end]) < bound) ++end;
        if (first < end) f(b, first, end);
        first = end;
    }
}

template <class T, class I>
Taps<T> forward_taps(const dst_conv& s, const int32_t* pointers, const I* indices, const T* values, const Layout& x,
                     int64_t slots, int64_t lanes) {
    const int64_t each = slots / s.stride_width, area = s.kernel_height * s.kernel_width;
    const int64_t reach = std::min(slots, std::min(s.stride_width, s.kernel_width) * kMostPositions +
                                              (s.kernel_width - 1) * s.dilation_width);
    const int64_t size = block_size(s.channels, s.kernel_height * reach * lanes * int64_t(sizeof(T)));
    std::vector<int32_t> offsets;  // of the taps of one channel, and then by column
    offsets.reserve(size_t(s.channels * area));
    for (int64_t h = 0; h < s.kernel_height; ++h)
        for (int64_t w = 0; w < s.kernel_width; ++w) {
            const int64_t across = w * s.dilation_width;
            offsets.push_back(int32_t(h * s.dilation_height * x.row +
                                      (across % s.stride_width * each + across / s.stride_width) * lanes));
        }
    for (int64_t k = 0; k < (s.channels - 1) * area; ++k) offsets.push_back(offsets[k] + int32_t(x.channel));
    const int64_t blocks = std::max<int64_t>(1, ceil_div(s.channels, size));
    const auto runs = [&](const auto& f) {
        for (int64_t o = 0; o < s.outputs; ++o)
            over_blocks(indices, pointers[o], pointers[o + 1], size * area, blocks,
                        [&](int64_t block, int32_t first, int32_t last) { f(0, block, o, first, last, 0); });
    };
    return order_taps<T>(1, blocks, s.outputs, pointers[s.outputs], values, runs,
                         [&](int32_t j, int64_t) { return offsets[indices[j]]; });
}

// One list for each phase: the remainders of an input position modulo the strides.
template <class T, class I>
Taps<T> backward_taps(const dst_conv& s, const int32_t* pointers, const I* indices, const T* values, const Layout& g,
                      int64_t top, int64_t left, int64_t lanes) {
    const int64_t n = pointers[s.channels * s.kernel_height * s.kernel_width];
    const int64_t reach = kMostPositions + ceil_div((s.kernel_width - 1) * s.dilation_width, s.stride_width);
    const int64_t rows = ceil_div(s.kernel_height, s.stride_height), phases = s.stride_height * s.stride_width;
    const int64_t size = block_size(s.outputs, rows * reach * lanes * int64_t(sizeof(T)));
    const int64_t blocks = ceil_div(s.outputs, size), area = s.kernel_height * s.kernel_width;
    struct Tap {
        int64_t list, base;
    };
    std::vector<Tap> taps;  // of one channel
    for (int64_t h = 0; h < s.kernel_height; ++h)
        for (int64_t w = 0; w < s.kernel_width; ++w) {
            const int64_t down = floor_div(s.pad_height - h * s.dilation_height, s.stride_height);
            const int64_t row = s.pad_height - h * s.dilation_height - down * s.stride_height;
            const int64_t right = floor_div(s.pad_width - w * s.dilation_width, s.stride_width);
            const int64_t column = s.pad_width - w * s.dilation_width - right * s.stride_width;
            // An input meets the tap where its remainder and the tap's add up to nothing or to the stride.
            const int64_t phase_row = row ? s.stride_height - row : 0;
            const int64_t phase_column = column ? s.stride_width - column : 0;
            taps.push_back({phase_row * s.stride_width + phase_column,
                            (down + (row > 0) - top) * g.row + (right + (column > 0) - left) * lanes});
        }
    const auto runs = [&](const auto& f) {
        for (int64_t c = 0; c < s.channels; ++c)
            for (int64_t k = 0; k < area; ++k)
                over_blocks(indices, pointers[c * area + k], pointers[c * area + k + 1], size, blocks,
                            [&](int64_t block, int32_t first, int32_t last) {
                                f(taps[k].list, block, c, first, last, taps[k].base);
                            });
    };
    return order_taps<T>(phases, blocks, s.channels, n, values, runs,
                         [&](int32_t j, int64_t base) { return int64_t(indices[j]) * g.channel + base; });
}

}  // namespace
#endif
#else
// ------------------------------------------------------------------------------------------- per instruction set
namespace {
namespace DST_ISA {

// G consecutive elements of every image, between one vector per image part and one vector per element. `load` reads
// element `at` and its successors of each lane, `store` writes them.
template <class T>
struct Group;

#if DST_LEVEL == 2
template <>
struct Group<float> {
    using V = __m512;
    static constexpr int G = 4;
    static DST_INLINE void transpose(V* v) {
        const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(v[0], v[1]));
        const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(v[0], v[1]));
        const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(v[2], v[3]));
        const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(v[2], v[3]));
        v[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        v[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        v[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        v[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    static DST_INLINE void load(const float* const* p, int64_t at, V* v) {
        for (int q = 0; q < 4; ++q) {
            const __m256 low = _mm256_castps128_ps256(_mm_loadu_ps(p[q] + at));
            const __m256 high = _mm256_castps128_ps256(_mm_loadu_ps(p[q + 8] + at));
            v[q] = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_insertf128_ps(low, _mm_loadu_ps(p[q + 4] + at), 1)),
                                      _mm256_insertf128_ps(high, _mm_loadu_ps(p[q + 12] + at), 1), 1);
        }
        transpose(v);
    }
    static DST_INLINE void store(float* const* p, int64_t at, V* v) {
        transpose(v);
        for (int q = 0; q < 4; ++q) {
            _mm_storeu_ps(p[q] + at, _mm512_castps512_ps128(v[q]));
            _mm_storeu_ps(p[q + 4] + at, _mm512_extractf32x4_ps(v[q], 1));
            _mm_storeu_ps(p[q + 8] + at, _mm512_extractf32x4_ps(v[q], 2));
            _mm_storeu_ps(p[q + 12] + at, _mm512_extractf32x4_ps(v[q], 3));
        }
    }
    static DST_INLINE void store_twice(float* const* p, int64_t at, V* v) {
        store(p, at, v);
        store(p, at + G, v + G);
    }
};

template <>
struct Group<double> {
    using V = __m512d;
    static constexpr int G = 2;
    static DST_INLINE void transpose(V* v) {
        const V a = _mm512_unpacklo_pd(v[0], v[1]), b = _mm512_unpackhi_pd(v[0], v[1]);
        v[0] = a;
        v[1] = b;
    }
    static DST_INLINE void load(const double* const* p, int64_t at, V* v) {
        for (int q = 0; q < 2; ++q) {
            const __m256d low = _mm256_castpd128_pd256(_mm_loadu_pd(p[q] + at));
            const __m256d high = _mm256_castpd128_pd256(_mm_loadu_pd(p[q + 4] + at));
            v[q] = _mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_insertf128_pd(low, _mm_loadu_pd(p[q + 2] + at), 1)),
                                      _mm256_insertf128_pd(high, _mm_loadu_pd(p[q + 6] + at), 1), 1);
        }
        transpose(v);
    }
    static DST_INLINE void store(double* const* p, int64_t at, V* v) {
        transpose(v);
        for (int q = 0; q < 2; ++q) {
            _mm_storeu_pd(p[q] + at, _mm512_castpd512_pd128(v[q]));
            _mm_storeu_pd(p[q + 2] + at, _mm512_extractf64x2_pd(v[q], 1));
            _mm_storeu_pd(p[q + 4] + at, _mm512_extractf64x2_pd(v[q], 2));
            _mm_storeu_pd(p[q + 6] + at, _mm512_extractf64x2_pd(v[q], 3));
        }
    }
    static DST_INLINE void store_twice(double* const* p, int64_t at, V* v) {
        store(p, at, v);
        store(p, at + G, v + G);
    }
};

#elif DST_LEVEL == 1
template <>
struct Group<float> {
    using V = __m256;
    static constexpr int G = 4;
    static DST_INLINE void transpose(V* v) {
        const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(v[0], v[1]));
        const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(v[0], v[1]));
        const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(v[2], v[3]));
        const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(v[2], v[3]));
        v[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
        v[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
        v[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
        v[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
    }
    static DST_INLINE void load(const float* const* p, int64_t at, V* v) {
        for (int q = 0; q < 4; ++q)
            v[q] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p[q] + at)), _mm_loadu_ps(p[q + 4] + at), 1);
        transpose(v);
    }
    static DST_INLINE void store(float* const* p, int64_t at, V* v) {
        transpose(v);
        for (int q = 0; q < 4; ++q) {
            _mm_storeu_ps(p[q] + at, _mm256_castps256_ps128(v[q]));
            _mm_storeu_ps(p[q + 4] + at, _mm256_extractf128_ps(v[q], 1));
        }
    }
    // Eight elements: half as many stores.
    static DST_INLINE void store_twice(float* const* p, int64_t at, V* v) {
        transpose(v);
        transpose(v + 4);
        for (int q = 0; q < 4; ++q) {
            _mm256_storeu_ps(p[q] + at, _mm256_permute2f128_ps(v[q], v[q + 4], 0x20));
            _mm256_storeu_ps(p[q + 4] + at, _mm256_permute2f128_ps(v[q], v[q + 4], 0x31));
        }
    }
};

template <>
struct Group<double> {
    using V = __m256d;
    static constexpr int G = 2;
    static DST_INLINE void transpose(V* v) {
        const V a = _mm256_unpacklo_pd(v[0], v[1]), b = _mm256_unpackhi_pd(v[0], v[1]);
        v[0] = a;
        v[1] = b;
    }
    static DST_INLINE void load(const double* const* p, int64_t at, V* v) {
        for (int q = 0; q < 2; ++q)
            v[q] = _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(p[q] + at)), _mm_loadu_pd(p[q + 2] + at), 1);
        transpose(v);
    }
    static DST_INLINE void store(double* const* p, int64_t at, V* v) {
        transpose(v);
        for (int q = 0; q < 2; ++q) {
            _mm_storeu_pd(p[q] + at, _mm256_castpd256_pd128(v[q]));
            _mm_storeu_pd(p[q + 2] + at, _mm256_extractf128_pd(v[q], 1));
        }
    }
    static DST_INLINE void store_twice(double* const* p, int64_t at, V* v) {
        store(p, at, v);
        store(p, at + G, v + G);
    }
};

#else
template <class T>
struct Group {
    using V = typename Simd<T>::V;
    static constexpr int G = 1;
    static DST_INLINE void load(const T* const* p, int64_t at, V* v) {
        for (int l = 0; l < Simd<T>::W; ++l) v[0][l] = p[l][at];
    }
    static DST_INLINE void store(T* const* p, int64_t at, V* v) {
        for (int l = 0; l < Simd<T>::W; ++l) p[l][at] = v[0][l];
    }
    static DST_INLINE void store_twice(T* const* p, int64_t at, V* v) {
        store(p, at, v);
        store(p, at + G, v + G);
    }
};
#endif

// Call put(i, vector) for the elements i of [from, to) of every lane; some may come twice.
template <class T, class Put>
DST_INLINE void read_lanes(const T* const* rows, int64_t from, int64_t to, const Put& put) {
    using S = Simd<T>;
    constexpr int G = Group<T>::G;
    const T* lanes[S::W];  // a copy, which what `put` stores cannot change
    for (int l = 0; l < S::W; ++l) lanes[l] = rows[l];
    typename S::V v[G];
    int64_t i = from;
    for (; i + G <= to; i += G) {
        Group<T>::load(lanes, i, v);
        for (int q = 0; q < G; ++q) put(i + q, v[q]);
    }
    if (i == to) return;
    if (to - from >= G) {
        Group<T>::load(lanes, to - G, v);
        for (int q = 0; q < G; ++q) put(to - G + q, v[q]);
        return;
    }
    for (; i < to; ++i) {
        T one[S::W];
        for (int l = 0; l < S::W; ++l) one[l] = lanes[l][i];
        put(i, S::load(one));
    }
}

// Write get(i) to the elements i of [from, to) of every lane.
template <class T, class Get>
DST_INLINE void write_lanes(T* const* rows, int64_t from, int64_t to, const Get& get) {
    using S = Simd<T>;
    constexpr int G = Group<T>::G;
    T* lanes[S::W];  // a copy, which the stores cannot change
    for (int l = 0; l < S::W; ++l) lanes[l] = rows[l];
    typename S::V v[2 * G];
    int64_t i = from;
    for (; i + 2 * G <= to; i += 2 * G) {
        for (int q = 0; q < 2 * G; ++q) v[q] = get(i + q);
        Group<T>::store_twice(lanes, i, v);
    }
    for (; i + G <= to; i += G) {
        for (int q = 0; q < G; ++q) v[q] = get(i + q);
        Group<T>::store(lanes, i, v);
    }
    if (i == to) return;
    if (to - from >= G) {
        for (int q = 0; q < G; ++q) v[q] = get(to - G + q);
        Group<T>::store(lanes, to - G, v);
        return;
    }
    for (; i < to; ++i) {
        T one[S::W];
        S::store(one, get(i));
        for (int l = 0; l < S::W; ++l) lanes[l][i] = one[l];
    }
}

// One row of every lane, in successive planes. Lanes without an image or beyond its rows stay at `spare`.
template <class T>
struct LaneRows {
    static constexpr int W = Simd<std::remove_const_t<T>>::W;
    T* at[W];
    int64_t step[W];

    void next() {
        for (int l = 0; l < W; ++l) at[l] += step[l];
    }
};

// The row `start + row` of the first plane of every lane of a unit, where `start` is the band's number times `height`.
// Returns how many lanes have one.
template <class T>
int lane_rows(LaneRows<T>& out, T* images, int64_t planes, int64_t rows, int64_t columns, int64_t batch, const Bands& bands,
              int64_t unit, int64_t height, int64_t row, T* spare) {
    constexpr int W = LaneRows<T>::W;
    int count = 0;
    for (int l = 0; l < W; ++l) {
        const int64_t lane = unit * W + l, r = lane / batch * height + row;
        const bool valid = lane < bands.lanes && r >= 0 && r < rows;
        out.at[l] = valid ? images + (lane % batch * planes * rows + r) * columns : spare;
        out.step[l] = valid ? rows * columns : 0;
        count += valid;
    }
    return count;
}

// The images' side of a scratch: which rows and columns of which planes it holds.
template <class T>
struct Source {
    T* images;
    int64_t planes, rows, columns, batch;
    int64_t height;  // rows between the first ones of successive bands
    int64_t first;   // of the first band
    const bool* wanted;  // rows of the scratch that are used; null: all
    Columns placed;
    Layout layout;

    template <class Body>
    void over_rows(const Bands& bands, int64_t unit, T* spare, const Body& body) const {
        const int64_t count = layout.rows;
        std::vector<LaneRows<T>> lanes{size_t(count)};
        std::vector<int> valid(size_t(count), 0);
        for (int64_t r = 0; r < count; ++r)
            valid[r] = lane_rows<T>(lanes[r], images, planes, rows, columns, batch, bands, unit, height, first + r, spare);
        // Rows are the inner loop: every image is then read or written in one stream for long enough to be prefetched.
        const bool* const used = wanted;
        const int64_t number = planes, channel = layout.channel, row = layout.row;
        for (int64_t c = 0; c < number; ++c)
            for (int64_t r = 0; r < count; ++r) {
                if (used && !used[r]) continue;
                body(lanes[r].at, valid[r], c * channel + r * row);
                lanes[r].next();
            }
    }
};

// Bring a unit's rows into the scratch. CONTIGUOUS: columns keep their order there.
template <bool CONTIGUOUS, class T>
void pack_rows(const Source<const T>& s, const Bands& bands, int64_t unit, const T* zeros, T* scratch) {
    using S = Simd<T>;
    const int64_t first = s.placed.first, last = s.placed.last, bytes = s.placed.slots * S::W * int64_t(sizeof(T));
    const int32_t* offsets = s.placed.offsets.data();
    if (first == last) return;
    const int64_t shift = offsets[first] - first * S::W;
    s.over_rows(bands, unit, zeros, [=](const T* const* lanes, int valid, int64_t at) {
        T* to = scratch + at;
        if (valid)
            read_lanes<T>(lanes, first, last, [=](int64_t i, typename S::V v) {
                S::store(to + (CONTIGUOUS ? shift + i * S::W : int64_t(offsets[i])), v);
            });
        else
            std::memset(to, 0, size_t(bytes));
    });
}

template <class T>
void pack(const Source<const T>& s, const Bands& bands, int64_t unit, const T* zeros, T* scratch) {
    if (s.placed.contiguous) pack_rows<true, T>(s, bands, unit, zeros, scratch);
    else pack_rows<false, T>(s, bands, unit, zeros, scratch);
}

// Bring a unit's rows back from the scratch, through a ReLU where asked for.
template <bool CONTIGUOUS, bool RELU, class T>
void unpack_rows(const Source<T>& s, const Bands& bands, int64_t unit, T* spare, const T* scratch) {
    using S = Simd<T>;
    const int64_t columns = s.columns;
    const int32_t* offsets = s.placed.offsets.data();
    s.over_rows(bands, unit, spare, [=](T* const* lanes, int valid, int64_t at) {
        const T* from = scratch + at;
        if (valid)
            write_lanes<T>(lanes, 0, columns, [=](int64_t i) {
                const typename S::V v = S::load(from + (CONTIGUOUS ? i * S::W : int64_t(offsets[i])));
                return RELU ? S::positive(v) : v;
            });
    });
}

template <class T>
void unpack(const Source<T>& s, const Bands& bands, int64_t unit, T* spare, const T* scratch, bool relu) {
    if (relu) unpack_rows<true, true, T>(s, bands, unit, spare, scratch);
    else if (s.placed.contiguous) unpack_rows<true, false, T>(s, bands, unit, spare, scratch);
    else unpack_rows<false, false, T>(s, bands, unit, spare, scratch);
}

// Segments of one block of taps: their number, their taps.
template <class T>
struct Block {
    const Segment* segments;
    int64_t count;
    const int32_t* offsets;
    const T* values;

    Block(const Taps<T>& taps, int64_t list, int64_t block) {
        const int64_t i = list * taps.blocks + block;
        segments = taps.segments.data() + taps.segment_starts[i];
        count = taps.segment_starts[i + 1] - taps.segment_starts[i];
        offsets = taps.offsets.get() + taps.tap_starts[i];
        values = taps.values.get() + taps.tap_starts[i];
    }
};

// Add a block's taps to NV consecutive positions of a row of the output, `step` elements from channel to channel. The
// first block starts from the bias.
template <class T, int NV>
void conv_strip(const Block<T>& block, const T* in, T* out, int64_t step, bool first, const T* bias) {
    using S = Simd<T>;
    using V = typename S::V;
    constexpr int U = NV <= 2 ? 4 : NV <= 4 ? 2 : 1;  // independent sums hide the latency of the multiply-add
    const int32_t* offsets = block.offsets;
    const T* values = block.values;
    for (const Segment *s = block.segments, *last = s + block.count; s < last; ++s) {
        T* to = out + s->channel * step;
        V sum[U][NV];
        if (first) {
            const V start = S::set(bias ? bias[s->channel] : T(0));
            for (int k = 0; k < NV; ++k) sum[0][k] = start;
        } else {
            for (int k = 0; k < NV; ++k) sum[0][k] = S::load(to + k * S::W);
        }
        for (int u = 1; u < U; ++u)
            for (int k = 0; k < NV; ++k) sum[u][k] = S::zero();
        int64_t j = 0;
        const int64_t count = s->count;
        for (; j + U <= count; j += U)
            for (int u = 0; u < U; ++u) {
                const T* row = in + offsets[j + u];
                const V w = S::set(values[j + u]);
                for (int k = 0; k < NV; ++k) sum[u][k] = S::fma(w, S::load(row + k * S::W), sum[u][k]);
            }
        for (; j < count; ++j) {
            const T* row = in + offsets[j];
            const V w = S::set(values[j]);
            for (int k = 0; k < NV; ++k) sum[0][k] = S::fma(w, S::load(row + k * S::W), sum[0][k]);
        }
        offsets += count;
        values += count;
        for (int k = 0; k < NV; ++k) {
            for (int u = 1; u < U; ++u) sum[0][k] = S::add(sum[0][k], sum[u][k]);
            S::store(to + k * S::W, sum[0][k]);
        }
    }
}

template <class T, int NV>
void conv_strips(int64_t positions, const Block<T>& block, const T* in, T* out, int64_t step, bool first, const T* bias) {
    if constexpr (NV > 0) {
        if (positions != NV) return conv_strips<T, NV - 1>(positions, block, in, out, step, first, bias);
        conv_strip<T, NV>(block, in, out, step, first, bias);
    }
}

// Call body(from, count) for strips of at most kMostPositions of n positions.
template <class F>
inline void over_strips(int64_t n, const F& body) {
    const int64_t strips = ceil_div(n, kMostPositions);
    for (int64_t i = 0; i < strips; ++i) {
        const int64_t from = n * i / strips;
        body(from, n * (i + 1) / strips - from);
    }
}

// Run body(index, memory) for n indices; a thread takes the next one when it is done. `memory` are `bytes` of the
// thread's own, zeroed at the start. Returns false without memory.
template <class F>
inline bool over_units(int64_t n, int threads, int64_t bytes, const F& body) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    const int team = int(std::min<int64_t>(n, threads));
#pragma omp parallel num_threads(team) if (team > 1)
    {
        Scratch& scratch = conv_scratch();
        char* memory = scratch.lines(bytes);
        if (!memory) {
            failed = true;
        } else {
            std::memset(memory, 0, size_t(bytes));
            for (int64_t i = next++; i < n; i = next++) body(i, memory);
            scratch.trim();
        }
    }
    return !failed;
}

template <class T, class I>
bool conv_forward(const ConvForward<T>& a) {
    const dst_conv& s = a.s;
    constexpr int64_t W = Simd<T>::W;
    if (s.batch <= 0 || s.outputs <= 0 || s.out_height <= 0 || s.out_width <= 0) return true;
    const int64_t halo = (s.kernel_height - 1) * s.dilation_height + 1;
    const Columns placed = place_columns(s.width, s.pad_width, (s.out_width - 1) * s.stride_width +
                                         (s.kernel_width - 1) * s.dilation_width + 1, s.stride_width, W);
    const double read = 4.0 * double(s.channels * placed.slots);
    const double row = double(s.out_width) * (0.5 * double(a.pointers[s.outputs]) + 4.0 * double(s.outputs));
    const int64_t row_size =
        (s.channels * placed.slots * s.stride_height + s.outputs * s.out_width) * W * int64_t(sizeof(T));
    const int64_t halo_size = s.channels * placed.slots * (halo - s.stride_height) * W * int64_t(sizeof(T));
    const Bands bands = cut_bands(s.batch, s.out_height, 1, (kBandBytes - halo_size) / row_size, W,
                                  row + read * double(s.stride_height), read * double(halo - s.stride_height), a.threads);
    const int64_t rows = (bands.height - 1) * s.stride_height + halo;
    const auto wanted = std::make_unique<bool[]>(size_t(rows));
    for (int64_t r = 0; r < bands.height; ++r)
        for (int64_t h = 0; h < s.kernel_height; ++h) wanted[r * s.stride_height + h * s.dilation_height] = true;
    const Source<const T> x{a.x, s.channels, s.height, s.width, s.batch, bands.height * s.stride_height, -s.pad_height,
                            wanted.get(), placed, lay_out<T>(s.channels, rows, placed.slots, W)};
    const Source<T> y{a.y, s.outputs, s.out_height, s.out_width, s.batch, bands.height, 0, nullptr,
                      place_columns(s.out_width, 0, s.out_width, 1, W), lay_out<T>(s.outputs, bands.height, s.out_width, W)};
    if (x.layout.rows * x.layout.row > kMostElements) return false;
    const Taps<T> taps =
        forward_taps<T, I>(s, a.pointers, static_cast<const I*>(a.indices), a.values, x.layout, placed.slots, W);
    const int64_t in_size = x.layout.rows * x.layout.row * int64_t(sizeof(T));
    const int64_t out_size = y.layout.rows * y.layout.row * int64_t(sizeof(T));
    const int64_t spare_size = whole_lines(std::max(s.width, s.out_width) * int64_t(sizeof(T)));
    return over_units(bands.units, a.threads, in_size + out_size + 2 * spare_size, [&](int64_t unit, char* memory) {
        T* in = reinterpret_cast<T*>(memory);
        T* out = reinterpret_cast<T*>(memory + in_size);
        const T* zeros = reinterpret_cast<T*>(memory + in_size + out_size);
        T* spare = reinterpret_cast<T*>(memory + in_size + out_size + spare_size);
        pack<T>(x, bands, unit, zeros, in);
        for (int64_t r = 0; r < bands.height; ++r)
            for (int64_t b = 0; b < taps.blocks; ++b)
                over_strips(s.out_width, [&](int64_t from, int64_t count) {
                    conv_strips<T, kMostPositions>(count, Block<T>(taps, 0, b),
                                                   in + r * s.stride_height * x.layout.row + from * W,
                                                   out + r * y.layout.row + from * W, y.layout.channel, b == 0, a.bias);
                });
        unpack<T>(y, bands, unit, spare, out, a.relu);
    });
}

// ---- backward: NV consecutive positions of a row of the input (of one remainder modulo the stride); every load of the
// output gradient feeds the input gradient (times the weight) and the weight's own gradient (times the input)
template <class T>
struct Strip {
    const T *g, *x;
    T* gx;      // may be null
    T* sums;    // of the weights' gradients, in the order of the block's taps
    int64_t step;  // elements between channels of x and gx
    bool first;    // of the blocks: gx starts from zero
};

// Keep a vector in its register: loading it anew for every use would make loads, not arithmetic, the limit.
template <class V>
DST_INLINE void hold(V& v) {
#if DST_LEVEL == 2
    asm("" : "+v"(v));
#elif DST_LEVEL == 1
    asm("" : "+x"(v));
#else
    (void)v;
#endif
}

// N taps at once, at most four: their sums are independent, which hides the latency of the multiply-add.
template <class T, int NV, bool INPUT, int N>
DST_INLINE void conv_back_taps(const int32_t* offsets, const T* values, const T* g, const T* x, typename Simd<T>::V* sum,
                               T* sums) {
    using S = Simd<T>;
    using V = typename S::V;
    V dot[4], w[N];
    const T* rows[N];
    for (int q = 0; q < 4; ++q) dot[q] = S::zero();
    for (int q = 0; q < N; ++q) {
        w[q] = S::set(values[q]);
        rows[q] = g + offsets[q];
    }
    for (int k = 0; k < NV; ++k) {
        const V in = S::load(x + k * S::W);
        for (int q = 0; q < N; ++q) {
            V d = S::load(rows[q] + k * S::W);
            if (INPUT) hold(d);
            if (INPUT) sum[k] = S::fma(w[q], d, sum[k]);
            dot[q] = S::fma(in, d, dot[q]);
        }
    }
    T out[4];
    S::sum4(dot[0], dot[1], dot[2], dot[3], out);
    for (int q = 0; q < N; ++q) sums[q] += out[q];
}

template <class T, int NV, bool INPUT>
void conv_back_strip(const Block<T>& block, const Strip<T>& a) {
    using S = Simd<T>;
    using V = typename S::V;
    const int32_t* offsets = block.offsets;
    const T *values = block.values, *g = a.g;
    T* sums = a.sums;
    const bool first = a.first;
    for (const Segment *s = block.segments, *last = s + block.count; s < last; ++s) {
        const T* x = a.x + s->channel * a.step;
        T* gx = INPUT ? a.gx + s->channel * a.step : nullptr;
        V sum[NV];
        for (int k = 0; k < NV; ++k) sum[k] = INPUT && !first ? S::load(gx + k * S::W) : S::zero();
        int64_t left = s->count;
        for (; left >= 4; left -= 4, offsets += 4, values += 4, sums += 4)
            conv_back_taps<T, NV, INPUT, 4>(offsets, values, g, x, sum, sums);
        if (left == 1) conv_back_taps<T, NV, INPUT, 1>(offsets, values, g, x, sum, sums);
        else if (left == 2) conv_back_taps<T, NV, INPUT, 2>(offsets, values, g, x, sum, sums);
        else if (left == 3) conv_back_taps<T, NV, INPUT, 3>(offsets, values, g, x, sum, sums);
        offsets += left;
        values += left;
        sums += left;
        if (INPUT)
            for (int k = 0; k < NV; ++k) S::store(gx + k * S::W, sum[k]);
    }
}

template <class T, int NV>
void conv_back_strips(int64_t positions, const Block<T>& block, const Strip<T>& a) {
    if constexpr (NV > 0) {
        if (positions != NV) return conv_back_strips<T, NV - 1>(positions, block, a);
        if (a.gx) conv_back_strip<T, NV, true>(block, a);
        else conv_back_strip<T, NV, false>(block, a);
    }
}

// Sum of the output gradient over images and positions.
template <class T>
void conv_bias(const dst_conv& s, const T* g, T* gb, int threads) {
    using S = Simd<T>;
    const int64_t n = s.out_height * s.out_width;
    in_parallel(s.outputs, threads, s.outputs * s.batch * n, [&](int64_t o) {
        typename S::V sum[4];
        for (int q = 0; q < 4; ++q) sum[q] = S::zero();
        T rest = 0;
        for (int64_t b = 0; b < s.batch; ++b) {
            const T* p = g + (b * s.outputs + o) * n;
            int64_t i = 0;
            for (; i + 4 * S::W <= n; i += 4 * S::W)
                for (int q = 0; q < 4; ++q) sum[q] = S::add(sum[q], S::load(p + i + q * S::W));
            for (; i + S::W <= n; i += S::W) sum[0] = S::add(sum[0], S::load(p + i));
            for (; i < n; ++i) rest += p[i];
        }
        T parts[4];
        S::sum4(sum[0], sum[1], sum[2], sum[3], parts);
        gb[o] = ((parts[0] + parts[1]) + (parts[2] + parts[3])) + rest;
    });
}

template <class T, class I>
bool conv_backward(const ConvBackward<T>& a) {
    const dst_conv& s = a.s;
    constexpr int64_t W = Simd<T>::W;
    const int64_t n = a.pointers[s.channels * s.kernel_height * s.kernel_width];
    if (a.gb) conv_bias<T>(s, a.g, a.gb, a.threads);
    if (s.batch <= 0 || s.channels <= 0 || s.outputs <= 0 || s.out_height <= 0 || s.out_width <= 0 || n == 0) {
        std::fill(a.gv, a.gv + n, T(0));
        if (a.gx) std::fill(a.gx, a.gx + s.batch * s.channels * s.height * s.width, T(0));
        return true;
    }
    // The output gradient's rows and columns that inputs of the first row and column of a band reach.
    const int64_t top = floor_div(s.pad_height - (s.kernel_height - 1) * s.dilation_height, s.stride_height);
    const int64_t left = floor_div(s.pad_width - (s.kernel_width - 1) * s.dilation_width, s.stride_width);
    const int64_t right = floor_div(s.width - 1 + s.pad_width, s.stride_width);
    const Columns placed = place_columns(s.out_width, -left, right - left + 1, 1, W);
    const Columns split = place_columns(s.width, 0, s.width, s.stride_width, W);
    const auto rows_of = [&](int64_t height) { return floor_div(height - 1 + s.pad_height, s.stride_height) - top + 1; };
    const double read = 4.0 * double(s.outputs * placed.slots) / double(s.stride_height);
    const double row = double(s.width) * ((a.gx ? 1.0 : 0.6) * double(n) / double(s.stride_height * s.stride_width) +
                                          8.0 * double(s.channels));
    const int64_t halo = (rows_of(s.stride_height) - 1) * s.stride_height;
    const int64_t row_size = (s.outputs * placed.slots + (a.gx ? 2 : 1) * s.channels * split.slots * s.stride_height) * W *
                             int64_t(sizeof(T)) / s.stride_height;
    const int64_t halo_size = s.outputs * placed.slots * halo / s.stride_height * W * int64_t(sizeof(T));
    const Bands bands = cut_bands(s.batch, s.height, s.stride_height, (kBandBytes - halo_size) / row_size, W, row + read,
                                  read * double(halo), kParts / 2);
    const int64_t rows = rows_of(bands.height);
    const Source<const T> g{a.g, s.outputs, s.out_height, s.out_width, s.batch, bands.height / s.stride_height, top, nullptr,
                            placed, lay_out<T>(s.outputs, rows, placed.slots, W)};
    const Layout layout = lay_out<T>(s.channels, bands.height, split.slots, W);
    const Source<const T> x{a.x, s.channels, s.height, s.width, s.batch, bands.height, 0, nullptr, split, layout};
    const Source<T> gx{a.gx, s.channels, s.height, s.width, s.batch, bands.height, 0, nullptr, split, layout};
    if (g.layout.rows * g.layout.row > kMostElements) return false;
    const Taps<T> taps = backward_taps<T, I>(s, a.pointers, static_cast<const I*>(a.indices), a.values, g.layout, top,
                                                     left, W);
    const int64_t parts = std::min(kParts, bands.units);
    std::vector<T> sums(size_t(parts * n), T(0));
    const int64_t g_size = rows * g.layout.row * int64_t(sizeof(T));
    const int64_t x_size = layout.rows * layout.row * int64_t(sizeof(T)), gx_size = a.gx ? x_size : 0;
    const int64_t spare_size = whole_lines(std::max(s.width, s.out_width) * int64_t(sizeof(T)));
    const int64_t size = g_size + x_size + gx_size + 2 * spare_size;
    const bool done = over_units(parts, a.threads, size, [&](int64_t part, char* memory) {
        T* g_scratch = reinterpret_cast<T*>(memory);
        T* x_scratch = reinterpret_cast<T*>(memory + g_size);
        T* gx_scratch = reinterpret_cast<T*>(memory + g_size + x_size);
        const T* zeros = reinterpret_cast<T*>(memory + g_size + x_size + gx_size);
        T* spare = reinterpret_cast<T*>(memory + g_size + x_size + gx_size + spare_size);
        for (int64_t unit = bands.units * part / parts; unit < bands.units * (part + 1) / parts; ++unit) {
            pack<T>(g, bands, unit, zeros, g_scratch);
            pack<T>(x, bands, unit, zeros, x_scratch);
            for (int64_t r = 0; r < bands.height; ++r)
                for (int64_t q = 0; q < std::min(s.stride_width, s.width); ++q) {
                    const int64_t phase = r % s.stride_height * s.stride_width + q;
                    for (int64_t b = 0; b < taps.blocks; ++b)
                        over_strips(ceil_div(s.width - q, s.stride_width), [&](int64_t at, int64_t count) {
                            const int64_t slot = r * layout.row + (q * (split.slots / s.stride_width) + at) * W;
                            conv_back_strips<T, kMostPositions>(
                                count, Block<T>(taps, phase, b),
                                {g_scratch + r / s.stride_height * g.layout.row + at * W, x_scratch + slot,
                                 a.gx ? gx_scratch + slot : nullptr,
                                 sums.data() + part * n + taps.tap_starts[phase * taps.blocks + b], layout.channel, b == 0});
                        });
                }
            if (a.gx) unpack<T>(gx, bands, unit, spare, gx_scratch, false);
        }
    });
    in_parallel(n, a.threads, n * parts, [&](int64_t j) {
        T sum = 0;
        for (int64_t p = 0; p < parts; ++p) sum += sums[p * n + j];
        a.gv[taps.positions[j]] = sum;
    });
    return done;
}

}  // namespace DST_ISA
}  // namespace
#endif
