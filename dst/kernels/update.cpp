// Kernels of topology updates: which weights to drop and grow, and patterns from patterns.
//
// Included once by spmm.cpp, for all instruction sets. A single thread computes all but `remap`, so results depend neither
// on the number of threads nor on the instruction set.

namespace {

template <class I>
void transpose_pattern(int64_t rows, int64_t columns, const int32_t* row_pointers, const I* column_indices,
                       int32_t* column_pointers, I* row_indices, int32_t* permutation) {
    std::fill(column_pointers, column_pointers + columns + 1, 0);
    const int64_t n = row_pointers[rows];
    for (int64_t j = 0; j < n; ++j) ++column_pointers[int64_t(column_indices[j]) + 1];
    for (int64_t c = 0; c < columns; ++c) column_pointers[c + 1] += column_pointers[c];
    std::vector<int32_t> next(column_pointers, column_pointers + columns);
    for (int64_t r = 0; r < rows; ++r)
        for (int32_t j = row_pointers[r]; j < row_pointers[r + 1]; ++j) {
            const int32_t at = next[column_indices[j]]++;
            row_indices[at] = I(r);
            permutation[j] = at;
        }
}

// `source` is the old position of each new position, -1 where it is newly grown.
template <class I>
void match_patterns(int64_t rows, const int32_t* old_pointers, const I* old_indices, const int32_t* old_permutation,
                    const int32_t* new_pointers, const I* new_indices, const int32_t* new_permutation, int64_t* source) {
    for (int64_t r = 0; r < rows; ++r) {
        int32_t i = old_pointers[r];
        for (int32_t j = new_pointers[r]; j < new_pointers[r + 1]; ++j) {
            while (i < old_pointers[r + 1] && old_indices[i] < new_indices[j]) ++i;
            const bool same = i < old_pointers[r + 1] && old_indices[i] == new_indices[j];
            source[new_permutation[j]] = same ? old_permutation[i] : -1;
        }
    }
}

// Expand rows `first` to `last` of a pattern to flat positions, counted from the first row.
template <class I>
void flat_positions(int64_t first, int64_t last, int64_t columns, const int32_t* pointers, const I* indices, int64_t* out) {
    for (int64_t r = first; r < last; ++r)
        for (int64_t j = pointers[r]; j < pointers[r + 1]; ++j) *out++ = (r - first) * columns + indices[j];
}

// Drop and grow sorted flat positions. The new pattern has n = old - dropped + grown non-zeros; `source` is as in
// match_patterns. Returns false, with the outputs undefined, if the positions are not sorted and distinct, a grown one is
// active or out of range, or a dropped one is not active.
template <class I>
bool rewire_pattern(int64_t rows, int64_t columns, const int32_t* old_pointers, const I* old_indices,
                    const int32_t* old_permutation, int64_t grows, const int64_t* grown, int64_t drops,
                    const int64_t* dropped, int32_t* row_pointers, I* column_indices, int32_t* column_pointers,
                    I* row_indices, int32_t* permutation, int64_t* source) {
    const int64_t n = int64_t(old_pointers[rows]) - drops + grows;
    if (n < 0) return false;
    std::vector<int32_t> before(static_cast<size_t>(n));  // old position of each non-zero, in row order
    std::fill(column_pointers, column_pointers + columns + 1, 0);
    int64_t g = 0, d = 0, at = 0, last = -1;
    row_pointers[0] = 0;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t start = r * columns, stop = start + columns, end = old_pointers[r + 1];
        int64_t j = old_pointers[r];
        while (j < end || (g < grows && grown[g] < stop)) {
            const int64_t held = j < end ? start + old_indices[j] : stop;
            const int64_t young = g < grows ? grown[g] : stop;
            if (young == held) return false;
            int64_t column;
            if (young < held) {
                if (young < start || young <= last || at == n) return false;
                last = young;
                column = young - start;
                before[at] = -1;
                ++g;
            } else if (d < drops && dropped[d] == held) {
                ++d;
                ++j;
                continue;
            } else {
                if (at == n) return false;
                column = old_indices[j];
                before[at] = old_permutation[j++];
            }
            column_indices[at++] = I(column);
            ++column_pointers[column + 1];
        }
        row_pointers[r + 1] = int32_t(at);
    }
    if (g != grows || d != drops || at != n) return false;
    for (int64_t c = 0; c < columns; ++c) column_pointers[c + 1] += column_pointers[c];
    std::vector<int32_t> next(column_pointers, column_pointers + columns);
    for (int64_t r = 0; r < rows; ++r)
        for (int32_t j = row_pointers[r]; j < row_pointers[r + 1]; ++j) {
            const int32_t to = next[column_indices[j]]++;
            row_indices[to] = I(r);
            permutation[j] = to;
            source[to] = before[j];
        }
    return true;
}

// Carry entries to a new pattern; a newly grown weight gets that of `grown`, or zero where it is null.
template <class U>
void remap(int64_t n, const int64_t* source, const U* entries, const U* grown, U* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && n > kSerialWork)
    for (int64_t i = 0; i < n; ++i) out[i] = source[i] >= 0 ? entries[source[i]] : grown ? grown[i] : U(0);
}

// Remove the common entries of two vectors, both sorted and distinct, from both. Sets the two lengths.
inline void cancel(int64_t n, const int64_t* a, int64_t m, const int64_t* b, int64_t* a_out, int64_t* b_out,
                   int64_t* lengths) {
    int64_t i = 0, j = 0, p = 0, q = 0;
    while (i < n && j < m) {  // both outputs have room for one more
        const int64_t x = a[i], y = b[j];
        a_out[p] = x;
        b_out[q] = y;
        p += x < y;
        q += y < x;
        i += x <= y;
        j += y <= x;
    }
    while (i < n) a_out[p++] = a[i++];
    while (j < m) b_out[q++] = b[j++];
    lengths[0] = p;
    lengths[1] = q;
}

// Maps the bits of a floating-point number to an integer with the same order (NaN of either sign at the ends).
template <class T>
struct Bits;
template <>
struct Bits<float> {
    using U = uint32_t;
};
template <>
struct Bits<double> {
    using U = uint64_t;
};

template <class T>
DST_INLINE typename Bits<T>::U ordered(T value) {
    using U = typename Bits<T>::U;
    constexpr U sign = U(1) << (sizeof(U) * 8 - 1);
    U u;
    std::memcpy(&u, &value, sizeof u);
    return u & sign ? ~u : u | sign;
}

// The k-th smallest (k in 1..n): a histogram of the leading bits, then a selection within one bin.
template <class T>
T select(int64_t n, int64_t k, const T* values) {
    constexpr int shift = sizeof(T) * 8 - 14;
    std::vector<int64_t> bins(1 << 14, 0);
    for (int64_t i = 0; i < n; ++i) ++bins[ordered(values[i]) >> shift];
    size_t bin = 0;
    while (k > bins[bin]) k -= bins[bin++];
    std::vector<T> inside;
    inside.reserve(bins[bin]);
    for (int64_t i = 0; i < n; ++i)
        if (ordered(values[i]) >> shift == bin) inside.push_back(values[i]);
    std::nth_element(inside.begin(), inside.begin() + (k - 1), inside.end(),
                     [](T a, T b) { return ordered(a) < ordered(b); });
    return inside[k - 1];
}

// Tie-breaking rank of a position, the smallest wins: SplitMix64's finalizer, as in dst.topology.selection.tie_order.
inline int64_t tie_order(int64_t position, int64_t key) {
    uint64_t z = uint64_t(position) * 0x9E3779B97F4A7C15u + uint64_t(key);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return int64_t(z ^ (z >> 31));
}

// Value and tie order of the worst of the k best (k in 1..n) entries: by larger value, then by smaller tie order of `name(i)`.
template <class T, class N>
void worst_of_best(int64_t n, int64_t k, const T* values, int64_t key, const N& name, T* least, int64_t* rank) {
    *least = select(n, n - k + 1, values);
    int64_t equal = k;
    std::vector<int64_t> ties;
    for (int64_t i = 0; i < n; ++i) {
        equal -= values[i] > *least;
        if (values[i] == *least) ties.push_back(tie_order(name(i), key));
    }
    std::nth_element(ties.begin(), ties.begin() + (equal - 1), ties.end());
    *rank = ties[equal - 1];
}

// Split positions into the `keep` with the highest scores and the others, each in their order. NaN ranks lowest; the tie
// order of the index breaks ties. Both outputs have room for one more.
template <class T>
void partition(int64_t n, const int64_t* positions, const T* scores, int64_t keep, int64_t key, int64_t* kept,
               int64_t* others) {
    if (keep <= 0 || keep >= n) {
        std::copy(positions, positions + n, keep <= 0 ? others : kept);
        return;
    }
    std::vector<T> values(scores, scores + n);
    for (T& value : values) value = value == value ? value : -std::numeric_limits<T>::infinity();
    T least;
    int64_t rank, a = 0, b = 0;
    worst_of_best(n, keep, values.data(), key, [](int64_t i) { return i; }, &least, &rank);
    for (int64_t i = 0; i < n; ++i) {
        const bool stays = values[i] > least || (values[i] == least && tie_order(i, key) <= rank);
        kept[a] = others[b] = positions[i];
        a += stays;
        b += !stays;
    }
}

// Keep the k best of *count > k pairs, by larger value and then by smaller tie order. The pairs stay in index order. Sets
// `least` and `rank` to the value and the tie order of the worst pair kept.
template <class T>
void prune(int64_t k, int64_t* count, T* values, int64_t* indices, int64_t key, T* least, int64_t* rank) {
    worst_of_best(*count, k, values, key, [indices](int64_t i) { return indices[i]; }, least, rank);
    int64_t kept = 0;
    for (int64_t i = 0; i < *count; ++i) {
        const T value = values[i];
        const bool keep = value > *least || (value == *least && tie_order(indices[i], key) <= *rank);
        values[kept] = value;
        indices[kept] = indices[i];
        kept += keep;
    }
    *count = kept;
}

constexpr int64_t kBlock = 64;

// Bit q: whether the absolute value of values[q] is at least `least`, for q < n <= 64. False for NaN.
template <class T>
inline uint64_t at_least(const T* values, int64_t n, T least) {
    uint64_t bits = 0;
    for (int64_t q = 0; q < n; ++q) bits |= uint64_t(std::fabs(values[q]) >= least) << q;
    return bits;
}

#if defined(__SSE2__)
inline uint64_t at_least(const float* values, int64_t n, float least) {
    if (n < kBlock) return at_least<float>(values, n, least);
    const __m128 bound = _mm_set1_ps(least), sign = _mm_set1_ps(-0.0f);
    uint64_t bits = 0;
    for (int q = 0; q < 4; ++q) {
        __m128i m[4];
        for (int p = 0; p < 4; ++p)
            m[p] = _mm_castps_si128(_mm_cmpge_ps(_mm_andnot_ps(sign, _mm_loadu_ps(values + 16 * q + 4 * p)), bound));
        const __m128i bytes = _mm_packs_epi16(_mm_packs_epi32(m[0], m[1]), _mm_packs_epi32(m[2], m[3]));
        bits |= uint64_t(uint32_t(_mm_movemask_epi8(bytes))) << (16 * q);
    }
    return bits;
}
#endif

// A threshold that at least k absolute values of a large tile exceed, estimated from a sample and then counted; -1 if there
// is none. With it the running top-k starts with little more than k pairs, instead of the whole tile.
template <class T>
T first_threshold(int64_t n, const T* tile, int64_t k) {
    constexpr int64_t stride = 13;
    if (n < 64 * 1024 || k > n / 4) return T(-1);
    std::vector<T> sample;
    sample.reserve(size_t(n / stride + 1));
    for (int64_t i = 0; i < n; i += stride)
        if (tile[i] == tile[i]) sample.push_back(std::fabs(tile[i]));
    const int64_t size = int64_t(sample.size()), expected = k / stride;
    const int64_t rank = expected + expected / 16 + 4 * int64_t(std::sqrt(double(expected))) + 8;
    if (rank > size) return T(-1);
    // The next smaller number: all of its ties are below the best k, so none of them is missed.
    const T threshold = std::nextafter(select(size, size - rank + 1, sample.data()), T(-1));
    if (threshold <= 0) return T(-1);
    int64_t above = 0;
    for (int64_t i = 0; i < n; i += kBlock)
        above += __builtin_popcountll(at_least(tile + i, std::min(kBlock, n - i), std::nextafter(threshold, T(1))));
    return above >= k ? threshold : T(-1);
}

template <class T>
void grow_update(T* tile, int64_t n, int64_t base, const int64_t* exclude, int64_t excluded, int64_t k, int64_t capacity,
                 int64_t key, T* values, int64_t* indices, int64_t* count, T* threshold, int64_t* rank) {
    // A NaN compares false with everything, so an excluded position never enters, not even among tied zeros.
    for (int64_t i = 0; i < excluded; ++i) tile[exclude[i] - base] = std::numeric_limits<T>::quiet_NaN();
    if (k <= 0) return;
    T least = *threshold;
    int64_t held = *count;
    if (held == 0 && least < 0) {
        least = first_threshold(n, tile, k);
        if (least > 0) *rank = std::numeric_limits<int64_t>::min();
    }
    for (int64_t i = 0; i < n; i += kBlock) {
        uint64_t bits = at_least(tile + i, std::min(kBlock, n - i), least);
        if (!bits) continue;
        if (held + kBlock > capacity) prune(k, &held, values, indices, key, &least, rank);
        for (; bits; bits &= bits - 1) {
            const int64_t at = i + __builtin_ctzll(bits);
            const T value = std::fabs(tile[at]);
            values[held] = value;
            indices[held] = base + at;
            held += value > least || (value == least && tie_order(base + at, key) < *rank);
        }
    }
    *count = held;
    *threshold = least;
}

}  // namespace

extern "C" {

void dst_transpose_pattern(int wide, int64_t rows, int64_t columns, const int32_t* row_pointers, const void* column_indices,
                           int32_t* column_pointers, void* row_indices, int32_t* permutation) {
    if (wide)
        transpose_pattern<int32_t>(rows, columns, row_pointers, (const int32_t*)column_indices, column_pointers,
                                   (int32_t*)row_indices, permutation);
    else
        transpose_pattern<uint16_t>(rows, columns, row_pointers, (const uint16_t*)column_indices, column_pointers,
                                    (uint16_t*)row_indices, permutation);
}

void dst_match_patterns(int wide, int64_t rows, const int32_t* old_pointers, const void* old_indices,
                        const int32_t* old_permutation, const int32_t* new_pointers, const void* new_indices,
                        const int32_t* new_permutation, int64_t* source) {
    if (wide)
        match_patterns<int32_t>(rows, old_pointers, (const int32_t*)old_indices, old_permutation, new_pointers,
                                (const int32_t*)new_indices, new_permutation, source);
    else
        match_patterns<uint16_t>(rows, old_pointers, (const uint16_t*)old_indices, old_permutation, new_pointers,
                                 (const uint16_t*)new_indices, new_permutation, source);
}

void dst_flat(int wide, int64_t first, int64_t last, int64_t columns, const int32_t* pointers, const void* indices,
              int64_t* out) {
    if (wide) flat_positions<int32_t>(first, last, columns, pointers, (const int32_t*)indices, out);
    else flat_positions<uint16_t>(first, last, columns, pointers, (const uint16_t*)indices, out);
}

// Returns 0, or 1 if the positions do not fit the pattern; see rewire_pattern.
int64_t dst_rewire_pattern(int wide, int64_t rows, int64_t columns, const int32_t* old_pointers, const void* old_indices,
                           const int32_t* old_permutation, int64_t grows, const int64_t* grown, int64_t drops,
                           const int64_t* dropped, int32_t* row_pointers, void* column_indices, int32_t* column_pointers,
                           void* row_indices, int32_t* permutation, int64_t* source) {
    if (wide)
        return !rewire_pattern<int32_t>(rows, columns, old_pointers, (const int32_t*)old_indices, old_permutation, grows,
                                        grown, drops, dropped, row_pointers, (int32_t*)column_indices, column_pointers,
                                        (int32_t*)row_indices, permutation, source);
    return !rewire_pattern<uint16_t>(rows, columns, old_pointers, (const uint16_t*)old_indices, old_permutation, grows, grown,
                                     drops, dropped, row_pointers, (uint16_t*)column_indices, column_pointers,
                                     (uint16_t*)row_indices, permutation, source);
}

// `bytes` is the size of an entry: 1, 2, 4 or 8.
void dst_remap(int bytes, int64_t n, const int64_t* source, const void* entries, const void* grown, void* out, int threads) {
    if (bytes == 8) remap(n, source, (const uint64_t*)entries, (const uint64_t*)grown, (uint64_t*)out, threads);
    else if (bytes == 4) remap(n, source, (const uint32_t*)entries, (const uint32_t*)grown, (uint32_t*)out, threads);
    else if (bytes == 2) remap(n, source, (const uint16_t*)entries, (const uint16_t*)grown, (uint16_t*)out, threads);
    else remap(n, source, (const uint8_t*)entries, (const uint8_t*)grown, (uint8_t*)out, threads);
}

void dst_cancel(int64_t n, const int64_t* a, int64_t m, const int64_t* b, int64_t* a_out, int64_t* b_out,
                int64_t* lengths) {
    cancel(n, a, m, b, a_out, b_out, lengths);
}

void dst_partition(int is_double, int64_t n, const int64_t* positions, const void* scores, int64_t keep, int64_t key,
                   int64_t* kept, int64_t* others) {
    if (is_double) partition<double>(n, positions, (const double*)scores, keep, key, kept, others);
    else partition<float>(n, positions, (const float*)scores, keep, key, kept, others);
}

// Add one tile of a gradient (n elements, the first with flat index `base`) to a running top-k by absolute value; `key`
// breaks ties. `values` and `indices` have room for `capacity` + 1 pairs, `capacity` >= k + 64. *count, *threshold and *rank
// start at 0, -1 and 0. The tile is overwritten at the excluded positions.
void dst_grow_update(int is_double, void* tile, int64_t n, int64_t base, const int64_t* exclude, int64_t excluded,
                     int64_t k, int64_t capacity, int64_t key, void* values, int64_t* indices, int64_t* count,
                     void* threshold, int64_t* rank) {
    if (is_double)
        grow_update<double>((double*)tile, n, base, exclude, excluded, k, capacity, key, (double*)values, indices, count,
                            (double*)threshold, rank);
    else
        grow_update<float>((float*)tile, n, base, exclude, excluded, k, capacity, key, (float*)values, indices, count,
                           (float*)threshold, rank);
}

// Reduce the running top-k to its k best.
void dst_grow_finish(int is_double, int64_t k, int64_t key, void* values, int64_t* indices, int64_t* count) {
    if (k <= 0) *count = 0;
    if (*count <= k) return;
    int64_t rank;
    double double_least;
    float float_least;
    if (is_double) prune<double>(k, count, (double*)values, indices, key, &double_least, &rank);
    else prune<float>(k, count, (float*)values, indices, key, &float_least, &rank);
}

}  // extern "C"
