// Rows of x in the form that dots() of a table takes: x itself, or a copy that is made once for many rows of weights.
#pragma once

#include <cstddef>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/workers.h"

namespace flashclient {

class PackedRows {
  public:
    // x: [tokens, hidden] fp32, which must outlive this. The threads share the work.
    PackedRows(Workers& workers, const Kernels& kernels, const float* x, size_t tokens, size_t hidden);
    ~PackedRows();
    PackedRows(const PackedRows&) = delete;
    PackedRows& operator=(const PackedRows&) = delete;

    // Up to TOKENS_MAX tokens from `first` on, which is a multiple of that.
    const void* group(size_t first) const { return groups_ + first / TOKENS_MAX * group_bytes_; }

  private:
    const char* groups_;
    size_t group_bytes_;
    std::vector<char> memory_;
};

}  // namespace flashclient
