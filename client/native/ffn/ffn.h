// An FFN layer's output as a sum over neurons, from bundles that may lie anywhere and arrive a few at a time.
//
// A bundle is [gate row][up row][down column], or [up row][down column], of hidden_size values each. Neuron n adds
// h_n * down_n to the output, h_n = activate(gate_n . x + b_n) * up_factor(up_n . x + c_n), or activate(up_n . x + b_n)
// without a gate (activation.h).
//
// Or a bundle is a slab of several neurons: [gate rows][up rows][down values], of which each output has one row, with a
// value for each neuron. Output j then gets the product of its row with the neurons' h, slab by slab.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/activation.h"
#include "kernels/kernels.h"
#include "kernels/readable_memory.h"
#include "kernels/workers.h"

namespace flashclient {

struct FfnShape {
    std::vector<Encoding> parts;  // parts of a bundle, back to back: [gate,] up, down
    size_t hidden;                // number of values of a neuron in a part
    Activation activation;
    size_t neurons = 1;  // of a bundle; more in a slab: a power of two, 32 to 256

    bool gated() const { return parts.size() == 3; }
};

// What each row of x has of its own, [tokens, neurons] by entry of a list: an adapter's part.
struct RowTerms {
    const float* bias = nullptr;     // added to b; null: nothing
    const float* up_bias = nullptr;  // added to c, likewise
    size_t bias_stride = 0;          // between tokens, of both
    float* h = nullptr;              // set to what the neurons give; null: not wanted
    size_t h_stride = 0;
};

// A list of neurons, in the order of their sum, and which rows of x want each. Of slabs, an entry of `bias` and
// `up_bias` is still one neuron, and all rows want all.
struct Neurons {
    std::span<const uint64_t> bundles;    // addresses, read in place
    const float* bias = nullptr;          // b, by entry of the list; null: none
    const float* up_bias = nullptr;       // c, likewise; not used without a gate
    const uint16_t* row_masks = nullptr;  // bit t: row t wants the entry; null: all rows want all
    size_t mask_stride = 0;               // between the masks of one group of TOKENS_MAX rows and those of the next
    RowTerms rows{};                      // of FfnSum only

    // `count` bundles from `first` on, of `neurons` each.
    Neurons part(size_t first, size_t count, size_t neurons = 1) const {
        const auto from = [&](auto* each) { return each != nullptr ? each + first * neurons : nullptr; };
        const RowTerms of_rows{from(rows.bias), from(rows.up_bias), rows.bias_stride, from(rows.h), rows.h_stride};
        return {bundles.subspan(first, count), from(bias), from(up_bias), from(row_masks), mask_stride, of_rows};
    }
    Neurons of_tokens(size_t group) const {
        Neurons some = *this;
        if (row_masks != nullptr) some.row_masks += group * mask_stride;
        return some;
    }
};

// One of several sums, each over neurons of its own for rows of its own.
struct FfnTerm {
    Neurons list;  // without masks
    const float* x;
    size_t tokens;
    float* y;  // of no other term
};

// The bits of the output depend on the order of the list only. They depend neither on how the list is cut into chunks,
// nor on the order in which neurons are fired, the number of threads, or the other tokens of a call. Safe to call from
// several threads.
class Ffn {
  public:
    // `workers` is shared and must outlive this. Throws std::invalid_argument for an encoding without a kernel, for an
    // instruction set that the processor lacks (null picks the best), for gated_relu without a gate, and for slabs of
    // another number of neurons.
    Ffn(Workers& workers, FfnShape shape, const char* instruction_set = nullptr);

    // Each throws std::invalid_argument for a bundle that it would read outside of readable memory (readable_memory.h).

    // Of slabs there is add_rows() only.

    // h[entry][t] for the entries of the list that `entries` names. x: [tokens, hidden] fp32, at most TOKENS_MAX
    // tokens; h: [list, tokens]. h is 0 where row t does not want the entry. Not read are entries that no row wants,
    // and the up rows of entries whose gate activation is 0 for every row.
    void fire(const Neurons& list, std::span<const uint32_t> entries, const float* x, size_t tokens, float* h) const;

    // y[t] += h[entry][t] * down[entry], entries rising. The column of an entry whose h is 0 for all tokens is not
    // read.
    void accumulate(std::span<const uint64_t> bundles, const float* h, size_t tokens, float* y) const;

    // fire() and accumulate() for the whole list and any number of tokens.
    void add_rows(const Neurons& list, const float* x, size_t tokens, float* y) const;

    // add_rows() of each term, with the same bits. The threads share the work of all terms, so that they wait for each
    // other twice, not twice for each term. For some hundred rows in all: h of all neurons is held at once.
    void add_terms(std::span<const FfnTerm> terms) const;

    const FfnShape& shape() const { return shape_; }
    Workers& workers() const { return workers_; }
    size_t bundle_bytes() const { return bundle_bytes_; }
    size_t alignment_bytes() const { return alignment_bytes_; }  // alignment of a bundle: that of its largest element
    std::string instruction_set() const { return gate_or_up_.kernels->instruction_set; }

  private:
    friend class FfnSum;
    struct Group;    // neurons that one thread fires together for a group of tokens
    struct Rows;     // x in the forms that the parts' kernels take
    struct Job;      // neurons that are fired for some rows, and where their sum goes
    struct Fired;    // what a group of tokens adds to y
    struct Scratch;  // memory of a thread that adds rows
    static Scratch& scratch_of_thread();
    struct Part {  // a part of a bundle
        const Kernels* kernels;
        size_t offset_bytes;
        size_t row_bytes;  // of a neuron

        const void* in(uint64_t bundle, size_t neuron = 0) const {
            return reinterpret_cast<const char*>(bundle) + offset_bytes + neuron * row_bytes;
        }
    };
    Part next_part(size_t part, const char* instruction_set);
    Reading new_reading() const { return {bundle_bytes_, alignment_bytes_}; }
    void fire_jobs(std::span<const Job> jobs) const;
    void fire_some(const Job& job, size_t first, size_t end) const;
    void fire_group(const Group& group, const Neurons& list, const Rows& x, float* h) const;
    void fire_two(const Group (&groups)[2], const Neurons& list, const Rows& x, float* const (&h)[2]) const;
    bool has_pairs() const;
    Group activate_group(const Group& group, const Neurons& list, float* dots, size_t tokens, float* h) const;
    void open_gate(const Group& group, const Neurons& list, const Rows& x, float* h) const;
    void multiply_group(const Group& group, const Neurons& list, const float* dots, size_t tokens, float* h) const;
    bool in_slabs() const { return shape_.neurons > 1; }
    size_t entries_of(const Neurons& list) const { return list.bundles.size() << neurons_shift_; }
    const void* row_of(const Part& part, const Neurons& list, size_t entry) const {
        return part.in(list.bundles[entry >> neurons_shift_], entry & (shape_.neurons - 1));
    }
    void require_no_slabs() const;
    void add_list(const Neurons& list, const Rows& rows, float* y) const;
    void add_jobs(std::span<Job> jobs) const;
    void accumulate_jobs(std::span<const Job> jobs) const;
    void accumulate_slabs(std::span<const Job> jobs) const;
    size_t slice_for(size_t jobs, size_t step) const;

    Workers& workers_;
    FfnShape shape_;
    size_t bundle_bytes_ = 0;
    size_t alignment_bytes_ = 1;
    unsigned neurons_shift_ = 0;  // two to this power are in a bundle
    Part gate_or_up_;             // the part whose dot goes through the activation
    Part up_;                     // the same as gate_or_up_ if there is no gate
    Part down_;
};

}  // namespace flashclient
