// The cells of one layer that a step wants, leased in a given order: as many at a time as may be, the next ones on
// their way while one is computed.
//
// The user computes on cells that are here, and says so with done(): they are given back, and further ones are asked
// for in the same message. It must have computed everything that it can before it waits, because wait() gives cells
// back that are here, where the session may hold fewer than before. They come again later.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "predict/cell_source.h"

namespace flashclient {

struct BundlesOfCell {
    uint32_t bundles;       // of a full cell
    uint32_t stride_bytes;  // from one to the next
};

class CellWalk {
  public:
    // `source` must outlive this.
    CellWalk(CellSource& source, BundlesOfCell cell) : source_(source), cell_(cell) {}

    // One thread at a time uses a walk, and holds use() meanwhile.
    [[nodiscard]] std::unique_lock<std::mutex> use() { return std::unique_lock(in_use_); }

    // Asks for the first of these cells of `layer`, which ascend. `far`: the walk looks as far ahead as the session may
    // lease now; otherwise only as far as its share reaches, which leaves the pool to others. Cells are called by their
    // index in the list. All methods throw what the source throws; after that, the next begin() or clear() gives
    // everything back.
    void begin(uint32_t layer, std::vector<uint32_t> cells, bool far);
    // The ranges of cells that the next step of `layer` may want; see CellSource.
    void prefetch(uint32_t layer, const std::vector<CellRange>& ranges) { source_.prefetch(layer, ranges); }
    // The address of a cell that is here; 0 for the others.
    uint64_t address(size_t index) const { return addresses_[index]; }
    // The cells from `first` on are computed.
    void done(size_t first, size_t count);
    // How many cells should be computed before done() is called, so that the next ones are asked for in time.
    size_t part() const;
    // Waits until more cells are here.
    void wait();
    void end();  // gives back what is left

    void clear();   // gives back what a walk that ended early holds
    void forget();  // the source has lost everything that was leased
    BundlesOfCell cell() const { return cell_; }

  private:
    enum class State : uint8_t { wanted, asked, here, done };

    void ask(bool begins);
    void take(const std::vector<Arrival>& arrivals);
    void hold_less();
    std::vector<uint32_t> take_done();

    CellSource& source_;
    BundlesOfCell cell_;
    std::mutex in_use_;
    uint32_t layer_ = 0;
    std::vector<uint32_t> cells_;
    std::vector<State> states_;
    std::vector<uint64_t> addresses_;
    std::vector<uint32_t> done_;  // cells that are done and not given back
    size_t next_ = 0;             // no cell before it is wanted
    size_t wanted_ = 0;           // cells that are to be asked for
    size_t asked_ = 0;            // cells on their way
    size_t held_ = 0;             // cells that are here, done or not
    size_t limit_ = 1;            // of asked_ + held_
    bool refused_ = false;        // a cell was refused, and hold_less() has not seen to it
    bool unfinished_ = false;     // a walk has not ended: the source may lease other cells than are noted here
};

}  // namespace flashclient
