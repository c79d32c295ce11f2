#include "kernels/ffn.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels/packed_rows.h"

namespace flashclient {
namespace {

constexpr size_t GROUP_MAX = 96;            // neurons that a thread fires at once: tens of microseconds of work
constexpr size_t GROUP_MIN = 16;            // a tile for one token
constexpr size_t ELEMENTS_PER_ITEM = 256;   // the fewest columns of a thread: eight cache lines of a bf16 row
constexpr size_t ELEMENTS_MAX = 8192;       // the most columns at a time: y of a token stays in the L1 cache
constexpr size_t H_ELEMENTS = 1 << 16;      // of many tokens at a time, at least: 256 KiB
constexpr size_t SUM_H_ELEMENTS = 1 << 18;  // the same in tiles: 1.5 MiB
constexpr size_t TILE_ALIGNMENT = 64;
constexpr size_t ROWS_PER_ITEM = 64;  // of down in a slab
constexpr size_t BLOCKS_MIN = 2;      // groups of neurons that each thread fires at a time, at least

// Room for `count` elements from the beginning of a cache line on. Not cleared unless it is new.
template <typename Element>
Element* aligned_room(std::vector<char>& memory, size_t count) {
    const size_t bytes = count * sizeof(Element) + TILE_ALIGNMENT;
    if (memory.size() < bytes) memory.resize(bytes);
    return reinterpret_cast<Element*>(memory.data() +
                                      (-reinterpret_cast<uintptr_t>(memory.data()) & (TILE_ALIGNMENT - 1)));
}

bool all_zero(const float* values, size_t count) {
    return std::all_of(values, values + count, [](float value) { return value == 0.0f; });
}

}  // namespace

struct Ffn::Group {
    uint32_t entry[GROUP_MAX];  // of the list
    size_t count;
    size_t tokens;  // number of the group of tokens
};

// Some rows of x, for each part that is multiplied with them.
struct Ffn::Rows {
    Rows(const Ffn& ffn, const float* x, size_t rows)
        : tokens(rows), first(ffn.workers_, *ffn.gate_or_up_.kernels, x, rows, ffn.shape_.hidden) {
        if (ffn.up_.kernels->pack != ffn.gate_or_up_.kernels->pack) {
            second.emplace(ffn.workers_, *ffn.up_.kernels, x, rows, ffn.shape_.hidden);
        }
    }
    const PackedRows& of_gate_or_up() const { return first; }
    const PackedRows& of_up() const { return second ? *second : first; }
    size_t groups() const { return divide_up(tokens, TOKENS_MAX); }
    size_t in_group(size_t group) const { return std::min(TOKENS_MAX, tokens - group * TOKENS_MAX); }

    size_t tokens;
    PackedRows first;
    std::optional<PackedRows> second;
};

// Neurons with output, of one group of tokens.
struct Ffn::Fired {
    const void** rows;  // their down columns
    float* h;           // [count, tokens]
    size_t count;
};

struct Ffn::Scratch {
    std::vector<float> h;           // [group of tokens][entry, token]
    std::vector<float> by_token;    // [token, entry]
    std::vector<const void*> rows;  // [group of tokens][entry]
    std::vector<Fired> fired;       // by group of tokens
};

Ffn::Ffn(Workers& workers, FfnShape shape, const char* instruction_set) : workers_(workers), shape_(std::move(shape)) {
    if (shape_.parts.size() != 2 && shape_.parts.size() != 3) {
        throw std::invalid_argument("a bundle's parts are gate, up and down, or up and down");
    }
    if (shape_.activation.function == Function::gated_relu && !shape_.gated()) {
        throw std::invalid_argument("activation gated_relu needs bundles with a gate row");
    }
    if (in_slabs() && (!std::has_single_bit(shape_.neurons) || shape_.neurons < weightd::SLAB_NEURONS_MIN ||
                       shape_.neurons > weightd::SLAB_NEURONS_MAX)) {
        throw std::invalid_argument("a slab has 32 to 256 neurons, a power of two");
    }
    neurons_shift_ = static_cast<unsigned>(std::bit_width(shape_.neurons) - 1);
    gate_or_up_ = next_part(0, instruction_set);
    up_ = shape_.gated() ? next_part(1, instruction_set) : gate_or_up_;
    down_ = next_part(shape_.parts.size() - 1, instruction_set);
}

// Parts are taken in their order: each begins where the one before ends.
Ffn::Part Ffn::next_part(size_t part, const char* instruction_set) {
    const Encoding& encoding = shape_.parts[part];
    const Part taken{&kernels_for(encoding, instruction_set), bundle_bytes_, encoding.bytes_of(shape_.hidden)};
    const bool along_neurons = in_slabs() && part == shape_.parts.size() - 1;
    const size_t values = along_neurons ? shape_.neurons : shape_.hidden;
    if (values % encoding.block_values != 0) {
        throw std::invalid_argument((along_neurons ? "a slab of " : "hidden_size ") + std::to_string(values) +
                                    " is not whole blocks of " + encoding.format);
    }
    bundle_bytes_ += encoding.bytes_of(shape_.hidden * shape_.neurons);
    if (const auto dtype = encoding.plain()) alignment_bytes_ = std::max(alignment_bytes_, bytes_of(*dtype));
    return taken;
}

// Kept from call to call, because allocating takes longer than a small call.
Ffn::Scratch& Ffn::scratch_of_thread() {
    static thread_local Scratch scratch;
    return scratch;
}

void Ffn::fire(const Neurons& list, std::span<const uint32_t> entries, const float* x, size_t tokens, float* h) const {
    assert(tokens <= TOKENS_MAX);
    require_no_slabs();
    Reading reading = new_reading();
    const auto checked = reading.checked(list.bundles, [&](auto&& check) {
        for (const uint32_t entry : entries) {
            if (list.row_masks == nullptr || list.row_masks[entry] != 0) check(entry);
        }
    });
    if (checked.empty()) {
        for (const uint32_t entry : entries) std::fill_n(h + entry * tokens, tokens, 0.0f);
        return;
    }
    const Neurons readable{checked, list.bias, list.up_bias, list.row_masks, list.mask_stride};
    fire_entries(readable, entries.data(), entries.size(), Rows(*this, x, tokens), h);
}

// `entries`: of the list; null for its first `count`. h: [group of tokens][list, tokens of the group].
void Ffn::fire_entries(const Neurons& list, const uint32_t* entries, size_t count, const Rows& x, float* h) const {
    const size_t rounds =
        std::max<size_t>(2, divide_up(count, GROUP_MAX * workers_.threads()));  // the same of each thread
    const size_t share = divide_up(count, rounds * workers_.threads());
    const size_t group_size = std::clamp(divide_up(share, GROUP_MIN) * GROUP_MIN, GROUP_MIN, GROUP_MAX);
    const auto h_of = [&](size_t t) { return h + t * TOKENS_MAX * entries_of(list); };
    workers_.run(divide_up(count, group_size), [&](size_t item) {
        const size_t end = std::min(count, (item + 1) * group_size);
        const auto of_tokens = [&](size_t t) {
            Group group{{}, 0, t};
            const Neurons masked = list.of_tokens(t);
            for (size_t i = item * group_size; i < end; i++) {
                const size_t entry = entries != nullptr ? entries[i] : i;
                if (masked.row_masks != nullptr && masked.row_masks[entry] == 0) {
                    std::fill_n(h_of(t) + entry * x.in_group(t), x.in_group(t), 0.0f);
                } else {
                    group.entry[group.count++] = static_cast<uint32_t>(entry);
                }
            }
            return group;
        };
        size_t t = 0;
        for (; list.row_masks == nullptr && has_pairs() && t + 1 < x.groups(); t += 2) {
            fire_two({of_tokens(t), of_tokens(t + 1)}, list, x, {h_of(t), h_of(t + 1)});
        }
        for (; t < x.groups(); t++) fire_group(of_tokens(t), list.of_tokens(t), x, h_of(t));
    });
}

bool Ffn::has_pairs() const {
    return gate_or_up_.kernels->dots_of_groups != nullptr && up_.kernels->dots_of_groups != nullptr;
}

// Computes the dots of a neuron for all tokens, which reads no more bytes, and sets those that are not wanted to 0.
void Ffn::fire_group(const Group& group, const Neurons& list, const Rows& x, float* h) const {
    const void* rows[GROUP_MAX];
    float dots[GROUP_MAX * TOKENS_MAX];
    const size_t tokens = x.in_group(group.tokens);
    for (size_t i = 0; i < group.count; i++) rows[i] = row_of(gate_or_up_, list, group.entry[i]);
    gate_or_up_.kernels->dots(rows, group.count, x.of_gate_or_up().group(group.tokens * TOKENS_MAX), shape_.hidden,
                              tokens, dots);
    const Group open = activate_group(group, list, dots, tokens, h);
    if (shape_.gated() && open.count > 0) open_gate(open, list, x, h);
}

// The same neurons for two groups of tokens, without masks.
void Ffn::fire_two(const Group (&groups)[2], const Neurons& list, const Rows& x, float* const (&h)[2]) const {
    const void* rows[GROUP_MAX];
    float dots[2][GROUP_MAX * TOKENS_MAX];
    const size_t first[2] = {groups[0].tokens * TOKENS_MAX, groups[1].tokens * TOKENS_MAX};
    const size_t tokens[2] = {x.in_group(groups[0].tokens), x.in_group(groups[1].tokens)};
    const auto multiply = [&](const Part& part, const PackedRows& packed) {
        for (size_t i = 0; i < groups[0].count; i++) rows[i] = row_of(part, list, groups[0].entry[i]);
        part.kernels->dots_of_groups(rows, groups[0].count, {packed.group(first[0]), packed.group(first[1])},
                                     shape_.hidden, tokens, {dots[0], dots[1]});
    };
    multiply(gate_or_up_, x.of_gate_or_up());
    Group open[2];
    for (size_t g = 0; g < 2; g++) open[g] = activate_group(groups[g], list, dots[g], tokens[g], h[g]);
    if (!shape_.gated()) return;
    if (open[0].count < groups[0].count || open[1].count < groups[1].count) {
        for (size_t g = 0; g < 2; g++) {
            if (open[g].count > 0) open_gate(open[g], list, x, h[g]);
        }
        return;
    }
    multiply(up_, x.of_up());
    for (size_t g = 0; g < 2; g++) multiply_group(open[g], list, dots[g], tokens[g], h[g]);
}

// Sets h of the neurons to the activation of their dots. Returns those that are not 0 for all tokens.
Ffn::Group Ffn::activate_group(const Group& group, const Neurons& list, const float* dots, size_t tokens,
                               float* h) const {
    const Activation activation = shape_.activation;  // a copy, which writing h cannot change
    Group open{{}, 0, group.tokens};
    for (size_t i = 0; i < group.count; i++) {
        const uint32_t entry = group.entry[i];
        const float bias = list.bias != nullptr ? list.bias[entry] : 0.0f;
        float* of_entry = h + entry * tokens;
        for (size_t t = 0; t < tokens; t++) {
            const bool wanted = list.row_masks == nullptr || (list.row_masks[entry] >> t & 1) != 0;
            of_entry[t] = wanted ? activate(activation, dots[i * tokens + t] + bias) : 0.0f;
        }
        if (!all_zero(of_entry, tokens)) open.entry[open.count++] = entry;
    }
    return open;
}

// Multiplies h by the factors of the up rows where the gate is open. A closed gate stays 0, whatever the up row holds.
void Ffn::open_gate(const Group& group, const Neurons& list, const Rows& x, float* h) const {
    const void* rows[GROUP_MAX];
    float dots[GROUP_MAX * TOKENS_MAX];
    const size_t tokens = x.in_group(group.tokens);
    for (size_t i = 0; i < group.count; i++) rows[i] = row_of(up_, list, group.entry[i]);
    up_.kernels->dots(rows, group.count, x.of_up().group(group.tokens * TOKENS_MAX), shape_.hidden, tokens, dots);
    multiply_group(group, list, dots, tokens, h);
}

void Ffn::multiply_group(const Group& group, const Neurons& list, const float* dots, size_t tokens, float* h) const {
    const Activation activation = shape_.activation;
    for (size_t i = 0; i < group.count; i++) {
        const uint32_t entry = group.entry[i];
        const float bias = list.up_bias != nullptr ? list.up_bias[entry] : 0.0f;
        for (size_t t = 0; t < tokens; t++) {
            float& value = h[entry * tokens + t];
            if (value != 0.0f) value *= up_factor(activation, dots[i * tokens + t] + bias);
        }
    }
}

void Ffn::accumulate(std::span<const uint64_t> bundles, const float* h, size_t tokens, float* y) const {
    assert(tokens <= TOKENS_MAX);
    require_no_slabs();
    Reading reading = new_reading();
    const auto checked = reading.checked(bundles, [&](auto&& check) {
        for (size_t entry = 0; entry < bundles.size(); entry++) {
            if (!all_zero(h + entry * tokens, tokens)) check(entry);
        }
    });
    Scratch& scratch = scratch_of_thread();
    scratch.h.assign(h, h + bundles.size() * tokens);
    accumulate_list(checked, tokens, scratch, y);
}

// scratch.h is [group of tokens][bundles, tokens of the group]; it is overwritten. Skips neurons whose h is 0: adding 0
// changes no finite sum, and their columns need not be read.
void Ffn::accumulate_list(std::span<const uint64_t> bundles, size_t tokens, Scratch& scratch, float* y) const {
    const size_t groups = divide_up(tokens, TOKENS_MAX);
    scratch.rows.resize(groups * bundles.size());
    scratch.fired.resize(groups);
    const auto in_group = [&](size_t group) { return std::min(TOKENS_MAX, tokens - group * TOKENS_MAX); };
    workers_.run(groups, [&](size_t group) {
        Fired fired{scratch.rows.data() + group * bundles.size(),
                    scratch.h.data() + group * TOKENS_MAX * bundles.size(), 0};
        const size_t some = in_group(group);
        for (size_t i = 0; i < bundles.size(); i++) {
            const float* of_entry = fired.h + i * some;
            if (all_zero(of_entry, some)) continue;
            std::copy_n(of_entry, some, fired.h + fired.count * some);
            fired.rows[fired.count++] = down_.in(bundles[i]);
        }
        scratch.fired[group] = fired;
    });
    // One thread computes an element of y and adds the neurons in order. Each thread gets one slice, if y is not large.
    const size_t share = divide_up(shape_.hidden, workers_.threads());
    const size_t slice = std::min(divide_up(share, ELEMENTS_PER_ITEM) * ELEMENTS_PER_ITEM, ELEMENTS_MAX);
    workers_.run(divide_up(shape_.hidden, slice), [&](size_t item) {
        for (size_t group = 0; group < groups; group++) {
            const Fired& fired = scratch.fired[group];
            down_.kernels->accumulate(fired.rows, fired.h, fired.count, in_group(group), shape_.hidden, item * slice,
                                      std::min(shape_.hidden, (item + 1) * slice),
                                      y + group * TOKENS_MAX * shape_.hidden);
        }
    });
}

void Ffn::require_no_slabs() const {
    if (in_slabs()) throw std::invalid_argument("slabs are summed as a whole, with all of their neurons");
}

// Many tokens are computed for some slabs at a time, as in add_rows().
void Ffn::add_slabs(const Neurons& list, const Rows& x, float* y) const {
    Scratch& scratch = scratch_of_thread();
    const size_t least = BLOCKS_MIN * GROUP_MAX * workers_.threads();
    const size_t neurons = x.tokens <= TOKENS_MAX ? entries_of(list) : std::max(least, H_ELEMENTS / x.tokens);
    const size_t block = std::max<size_t>(1, divide_up(neurons, shape_.neurons));
    for (size_t first = 0; first < list.bundles.size(); first += block) {
        const auto of_first = [&](const float* bias) {
            return bias == nullptr ? nullptr : bias + first * shape_.neurons;
        };
        const Neurons part{list.bundles.subspan(first, std::min(block, list.bundles.size() - first)),
                           of_first(list.bias), of_first(list.up_bias)};
        const size_t entries = entries_of(part);
        if (scratch.h.size() < entries * x.tokens) scratch.h.resize(entries * x.tokens);
        fire_entries(part, nullptr, entries, x, scratch.h.data());
        if (x.tokens == 1) {
            accumulate_slabs(part.bundles, scratch.h.data(), 1, y);
            continue;
        }
        if (scratch.by_token.size() < entries * x.tokens) scratch.by_token.resize(entries * x.tokens);
        workers_.run(x.groups(), [&](size_t group) {
            const size_t begin = group * TOKENS_MAX;
            const float* of_group = scratch.h.data() + begin * entries;
            for (size_t t = 0; t < x.in_group(group); t++) {
                float* of_token = scratch.by_token.data() + (begin + t) * entries;
                for (size_t i = 0; i < entries; i++) of_token[i] = of_group[i * x.in_group(group) + t];
            }
        });
        accumulate_slabs(part.bundles, scratch.by_token.data(), x.tokens, y);
    }
}

// h: [tokens, neurons of all slabs]. One thread computes an element of y and adds the slabs in order.
void Ffn::accumulate_slabs(std::span<const uint64_t> slabs, const float* h, size_t tokens, float* y) const {
    const size_t share = divide_up(shape_.hidden, workers_.threads());
    const size_t slice = std::min(divide_up(share, ROWS_PER_ITEM) * ROWS_PER_ITEM, ELEMENTS_MAX);
    const size_t stride = slabs.size() * shape_.neurons;
    workers_.run(divide_up(shape_.hidden, slice), [&](size_t item) {
        const size_t begin = item * slice;
        const size_t end = std::min(shape_.hidden, begin + slice);
        for (size_t s = 0; s < slabs.size(); s++) {
            down_.kernels->add_products(down_.in(slabs[s]), shape_.neurons, h + s * shape_.neurons, stride, tokens,
                                        shape_.hidden, begin, end, y);
        }
    });
}

void Ffn::add_rows(const Neurons& list, const float* x, size_t tokens, float* y) const {
    Reading reading = new_reading();
    const auto checked = reading.checked(list.bundles);
    const Neurons readable{checked, list.bias, list.up_bias, list.row_masks, list.mask_stride};
    add_list(readable, Rows(*this, x, tokens), y);
}

// Many tokens are computed for some neurons at a time, whose weights then stay in a cache.
void Ffn::add_list(const Neurons& list, const Rows& x, float* y) const {
    if (in_slabs()) {
        if (list.row_masks != nullptr) require_no_slabs();
        return add_slabs(list, x, y);
    }
    Scratch& scratch = scratch_of_thread();
    const size_t least = BLOCKS_MIN * GROUP_MAX * workers_.threads();
    const size_t block = x.tokens <= TOKENS_MAX ? list.bundles.size() : std::max(least, H_ELEMENTS / x.tokens);
    for (size_t first = 0; first < list.bundles.size(); first += block) {
        const Neurons part = list.part(first, std::min(block, list.bundles.size() - first));
        if (scratch.h.size() < part.bundles.size() * x.tokens) scratch.h.resize(part.bundles.size() * x.tokens);
        fire_entries(part, nullptr, part.bundles.size(), x, scratch.h.data());
        accumulate_list(part.bundles, x.tokens, scratch, y);
    }
}

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
    const Neurons readable{checked, list.bias, list.up_bias};
    if (!in_groups()) return ffn_.add_list(readable, *x_, y_);
    const size_t least = BLOCKS_MIN * GROUP_MAX * ffn_.workers_.threads();
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
    if (scratch.h.size() < some * x_->tokens) scratch.h.resize(some * x_->tokens);
    ffn_.fire_entries(list, nullptr, some, *x_, scratch.h.data());
    for (const uint64_t bundle : list.bundles) rows_.push_back(ffn_.down_.in(bundle));
    const float* h = scratch.h.data();
    if (waiting_ > 0) {
        if (scratch.by_token.size() < count * x_->tokens) scratch.by_token.resize(count * x_->tokens);
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
    const size_t least = std::min(divide_up(share, ELEMENTS_PER_ITEM) * ELEMENTS_PER_ITEM, ELEMENTS_MAX);
    const size_t slice = tokens > TOKENS_MAX ? ELEMENTS_PER_ITEM : least;
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
