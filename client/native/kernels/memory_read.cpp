#include "kernels/memory_read.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace flashclient {
namespace {

constexpr std::size_t kLineBytes = 64;
constexpr std::size_t kBytesPerItem = 256 * 1024;  // as large as the kernels' blocks

std::uint64_t read_lines(const char* data, std::size_t bytes) {
    std::uint64_t folded[kLineBytes / sizeof(std::uint64_t)] = {};
    for (std::size_t j = 0; j + kLineBytes <= bytes; j += kLineBytes) {
        std::uint64_t line[kLineBytes / sizeof(std::uint64_t)];
        std::memcpy(line, data + j, kLineBytes);
        for (std::size_t i = 0; i < std::size(line); ++i) folded[i] ^= line[i];
    }
    std::uint64_t result = 0;
    for (const std::uint64_t word : folded) result ^= word;
    return result;
}

}  // namespace

std::uint64_t read_memory(Workers& workers, const void* data, std::size_t bytes) {
    std::atomic<std::uint64_t> result{0};
    workers.run((bytes + kBytesPerItem - 1) / kBytesPerItem, [&](std::size_t item) {
        const std::size_t begin = item * kBytesPerItem;
        const char* first = static_cast<const char*>(data) + begin;
        result.fetch_xor(read_lines(first, std::min(kBytesPerItem, bytes - begin)), std::memory_order_relaxed);
    });
    return result.load();
}

}  // namespace flashclient
