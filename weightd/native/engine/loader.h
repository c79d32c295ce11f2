// Turns missing cells into verified cells: merges neighbours into one request, reads, verifies and reports.
//
// Invariants: each cell is reported once. A cell that cannot be read, or whose checksum differs, is read once more
// before it is reported as failed.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "bundle/model_spec.h"
#include "device/clock.h"
#include "device/latencies.h"
#include "device/reader.h"
#include "device/verify.h"
#include "pool/pool.h"

namespace weightd {

struct Source {  // what the loader needs of a model
    uint32_t model;
    const ModelSpec* spec;
    const DirectFile* file;
    int file_index;
};

struct Missing {
    uint32_t cell;  // of the model's numbering
    Place place;
    std::byte* address;
    uint32_t session = 0;  // the one that wants it; 0: none
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
    void started();  // one read
    void ended();
    double seconds() const;

  private:
    uint64_t under_way_ = 0;
    Clock::time_point since_;
    Clock::duration before_{0};
};

// A short gap between two missing cells is read too, and thrown away, where that saves a request. A dense sweep finds
// single hot cells already in the pool, and each request waits for its turn when the processors are busy.
inline constexpr uint64_t GAP_BYTES_MAX = 16384;
inline constexpr uint64_t GAPS_DIVISOR = 3;  // a request's gaps are at most this part of its cells' bytes
inline constexpr uint32_t GAPS_MAX = 256;    // requests with gaps at once: 4 MiB beside --dram

inline constexpr uint32_t REGIONS = 64;  // equal parts of bundles.bin whose reads are counted, as a measure of wear

struct DeviceUse {  // by one model
    ReadingTime reading;
    Latencies latencies;
    std::array<uint64_t, REGIONS> region_reads{};  // requests that begin in each
};

class Loader {
  public:
    Loader(Reader& reader, Verifier& verifier) : reader_(reader), verifier_(verifier) {}
    // Starts to read each cell into its place. Returns what that costs the device.
    LoadCounts load(const Source& source, std::vector<Missing> cells);
    // Adds what has been read and checked, or has failed twice, since the last call. Never blocks.
    void reap(std::vector<Loaded>& loaded);
    bool busy() const { return !flights_.empty(); }
    uint32_t reads() const { return static_cast<uint32_t>(flights_.size()); }  // that are not done
    const DeviceUse& device_use(uint32_t model) const;

  private:
    struct alignas(READ_STEP_BYTES) Gap {
        std::array<std::byte, GAP_BYTES_MAX> bytes;
    };
    struct Flight {
        Source source;
        std::vector<Missing> cells;  // neighbours on flash, apart from gaps
        bool second_try = false;
        uint64_t gaps_bytes = 0;
        uint32_t gaps = 0;
        std::unique_ptr<Gap> gap{};  // where gaps are read to; its content is never used
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
