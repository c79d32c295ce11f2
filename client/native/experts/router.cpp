#include "experts/router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace flashclient {

void Routers::project(const Router& router, const void* x, size_t rows, void* logits) const {
    const Linear::Projection projection{router.weight, router.bias, logits};
    linear_.project({&projection, 1}, x, rows);
}

void Routers::pick(const Router& router, const void* logits, size_t rows, float* weights, int64_t* experts) const {
    const size_t row_bytes = router.weight.rows * bytes_of(dtype());
    const auto some = [&](size_t item) {
        const size_t end = std::min(rows, (item + 1) * TOKENS_MAX);
        for (size_t row = item * TOKENS_MAX; row < end; row++) {
            pick_row(router, static_cast<const char*>(logits) + row * row_bytes, weights + row * router.picks,
                     experts + row * router.picks);
        }
    };
    if (rows <= TOKENS_MAX) return some(0);
    workers_.run(divide_up(rows, TOKENS_MAX), some);
}

void Routers::pick_row(const Router& router, const void* logits, float* weights, int64_t* experts) const {
    static thread_local std::vector<float> values;  // kept from call to call, because allocating takes long
    static thread_local std::vector<uint32_t> order;
    const size_t count = router.weight.rows;
    values.resize(count);
    order.resize(count);
    kernels_.upcast(logits, count, values.data());
    std::iota(order.begin(), order.end(), 0U);
    for (float& value : values) value = std::isnan(value) ? std::numeric_limits<float>::infinity() : value;
    const auto is_before = [](uint32_t a, uint32_t b) {
        return values[a] > values[b] || (values[a] == values[b] && a < b);
    };
    const auto last = order.begin() + static_cast<ptrdiff_t>(router.picks);
    std::partial_sort(order.begin(), last, order.end(), is_before);
    const float sum = kernels_.exponentials(values.data(), count);
    float of_picks = 0.0f;
    for (size_t i = 0; i < router.picks; i++) {
        experts[i] = order[i];
        weights[i] = values[order[i]] / sum;
        of_picks += weights[i];
    }
    for (size_t i = 0; router.normalised && i < router.picks; i++) weights[i] /= of_picks;
    if (!router.rounded) return;
    kernels_.downcast(weights, router.picks, order.data());  // which is not needed any more
    kernels_.upcast(order.data(), router.picks, weights);
}

}  // namespace flashclient
