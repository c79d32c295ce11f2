// Reads that wait until others complete. The files take turns, and each may have only a part of the reads in flight.
//
// So a slow device, or a file on a network that hangs, delays only the reads of its own model.
#pragma once

#include <deque>
#include <map>
#include <optional>

#include "device/reader.h"

namespace weightd {

// How many reads may be in flight in all, if one file may have `of_file` of them and other files must still get some.
inline constexpr uint32_t reads_in_all(uint32_t of_file) { return of_file + (of_file + 7) / 8; }

class ReadTurns {
  public:
    explicit ReadTurns(uint32_t of_file_max) : of_file_max_(of_file_max) {}

    void push(Read read);
    void push_first(Read read);  // a read that was short continues before the others of its file
    // The next read, which is under way until ended(). None: nothing waits, or only reads of files at their limit.
    std::optional<Read> next();
    void ended(const DirectFile* file);
    size_t waiting() const { return waiting_; }
    size_t startable() const;  // how many times next() would find one now

  private:
    struct Line {
        std::deque<Read> waiting;
        uint32_t under_way = 0;
    };

    uint32_t of_file_max_;
    size_t waiting_ = 0;
    std::map<const DirectFile*, Line> lines_;  // of files with reads that wait or are under way
    const DirectFile* last_ = nullptr;         // whose turn was the last; it may be closed, and is not dereferenced
};

}  // namespace weightd
