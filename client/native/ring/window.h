// Which cells of each layer stay leased from one token to the next: those that the last k tokens of a generation
// wanted ("windowing", LLM in a flash, arXiv 2312.11514, section 3.1).
//
// Counts only: what it says to acquire and to release is the caller's to do. The window changes what is read, never
// what a step computes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <utility>
#include <vector>

namespace flashclient {

// One step of one layer. Row t of the step is column t % columns of some sequence of the batch; column c is token
// past_tokens + c.
struct Wanted {
    uint32_t past_tokens;
    uint32_t columns;
    std::span<const uint32_t> positions;  // of the bundles that some row wants, rising
    std::span<const uint16_t> row_masks;  // bit t: row t wants it
};

class Window {
  public:
    // k = `tokens`, that of the step included, so 1 keeps what the step shares with the one before; 0 keeps nothing.
    // `cells` is their number by layer.
    Window(uint32_t tokens, uint32_t bundles_per_cell, std::vector<uint32_t> cells);

    struct Slide {
        std::vector<uint32_t> acquire;
        std::vector<uint32_t> release;  // of the same layer
        // Of other layers: where the limit is less than the window, the oldest tokens of all layers give way.
        std::vector<std::pair<uint32_t, std::vector<uint32_t>>> elsewhere;
        bool fits = true;  // false: the step alone wants more cells than `limit`. Nothing is held any more.
    };
    // Makes room for the step and takes its cells in. Tokens that the layer has at or after past_tokens were rejected
    // and go first. Valid until the next call. Throws std::out_of_range and std::invalid_argument, and has then done
    // nothing.
    const Slide& slide(uint32_t layer, const Wanted& wanted, uint32_t limit);
    void clear();  // holds nothing any more
    uint32_t tokens() const { return tokens_; }
    uint32_t cells_held() const { return held_; }

  private:
    struct Token {
        uint32_t index;
        uint64_t slid;  // number of the slide that took it in: the least is the oldest of all layers
        std::vector<uint32_t> cells;
    };
    struct Layer {
        std::deque<Token> tokens;
        std::vector<uint16_t> users;  // by cell: tokens that want it
        std::vector<uint8_t> held;    // by cell
    };
    void forget(Layer& layer, Token& token);
    void take_in(Layer& layer, const Wanted& wanted);
    void take_column(Layer& layer, const Wanted& wanted, uint32_t column);
    void release_unused(Layer& layer, std::vector<uint32_t>& released);
    bool drop_oldest(uint32_t layer);

    uint32_t tokens_;
    uint32_t bundles_per_cell_;
    std::vector<Layer> layers_;
    uint32_t held_ = 0;
    uint64_t slides_ = 0;
    Slide slide_;
    std::vector<uint32_t> forgotten_;  // cells of tokens that went, perhaps still wanted by others
};

}  // namespace flashclient
