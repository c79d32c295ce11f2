// A histogram of read times: counts in buckets whose bounds double.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>

#include "device/clock.h"

namespace weightd {

inline constexpr uint64_t LATENCY_FIRST_NS = 8'000;  // upper bound of the first bucket; flash takes ten times longer
inline constexpr size_t LATENCY_BUCKETS = 22;        // the last has no upper bound; it begins at 8.4 s

class Latencies {
  public:
    void add(std::chrono::nanoseconds took) {
        const auto ns = static_cast<uint64_t>(std::max<int64_t>(took.count(), 1));
        const auto bucket = static_cast<size_t>(std::bit_width((ns - 1) / LATENCY_FIRST_NS));
        counts_[std::min(bucket, LATENCY_BUCKETS - 1)]++;
        sum_ += took;
    }
    const std::array<uint64_t, LATENCY_BUCKETS>& counts() const { return counts_; }
    double sum_s() const { return seconds(sum_); }
    // The upper bound of a bucket, which belongs to it. Not for the last bucket.
    static constexpr double bound_s(size_t bucket) { return static_cast<double>(LATENCY_FIRST_NS << bucket) / 1e9; }

  private:
    std::array<uint64_t, LATENCY_BUCKETS> counts_{};
    std::chrono::nanoseconds sum_{0};
};

}  // namespace weightd
