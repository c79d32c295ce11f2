// A walk through all bundles of a model in placement order, chunk after chunk, layer after layer, again and again.
//
// Exact mode needs every bundle of every layer for every token, so the next chunks are known. The sweep keeps several
// chunks leased or on their way ahead of the one in use, across layers and tokens, as far as the session's share goes.
// While chunks arrive before they are needed, it gives out, gives back and asks for half of them at a time, because
// waking weightd, or the threads of a kernel, takes longer than computing a chunk that lies in the pool.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "ring/session.h"

namespace flashclient {

inline constexpr uint32_t CHUNK_BYTES = 1U << 20;  // one read of the daemon; larger chunks gain nothing

struct Layout {
    uint32_t bundles_per_cell;
    uint32_t stride_bytes;
    uint32_t cell_bytes;
    std::vector<uint32_t> neurons;  // by layer
};

class Sweep {
  public:
    Sweep(Session& session, Layout layout);
    ~Sweep();

    struct Bundles {
        uint32_t first_position = 0;
        std::vector<uint64_t> addresses;  // in order of position
    };

    // Takes back the bundles it gave out, and gives out the next ones of `layer`; null at the end of the layer. A layer
    // that is not the expected one begins at its start. Blocks; throws SessionLost, CorruptBundle, std::system_error.
    const Bundles* next(uint32_t layer);
    void idle();    // gives everything back
    void forget();  // the session was replaced: nothing is leased or on its way
    Session& session() const { return session_; }

  private:
    struct Chunk {
        uint32_t layer = 0;
        uint32_t first_cell = 0;
        uint32_t cell_count = 0;
        uint32_t unanswered = 0;
        uint32_t first_position = 0;
        std::vector<uint64_t> addresses;  // of its bundles, in order of position
        std::vector<ring::Grant> failed;  // cells that could not be read: nothing to give back
    };

    uint32_t cells_in(uint32_t layer) const;
    void look_ahead();
    void finish_chunks_in_use();
    void finish_first();
    void refill();  // gives back used chunks, and asks for as many
    void wait_for_first();
    void give_out();
    void take_answers(bool block);
    void place(Chunk& chunk, const ring::Grant& grant);
    void give_back_used();

    Session& session_;
    Layout layout_;
    uint32_t chunk_cells_;
    uint32_t chunks_max_;
    std::vector<Chunk> used_;   // still leased
    std::deque<Chunk> chunks_;  // the first is the one in use or the next
    uint32_t first_tag_ = 0;    // of chunks_[0]; the others count up
    Bundles given_;             // the bundles of the first in_use_ chunks
    uint32_t in_use_ = 0;
    bool layer_ended_ = false;  // the last chunk given out was its layer's last
    uint32_t next_layer_ = 0;   // where look_ahead goes on
    uint32_t next_cell_ = 0;
    std::vector<ring::Grant> grants_;
};

}  // namespace flashclient
