// The cells of one layer that a step wants, leased in a given order: as many at a time as may be, the next ones on
// their way while one is computed.
//
// The user computes on cells that are here, and says so with done(): they are given back, and further ones are asked
// for in the same message. It must have computed everything that it can before it waits, because wait() gives cells
// back that are here, where the session may hold fewer than before. They come again later.
//
// Cells stay leased after their use while the session may lease all cells of the model at once: they cost no message
// in the next step. Where it may lease fewer, weightd's replacement should see every use, so everything is given back.
// What is kept is given back by the next step after the limit has fallen, after a refusal, and by clear().
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
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
    static constexpr uint32_t NEVER_KEPT = UINT32_MAX;

    // `source` must outlive this. cells_of_model: how many the session must be able to lease so that cells are kept.
    CellWalk(CellSource& source, BundlesOfCell cell, uint32_t cells_of_model = NEVER_KEPT)
        : source_(source), cell_(cell), cells_of_model_(cells_of_model) {}

    // One thread at a time uses a walk, and holds use() meanwhile.
    [[nodiscard]] std::unique_lock<std::mutex> use() { return std::unique_lock(in_use_); }

    // Asks for the first of these cells of `layer`, which ascend. `far`: the walk looks as far ahead as the session may
    // lease now; otherwise only as far as its share reaches, which leaves the pool to others. Cells are called by their
    // index in the list. All methods throw what the source throws; after that, the next begin() or clear() gives
    // everything back.
    void begin(uint32_t layer, std::vector<uint32_t> cells, bool far);
    // The ranges of cells that the next step of `layer` may want; see CellSource. Ranges that are kept are left out.
    void prefetch(uint32_t layer, std::vector<CellRange> ranges);
    // Some of the first cells of `layer`, which the next step surely wants.
    void read_on(uint32_t layer, uint32_t cells);
    bool is_asked() const { return asked_ > 0; }     // whether cells are on their way
    bool all_asked() const { return wanted_ == 0; }  // whether none is still to be asked for
    // The address of a cell that is here; 0 for the others.
    uint64_t address(size_t index) const { return addresses_[index]; }
    // The cells from `first` on are computed.
    void done(size_t first, size_t count);
    // How many cells should be computed before done() is called, so that the next ones are asked for in time.
    size_t part() const;
    // Waits until more cells are here.
    void wait();
    void end();  // gives back what is left and not kept

    void clear();   // gives everything back, also what a walk that ended early holds
    void forget();  // the source has lost everything that was leased
    BundlesOfCell cell() const { return cell_; }

  private:
    enum class State : uint8_t { wanted, asked, here, done };

    void ask();
    void exchange(const std::vector<uint32_t>& acquire, const std::vector<uint32_t>& release);
    void find_kept();
    void keep(size_t index);
    void take(const std::vector<Arrival>& arrivals);
    void hold_less();
    std::vector<uint32_t> take_done();
    void count_kept();
    void give_kept_back();
    void forget_walk();

    CellSource& source_;
    BundlesOfCell cell_;
    uint32_t cells_of_model_;
    std::mutex in_use_;
    // By layer: the addresses of cells that are kept, by cell; 0 for the others.
    std::map<uint32_t, std::vector<uint64_t>> kept_;
    bool keeps_ = false;       // in this walk
    bool lent_enough_ = true;  // weightd has refused nothing since the last clear()
    uint32_t layer_ = 0;
    std::vector<uint32_t> cells_;
    std::vector<State> states_;
    std::vector<uint64_t> addresses_;
    std::vector<uint32_t> done_;  // cells that are done and not given back
    size_t next_ = 0;             // no cell before it is wanted
    size_t wanted_ = 0;           // cells that are to be asked for
    size_t asked_ = 0;            // cells on their way
    size_t held_ = 0;             // cells that are here, done or not, and not kept
    size_t limit_ = 1;            // of asked_ + held_
    bool refused_ = false;        // a cell was refused, and hold_less() has not seen to it
    bool exchanged_ = false;      // the source's last exchange() was of this walk
    bool unfinished_ = false;     // a walk has not ended: the source may lease other cells than are noted here
};

}  // namespace flashclient
