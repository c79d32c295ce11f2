// The cells of a model that a client leases in predict mode: which they are, which tokens want each, and where each
// lies.
//
// What the last k tokens of a generation wanted stays leased ("windowing", LLM in a flash, arXiv 2312.11514, section
// 3.1). The window changes what is read, never what a step computes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "predict/cell_source.h"

namespace flashclient {

// Together, far fewer tokens use most of a model's neurons. The window's counters hold far more.
inline constexpr uint32_t WINDOW_TOKENS_MAX = 1024;

struct CellLayout {
    uint32_t bundles_per_cell;
    uint32_t stride_bytes;        // from one bundle of a cell to the next
    std::vector<uint32_t> cells;  // their number, by layer
};

// What one step of one layer wants. Row t of the step is column t % columns of some sequence of the batch; column c is
// token past_tokens + c.
struct Wanted {
    uint32_t past_tokens;
    uint32_t columns;
    std::span<const uint32_t> positions;  // of the bundles that some row wants, rising
    std::span<const uint16_t> row_masks;  // bit t: row t wants it
};

// A step is slide(), wait() until all of its bundles are located, and end_step(). After a step that ended early, the
// next one first gives everything back. One thread at a time uses a window, and holds use() meanwhile.
class Window {
  public:
    // k = `tokens`, the token of the step included: 1 keeps the cells of the last step for the next, 0 keeps nothing.
    Window(CellSource& source, uint32_t tokens, CellLayout layout);

    [[nodiscard]] std::unique_lock<std::mutex> use() { return std::unique_lock(in_use_); }

    // Moves the window to the step: gives back the cells that leave it and asks for those that are missing. Does not
    // wait. The layer's tokens at or after past_tokens were rejected and leave first. Where the window would exceed the
    // limit, the oldest tokens of all layers leave. Returns false where the step alone wants more cells than the limit;
    // nothing is leased then. Throws std::out_of_range and std::invalid_argument before it changes anything.
    bool slide(uint32_t layer, const Wanted& wanted);
    // Waits until more cells have arrived. Returns false where the source refused one; nothing is leased then.
    bool wait();
    // For positions whose entry of `addresses` is 0 and whose cells have arrived, sets the address, and appends the
    // entry to `found`.
    void locate(std::span<const uint32_t> positions, std::span<uint64_t> addresses, std::vector<uint32_t>& found) const;
    void end_step();

    // Computes a step in parts if it wants more cells than may be leased; replaces slide(). Asks for the cells of the
    // first positions, as many as the source's share, and returns the number of these positions. The window must be
    // empty. clear() ends the part.
    size_t lease_first(uint32_t layer, std::span<const uint32_t> positions);

    void clear();   // gives everything back
    void forget();  // the source has lost everything that was leased
    uint32_t tokens() const { return tokens_; }
    uint32_t cells_held() const { return held_; }  // leased or on their way

  private:
    struct Token {
        uint32_t index;
        uint64_t slid;  // number of the slide that added it: the token with the lowest is the oldest of all layers
        std::vector<uint32_t> cells;
    };
    struct Layer {
        std::deque<Token> tokens;
        std::vector<uint64_t> addresses;  // by cell; 0: not leased, ON_ITS_WAY: asked for
        std::vector<uint16_t> users;      // by cell: tokens that want it
        uint32_t held = 0;
    };
    struct Slide {  // requests that the source has not got yet
        std::vector<uint32_t> acquire;
        std::vector<uint32_t> release;                                      // cells of the same layer
        std::vector<std::pair<uint32_t, std::vector<uint32_t>>> elsewhere;  // cells of other layers to release
    };

    bool fits(const Layer& layer, const Wanted& wanted, uint32_t limit) const;
    void take_in(Layer& layer, const Wanted& wanted, uint32_t column);
    bool ask_for(Layer& layer, uint32_t cell);
    void drop(Layer& layer, const Token& token);
    void release_unused(Layer& layer, std::vector<uint32_t>& released);
    void drop_oldest(uint32_t layer);
    void release_elsewhere();
    void exchange(const std::vector<uint32_t>& acquire);
    static void empty(Layer& layer);

    CellSource& source_;
    uint32_t tokens_;
    CellLayout layout_;
    std::mutex in_use_;
    std::vector<Layer> layers_;
    uint32_t held_ = 0;
    uint64_t slides_ = 0;
    bool unfinished_ = false;  // a step has begun, or clear() has thrown: the source may hold other leases than layers_
    uint32_t layer_ = 0;       // layer of the step under way
    Slide slide_;
    std::vector<uint32_t> dropped_;  // cells of tokens that left, perhaps still wanted by others
};

}  // namespace flashclient
