// A reader that reads each part of a bundle with a request of its own, as if the parts lay apart on flash.
//
// scripts/bench_paper.py measures what bundling saves: the rows without it read the same bytes, from the same file,
// for the same engine, but a gate row, an up row and a down column take one request each, and no request takes more.
#pragma once

#include <atomic>
#include <map>
#include <unordered_map>

#include "device/reader.h"

namespace weightd {

class PartReader final : public Reader {
  public:
    // `reader` does the reading. Bundles must fill their cells, and parts must be whole blocks.
    PartReader(std::unique_ptr<Reader> reader, size_t part_bytes);

    std::string level() const override { return reader_->level() + ", each part of a bundle alone"; }
    int register_file(const DirectFile& file) override { return reader_->register_file(file); }
    void unregister_file(int index) override { reader_->unregister_file(index); }
    int register_memory(std::span<std::byte> memory) override;
    void pin_memory(int index) override { reader_->pin_memory(memory_.at(index).index); }
    void unregister_memory(int index) override;
    void submit(std::vector<Read> reads) override;
    void reap(std::vector<Completion>& completions) override;
    void wait() override;
    ReadQueue queue() const override { return reader_->queue(); }
    int event_fd() const override { return reader_->event_fd(); }

    // Since the start. May be called from any thread.
    uint64_t reads() const { return reads_.load(); }
    uint64_t read_bytes() const { return read_bytes_.load(); }

  private:
    struct Memory {  // a segment of the pool
        std::span<std::byte> bytes;
        int index;  // of the inner reader
    };
    struct Whole {  // a read that was split
        Completion completion;
        size_t parts_left;
    };
    const Memory* memory_of(const void* address) const;
    void split(const Read& read, std::vector<Read>& parts);
    void take();

    std::unique_ptr<Reader> reader_;
    size_t part_bytes_;
    std::map<int, Memory> memory_;
    int next_memory_ = 0;
    std::unordered_map<uint64_t, Whole> wholes_;       // by number
    std::unordered_map<uint64_t, uint64_t> whole_of_;  // by the tag of a part
    uint64_t next_whole_ = 0;
    uint64_t next_part_ = 0;
    std::vector<Completion> parts_;
    std::vector<Completion> done_;
    std::atomic<uint64_t> reads_ = 0;
    std::atomic<uint64_t> read_bytes_ = 0;
};

}  // namespace weightd
