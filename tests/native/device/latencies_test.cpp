#include "device/latencies.h"

#include <gtest/gtest.h>

#include <numeric>

namespace weightd {
namespace {

using std::chrono::nanoseconds;

size_t bucket_of(int64_t ns) {
    Latencies latencies;
    latencies.add(nanoseconds(ns));
    const auto& counts = latencies.counts();
    EXPECT_EQ(std::accumulate(counts.begin(), counts.end(), uint64_t{0}), 1U);
    return static_cast<size_t>(std::find(counts.begin(), counts.end(), 1U) - counts.begin());
}

TEST(Latencies, ABoundBelongsToItsBucketAndOneMoreToTheNext) {
    for (size_t bucket = 0; bucket + 1 < LATENCY_BUCKETS; bucket++) {
        const auto bound_ns = static_cast<int64_t>(LATENCY_FIRST_NS << bucket);
        EXPECT_EQ(bucket_of(bound_ns), bucket);
        EXPECT_EQ(bucket_of(bound_ns + 1), bucket + 1);
        EXPECT_DOUBLE_EQ(Latencies::bound_s(bucket), static_cast<double>(bound_ns) * 1e-9);
    }
}

TEST(Latencies, TheEndsAreOpen) {
    EXPECT_EQ(bucket_of(0), 0U);
    EXPECT_EQ(bucket_of(-5), 0U);  // a clock that went back
    EXPECT_EQ(bucket_of(int64_t{3600} * 1'000'000'000), LATENCY_BUCKETS - 1);
}

TEST(Latencies, SumsUp) {
    Latencies latencies;
    latencies.add(nanoseconds(1'500'000));
    latencies.add(nanoseconds(500'000));
    EXPECT_DOUBLE_EQ(latencies.sum_s(), 0.002);
}

}  // namespace
}  // namespace weightd
