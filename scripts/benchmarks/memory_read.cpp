// Reads memory with some threads and does nothing with it: the speed that kernels are compared with.
// scripts/benchmarks/memory_read.py builds it.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr size_t LINE_BYTES = 64;
constexpr size_t BLOCK_BYTES = 256 * 1024;  // as large as the kernels' blocks
constexpr size_t AHEAD_BYTES = 8 * 1024;    // as far ahead as the kernels fetch

uint64_t read_lines(const char* data, size_t bytes) {
    uint64_t folded[LINE_BYTES / sizeof(uint64_t)] = {};
    for (size_t j = 0; j + LINE_BYTES <= bytes; j += LINE_BYTES) {
        __builtin_prefetch(data + j + AHEAD_BYTES, 0, 2);
        uint64_t line[LINE_BYTES / sizeof(uint64_t)];
        std::memcpy(line, data + j, LINE_BYTES);
        for (size_t i = 0; i < std::size(line); i++) folded[i] ^= line[i];
    }
    uint64_t result = 0;
    for (const uint64_t word : folded) result ^= word;
    return result;
}

}  // namespace

// The exclusive or of all 64-bit words of `bytes` at `data`; bytes beyond the last whole 64 are left out.
extern "C" uint64_t read_memory(const char* data, size_t bytes, size_t threads) {
    std::atomic<uint64_t> result = 0;
    std::atomic<size_t> next = 0;
    const auto read_blocks = [&] {
        for (size_t begin = next.fetch_add(BLOCK_BYTES); begin < bytes; begin = next.fetch_add(BLOCK_BYTES)) {
            result.fetch_xor(read_lines(data + begin, std::min(BLOCK_BYTES, bytes - begin)));
        }
    };
    std::vector<std::thread> others;
    for (size_t i = 1; i < threads; i++) others.emplace_back(read_blocks);
    read_blocks();
    for (std::thread& other : others) other.join();
    return result;
}
