// How fast a device answers, through the same readers that serve.
#pragma once

#include <cstdint>
#include <string>

namespace weightd {

struct Measurement {
    uint64_t reads = 0;
    uint64_t bytes = 0;
    double seconds = 0;
    double cpu_seconds = 0;  // of this process, user and system
};

struct MeasureOptions {
    std::string io_engine;  // of make_reader
    uint64_t read_bytes = 0;
    uint32_t depth = 1;
    double seconds = 1;
    bool random = true;   // else one offset after the other
    bool verify = false;  // also computes each read's XXH3-64, in workers
};

// Throws std::system_error, std::invalid_argument (a file shorter than one read).
Measurement measure_reads(const std::string& path, const MeasureOptions& options);

}  // namespace weightd
