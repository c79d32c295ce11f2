// A walk through all bundles of a model in placement order, chunk after chunk, layer after layer, again and again.
//
// Exact mode needs every bundle of every layer for every token, so the next chunks are known. The sweep keeps several
// chunks leased or on their way ahead of the one in use, across layers and tokens, as far as the session's share goes.
// While chunks arrive before they are needed, it gives out, gives back and asks for half of them at a time, because
// waking weightd, or the threads of a kernel, takes longer than computing a chunk that lies in the pool.
//
// Chunks stay leased after their use as far as the session may borrow above its share: they cost no message in the next
// turn. They are given back when the limit falls, when weightd refuses to lend more, and in idle(). A model that lies
// whole in the pool of one client then costs none at all. Each layer keeps its first chunks, and all layers the same
// part, so that others are read while those are computed.
//
// What is ahead beyond the share (ahead_depth.h) takes its place from what is kept.
//
// Invariants: chunks_ are, in order, the chunks after those given out that are not kept. No chunk is leased twice.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "predict/chunk_source.h"
#include "ring/ahead_depth.h"
#include "ring/session.h"

namespace flashclient {

inline constexpr uint32_t CHUNK_BYTES = 1U << 20;  // one read of the daemon; larger chunks gain nothing
inline constexpr uint32_t AHEAD_PART = 8;          // an eighth of what may be leased may be ahead

struct Layout {
    uint32_t bundles_per_cell;
    uint32_t stride_bytes;
    uint32_t cell_bytes;
    std::vector<uint32_t> bundles;  // by layer: neurons or slabs

    uint32_t cells_in(uint32_t layer) const { return (bundles[layer] + bundles_per_cell - 1) / bundles_per_cell; }
};

class Sweep : public ChunkSource {
  public:
    Sweep(Session& session, Layout layout);
    ~Sweep() override;
    Sweep(const Sweep&) = delete;
    Sweep& operator=(const Sweep&) = delete;

    std::unique_lock<std::mutex> use() override { return session_.use(); }
    // Throws SessionLost, CorruptBundle, std::system_error.
    const Bundles* next(uint32_t layer) override;
    void leave() override;
    const std::vector<uint32_t>& bundles() const override { return layout_.bundles; }
    void idle();    // gives everything back
    void forget();  // the session was replaced: nothing is leased or on its way
    Session& session() const { return session_; }

  private:
    static constexpr uint32_t NO_LAYER = UINT32_MAX;

    struct Cursor {
        uint32_t layer = 0;
        uint32_t cell = 0;
    };
    struct Chunk {
        Cursor at;
        uint32_t cell_count = 0;
        uint32_t unanswered = 0;
        std::vector<uint64_t> addresses;  // of its bundles, in order of position
        std::vector<ring::Grant> failed;  // cells that were not granted: nothing to give back
        bool refused = false;             // some of them, because they would have been borrowed
    };
    using Kept = std::map<std::pair<uint32_t, uint32_t>, Chunk>;  // by layer and first cell

    uint32_t cells_at(const Cursor& at) const;
    Cursor after(const Cursor& at) const;
    uint32_t streamed_cells() const;
    Kept::const_iterator kept_at(const Cursor& at) const { return kept_.find({at.layer, at.cell}); }
    uint32_t keep_max(uint32_t layer) const;
    void keep_at_most(uint32_t cells);
    void look_ahead();
    void ask(const Cursor& at);
    void finish_chunks_in_use();
    void finish_first();
    void refill();  // gives back used chunks, and asks for as many
    void wait_for_first();
    void choose_chunks();
    void give_out(const Chunk& chunk);
    void give_out_kept();
    void give_out_streamed();
    void take_answers(bool block);
    void place(Chunk& chunk, const ring::Grant& grant);
    void give_back_used();
    void give_back_streamed();

    Session& session_;
    Layout layout_;
    uint32_t cells_ = 0;       // of the model
    uint32_t chunk_cells_;     // 0: to be chosen
    AheadDepth depth_;         // chunks that are streamed: used, in use or on their way
    uint32_t keep_max_ = 0;    // cells of all layers, by the limit
    uint32_t refused_at_ = 0;  // cells: when so many were kept, weightd refused to lend more
    Kept kept_;
    std::vector<uint32_t> kept_in_;  // cells of each layer
    uint32_t kept_cells_ = 0;
    std::vector<Chunk> used_;   // still leased
    std::deque<Chunk> chunks_;  // the first ones are in use
    uint32_t first_tag_ = 0;    // of chunks_[0]; the others count up
    Bundles given_;
    uint32_t in_use_ = 0;       // of chunks_
    Cursor next_;               // of what is given out next
    bool layer_ended_ = false;  // the last chunk given out was its layer's last
    Cursor ahead_;              // where look_ahead goes on
    std::vector<ring::Grant> grants_;
};

}  // namespace flashclient
