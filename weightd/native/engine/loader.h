// From cells that are missing to cells that are verified: merges neighbours, reads, checks, reports.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "bundle/model.h"
#include "device/latencies.h"
#include "device/reader.h"
#include "device/verify.h"
#include "pool/pool.h"

namespace weightd {

struct Source {  // what the loader must know of a model
    uint32_t model;
    const ModelSpec* spec;
    const DirectFile* file;
    int file_index;
};

struct Missing {
    uint32_t cell;  // of the model's numbering
    Place place;
    std::byte* address;
    uint32_t session = 0;  // that wants it, by number; 0: none
};

struct Loaded {
    uint32_t model;
    uint32_t cell;
    Place place;
    int error;             // 0, or an errno of the read
    int32_t wrong_bundle;  // index in the cell of a bundle whose checksum differs, or -1
};

struct LoadCounts {
    uint64_t reads = 0;
    uint64_t read_bytes = 0;
};

// The time during which at least one of a model's reads is under way.
class ReadingTime {
  public:
    void started();  // one more read
    void ended();    // one of them
    double seconds() const;

  private:
    using Clock = std::chrono::steady_clock;
    uint64_t under_way_ = 0;
    Clock::time_point since_;
    Clock::duration before_{0};
};

// What is resident between two missing cells is read once more where that saves a request: of hot cells a dense sweep
// leaves single ones, and with busy processors each request waits for its turn.
inline constexpr uint64_t GAP_BYTES_MAX = 16384;
inline constexpr uint64_t GAPS_DIVISOR = 3;  // of what a request has cells for: no more than that is in its gaps

inline constexpr uint32_t GAPS_MAX = 256;  // requests with gaps at once: 4 MiB of the interpreter's allowance

inline constexpr uint32_t REGIONS = 64;  // equal parts of bundles.bin, whose reads are counted for its wear

struct DeviceUse {  // by one model
    ReadingTime reading;
    Latencies latencies;
    std::array<uint64_t, REGIONS> region_reads{};  // requests that begin there
};

class Loader {
  public:
    Loader(Reader& reader, Verifier& verifier) : reader_(reader), verifier_(verifier) {}
    // Reads each cell into its place. Returns what that costs the device.
    LoadCounts load(const Source& source, std::vector<Missing> cells);
    // What has been read and checked, or failed twice, since the last call; never blocks.
    void reap(std::vector<Loaded>& loaded);
    bool busy() const { return !flights_.empty(); }
    const DeviceUse& device_use(uint32_t model) const;

  private:
    struct alignas(READ_STEP_BYTES) Gap {
        std::array<std::byte, GAP_BYTES_MAX> bytes;
    };
    struct Flight {
        Source source;
        std::vector<Missing> cells;  // neighbours on flash, but for gaps
        bool second_try = false;
        uint64_t gaps_bytes = 0;
        std::unique_ptr<Gap> gap{};  // where there are any: nobody reads what is put there
    };
    bool joins(const Flight& flight, const Missing& missing) const;
    void join(Flight& flight, const Missing& missing);
    Read read_of(const Flight& flight, uint64_t tag) const;
    Job job_of(const Flight& flight, uint64_t tag) const;
    void start(std::vector<Flight> flights);
    void finish_read(const Completion& completion, std::vector<Loaded>& loaded, std::vector<Job>& jobs,
                     std::vector<Flight>& again);
    void finish_job(const Job& job, std::vector<Loaded>& loaded, std::vector<Flight>& again);

    Reader& reader_;
    Verifier& verifier_;
    std::unordered_map<uint32_t, DeviceUse> device_;  // by model
    std::unordered_map<uint64_t, Flight> flights_;    // by tag
    uint64_t next_tag_ = 0;
    uint32_t gaps_made_ = 0;
    std::vector<std::unique_ptr<Gap>> gaps_free_;
    std::vector<Completion> completions_;
    std::vector<Job> done_;
};

}  // namespace weightd
