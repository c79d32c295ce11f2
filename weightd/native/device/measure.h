// Measures how fast a device reads, with the readers that serve sessions.
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
    std::string io_engine;  // `kind` of make_reader()
    uint64_t read_bytes = 0;
    uint32_t depth = 1;
    double seconds = 1;
    bool random = true;   // at random offsets; false: one offset after the other
    bool verify = false;  // also compute the XXH3-64 of each read, as verifiers do
};

// Throws std::system_error, and std::invalid_argument for a file that is shorter than one read.
Measurement measure_reads(const std::string& path, const MeasureOptions& options);

}  // namespace weightd
