#include "kernels/ffn.h"

#include <algorithm>
#include <cassert>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace flashclient {
namespace {

constexpr size_t GROUP_MAX = 96;           // neurons that a thread fires at once: tens of microseconds of work
constexpr size_t GROUP_MIN = 8;            // a tile for one token
constexpr size_t ELEMENTS_PER_ITEM = 256;  // the fewest columns of a thread: eight cache lines of a bf16 row
constexpr size_t ELEMENTS_MAX = 8192;      // the most columns at a time: y of a token stays in the L1 cache
constexpr size_t TOKENS_MIN = 8;           // of a group: converting a row of weights does not pay for fewer
static_assert(TOKENS_MAX % TOKENS_MIN == 0);

bool all_zero(const float* values, size_t count) {
    return std::all_of(values, values + count, [](float value) { return value == 0.0f; });
}

// The tokens of a group: as many as a call takes, or half of that where some threads would have no group.
size_t group_tokens(size_t tokens, size_t threads) {
    const bool few = tokens > TOKENS_MAX && divide_up(tokens, TOKENS_MAX) < 2 * threads;
    return few ? TOKENS_MIN : TOKENS_MAX;
}

}  // namespace

struct Ffn::Group {
    uint32_t entry[GROUP_MAX];  // of the list
    size_t count = 0;
};

struct Ffn::Scratch {
    std::vector<float> h;                // [entries, tokens]
    std::vector<float> fired_h;          // [fired, tokens]
    std::vector<const void*> down_rows;  // of those that fired
    std::vector<uint16_t> masks;         // of a group that does not begin with bit 0
};

Ffn::Ffn(Workers& workers, FfnShape shape, const char* instruction_set) : workers_(workers), shape_(std::move(shape)) {
    if (shape_.parts.size() != 2 && shape_.parts.size() != 3) {
        throw std::invalid_argument("a bundle's parts are gate, up and down, or up and down");
    }
    if (shape_.activation.function == Function::gated_relu && !shape_.gated()) {
        throw std::invalid_argument("activation gated_relu needs bundles with a gate row");
    }
    gate_or_up_ = next_part(0, instruction_set);
    up_ = shape_.gated() ? next_part(1, instruction_set) : gate_or_up_;
    down_ = next_part(shape_.parts.size() - 1, instruction_set);
}

// Parts are taken in their order: each begins where the one before ends.
Ffn::Part Ffn::next_part(size_t part, const char* instruction_set) {
    const Encoding& encoding = shape_.parts[part];
    const Part taken{&kernels_for(encoding, instruction_set), bundle_bytes_};
    if (shape_.hidden % encoding.block_values != 0) {
        throw std::invalid_argument("hidden_size " + std::to_string(shape_.hidden) + " is not whole blocks of " +
                                    encoding.format);
    }
    bundle_bytes_ += encoding.bytes_of(shape_.hidden);
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
    fire_entries({checked, list.bias, list.up_bias, list.row_masks}, entries.data(), entries.size(), x, tokens, h);
}

// `entries`: of the list; null for its first `count`.
void Ffn::fire_entries(const Neurons& list, const uint32_t* entries, size_t count, const float* x, size_t tokens,
                       float* h) const {
    const size_t share = divide_up(count, 2 * workers_.threads());
    const size_t group_size = std::clamp(divide_up(share, GROUP_MIN) * GROUP_MIN, GROUP_MIN, GROUP_MAX);
    workers_.run(divide_up(count, group_size), [&](size_t item) {
        Group group;
        for (size_t i = item * group_size; i < std::min(count, (item + 1) * group_size); i++) {
            const size_t entry = entries != nullptr ? entries[i] : i;
            if (list.row_masks != nullptr && list.row_masks[entry] == 0) {
                std::fill_n(h + entry * tokens, tokens, 0.0f);
            } else {
                group.entry[group.count++] = static_cast<uint32_t>(entry);
            }
        }
        fire_group(group, list, x, tokens, h);
    });
}

// Computes the dots of a neuron for all tokens, which reads no more bytes, and sets those that are not wanted to 0.
void Ffn::fire_group(const Group& group, const Neurons& list, const float* x, size_t tokens, float* h) const {
    const void* rows[GROUP_MAX];
    float dots[GROUP_MAX * TOKENS_MAX];
    for (size_t i = 0; i < group.count; i++) rows[i] = gate_or_up_.in(list.bundles[group.entry[i]]);
    gate_or_up_.kernels->dots(rows, group.count, x, shape_.hidden, tokens, dots);
    const Activation activation = shape_.activation;  // a copy, which writing h cannot change
    Group open;
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
    if (shape_.gated()) open_gate(open, list, x, tokens, h);
}

// Multiplies h by the factors of the up rows where the gate is open. A closed gate stays 0, whatever the up row holds.
void Ffn::open_gate(const Group& group, const Neurons& list, const float* x, size_t tokens, float* h) const {
    const void* rows[GROUP_MAX];
    float dots[GROUP_MAX * TOKENS_MAX];
    for (size_t i = 0; i < group.count; i++) rows[i] = up_.in(list.bundles[group.entry[i]]);
    up_.kernels->dots(rows, group.count, x, shape_.hidden, tokens, dots);
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
    Reading reading = new_reading();
    const auto checked = reading.checked(bundles, [&](auto&& check) {
        for (size_t entry = 0; entry < bundles.size(); entry++) {
            if (!all_zero(h + entry * tokens, tokens)) check(entry);
        }
    });
    accumulate_list(checked, h, tokens, y);
}

// Skips neurons whose h is 0: adding 0 changes no finite sum, and their columns need not be read.
void Ffn::accumulate_list(std::span<const uint64_t> bundles, const float* h, size_t tokens, float* y) const {
    Scratch& scratch = scratch_of_thread();
    scratch.fired_h.resize(bundles.size() * tokens);
    scratch.down_rows.resize(bundles.size());
    size_t fired = 0;
    for (size_t i = 0; i < bundles.size(); i++) {
        const float* of_entry = h + i * tokens;
        if (all_zero(of_entry, tokens)) continue;
        std::copy_n(of_entry, tokens, scratch.fired_h.data() + fired * tokens);
        scratch.down_rows[fired++] = down_.in(bundles[i]);
    }
    // One thread computes an element of y and adds the neurons in order. Each thread gets one slice, if y is not large.
    const size_t share = divide_up(shape_.hidden, workers_.threads());
    const size_t slice = std::min(divide_up(share, ELEMENTS_PER_ITEM) * ELEMENTS_PER_ITEM, ELEMENTS_MAX);
    workers_.run(divide_up(shape_.hidden, slice), [&](size_t item) {
        down_.kernels->accumulate(scratch.down_rows.data(), scratch.fired_h.data(), fired, tokens, shape_.hidden,
                                  item * slice, std::min(shape_.hidden, (item + 1) * slice), y);
    });
}

// The threads share the groups of tokens. Within a group, run() is done by the calling thread alone.
void Ffn::add_rows(const Neurons& list, const float* x, size_t tokens, float* y) const {
    Reading reading = new_reading();
    const auto checked = reading.checked(list.bundles);
    const size_t count = checked.size();
    const size_t together = group_tokens(tokens, workers_.threads());
    workers_.run(divide_up(tokens, together), [&](size_t item) {
        const size_t first = item * together;
        const size_t some = std::min(together, tokens - first);
        Scratch& scratch = scratch_of_thread();
        if (scratch.h.size() < count * some) scratch.h.resize(count * some);
        Neurons of_group{checked, list.bias, list.up_bias};
        if (list.row_masks != nullptr) {
            const uint16_t* masks = list.row_masks + first / TOKENS_MAX * list.mask_stride;
            scratch.masks.assign(masks, masks + count);
            for (uint16_t& mask : scratch.masks) {
                mask = static_cast<uint16_t>((mask >> first % TOKENS_MAX) & ((1U << some) - 1));
            }
            of_group.row_masks = scratch.masks.data();
        }
        fire_entries(of_group, nullptr, count, x + first * shape_.hidden, some, scratch.h.data());
        accumulate_list(checked, scratch.h.data(), some, y + first * shape_.hidden);
    });
}

}  // namespace flashclient
