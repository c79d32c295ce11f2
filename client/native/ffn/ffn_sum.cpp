#include "ffn/ffn_sum.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "ffn/ffn_rows.h"

namespace flashclient {
namespace {

constexpr size_t SUM_H_ELEMENTS = 1 << 18;  // of many tokens at a time, at least: 1.5 MiB in tiles

}  // namespace

FfnSum::FfnSum(const Ffn& ffn, const float* x, size_t tokens, float* y)
    : ffn_(ffn), x_(std::make_unique<Ffn::Rows>(ffn, x, tokens)), y_(y) {
    if (!in_groups() || tokens <= 1) return;
    const size_t elements = divide_up(ffn.shape_.hidden, SUM_ELEMENTS) * SUM_ELEMENTS;
    sums_ = aligned_room<float>(sums_memory_, x_->groups() * TOKENS_MAX * elements);
    for_strips([](float* sums, float* of_y, size_t count) { std::copy_n(of_y, count, sums); });
}
FfnSum::~FfnSum() = default;

// Calls copy(sums, y, count) for each token's part of each strip.
template <typename Copy>
void FfnSum::for_strips(const Copy& copy) {
    const size_t hidden = ffn_.shape_.hidden;
    ffn_.workers_.run(divide_up(hidden, SUM_ELEMENTS), [&](size_t strip) {
        const size_t first = strip * SUM_ELEMENTS;
        float* sums = sums_ + first * x_->groups() * TOKENS_MAX;
        for (size_t t = 0; t < x_->tokens; t++) {
            copy(sums + t * SUM_ELEMENTS, y_ + t * hidden + first, std::min(SUM_ELEMENTS, hidden - first));
        }
    });
}

void FfnSum::add(const Neurons& list) {
    if (x_->tokens == 0) return;
    Reading reading = ffn_.new_reading();
    const auto checked = reading.checked(list.bundles);
    const Neurons readable{checked, list.bias, list.up_bias, nullptr, 0, list.rows};
    if (!in_groups()) return ffn_.add_list(readable, *x_, y_);
    const size_t least = FIRED_BLOCKS_MIN * FIRED_MAX * ffn_.workers_.threads();
    const size_t many = divide_up(std::max(least, SUM_H_ELEMENTS / x_->tokens), GROUP_NEURONS) * GROUP_NEURONS;
    const size_t block = x_->tokens <= TOKENS_MAX ? checked.size() + waiting_ : many;
    for (size_t first = 0, count = 0; first < checked.size(); first += count) {
        count = std::min(block - waiting_, checked.size() - first);
        add_block(readable.part(first, count));
    }
}

// Adds all whole groups.
void FfnSum::add_block(const Neurons& list) {
    Ffn::Scratch& scratch = Ffn::scratch_of_thread();
    const size_t some = list.bundles.size();
    const size_t count = waiting_ + some;
    const Ffn::Job job{list, x_.get(), x_->tokens, nullptr, room(scratch.h, some * x_->tokens)};
    ffn_.fire_jobs({&job, 1});
    for (const uint64_t bundle : list.bundles) rows_.push_back(ffn_.down_.in(bundle));
    const float* h = scratch.h.data();
    if (waiting_ > 0) {
        room(scratch.by_token, count * x_->tokens);
        for (size_t group = 0; group < x_->groups(); group++) {
            const size_t first = group * TOKENS_MAX, tokens = x_->in_group(group);
            float* out =
                std::copy_n(h_.data() + first * waiting_, waiting_ * tokens, scratch.by_token.data() + first * count);
            std::copy_n(h + first * some, some * tokens, out);
        }
        h = scratch.by_token.data();
    }
    const size_t whole = count / GROUP_NEURONS * GROUP_NEURONS;
    if (whole > 0) add_groups(h, whole);
    keep(h, whole, count - whole);
}

// Keeps `count` neurons from `first` on, the last of those at hand.
void FfnSum::keep(const float* h, size_t first, size_t count) {
    const size_t row_bytes = ffn_.down_.row_bytes;
    std::vector<char> columns(count * row_bytes);
    std::vector<float> kept(count * x_->tokens);
    for (size_t i = 0; i < count; i++) {
        std::copy_n(static_cast<const char*>(rows_[first + i]), row_bytes, columns.data() + i * row_bytes);
    }
    for (size_t group = 0; group < x_->groups(); group++) {
        const size_t token = group * TOKENS_MAX, tokens = x_->in_group(group);
        std::copy_n(h + token * (first + count) + first * tokens, count * tokens, kept.data() + token * count);
    }
    columns_.swap(columns);
    h_.swap(kept);
    waiting_ = count;
    rows_.clear();
    for (size_t i = 0; i < count; i++) rows_.push_back(columns_.data() + i * row_bytes);
}

void FfnSum::finish() {
    if (waiting_ > 0) add_groups(h_.data(), waiting_);
    waiting_ = 0;
    rows_.clear();
    if (sums_ == nullptr) return;
    for_strips([](const float* sums, float* of_y, size_t count) { std::copy_n(sums, count, of_y); });
}

// The first `count` neurons of rows_, to whose end `h` [group of tokens][rows_, token] reaches.
void FfnSum::add_groups(const float* h, size_t count) {
    const GroupSums& sums = *ffn_.down_.kernels->groups;
    Workers& workers = ffn_.workers_;
    const size_t hidden = ffn_.shape_.hidden;
    const size_t tokens = x_->tokens;
    const size_t bytes = sums.packed_bytes(count);  // of a group of tokens
    char* packed = nullptr;
    if (tokens > 1) {
        packed = aligned_room<char>(packed_, x_->groups() * bytes);
        workers.run(x_->groups(), [&](size_t group) {
            sums.pack(h + group * TOKENS_MAX * rows_.size(), count, x_->in_group(group), packed + group * bytes);
        });
    }
    const size_t share = divide_up(hidden, workers.threads());
    const size_t least = std::min(divide_up(share, COLUMNS_PER_ITEM) * COLUMNS_PER_ITEM, COLUMNS_MAX);
    const size_t slice = tokens > TOKENS_MAX ? COLUMNS_PER_ITEM : least;
    workers.run(divide_up(hidden, slice), [&](size_t item) {
        const size_t begin = item * slice;
        const size_t end = std::min(hidden, begin + slice);
        if (tokens == 1) {
            sums.add_to_one(rows_.data(), h, count, begin, end, y_);
        } else {
            sums.add(rows_.data(), packed, count, tokens, hidden, begin, end, sums_);
        }
    });
}

}  // namespace flashclient
