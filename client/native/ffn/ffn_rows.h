// What Ffn and FfnSum share: rows of x, neurons that are fired for them, and memory that is kept from call to call.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "ffn/ffn.h"
#include "kernels/packed_rows.h"

namespace flashclient {

inline constexpr size_t FIRED_MAX = 96;          // neurons that a thread fires at once: tens of microseconds of work
inline constexpr size_t FIRED_BLOCKS_MIN = 2;    // of them that each thread fires at a time, at least
inline constexpr size_t COLUMNS_PER_ITEM = 256;  // the fewest columns of a thread: eight cache lines of a bf16 row
inline constexpr size_t COLUMNS_MAX = 8192;      // the most columns at a time: y of a token stays in the L1 cache

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

// Neurons that are fired for some rows, and where their sum goes.
struct Ffn::Job {
    Neurons list;
    const Rows* x;  // null: their h are there
    size_t tokens;
    float* y;  // [tokens, hidden]
    float* h;  // [group of tokens][entry, token]
    // The entries that are fired, and their number. Null: all.
    const uint32_t* entries = nullptr;
    size_t entry_count = 0;

    size_t groups() const { return divide_up(tokens, TOKENS_MAX); }
    size_t in_group(size_t group) const { return std::min(TOKENS_MAX, tokens - group * TOKENS_MAX); }
};

// Neurons with output, of one group of tokens.
struct Ffn::Fired {
    const void** rows;  // their down columns
    float* h;           // [count, tokens]
    size_t count;
};

struct Ffn::Scratch {
    std::vector<float> h;
    std::vector<float> by_token;
    std::vector<const void*> rows;
    std::vector<Fired> fired;
};

// Room for `count` elements from the beginning of a cache line on. Not cleared unless it is new.
template <typename Element>
Element* aligned_room(std::vector<char>& memory, size_t count) {
    constexpr size_t LINE_BYTES_OF_ROOM = 64;
    const size_t bytes = count * sizeof(Element) + LINE_BYTES_OF_ROOM;
    if (memory.size() < bytes) memory.resize(bytes);
    return reinterpret_cast<Element*>(memory.data() +
                                      (-reinterpret_cast<uintptr_t>(memory.data()) & (LINE_BYTES_OF_ROOM - 1)));
}

// Room for `count` elements. What it held may be kept or lost.
template <typename Element>
Element* room(std::vector<Element>& memory, size_t count) {
    if (memory.size() < count) memory.resize(count);
    return memory.data();
}

}  // namespace flashclient
