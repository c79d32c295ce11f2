#include "engine/loader.h"

#include <algorithm>

namespace weightd {
namespace {

uint64_t gap_bytes(const ModelSpec& spec, const Missing& missing, const Missing& next) {
    return spec.offset_of(next.cell) - spec.offset_of(missing.cell) - spec.cell_bytes;  // huge where layers lie apart
}

}  // namespace

void ReadingTime::started() {
    if (under_way_++ == 0) since_ = Clock::now();
}

void ReadingTime::ended() {
    if (--under_way_ == 0) before_ += Clock::now() - since_;
}

double ReadingTime::seconds() const {
    const Clock::duration now = under_way_ > 0 ? Clock::now() - since_ : Clock::duration{0};
    return weightd::seconds(before_ + now);
}

const DeviceUse& Loader::device_use(uint32_t model) const {
    static const DeviceUse none;
    const auto found = device_.find(model);
    return found == device_.end() ? none : found->second;
}

bool Loader::joins(const Flight& flight, const Missing& missing) const {
    const ModelSpec& spec = *flight.source.spec;
    const uint64_t gap = gap_bytes(spec, flight.cells.back(), missing);
    if (gap > GAP_BYTES_MAX) return false;
    const uint64_t pieces = flight.cells.size() + 1 + flight.gaps + (gap > 0 ? 1 : 0);
    const uint64_t cells_bytes = uint64_t{flight.cells.size() + 1} * spec.cell_bytes;
    const uint64_t gaps_bytes = flight.gaps_bytes + gap;
    const bool has_place = flight.gap != nullptr || !gaps_free_.empty() || gaps_made_ < GAPS_MAX;
    const bool worthwhile = gap == 0 || (has_place && gaps_bytes <= cells_bytes / GAPS_DIVISOR);
    return worthwhile && cells_bytes + gaps_bytes <= READ_BYTES_MAX && pieces <= PIECES_MAX;
}

void Loader::join(Flight& flight, const Missing& missing) {
    const uint64_t gap = gap_bytes(*flight.source.spec, flight.cells.back(), missing);
    flight.gaps_bytes += gap;
    flight.gaps += gap > 0;
    if (flight.gaps_bytes > 0 && flight.gap == nullptr) {
        if (gaps_free_.empty()) {
            gaps_free_.push_back(std::make_unique<Gap>());
            gaps_made_++;
        }
        flight.gap = std::move(gaps_free_.back());
        gaps_free_.pop_back();
    }
    flight.cells.push_back(missing);
}

LoadCounts Loader::load(const Source& source, std::vector<Missing> cells) {
    const ModelSpec& spec = *source.spec;
    std::sort(cells.begin(), cells.end(), [](const Missing& a, const Missing& b) { return a.cell < b.cell; });
    std::vector<Flight> flights;
    LoadCounts counts;
    for (const Missing& missing : cells) {
        if (!flights.empty() && joins(flights.back(), missing)) {
            join(flights.back(), missing);
        } else {
            flights.push_back({source, {missing}});
        }
    }
    for (const Flight& flight : flights) {
        counts.read_bytes += flight.cells.size() * spec.cell_bytes + flight.gaps_bytes;
    }
    counts.reads = flights.size();
    start(std::move(flights));
    return counts;
}

void Loader::start(std::vector<Flight> flights) {
    std::vector<Read> reads;
    reads.reserve(flights.size());
    for (Flight& flight : flights) {
        const uint64_t tag = next_tag_++;
        reads.push_back(read_of(flight, tag));
        DeviceUse& use = device_[flight.source.model];
        use.reading.started();
        use.region_reads[flight.source.spec->region_of(reads.back().offset_bytes, REGIONS)]++;
        flights_.emplace(tag, std::move(flight));
    }
    if (!reads.empty()) reader_.submit(std::move(reads));
}

Read Loader::read_of(const Flight& flight, uint64_t tag) const {
    const ModelSpec& spec = *flight.source.spec;
    Read read;
    read.tag = tag;
    read.file = flight.source.file;
    read.file_index = flight.source.file_index;
    read.offset_bytes = spec.offset_of(flight.cells.front().cell);
    const Segment* segment = flight.cells.front().place.segment;
    bool one_segment = true;
    const Missing* last_cell = nullptr;
    for (const Missing& missing : flight.cells) {
        one_segment = one_segment && missing.place.segment == segment;
        const uint64_t gap = last_cell == nullptr ? 0 : gap_bytes(spec, *last_cell, missing);
        last_cell = &missing;
        if (gap > 0) {
            read.pieces.push_back({flight.gap->bytes.data(), gap});
        } else if (!read.pieces.empty()) {  // slots that are neighbours share a piece
            iovec& last = read.pieces.back();
            if (static_cast<std::byte*>(last.iov_base) + last.iov_len == missing.address) {
                last.iov_len += spec.cell_bytes;
                continue;
            }
        }
        read.pieces.push_back({missing.address, spec.cell_bytes});
    }
    read.buffer_index = read.pieces.size() == 1 && one_segment ? segment->buffer_index : -1;
    return read;
}

Job Loader::job_of(const Flight& flight, uint64_t tag) const {
    const ModelSpec& spec = *flight.source.spec;
    Job job;
    job.tag = tag;
    job.checks.reserve(flight.cells.size() * spec.bundles_per_cell);
    for (const Missing& missing : flight.cells) {
        const uint32_t layer = spec.layer_of(missing.cell);
        const uint32_t cell = missing.cell - spec.layers[layer].first_cell;
        const uint64_t* expected =
            &spec.checksums[spec.layers[layer].first_checksum + uint64_t{cell} * spec.bundles_per_cell];
        for (uint32_t i = 0; i < spec.bundles_in(layer, cell); i++) {
            job.checks.push_back({missing.address + uint64_t{i} * spec.stride_bytes, spec.bundle_bytes, expected[i]});
        }
    }
    return job;
}

void Loader::reap(std::vector<Loaded>& loaded) {
    std::vector<Job> jobs;
    std::vector<Flight> again;
    completions_.clear();
    reader_.reap(completions_);
    for (const Completion& completion : completions_) finish_read(completion, loaded, jobs, again);
    verifier_.submit(std::move(jobs));
    done_.clear();
    verifier_.reap(done_);
    for (const Job& job : done_) finish_job(job, loaded, again);
    start(std::move(again));
}

void Loader::finish_read(const Completion& completion, std::vector<Loaded>& loaded, std::vector<Job>& jobs,
                         std::vector<Flight>& again) {
    const auto found = flights_.find(completion.tag);
    Flight& flight = found->second;
    DeviceUse& use = device_[flight.source.model];
    use.reading.ended();
    use.latencies.add(completion.took);
    if (flight.gap != nullptr) gaps_free_.push_back(std::move(flight.gap));
    if (completion.error == 0) {
        jobs.push_back(job_of(flight, completion.tag));
        return;
    }
    // Each cell is read once more, alone, because one bad block must not fail its neighbours.
    for (const Missing& missing : flight.cells) {
        if (flight.second_try) {
            loaded.push_back({flight.source.model, missing.cell, missing.place, completion.error, -1});
        } else {
            again.push_back({flight.source, {missing}, true});
        }
    }
    flights_.erase(found);
}

void Loader::finish_job(const Job& job, std::vector<Loaded>& loaded, std::vector<Flight>& again) {
    const auto found = flights_.find(job.tag);
    Flight& flight = found->second;
    const ModelSpec& spec = *flight.source.spec;
    std::vector<int32_t> wrong_bundle(flight.cells.size(), -1);
    for (const uint32_t check : job.wrong) {  // only a layer's last cell may hold fewer; a run may cross layers
        size_t cell = 0;
        uint32_t left = check;
        while (true) {
            const uint32_t layer = spec.layer_of(flight.cells[cell].cell);
            const uint32_t count = spec.bundles_in(layer, flight.cells[cell].cell - spec.layers[layer].first_cell);
            if (left < count) break;
            left -= count;
            cell++;
        }
        wrong_bundle[cell] = static_cast<int32_t>(left);
    }
    for (size_t i = 0; i < flight.cells.size(); i++) {
        if (wrong_bundle[i] >= 0 && !flight.second_try) {  // the transfer may have failed: read it again
            again.push_back({flight.source, {flight.cells[i]}, true});
        } else {
            loaded.push_back({flight.source.model, flight.cells[i].cell, flight.cells[i].place, 0, wrong_bundle[i]});
        }
    }
    flights_.erase(found);
}

}  // namespace weightd
