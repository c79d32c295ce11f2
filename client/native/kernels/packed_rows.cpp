#include "kernels/packed_rows.h"

#include <algorithm>
#include <utility>

namespace flashclient {
namespace {

constexpr size_t PACKED_KEPT_MAX = size_t{1} << 24;  // bytes that a thread keeps from call to call
constexpr size_t ALIGNMENT_BYTES = 64;

// Kept, because allocating takes longer than a small product.
std::vector<char>& kept() {
    static thread_local std::vector<char> bytes;
    return bytes;
}

}  // namespace

PackedRows::PackedRows(Workers& workers, const Kernels& kernels, const float* x, size_t tokens, size_t hidden)
    : groups_(reinterpret_cast<const char*>(x)), group_bytes_(TOKENS_MAX * hidden * sizeof(float)) {
    if (kernels.pack == nullptr) return;
    const size_t groups = divide_up(tokens, TOKENS_MAX);
    group_bytes_ = kernels.packed_bytes(hidden, std::min(tokens, TOKENS_MAX));
    memory_.swap(kept());
    const size_t bytes = groups * group_bytes_ + ALIGNMENT_BYTES;
    if (memory_.size() < bytes) memory_ = std::vector<char>(bytes);
    char* packed = memory_.data() + (-reinterpret_cast<uintptr_t>(memory_.data()) & (ALIGNMENT_BYTES - 1));
    groups_ = packed;
    workers.run(groups, [&](size_t group) {
        const size_t first = group * TOKENS_MAX;
        kernels.pack(x + first * hidden, hidden, std::min(TOKENS_MAX, tokens - first), packed + group * group_bytes_);
    });
}

PackedRows::~PackedRows() {
    if (memory_.size() > kept().size() && memory_.size() <= PACKED_KEPT_MAX) kept().swap(memory_);
}

}  // namespace flashclient
