#include "experts/expert_step.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace flashclient {
namespace {

constexpr size_t PICKS_TOGETHER = 8 * TOKENS_MAX;  // rows of all experts that are computed together

}  // namespace

ExpertStep::ExpertStep(const Ffn& ffn, CellWalk& walk, std::vector<ExpertLayer> layers)
    : ffn_(ffn), walk_(walk), layers_(std::move(layers)) {
    const uint64_t of_cell = walk_.cell().bundles * ffn_.shape().neurons;
    for (auto& [experts, neurons, of_layer] : layers_) {
        const bool whole_cells = experts == 1 || (experts > 0 && neurons % (experts * of_cell) == 0);
        const bool whole_bundles = neurons % ffn_.shape().neurons == 0;
        if (neurons == 0 || !whole_cells || !whole_bundles) throw std::invalid_argument("an expert has whole cells");
        if (of_layer == nullptr) of_layer = &ffn_;
        if (of_layer->shape().hidden != ffn_.shape().hidden || of_layer->shape().neurons != ffn_.shape().neurons ||
            of_layer->shape().gated() != ffn_.shape().gated()) {
            throw std::invalid_argument("the FFNs of layers differ in more than their encodings");
        }
    }
    for (Guesses* guesses : {&a_layer_before_, &nearly_complete_}) guesses->precision.resize(layers_.size());
}

StepTimes ExpertStep::run(uint32_t index, const PickedRows& rows, float* y, const GuessNext& guess) {
    const ExpertLayer& layer = layers_.at(index);
    StepTimer timer;
    std::fill_n(y, rows.tokens * ffn_.shape().hidden, 0.0f);
    of_layer_ = layer.ffn;
    neurons_ = layer.neurons / layer.experts;
    cells_ = cells_of(layer);
    rows.experts == nullptr ? pick_all(layer, rows) : sort_picks(layer, rows);
    for (Guesses* guesses : {&a_layer_before_, &nearly_complete_}) judge(index, *guesses);
    if (experts_.empty()) return timer.times;
    const bool few = picks_.size() <= TOKENS_MAX * std::max<size_t>(1, rows.picks);
    walk_.begin(index, cells_of_experts(), few);
    asks_ = walk_.is_asked();
    if (guess && asks_) look_ahead(guess(), rows.tokens, a_layer_before_);
    bool reads_on = picks_nearly_all(layer);
    timer.lap(timer.times.acquire_s);
    while (true) {
        do {
            if (walk_.all_asked() && std::exchange(reads_on, false)) read_on(index);
        } while (compute_some(rows, y));
        timer.lap(timer.times.compute_s);
        if (added_ == experts_.size()) break;
        walk_.wait();
        timer.lap(timer.times.wait_s);
    }
    walk_.end();
    timer.lap(timer.times.acquire_s);
    return timer.times;
}

// ---- who picks what ----

void ExpertStep::pick_all(const ExpertLayer& layer, const PickedRows& rows) {
    if (layer.experts != 1) throw std::invalid_argument("the layer has several experts, and no row picks any");
    picks_.resize(rows.tokens);
    for (size_t t = 0; t < rows.tokens; t++) picks_[t] = {static_cast<uint32_t>(t), 1.0f};
    experts_.clear();
    if (rows.tokens > 0) experts_.push_back({0, 0, rows.tokens, 0, 0, {}});
    added_ = 0;
}

// A counting sort.
void ExpertStep::sort_picks(const ExpertLayer& layer, const PickedRows& rows) {
    const auto counts = [&](size_t i) {
        return rows.experts[i] >= 0 && rows.experts[i] < int64_t{layer.experts} && rows.weights[i] != 0.0f;
    };
    const size_t count = rows.tokens * rows.picks;
    ends_.assign(layer.experts + 1, 0);
    for (size_t i = 0; i < count; i++) {
        if (counts(i)) ends_[static_cast<size_t>(rows.experts[i]) + 1]++;
    }
    experts_.clear();
    added_ = 0;
    for (uint32_t expert = 0; expert < layer.experts; expert++) {
        const size_t picks = ends_[expert + 1];
        ends_[expert + 1] += ends_[expert];
        if (picks > 0) experts_.push_back({expert, ends_[expert], picks, 0, 0, {}});
    }
    picks_.resize(ends_.back());  // from here on ends_[expert] is where the expert's next pick goes
    for (size_t i = 0; i < count; i++) {
        if (!counts(i)) continue;
        picks_[ends_[static_cast<size_t>(rows.experts[i])]++] = {static_cast<uint32_t>(i / rows.picks),
                                                                 rows.weights[i]};
    }
}

std::vector<uint32_t> ExpertStep::cells_of_experts() {
    std::vector<uint32_t> cells;
    cells.reserve(experts_.size() * cells_);
    for (Expert& expert : experts_) {
        expert.first_cell = cells.size();
        for (size_t i = 0; i < cells_; i++) cells.push_back(static_cast<uint32_t>(expert.number * cells_ + i));
    }
    return cells;
}

size_t ExpertStep::cells_of(const ExpertLayer& layer) const {
    return divide_up(layer.neurons / layer.experts, walk_.cell().bundles * ffn_.shape().neurons);
}

void ExpertStep::expect(const Guess& guess, size_t rows) { look_ahead(guess, rows, nearly_complete_); }

void ExpertStep::look_ahead(const Guess& guess, size_t rows, Guesses& guesses) {
    if (guess.experts.empty()) return;
    const ExpertLayer& layer = layers_.at(guess.layer);
    const auto cells = static_cast<uint32_t>(cells_of(layer));
    const size_t trusted = rows * guesses.precision[guess.layer].trusted(guess.experts.size() / rows);
    std::vector<CellRange> ranges;
    for (const int64_t expert : std::span(guess.experts).first(trusted)) {
        if (expert < 0 || expert >= int64_t{layer.experts}) continue;
        const uint32_t first = static_cast<uint32_t>(expert) * cells;
        ranges.emplace_back(first, first + cells);
    }
    walk_.prefetch(guess.layer, ranges);
    guesses.last = guess;
    guesses.rows = rows;
}

// Compares the last guess with what the layer's rows have picked.
void ExpertStep::judge(uint32_t layer, Guesses& guesses) {
    if (guesses.last.layer != layer) return;
    const std::vector<int64_t> guessed = std::exchange(guesses.last.experts, {});
    for (size_t i = 0; i < guessed.size(); i++) {
        const auto is_it = [&](const Expert& expert) { return expert.number == guessed[i]; };
        guesses.precision[layer].note(i / guesses.rows, std::ranges::any_of(experts_, is_it));
    }
}

// Whether the next mixture may be read before its router has picked.
bool ExpertStep::picks_nearly_all(const ExpertLayer& layer) const {
    return layer.experts > 1 && experts_.size() * 4 >= size_t{layer.experts} * 3;
}

// Where rows pick nearly all experts, the next layer's first ones are read while the last ones of this layer are
// computed, and what lies between the two.
void ExpertStep::read_on(uint32_t index) {
    if (index + 1 == layers_.size()) return;
    const ExpertLayer& next = layers_[index + 1];
    walk_.read_on(index + 1, static_cast<uint32_t>(next.experts * cells_of(next)));
}

// ---- computing ----

// Computes cells that are here and come next in their experts. Returns false where there are none.
bool ExpertStep::compute_some(const PickedRows& rows, float* y) {
    find_ready();
    if (ready_.empty()) return false;
    compute_ready(rows, y);
    for (const auto& [expert, cells] : ready_) {
        walk_.done(expert->first_cell + expert->computed, cells);
        expert->computed += cells;
    }
    add_finished(rows, y);
    return true;
}

void ExpertStep::find_ready() {
    ready_.clear();
    size_t left = walk_.part(), picks = 0;
    for (size_t i = added_; i < experts_.size() && left > 0; i++) {
        Expert& expert = experts_[i];
        const size_t most = std::min(cells_ - expert.computed, left);
        size_t cells = 0;
        while (cells < most && walk_.address(expert.first_cell + expert.computed + cells) != 0) cells++;
        if (cells == 0) continue;
        if (!ready_.empty() && picks + expert.picks > PICKS_TOGETHER) break;
        ready_.push_back({&expert, cells});
        picks += expert.picks;
        left -= cells;
    }
}

void ExpertStep::compute_ready(const PickedRows& rows, float* y) {
    const size_t hidden = ffn_.shape().hidden;
    size_t cells = 0, picks = 0;
    for (const Ready& ready : ready_) {
        cells += ready.cells;
        picks += ready.expert->picks;
    }
    addresses_.clear();
    addresses_.reserve(cells * walk_.cell().bundles);  // terms refer to what is in it
    if (x_.size() < picks * hidden) x_.resize(picks * hidden);
    terms_.clear();
    float* x = x_.data();
    for (const Ready& ready : ready_) {
        Expert& expert = *ready.expert;
        if (!is_direct(rows) && expert.y.empty()) expert.y = zeros(expert.picks * hidden);
        terms_.push_back(
            {neurons_of(ready, rows), rows_of(expert, rows, x), expert.picks, is_direct(rows) ? y : expert.y.data()});
        x += expert.picks * hidden;
    }
    if (terms_.size() > 1) return of_layer_->add_terms(terms_);
    of_layer_->add_rows(terms_[0].list, terms_[0].x, terms_[0].tokens, terms_[0].y);  // of any number of rows
}

// Appends to addresses_.
Neurons ExpertStep::neurons_of(const Ready& ready, const PickedRows& rows) {
    const Expert& expert = *ready.expert;
    const BundlesOfCell cell = walk_.cell();
    const size_t first = expert.computed * cell.bundles;  // bundle of the expert
    const size_t count = std::min(ready.cells * cell.bundles, neurons_ / ffn_.shape().neurons - first);
    const size_t begin = addresses_.size();
    for (size_t i = 0; i < count; i++) {
        const uint64_t address = walk_.address(expert.first_cell + expert.computed + i / cell.bundles);
        addresses_.push_back(address + i % cell.bundles * cell.stride_bytes);
    }
    Neurons list{std::span(addresses_).subspan(begin)};
    const size_t first_neuron = expert.number * neurons_ + first * ffn_.shape().neurons;
    if (rows.bias != nullptr) list.bias = rows.bias + first_neuron;
    if (rows.up_bias != nullptr) list.up_bias = rows.up_bias + first_neuron;
    return list;
}

// The rows of an expert, copied to `x` unless they lie together.
const float* ExpertStep::rows_of(const Expert& expert, const PickedRows& rows, float* x) const {
    if (rows.experts == nullptr || (rows.tokens == 1 && expert.picks == 1)) return rows.x;
    const size_t hidden = ffn_.shape().hidden;
    ffn_.workers().run(divide_up(expert.picks, TOKENS_MAX), [&](size_t item) {
        for (size_t i = item * TOKENS_MAX; i < std::min(expert.picks, (item + 1) * TOKENS_MAX); i++) {
            std::copy_n(rows.x + picks_[expert.first_pick + i].token * hidden, hidden, x + i * hidden);
        }
    });
    return x;
}

void ExpertStep::add_finished(const PickedRows& rows, float* y) {
    const size_t first = added_;
    size_t picks = 0;
    for (; added_ < experts_.size() && experts_[added_].computed == cells_; added_++) picks += experts_[added_].picks;
    if (first == added_ || is_direct(rows)) return;
    const size_t hidden = ffn_.shape().hidden;
    const size_t slice = picks <= TOKENS_MAX ? hidden : divide_up(hidden, ffn_.workers().threads());
    ffn_.workers().run(divide_up(hidden, slice), [&](size_t item) {
        const size_t begin = item * slice;
        const size_t end = std::min(hidden, begin + slice);
        for (size_t i = first; i < added_; i++) add(experts_[i], rows, begin, end, y);
    });
    for (size_t i = first; i < added_; i++) free_.push_back(std::move(experts_[i].y));
}

// The elements [begin, end) of each row.
void ExpertStep::add(const Expert& expert, const PickedRows& rows, size_t begin, size_t end, float* y) const {
    const size_t hidden = ffn_.shape().hidden;
    const float* bias = rows.output_bias == nullptr ? nullptr : rows.output_bias + expert.number * hidden;
    for (size_t i = 0; i < expert.picks; i++) {
        const auto [token, weight] = picks_[expert.first_pick + i];
        const float* from = expert.y.data() + i * hidden;
        float* to = y + token * hidden;
        if (bias == nullptr) {
            for (size_t j = begin; j < end; j++) to[j] += weight * from[j];
        } else {
            for (size_t j = begin; j < end; j++) to[j] += weight * (from[j] + bias[j]);
        }
    }
}

std::vector<float> ExpertStep::zeros(size_t count) {
    std::vector<float> values;
    if (!free_.empty()) {
        values = std::move(free_.back());
        free_.pop_back();
    }
    values.assign(count, 0.0f);
    return values;
}

}  // namespace flashclient
