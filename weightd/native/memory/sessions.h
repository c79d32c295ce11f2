// The open sessions: how many slots each is guaranteed, and how many it may lease.
//
// Invariants: a session's lease limit is its share plus an equal part of what is lent, or what its model can use, if
// that is less: all of its cells, or for a table what a lookup of thousands of rows takes. The limits of all sessions
// that borrow fit into --dram together, beside what is kept for fetches. A limit never falls below the share.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "memory/memory.h"
#include "memory/model.h"
#include "memory/pressure.h"
#include "memory/session.h"

namespace weightd {

inline constexpr uint32_t FETCH_SLOTS_MAX = 256;  // share of the gRPC fetches of a model together
inline constexpr uint64_t TABLE_LENT_BYTES_MAX = 32 << 20;
inline constexpr uint32_t LENT_NEVER_DIVISOR = 16;  // this part of the pool (or FETCH_SLOTS_MAX) is never lent

class Sessions {
  public:
    Sessions(const ModelList& models, const Memory& memory, const Pressure& pressure)
        : models_(models), memory_(memory), pressure_(pressure) {}

    Session& add(std::unique_ptr<Session> session);  // gives it its number
    // Ends its share. The caller ends its leases and then calls update_limits(). None: there is no such session.
    std::unique_ptr<Session> remove(uint32_t session);
    Session* find(uint32_t session) const;
    std::vector<const Session*> in_order() const;  // in which they opened

    uint64_t share_slots(const Model& model) const;  // the shares of all its sessions together
    uint64_t owed_slots(const Model& model) const;   // its sessions' shares, or what they hold within their limits
    void update_limits();
    void tell_segment_gone(const Model& model, uint32_t segment) const;

  private:
    struct Shares {  // of the sessions of one model
        uint64_t slots = 0;
        uint64_t fetching_slots = 0;  // part of `slots`: of the sessions that do not borrow
    };

    Shares shares_of(const Model& model) const;
    uint64_t lendable_bytes() const;

    const ModelList& models_;
    const Memory& memory_;
    const Pressure& pressure_;
    std::unordered_map<uint32_t, std::unique_ptr<Session>> sessions_;  // by id
    std::unordered_map<uint32_t, Shares> shares_;                      // by model
    uint32_t next_id_ = 1;
};

}  // namespace weightd
