#include "ffn/ffn.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <deque>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ffn/ffn_rows.h"

namespace flashclient {
namespace {

constexpr size_t FIRED_MIN = 16;        // a tile for one token
constexpr size_t H_ELEMENTS = 1 << 16;  // of many tokens at a time, at least: 256 KiB
constexpr size_t ROWS_PER_ITEM = 64;    // of down in a slab
constexpr size_t ITEMS_PER_THREAD = 8;  // of the down columns of several terms: some threads begin late

bool all_zero(const float* values, size_t count) {
    bool any = false;
    for (size_t i = 0; i < count; i++) any |= values[i] != 0.0f;  // not std::all_of(): where it ends is guessed wrong
    return !any;
}

// The job that has this item, and the item's number in it.
template <typename Job, typename Count>
std::pair<const Job&, size_t> part_of(std::span<const Job> jobs, const Count& count_of, size_t item) {
    const Job* job = jobs.data();
    for (; item >= count_of(*job); job++) item -= count_of(*job);
    return {*job, item};
}

// Copies what the entries [first, end) of a job give to where it is wanted.
template <typename Job>
void give_h(const Job& job, size_t entries, size_t first, size_t end) {
    for (size_t t = 0; t < job.tokens; t++) {
        const size_t group = t / TOKENS_MAX, some = job.in_group(group);
        const float* of_group = job.h + group * TOKENS_MAX * entries + t % TOKENS_MAX;
        for (size_t i = first; i < end; i++) job.list.rows.h[t * job.list.rows.h_stride + i] = of_group[i * some];
    }
}

}  // namespace

struct Ffn::Group {
    uint32_t entry[FIRED_MAX];  // of the list
    size_t count;
    size_t tokens;  // number of the group of tokens
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
    const Rows rows(*this, x, tokens);
    const Job job{readable, &rows, tokens, nullptr, h, entries.data(), entries.size()};
    fire_jobs({&job, 1});
}

// The threads share the entries of all jobs.
void Ffn::fire_jobs(std::span<const Job> jobs) const {
    const auto count_of = [&](const Job& job) {
        return job.entries != nullptr ? job.entry_count : entries_of(job.list);
    };
    size_t count = 0;
    for (const Job& job : jobs) count += count_of(job);
    const size_t rounds =
        std::max<size_t>(2, divide_up(count, FIRED_MAX * workers_.threads()));  // the same of each thread
    const size_t share = divide_up(count, rounds * workers_.threads());
    const size_t some = std::clamp(share / FIRED_MIN * FIRED_MIN, FIRED_MIN, FIRED_MAX);
    const auto items_of = [&](const Job& job) { return divide_up(count_of(job), some); };
    size_t items = 0;
    for (const Job& job : jobs) items += items_of(job);
    workers_.run(items, [&](size_t item) {
        const auto [job, of_job] = part_of(jobs, items_of, item);
        fire_some(job, of_job * some, std::min(count_of(job), (of_job + 1) * some));
    });
}

// The entries [first, end) of those of the job.
void Ffn::fire_some(const Job& job, size_t first, size_t end) const {
    const Rows& x = *job.x;
    const auto h_of = [&](size_t t) { return job.h + t * TOKENS_MAX * entries_of(job.list); };
    const auto of_tokens = [&](size_t t) {
        Group group{{}, 0, t};
        const Neurons masked = job.list.of_tokens(t);
        for (size_t i = first; i < end; i++) {
            const size_t entry = job.entries != nullptr ? job.entries[i] : i;
            if (masked.row_masks != nullptr && masked.row_masks[entry] == 0) {
                std::fill_n(h_of(t) + entry * x.in_group(t), x.in_group(t), 0.0f);
            } else {
                group.entry[group.count++] = static_cast<uint32_t>(entry);
            }
        }
        return group;
    };
    size_t t = 0;
    for (; job.list.row_masks == nullptr && has_pairs() && t + 1 < x.groups(); t += 2) {
        fire_two({of_tokens(t), of_tokens(t + 1)}, job.list, x, {h_of(t), h_of(t + 1)});
    }
    for (; t < x.groups(); t++) fire_group(of_tokens(t), job.list.of_tokens(t), x, h_of(t));
    if (job.list.rows.h != nullptr) give_h(job, entries_of(job.list), first, end);
}

bool Ffn::has_pairs() const {
    return gate_or_up_.kernels->dots_of_groups != nullptr && up_.kernels->dots_of_groups != nullptr;
}

// Computes the dots of a neuron for all tokens, which reads no more bytes, and sets those that are not wanted to 0.
void Ffn::fire_group(const Group& group, const Neurons& list, const Rows& x, float* h) const {
    const void* rows[FIRED_MAX];
    float dots[FIRED_MAX * TOKENS_MAX];
    const size_t tokens = x.in_group(group.tokens);
    for (size_t i = 0; i < group.count; i++) rows[i] = row_of(gate_or_up_, list, group.entry[i]);
    gate_or_up_.kernels->dots(rows, group.count, x.of_gate_or_up().group(group.tokens * TOKENS_MAX), shape_.hidden,
                              tokens, dots);
    const Group open = activate_group(group, list, dots, tokens, h);
    if (shape_.gated() && open.count > 0) open_gate(open, list, x, h);
}

// The same neurons for two groups of tokens, without masks.
void Ffn::fire_two(const Group (&groups)[2], const Neurons& list, const Rows& x, float* const (&h)[2]) const {
    const void* rows[FIRED_MAX];
    float dots[2][FIRED_MAX * TOKENS_MAX];
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

// Sets h of the neurons to the activation of their dots, which it overwrites. Returns those that are not 0 for all
// tokens.
Ffn::Group Ffn::activate_group(const Group& group, const Neurons& list, float* dots, size_t tokens, float* h) const {
    if (list.bias != nullptr) {
        for (size_t i = 0; i < group.count; i++) {
            for (size_t t = 0; t < tokens; t++) dots[i * tokens + t] += list.bias[group.entry[i]];
        }
    }
    if (list.rows.bias != nullptr) {
        for (size_t t = 0; t < tokens; t++) {
            const float* of_row = list.rows.bias + (group.tokens * TOKENS_MAX + t) * list.rows.bias_stride;
            for (size_t i = 0; i < group.count; i++) dots[i * tokens + t] += of_row[group.entry[i]];
        }
    }
    activate_all(shape_.activation, *gate_or_up_.kernels, dots, group.count * tokens);
    Group open{{}, 0, group.tokens};
    for (size_t i = 0; i < group.count; i++) {
        const uint32_t entry = group.entry[i];
        float* of_entry = h + entry * tokens;
        std::copy_n(dots + i * tokens, tokens, of_entry);
        for (size_t t = 0; list.row_masks != nullptr && t < tokens; t++) {
            if ((list.row_masks[entry] >> t & 1) == 0) of_entry[t] = 0.0f;
        }
        if (!all_zero(of_entry, tokens)) open.entry[open.count++] = entry;
    }
    return open;
}

// Multiplies h by the factors of the up rows where the gate is open. A closed gate stays 0, whatever the up row holds.
void Ffn::open_gate(const Group& group, const Neurons& list, const Rows& x, float* h) const {
    const void* rows[FIRED_MAX];
    float dots[FIRED_MAX * TOKENS_MAX];
    const size_t tokens = x.in_group(group.tokens);
    for (size_t i = 0; i < group.count; i++) rows[i] = row_of(up_, list, group.entry[i]);
    up_.kernels->dots(rows, group.count, x.of_up().group(group.tokens * TOKENS_MAX), shape_.hidden, tokens, dots);
    multiply_group(group, list, dots, tokens, h);
}

// Without branches: half of the gates of a ReLU are closed, in no order.
void Ffn::multiply_group(const Group& group, const Neurons& list, const float* dots, size_t tokens, float* h) const {
    const Activation activation = shape_.activation;
    const float* of_rows = list.rows.up_bias;
    if (of_rows != nullptr) of_rows += group.tokens * TOKENS_MAX * list.rows.bias_stride;
    for (size_t i = 0; i < group.count; i++) {
        const uint32_t entry = group.entry[i];
        const float of_all = list.up_bias != nullptr ? list.up_bias[entry] : 0.0f;
        for (size_t t = 0; t < tokens; t++) {
            const float value = h[entry * tokens + t];
            const float bias = of_rows == nullptr ? of_all : of_all + of_rows[t * list.rows.bias_stride + entry];
            const float product = value * up_factor(activation, dots[i * tokens + t] + bias);
            h[entry * tokens + t] = value != 0.0f ? product : value;
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
    const Job job{{checked}, nullptr, tokens, y, scratch.h.data()};
    accumulate_jobs({&job, 1});
}

// Overwrites the jobs' h. Skips neurons whose h is 0: adding 0 changes no finite sum, and their columns need not be
// read.
void Ffn::accumulate_jobs(std::span<const Job> jobs) const {
    Scratch& scratch = scratch_of_thread();
    scratch.fired.clear();
    size_t count = 0;
    for (const Job& job : jobs) count += job.groups() * job.list.bundles.size();
    const void** rows = room(scratch.rows, count);
    for (const Job& job : jobs) {
        for (size_t group = 0; group < job.groups(); group++, rows += job.list.bundles.size()) {
            scratch.fired.push_back({rows, job.h + group * TOKENS_MAX * job.list.bundles.size(), 0});
        }
    }
    const auto groups_of = [](const Job& job) { return job.groups(); };
    workers_.run(scratch.fired.size(), [&](size_t item) {
        const auto [job, group] = part_of(jobs, groups_of, item);
        Fired& fired = scratch.fired[item];
        const size_t some = job.in_group(group);
        for (size_t i = 0; i < job.list.bundles.size(); i++) {
            const float* of_entry = fired.h + i * some;
            const bool fires = !all_zero(of_entry, some);
            std::copy_n(of_entry, some, fired.h + fired.count * some);
            fired.rows[fired.count] = down_.in(job.list.bundles[i]);
            fired.count += fires;  // without a branch, because no processor predicts which neurons fire
        }
    });
    // One thread computes an element of y and adds the neurons in order.
    const size_t slice = slice_for(jobs.size(), COLUMNS_PER_ITEM);
    const size_t slices = divide_up(shape_.hidden, slice);
    workers_.run(jobs.size() * slices, [&](size_t item) {
        const Job& job = jobs[item / slices];
        const size_t begin = item % slices * slice;
        const Fired* fired = scratch.fired.data();
        for (const Job& before : jobs.first(item / slices)) fired += before.groups();
        for (size_t group = 0; group < job.groups(); group++) {
            down_.kernels->accumulate(fired[group].rows, fired[group].h, fired[group].count, job.in_group(group),
                                      shape_.hidden, begin, std::min(shape_.hidden, begin + slice),
                                      job.y + group * TOKENS_MAX * shape_.hidden);
        }
    });
}

// The columns of y of a thread, a multiple of `least`. Each thread gets one slice of a single job, if y is not large.
size_t Ffn::slice_for(size_t jobs, size_t least) const {
    const size_t slices = divide_up((jobs == 1 ? 1 : ITEMS_PER_THREAD) * workers_.threads(), jobs);
    return std::min(divide_up(divide_up(shape_.hidden, slices), least) * least, COLUMNS_MAX);
}

void Ffn::require_no_slabs() const {
    if (in_slabs()) throw std::invalid_argument("slabs are summed as a whole, with all of their neurons");
}

// One thread computes an element of y and adds the slabs in order.
void Ffn::accumulate_slabs(std::span<const Job> jobs) const {
    Scratch& scratch = scratch_of_thread();
    size_t count = 0, groups = 0;
    for (const Job& job : jobs) {
        count += job.tokens * entries_of(job.list);
        groups += job.tokens == 1 ? 0 : job.groups();
    }
    // h of a job as [token, neuron], where it has several tokens.
    float* by_token = groups == 0 ? nullptr : room(scratch.by_token, count);
    const auto h_of = [&](size_t number) {
        if (jobs[number].tokens == 1) return jobs[number].h;
        float* of_job = by_token;
        for (const Job& before : jobs.first(number)) of_job += before.tokens * entries_of(before.list);
        return of_job;
    };
    const auto groups_of = [](const Job& job) { return job.tokens == 1 ? 0 : job.groups(); };
    workers_.run(groups, [&](size_t item) {
        const auto [job, group] = part_of(jobs, groups_of, item);
        const size_t entries = entries_of(job.list), begin = group * TOKENS_MAX, some = job.in_group(group);
        const float* of_group = job.h + begin * entries;
        for (size_t t = 0; t < some; t++) {
            float* of_token = h_of(static_cast<size_t>(&job - jobs.data())) + (begin + t) * entries;
            for (size_t i = 0; i < entries; i++) of_token[i] = of_group[i * some + t];
        }
    });
    const size_t slice = slice_for(jobs.size(), ROWS_PER_ITEM);
    const size_t slices = divide_up(shape_.hidden, slice);
    workers_.run(jobs.size() * slices, [&](size_t item) {
        const Job& job = jobs[item / slices];
        const size_t begin = item % slices * slice;
        const float* h = h_of(item / slices);
        for (size_t s = 0; s < job.list.bundles.size(); s++) {
            down_.kernels->add_products(down_.in(job.list.bundles[s]), shape_.neurons, h + s * shape_.neurons,
                                        entries_of(job.list), job.tokens, shape_.hidden, begin,
                                        std::min(shape_.hidden, begin + slice), job.y);
        }
    });
}

void Ffn::add_jobs(std::span<Job> jobs) const {
    size_t count = 0;
    for (const Job& job : jobs) count += job.tokens * entries_of(job.list);
    float* h = room(scratch_of_thread().h, count);
    for (Job& job : jobs) {
        job.h = h;
        h += job.tokens * entries_of(job.list);
    }
    fire_jobs(jobs);
    in_slabs() ? accumulate_slabs(jobs) : accumulate_jobs(jobs);
}

void Ffn::add_rows(const Neurons& list, const float* x, size_t tokens, float* y) const {
    Reading reading = new_reading();
    const auto checked = reading.checked(list.bundles);
    const Neurons readable{checked, list.bias, list.up_bias, list.row_masks, list.mask_stride};
    add_list(readable, Rows(*this, x, tokens), y);
}

// Many tokens are computed for some neurons at a time, whose weights then stay in a cache.
void Ffn::add_list(const Neurons& list, const Rows& x, float* y) const {
    if (list.row_masks != nullptr) require_no_slabs();
    const size_t least = FIRED_BLOCKS_MIN * FIRED_MAX * workers_.threads();
    const size_t neurons = x.tokens <= TOKENS_MAX ? entries_of(list) : std::max(least, H_ELEMENTS / x.tokens);
    const size_t block = std::max<size_t>(1, divide_up(neurons, shape_.neurons));
    for (size_t first = 0; first < list.bundles.size(); first += block) {
        const size_t count = std::min(block, list.bundles.size() - first);
        Job job{list.part(first, count, shape_.neurons), &x, x.tokens, y, nullptr};
        add_jobs({&job, 1});
    }
}

void Ffn::add_terms(std::span<const FfnTerm> terms) const {
    Reading reading = new_reading();
    std::vector<std::vector<uint64_t>> checked;  // their arrays stay where they are
    std::deque<Rows> rows;
    std::vector<Job> jobs;
    const FfnTerm* before = nullptr;
    for (const FfnTerm& term : terms) {
        if (term.tokens == 0 || term.list.bundles.empty()) continue;
        const Neurons list{checked.emplace_back(reading.checked(term.list.bundles)), term.list.bias, term.list.up_bias};
        const bool same = before != nullptr && before->x == term.x && before->tokens == term.tokens;
        if (!same) rows.emplace_back(*this, term.x, term.tokens);
        before = &term;
        jobs.push_back({list, &rows.back(), term.tokens, term.y, nullptr});
    }
    if (!jobs.empty()) add_jobs(jobs);
}

}  // namespace flashclient
