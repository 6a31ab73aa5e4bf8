// Runs every kernel on odd sizes in exactly sized heap blocks and checks it against plain loops. Built with the address and
// undefined-behaviour sanitizers by sanitize_kernels.sh; includes the source so that everything is instrumented.
#include "../dst/kernels/spmm.cpp"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

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

template <class T, class I>
void check(int64_t rows, int64_t columns, int64_t batch, double density) {
    const int is_double = sizeof(T) == 8, wide = sizeof(I) == 4;
    std::vector<int32_t> starts(1, 0);
    std::vector<I> found;
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c)
            if (generator() < density * 4294967295.0) found.push_back(I(c));
        starts.push_back(int32_t(found.size()));
    }
    const int64_t n = int64_t(found.size());
    auto row_pointers = block<int32_t>(rows + 1), column_pointers = block<int32_t>(columns + 1), permutation = block<int32_t>(n);
    auto column_indices = block<I>(n), row_indices = block<I>(n);
    std::copy(starts.begin(), starts.end(), row_pointers.get());
    std::copy(found.begin(), found.end(), column_indices.get());
    dst_transpose_pattern(wide, rows, columns, row_pointers.get(), column_indices.get(), column_pointers.get(),
                          row_indices.get(), permutation.get());
    auto values = random_block<T>(n), row_values = block<T>(n);
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
    auto source = block<int32_t>(n);
    dst_match_patterns(wide, rows, row_pointers.get(), column_indices.get(), permutation.get(), row_pointers.get(),
                       column_indices.get(), permutation.get(), source.get());
    for (int64_t j = 0; j < n; ++j) expect(source[j] == j, "match", rows, columns, batch);
    const int64_t size = rows * columns, k = size / 3;
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

}  // namespace

int main() {
    for (int isa = 2; isa >= 0; --isa) {
        if (dst_set_isa(isa) != isa) continue;
        for (int64_t rows : {1, 7, 33, 129})
            for (int64_t columns : {1, 17, 65})
                for (int64_t batch : {0, 1, 3, 16, 17, 129, 300})
                    for (double density : {0.0, 0.15, 1.0}) {
                        check<float, uint16_t>(rows, columns, batch, density);
                        check<float, int32_t>(rows, columns, batch, density);
                        check<double, uint16_t>(rows, columns, batch, density);
                        check<double, int32_t>(rows, columns, batch, density);
                    }
        std::printf("isa %d done\n", isa);
    }
    std::printf("%d failures\n", failures);
    return failures != 0;
}
