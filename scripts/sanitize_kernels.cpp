// Runs every kernel on odd sizes in exactly sized heap blocks and checks it against plain loops. Built with the address and
// undefined-behaviour sanitizers by sanitize_kernels.sh; includes the source so that everything is instrumented.
#include "../dst/kernels/spmm.cpp"

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <string>

namespace {

std::mt19937 generator(0);
int failures = 0;

void expect(bool good, const char* what, int64_t rows, int64_t columns, int64_t batch) {
    if (good) return;
    ++failures;
    std::printf("FAILED %s at %lld x %lld, batch %lld, isa %d\n", what, (long long)rows, (long long)columns, (long long)batch,
                dst_isa());
}

template <class T>
std::unique_ptr<T[]> block(int64_t n) {
    return std::unique_ptr<T[]>(new T[n]());
}

template <class T>
std::unique_ptr<T[]> random_block(int64_t n) {
    auto out = block<T>(n);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < n; ++i) out[i] = T(normal(generator));
    return out;
}

template <class T>
bool near(T a, double b) {
    return std::fabs(double(a) - b) <= (sizeof(T) == 4 ? 1e-3 : 1e-10) * (1 + std::fabs(b));
}

// A random weight matrix: its pattern and values in both orders.
template <class T, class I>
struct Drawn {
    int64_t n;
    std::unique_ptr<int32_t[]> row_pointers, column_pointers, permutation;
    std::unique_ptr<I[]> column_indices, row_indices;
    std::unique_ptr<T[]> values, row_values;

    Drawn(int64_t rows, int64_t columns, double density) {
        const int is_double = sizeof(T) == 8, wide = sizeof(I) == 4;
        std::vector<int32_t> starts(1, 0);
        std::vector<I> found;
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < columns; ++c)
                if (generator() < density * 4294967295.0) found.push_back(I(c));
            starts.push_back(int32_t(found.size()));
        }
        n = int64_t(found.size());
        row_pointers = block<int32_t>(rows + 1), column_pointers = block<int32_t>(columns + 1), permutation = block<int32_t>(n);
        column_indices = block<I>(n), row_indices = block<I>(n);
        std::copy(starts.begin(), starts.end(), row_pointers.get());
        std::copy(found.begin(), found.end(), column_indices.get());
        dst_transpose_pattern(wide, rows, columns, row_pointers.get(), column_indices.get(), column_pointers.get(),
                              row_indices.get(), permutation.get());
        values = random_block<T>(n), row_values = block<T>(n);
        dst_gather(is_double, n, permutation.get(), values.get(), row_values.get(), 1);
    }
};

template <class T, class I>
void check(int64_t rows, int64_t columns, int64_t batch, double density) {
    const int is_double = sizeof(T) == 8, wide = sizeof(I) == 4;
    const Drawn<T, I> w(rows, columns, density);
    const int64_t n = w.n;
    const auto &row_pointers = w.row_pointers, &column_pointers = w.column_pointers, &permutation = w.permutation;
    const auto &column_indices = w.column_indices, &row_indices = w.row_indices;
    const auto &values = w.values, &row_values = w.row_values;
    for (int threads = 1; threads <= 3; threads += 2) {
        dst_gather(is_double, n, permutation.get(), values.get(), row_values.get(), threads);
        auto x = random_block<T>(columns * batch), bias = random_block<T>(rows), y = block<T>(rows * batch);
        dst_forward(is_double, wide, rows, columns, row_pointers.get(), column_indices.get(), row_values.get(), x.get(),
                    batch == 1 ? 1 : batch, y.get(), batch, batch, bias.get(), 1, threads);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t b = 0; b < batch; ++b) {
                double sum = bias[r];
                for (int32_t j = row_pointers[r]; j < row_pointers[r + 1]; ++j)
                    sum += double(row_values[j]) * double(x[int64_t(column_indices[j]) * batch + b]);
                expect(near(y[r * batch + b], std::max(sum, 0.0)), "forward", rows, columns, batch);
            }
        // The same layer between a dense one and a dense head, in one call, from either order of the input.
        const int64_t inputs = 5, outputs = 6;
        auto first = random_block<T>(columns * inputs), head = random_block<T>(outputs * rows), raw = random_block<T>(inputs * batch);
        auto raw_major = block<T>(inputs * batch), chained = block<T>(outputs * batch);
        for (int64_t f = 0; f < inputs; ++f)
            for (int64_t b = 0; b < batch; ++b) raw_major[b * inputs + f] = raw[f * batch + b];
        const dst_layer layers[3] = {
            {0, 0, columns, inputs, 1, nullptr, nullptr, first.get(), nullptr},
            {1, wide, rows, columns, 1, row_pointers.get(), column_indices.get(), row_values.get(), bias.get()},
            {0, 0, outputs, rows, 0, nullptr, nullptr, head.get(), head.get()},
        };
        const dst_chain chain = {is_double, 3, layers};
        std::vector<double> hidden(columns * batch), after(rows * batch);
        for (int64_t c = 0; c < columns; ++c)
            for (int64_t b = 0; b < batch; ++b) {
                double sum = 0;
                for (int64_t f = 0; f < inputs; ++f) sum += double(first[c * inputs + f]) * double(raw[f * batch + b]);
                hidden[c * batch + b] = std::max(sum, 0.0);
            }
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t b = 0; b < batch; ++b) {
                double sum = bias[r];
                for (int32_t j = row_pointers[r]; j < row_pointers[r + 1]; ++j)
                    sum += double(row_values[j]) * hidden[int64_t(column_indices[j]) * batch + b];
                after[r * batch + b] = std::max(sum, 0.0);
            }
        for (int batch_major = 0; batch_major < 2; ++batch_major) {
            dst_run_chain(&chain, batch_major ? raw_major.get() : raw.get(), batch_major ? inputs : batch, batch_major, batch,
                          chained.get(), threads);
            for (int64_t o = 0; o < outputs; ++o)
                for (int64_t b = 0; b < batch; ++b) {
                    double sum = head[o], size = 0;
                    for (int64_t r = 0; r < rows; ++r) {
                        const double part = double(head[o * rows + r]) * after[r * batch + b];
                        sum += part;
                        size += std::fabs(part);
                    }
                    const double gap = std::fabs(double(chained[o * batch + b]) - sum);
                    expect(gap <= (sizeof(T) == 4 ? 1e-4 : 1e-11) * (1 + size), "chain", rows, columns, batch);
                }
        }
        auto g = random_block<T>(rows * batch), masked = block<T>(rows * batch), bias_gradient = block<T>(rows);
        dst_gradient(is_double, rows, batch, g.get(), rows, 1, y.get(), batch, masked.get(), bias_gradient.get(), threads);
        for (int64_t r = 0; r < rows; ++r) {
            double sum = 0;
            for (int64_t b = 0; b < batch; ++b) {
                const double wanted = y[r * batch + b] > 0 ? double(g[b * rows + r]) : 0.0;
                sum += wanted;
                expect(double(masked[r * batch + b]) == wanted, "gradient", rows, columns, batch);
            }
            expect(near(bias_gradient[r], sum), "bias gradient", rows, columns, batch);
        }
        auto gx = block<T>(columns * batch), gv = block<T>(n);
        for (int input = 0; input < 2; ++input) {
            dst_backward(is_double, wide, rows, columns, column_pointers.get(), row_indices.get(), values.get(), x.get(), batch,
                         masked.get(), batch, input ? gx.get() : nullptr, batch, gv.get(), batch, threads);
            for (int64_t c = 0; c < columns; ++c)
                for (int32_t j = column_pointers[c]; j < column_pointers[c + 1]; ++j) {
                    double dot = 0;
                    for (int64_t b = 0; b < batch; ++b)
                        dot += double(masked[int64_t(row_indices[j]) * batch + b]) * double(x[c * batch + b]);
                    expect(near(gv[j], dot), "values' gradient", rows, columns, batch);
                }
        }
        for (int64_t c = 0; c < columns; ++c)
            for (int64_t b = 0; b < batch; ++b) {
                double sum = 0;
                for (int32_t j = column_pointers[c]; j < column_pointers[c + 1]; ++j)
                    sum += double(values[j]) * double(masked[int64_t(row_indices[j]) * batch + b]);
                expect(near(gx[c * batch + b], sum), "input gradient", rows, columns, batch);
            }
    }
    // Topology: a pattern matched with itself, and the k largest of a tile with ties.
    auto source = block<int64_t>(n);
    dst_match_patterns(wide, rows, row_pointers.get(), column_indices.get(), permutation.get(), row_pointers.get(),
                       column_indices.get(), permutation.get(), source.get());
    for (int64_t j = 0; j < n; ++j) expect(source[j] == j, "match", rows, columns, batch);
    const int64_t size = rows * columns, k = size / 3;
    // A pattern that drops every third weight and grows every second inactive position.
    auto active = block<int64_t>(n);
    dst_flat(wide, 0, rows, columns, row_pointers.get(), column_indices.get(), active.get());
    std::vector<int64_t> dropped, grown, after;
    for (int64_t j = 0; j < n; ++j) (j % 3 ? after : dropped).push_back(active[j]);
    for (int64_t i = 0; i < size; i += 2)
        if (!std::binary_search(active.get(), active.get() + n, i)) grown.push_back(i);
    after.insert(after.end(), grown.begin(), grown.end());
    std::sort(after.begin(), after.end());
    const int64_t m = int64_t(after.size());
    auto new_rows = block<int32_t>(rows + 1), new_columns = block<int32_t>(columns + 1), new_permutation = block<int32_t>(m);
    auto new_column_indices = block<I>(m), new_row_indices = block<I>(m);
    auto carried = block<int64_t>(m), new_active = block<int64_t>(m);
    expect(!dst_rewire_pattern(wide, rows, columns, row_pointers.get(), column_indices.get(), permutation.get(),
                               int64_t(grown.size()), grown.data(), int64_t(dropped.size()), dropped.data(), new_rows.get(),
                               new_column_indices.get(), new_columns.get(), new_row_indices.get(), new_permutation.get(),
                               carried.get()), "rewire", rows, columns, batch);
    dst_flat(wide, 0, rows, columns, new_rows.get(), new_column_indices.get(), new_active.get());
    expect(std::equal(after.begin(), after.end(), new_active.get()), "rewired positions", rows, columns, batch);
    auto remapped = block<T>(m);
    dst_remap(int(sizeof(T)), m, carried.get(), values.get(), nullptr, remapped.get(), 1);
    for (int64_t j = 0; j < m; ++j)
        expect(remapped[j] == (carried[j] < 0 ? T(0) : values[carried[j]]), "remap", rows, columns, batch);
    auto stays = block<int64_t>(n / 2 + 1), leaves = block<int64_t>(n - n / 2 + 1);
    dst_partition(is_double, n, active.get(), values.get(), n / 2, 3, stays.get(), leaves.get());
    auto first = block<int64_t>(n / 2 + 1), second = block<int64_t>(n + 1);
    int64_t lengths[2];
    dst_cancel(n / 2, stays.get(), n, active.get(), first.get(), second.get(), lengths);
    expect(lengths[0] == 0 && lengths[1] == n - n / 2 && std::equal(second.get(), second.get() + lengths[1], leaves.get()),
           "partition", rows, columns, batch);
    auto tile = block<T>(size);
    for (int64_t i = 0; i < size; ++i) tile[i] = T(int(generator() % 7) - 3);
    std::vector<int64_t> order(size);
    for (int64_t i = 0; i < size; ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        const T x = std::fabs(tile[a]), y = std::fabs(tile[b]);
        return x > y || (x == y && tie_order(a, 5) < tie_order(b, 5));
    });
    order.resize(k);
    std::sort(order.begin(), order.end());
    const int64_t capacity = k + 64;
    auto kept = block<T>(capacity + 1);
    auto indices = block<int64_t>(capacity + 1);
    int64_t count = 0, rank = 0;
    T threshold = -1;
    dst_grow_update(is_double, tile.get(), size, 0, nullptr, 0, k, capacity, 5, kept.get(), indices.get(), &count,
                    &threshold, &rank);
    dst_grow_finish(is_double, k, 5, kept.get(), indices.get(), &count);
    expect(count == k && std::equal(order.begin(), order.end(), indices.get()), "growth", rows, columns, batch);
}

// Row-major examples with strides beyond the row, in blocks that end with the last row. The spaces between rows stay as
// they were. Without an activation nothing optional is given either.
template <class T, class I>
void check_rows(int64_t rows, int64_t columns, int64_t batch, double density) {
    const int is_double = sizeof(T) == 8, wide = sizeof(I) == 4;
    const Drawn<T, I> w(rows, columns, density);
    for (int64_t gap = 0; gap < 4; gap += 3)
        for (int threads = 1; threads <= 3; threads += 2) {
            const int64_t in = columns + gap, out = rows + gap, last = std::max<int64_t>(batch - 1, 0);
            const int64_t in_size = batch ? last * in + columns : 0, out_size = batch ? last * out + rows : 0;
            auto x = random_block<T>(in_size), g = random_block<T>(out_size), bias = random_block<T>(rows);
            auto y = block<T>(out_size), slope = block<T>(rows * batch), gx = block<T>(in_size), gv = block<T>(w.n), gb = block<T>(rows);
            for (int activation = 0; activation < 3; ++activation) {
                const bool relu = activation == 1, gelu = activation == 2;
                auto plain = block<T>(out_size);
                std::fill_n(y.get(), out_size, T(7));
                std::fill_n(gx.get(), in_size, T(7));
                int64_t failed = dst_rows_forward(
                    is_double, wide, rows, columns, w.row_pointers.get(), w.column_indices.get(), w.row_values.get(), x.get(), in,
                    y.get(), out, batch, activation ? bias.get() : nullptr, activation, gelu ? slope.get() : nullptr, threads);
                failed += dst_rows_backward(
                    is_double, wide, rows, columns, w.column_pointers.get(), w.row_indices.get(), w.values.get(), x.get(), in, g.get(),
                    out, relu ? y.get() : gelu ? slope.get() : nullptr, relu ? out : rows, gelu, activation ? gx.get() : nullptr, in,
                    gv.get(), activation ? gb.get() : nullptr, batch, threads);
                if (gelu)
                    failed += dst_rows_forward(is_double, wide, rows, columns, w.row_pointers.get(), w.column_indices.get(),
                                               w.row_values.get(), x.get(), in, plain.get(), out, batch, bias.get(), activation,
                                               nullptr, threads);
                expect(failed == 0, "rows' memory", rows, columns, batch);
                std::vector<double> values_gradient(w.n), input_gradient(columns * batch), bias_gradient(rows);
                for (int64_t b = 0; b < batch; ++b)
                    for (int64_t r = 0; r < rows; ++r) {
                        double sum = activation ? double(bias[r]) : 0.0;
                        for (int32_t j = w.row_pointers[r]; j < w.row_pointers[r + 1]; ++j)
                            sum += double(w.row_values[j]) * double(x[b * in + w.column_indices[j]]);
                        const double below = 0.5 * std::erfc(-sum / std::sqrt(2.0));
                        const double slopes = below + sum * std::exp(-0.5 * sum * sum) / std::sqrt(2 * std::acos(-1.0));
                        expect(near(y[b * out + r], relu ? std::max(sum, 0.0) : gelu ? sum * below : sum), "rows", rows, columns,
                               batch);
                        if (gelu) expect(near(slope[b * rows + r], slopes), "rows' derivative", rows, columns, batch);
                        if (gelu) expect(plain[b * out + r] == y[b * out + r], "rows without derivative", rows, columns, batch);
                        const double factor = relu ? double(y[b * out + r] > 0) : gelu ? double(slope[b * rows + r]) : 1.0;
                        const double part = factor * double(g[b * out + r]);
                        for (int32_t j = w.row_pointers[r]; j < w.row_pointers[r + 1]; ++j) {
                            const int64_t c = w.column_indices[j];
                            input_gradient[b * columns + c] += double(w.row_values[j]) * part;
                            values_gradient[w.permutation[j]] += double(x[b * in + c]) * part;
                        }
                        bias_gradient[r] += part;
                    }
                for (int64_t j = 0; j < w.n; ++j)
                    expect(near(gv[j], values_gradient[j]), "rows' values", rows, columns, batch);
                for (int64_t b = 0; b < batch; ++b)
                    for (int64_t c = 0; c < columns; ++c)
                        expect(activation ? near(gx[b * in + c], input_gradient[b * columns + c]) : gx[b * in + c] == 7,
                               "rows' input", rows, columns, batch);
                for (int64_t r = 0; activation && r < rows; ++r)
                    expect(near(gb[r], bias_gradient[r]), "rows' bias", rows, columns, batch);
                for (int64_t b = 0; b + 1 < batch; ++b)
                    for (int64_t i = 0; i < gap; ++i)
                        expect(y[b * out + rows + i] == 7 && gx[b * in + columns + i] == 7, "rows' gaps", rows, columns, batch);
            }
        }
}

// GELU of ordinary, huge and infinite numbers and of NaN, in batches that end within a vector and within a block.
template <class T>
void check_gelu() {
    const T infinity = std::numeric_limits<T>::infinity(), largest = std::numeric_limits<T>::max();
    std::vector<T> inputs = {T(0), T(-0.0), std::numeric_limits<T>::denorm_min(), largest, -largest, infinity, -infinity,
                             std::numeric_limits<T>::quiet_NaN()};
    for (T x = T(0.01); x < T(50); x *= T(1.07)) inputs.insert(inputs.end(), {x, -x});
    const int32_t pointers[2] = {0, 1};
    const uint16_t index[1] = {0};
    const T one = 1;
    for (int64_t batch : {int64_t(8), int64_t(63), int64_t(65), int64_t(inputs.size())}) {
        auto x = block<T>(batch), y = block<T>(batch), slope = block<T>(batch);
        std::copy_n(inputs.begin(), batch, x.get());
        for (int derivative = 0; derivative < 2; ++derivative) {
            dst_rows_forward(sizeof(T) == 8, 0, 1, 1, pointers, index, &one, x.get(), 1, y.get(), 1, batch, nullptr, 2,
                             derivative ? slope.get() : nullptr, 1);
            for (int64_t b = 0; b < batch; ++b) {
                const double in = x[b], below = 0.5 * std::erfc(-in / std::sqrt(2.0));
                const double density = std::exp(-0.5 * in * in) / std::sqrt(2 * std::acos(-1.0));
                const double wanted = in * below, wanted_slope = below + in * density;
                // An infinite input meets a factor of zero: the product may be NaN.
                expect(std::isinf(in) ? y[b] == T(in) || std::isnan(y[b])
                       : std::isnan(in) ? std::isnan(y[b])
                                        : near(y[b], wanted), "GELU", 1, 1, batch);
                if (!derivative || std::isinf(in)) continue;
                expect(std::isnan(in) ? std::isnan(slope[b]) : near(slope[b], wanted_slope), "GELU's derivative", 1, 1, batch);
            }
        }
    }
}

// A convolution and its gradients against plain loops over every tap.
template <class T, class I>
void check_conv(const dst_conv& s, double density) {
    const int is_double = sizeof(T) == 8, wide = sizeof(I) == 4;
    const int64_t area = s.kernel_height * s.kernel_width, columns = s.channels * area;
    const Drawn<T, I> w(s.outputs, columns, density);
    const int64_t n = w.n;
    const auto &row_pointers = w.row_pointers, &column_pointers = w.column_pointers, &permutation = w.permutation;
    const auto &column_indices = w.column_indices, &row_indices = w.row_indices;
    const auto &values = w.values, &row_values = w.row_values;
    const int64_t in = s.height * s.width, out = s.out_height * s.out_width;
    auto x = random_block<T>(s.batch * s.channels * in), g = random_block<T>(s.batch * s.outputs * out);
    auto bias = random_block<T>(s.outputs);
    std::vector<double> y(s.batch * s.outputs * out), gx(s.batch * s.channels * in), gv(n), gb(s.outputs);
    for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t o = 0; o < s.outputs; ++o)
            for (int64_t p = 0; p < out; ++p) {
                const int64_t at = (b * s.outputs + o) * out + p;
                y[at] = bias[o];
                gb[o] += g[at];
                for (int32_t j = row_pointers[o]; j < row_pointers[o + 1]; ++j) {
                    const int64_t k = column_indices[j], h = k % area / s.kernel_width, w = k % s.kernel_width;
                    const int64_t row = p / s.out_width * s.stride_height - s.pad_height + h * s.dilation_height;
                    const int64_t column = p % s.out_width * s.stride_width - s.pad_width + w * s.dilation_width;
                    if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
                    const int64_t from = (b * s.channels + k / area) * in + row * s.width + column;
                    y[at] += double(row_values[j]) * double(x[from]);
                    gx[from] += double(row_values[j]) * double(g[at]);
                    gv[permutation[j]] += double(x[from]) * double(g[at]);
                }
            }
    auto got_y = block<T>(y.size()), got_gx = block<T>(gx.size()), got_gv = block<T>(n), got_gb = block<T>(s.outputs);
    for (int threads = 1; threads <= 3; threads += 2)
        for (int every = 0; every < 2; ++every) {
            dst_conv_forward(is_double, wide, &s, row_pointers.get(), column_indices.get(), row_values.get(), x.get(), got_y.get(),
                             every ? bias.get() : nullptr, every, threads);
            dst_conv_backward(is_double, wide, &s, column_pointers.get(), row_indices.get(), values.get(), x.get(), g.get(),
                              every ? got_gx.get() : nullptr, got_gv.get(), every ? got_gb.get() : nullptr, threads);
            for (size_t i = 0; i < y.size(); ++i) {
                const double wanted = every ? std::max(y[i], 0.0) : y[i] - double(bias[int64_t(i) / out % s.outputs]);
                expect(near(got_y[i], wanted), "convolution", s.outputs, columns, s.batch);
            }
            for (int64_t j = 0; j < n; ++j) expect(near(got_gv[j], gv[j]), "convolution values", s.outputs, columns, s.batch);
        }
    for (size_t i = 0; i < gx.size(); ++i) expect(near(got_gx[i], gx[i]), "convolution input", s.outputs, columns, s.batch);
    for (int64_t o = 0; o < s.outputs; ++o) expect(near(got_gb[o], gb[o]), "convolution bias", s.outputs, columns, s.batch);
}

void check_convs() {
    const int64_t images[][5] = {{0, 2, 5, 6, 3}, {1, 3, 9, 7, 4}, {3, 5, 8, 8, 3}, {9, 2, 6, 13, 7}, {17, 40, 4, 3, 2}};
    for (const auto& i : images)
        for (int64_t kernel : {1, 2, 3, 5})
            for (int64_t stride : {1, 2, 3})
                for (int64_t pad : {0, 1, 3})
                    for (int64_t dilation : {1, 2}) {
                        const int64_t reach = (kernel - 1) * dilation + 1;
                        if (i[2] + 2 * pad < reach || i[3] + 2 * pad < reach) continue;
                        const dst_conv s = {i[0], i[1], i[2], i[3], i[4], (i[2] + 2 * pad - reach) / stride + 1,
                                            (i[3] + 2 * pad - reach) / stride + 1, kernel, kernel, stride, stride, pad, pad,
                                            dilation, dilation};
                        check_conv<float, uint16_t>(s, 0.3);
                        check_conv<double, int32_t>(s, stride == 3 ? 0.0 : 0.3);
                    }
    // Other sizes down than across, and an image whose bands the size of the scratch limits.
    const dst_conv uneven[] = {
        {3, 4, 9, 14, 5, 10, 8, 2, 5, 1, 2, 1, 3, 1, 1},
        {2, 3, 11, 7, 4, 3, 9, 3, 1, 3, 1, 1, 1, 2, 1},
        {5, 2, 1, 33, 3, 1, 33, 1, 3, 2, 1, 0, 2, 1, 2},
        {1, 8, 40, 900, 6, 40, 900, 3, 3, 1, 1, 1, 1, 1, 1},
        {1, 8, 41, 900, 6, 21, 450, 3, 3, 2, 2, 1, 1, 1, 1},
    };
    for (const dst_conv& s : uneven) {
        check_conv<float, uint16_t>(s, 0.3);
        check_conv<double, int32_t>(s, 0.3);
    }
}

}  // namespace

// The arguments name the parts to check ("layers", "rows", "convolutions") and the instruction sets ("2": AVX-512,
// "1": AVX2, "0": portable). Where no part is named all are checked; the same holds for instruction sets.
int main(int count, char** arguments) {
    const std::vector<std::string> named(arguments + 1, arguments + count);
    const auto wanted = [&](const std::string& name, const std::vector<std::string>& kind) {
        const auto has = [&](const std::string& n) { return std::find(named.begin(), named.end(), n) != named.end(); };
        return has(name) || std::none_of(kind.begin(), kind.end(), has);
    };
    const std::vector<std::string> parts = {"layers", "rows", "convolutions"}, sets = {"0", "1", "2"};
    for (int isa = 2; isa >= 0; --isa) {
        if (!wanted(std::to_string(isa), sets)) continue;
        if (dst_set_isa(isa) != isa) {
            std::printf("isa %d: not on this machine\n", isa);
            continue;
        }
        for (int64_t rows : {1, 7, 33, 129})
            for (int64_t columns : {1, 17, 65})
                for (int64_t batch : {0, 1, 3, 16, 17, 129, 300})
                    for (double density : {0.0, 0.15, 1.0}) {
                        if (wanted("layers", parts)) {
                            check<float, uint16_t>(rows, columns, batch, density);
                            check<float, int32_t>(rows, columns, batch, density);
                            check<double, uint16_t>(rows, columns, batch, density);
                            check<double, int32_t>(rows, columns, batch, density);
                        }
                        if (wanted("rows", parts)) {
                            check_rows<float, uint16_t>(rows, columns, batch, density);
                            check_rows<double, int32_t>(rows, columns, batch, density);
                        }
                    }
        if (wanted("rows", parts)) {
            check_rows<float, uint16_t>(300, 160, 1000, 0.1);
            check_gelu<float>();
            check_gelu<double>();
        }
        if (wanted("convolutions", parts)) check_convs();
        std::printf("isa %d done\n", isa);
        std::fflush(stdout);
    }
    std::printf("%d failures\n", failures);
    return failures != 0;
}
