// The sessions that wait for reads under way: one linked list for each slot, all in one vector that is reused.
//
// Invariant: a slot has waiters only while it is being read.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "pool/pool.h"

namespace weightd {

class Waiters {
  public:
    void add(Slot& slot, uint32_t session, uint32_t tag) {
        uint32_t index = first_free_;
        if (index == NO_WAITER) {
            index = static_cast<uint32_t>(waiters_.size());
            waiters_.emplace_back();
        } else {
            first_free_ = waiters_[index].next;
        }
        waiters_[index] = {session, tag, slot.first_waiter};
        slot.first_waiter = index;
    }

    // Empties the slot's list, and calls answer(session, tag) for each waiter, the last one first.
    template <typename Answer>
    void take_all(Slot& slot, Answer answer) {
        uint32_t index = std::exchange(slot.first_waiter, NO_WAITER);
        while (index != NO_WAITER) {
            const Waiter waiter = waiters_[index];
            waiters_[index].next = first_free_;
            first_free_ = index;
            index = waiter.next;
            answer(waiter.session, waiter.tag);
        }
    }

  private:
    struct Waiter {
        uint32_t session;
        uint32_t tag;
        uint32_t next;  // of the slot's list, or of the free ones
    };

    std::vector<Waiter> waiters_;
    uint32_t first_free_ = NO_WAITER;
};

}  // namespace weightd
