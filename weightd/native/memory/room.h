// How much of --dram a model can get, and the error if that is not enough.
//
// Invariant: memory that was freed for a waiting opener is not given to another model.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>

#include "memory/memory.h"
#include "memory/model.h"
#include "memory/sessions.h"

namespace weightd {

struct NoRoom : std::runtime_error {  // what was asked exceeds --dram or another limit; the text has the numbers
    using std::runtime_error::runtime_error;
};

class Room {
  public:
    Room(const ModelList& models, const Memory& memory, const Sessions& sessions)
        : models_(models), memory_(memory), sessions_(sessions) {}

    uint64_t free_bytes(const Model& asking) const;  // free now, and not kept for another model's opener

    // Throws NoRoom unless both fit after all memory that can be taken back has been taken back: what the model needs
    // for all its users, and what this user needs, who already has `has_bytes`.
    void require(const Model& asking, uint64_t model_bytes, uint64_t user_bytes, uint64_t has_bytes) const;
    // The share of a session that wants so many slots (0: no preference). Throws NoRoom.
    uint32_t share_for(const Model& asking, uint32_t slots_wanted, uint64_t has_bytes) const;
    NoRoom refusal(const Model& asking, uint64_t bytes, uint64_t left_bytes, uint64_t has_bytes) const;

    // From now on, memory that becomes free is kept for the model's waiting opener, up to `bytes`.
    void keep(const Model& asking, uint64_t bytes) { kept_bytes_[&asking] = bytes; }
    void stop_keeping(const Model& asking) { kept_bytes_.erase(&asking); }
    bool keeps() const { return !kept_bytes_.empty(); }

  private:
    uint64_t kept_for_others_bytes(const Model& asking) const;
    uint64_t fixed_bytes(const Model& asking) const;
    uint64_t obtainable_bytes(const Model& asking) const;
    uint64_t in_use_bytes(const Model& model) const;
    bool would_fit(uint64_t dram_bytes, const Model& asking, uint64_t bytes, uint64_t has_bytes) const;
    uint64_t enough_bytes(const Model& asking, uint64_t bytes, uint64_t has_bytes) const;

    const ModelList& models_;
    const Memory& memory_;
    const Sessions& sessions_;
    std::map<const Model*, uint64_t> kept_bytes_;  // by model whose opener waits
};

}  // namespace weightd
